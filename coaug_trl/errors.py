"""The one error a user can cause."""


class InputError(ValueError):
    """
    Input the user must mend: a file, a line, an id or a setting.

    The message says where the fault is and what to do. Commands print it without a traceback and exit with code 2.
    """
