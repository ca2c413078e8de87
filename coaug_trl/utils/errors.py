"""The one error a user can cause."""


class InputError(ValueError):
    """
    Input the user must mend: a file, a line, an id or a setting.

    The message says where the fault is and what to do. Commands print it without a traceback and exit with code 2.
    """


class TrainingStopped(RuntimeError):
    """
    Training stopped itself because it had gone wrong, on all processes together.

    The message says why and which checkpoint is left. Commands print it without a traceback and exit with code 1.
    """
