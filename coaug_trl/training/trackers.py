"""The trackers that `report_to` names: whether they are there, and what Trackio, the recipes' default, needs."""

import io
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TrackioCallback, get_reporting_integration_callbacks

from ..utils.errors import InputError
from ..utils.terminal import say


EXTRAS = {"trackio": 'pip install "coaug-trl[trackio]"'}


def check_trackers(report_to: Iterable[str]) -> None:
    """
    Refuses trackers that cannot be reported to, before the work begins.

    Args:
        report_to (`Iterable[str]`):
            Their names, as in [`~transformers.TrainingArguments`].

    Raises:
        `InputError`: One is unknown or not installed.
    """
    for name in report_to:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise InputError(f"report_to is {name!r}: {error}") from None
        try:
            callback()
        except (ImportError, RuntimeError):
            raise InputError(
                f"report_to is {name!r}, which is not installed: {EXTRAS.get(name, f'pip install {name}')}, or set "
                "report_to to none."
            ) from None


def tame_trackio(callbacks: Iterable[TrainerCallback]) -> None:
    """
    Lets Trackio's curves run over optimizer steps, and what it prints be one line.

    Of itself Trackio counts what it is sent, so that each evaluation would move all curves on by a step.

    Args:
        callbacks (`Iterable[TrainerCallback]`):
            Those of a trainer; that of Trackio is changed, if it is there.
    """
    for callback in callbacks:
        if isinstance(callback, TrackioCallback):
            callback._trackio = _Trackio(callback._trackio)


@contextmanager
def tracking(trainer: Trainer) -> Iterator[None]:
    """
    Takes up Trackio's run where it has ended or not begun: its callback keeps it for the time of a training, but TRL
    times every generation into it.

    Args:
        trainer ([`~transformers.Trainer`]):
            What is about to generate.
    """
    closed = [
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, TrackioCallback) and not callback._initialized
    ]
    for callback in closed:
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    try:
        yield
    finally:
        for callback in closed:
            callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


class _Trackio:
    """Trackio's module, but what is logged with an optimizer step is logged at it, and standard output is left alone."""

    def __init__(self, module: Any):
        self._module = module
        self._said = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def init(self, project: str, name: str, **kwargs) -> Any:
        with redirect_stdout(io.StringIO()):
            run = self._module.init(project=project, name=name, **kwargs)
        if not self._said:
            self._said = True
            say(f"curves: trackio show --project {shlex.quote(project)}, run {name}")
        return run

    def finish(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._module.finish()

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._module.log(metrics, metrics.get("train/global_step", step))
