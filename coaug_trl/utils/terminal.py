"""How the commands speak: results on standard output, what goes on beside them, problems on standard error."""

import json
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO


if TYPE_CHECKING:
    from rich.console import RenderableType

# Libraries read these when they are imported, which is after the command line is read.
_NO_PROGRESS = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTROL_BUT_STYLES = re.compile(rf"(?!\x1b\[[\d;]*m){_CONTROL.pattern}")
_settings = {"quiet": False, "json": False}


def set_up(quiet: bool = False, as_json: bool = False) -> None:
    """
    Says how the command that runs is to speak.

    Args:
        quiet: Results and problems only: no progress, nothing of what goes on.
        as_json: Results as JSON; standard output holds nothing else.
    """
    _settings.update(quiet=quiet, json=as_json)
    if quiet:
        os.environ.update(_NO_PROGRESS)
    elif not sys.stderr.isatty():  # a log: a line now and then rather than ten a second, and none of short work
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers, too


def is_quiet() -> bool:
    """Whether the command is to print results and problems only."""
    return _settings["quiet"]


def is_json() -> bool:
    """Whether standard output is to hold JSON alone."""
    return _settings["json"]


def say(text: object = "") -> None:
    """Prints what goes on: nothing with `--quiet`, and beside the results with `--json`."""
    if not _settings["quiet"]:
        print(visible(str(text)), file=sys.stderr if _settings["json"] else sys.stdout)


def note(text: str) -> None:
    """Prints what a user should know or act on."""
    _print_labelled("note:", "yellow", text)


def error(text: str) -> None:
    """Prints why the command ends."""
    _print_labelled("error:", "bold red", text)


def show(content: Any, shown: "RenderableType", indent: int | None = 2) -> None:
    """
    Prints a result.

    Args:
        content: The result as `--json` prints it; numbers that JSON has no word for become null.
        shown: The result as it is printed otherwise: a string, or anything that rich renders.
        indent: Of the JSON; `None` for an object a line.
    """
    if _settings["json"]:
        print(json.dumps(_finite(content), indent=indent, ensure_ascii=False, default=str))
    elif isinstance(shown, str):
        # a terminal gets the bold type of tables
        print(_CONTROL_BUT_STYLES.sub(" ", shown) if sys.stdout.isatty() else visible(shown))
    else:
        _console(sys.stdout).print(shown)


def visible(text: str) -> str:
    """A text without control characters, which would steer the terminal that shows it."""
    return _CONTROL.sub(" ", text)


def describe_seconds(seconds: float) -> str:
    """A time, to two units or two digits."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _print_labelled(label: str, style: str, text: str) -> None:
    text = visible(text)
    if not sys.stderr.isatty():
        print(label, text, file=sys.stderr)
        return
    from rich.text import Text

    _console(sys.stderr).print(Text.assemble((label, style), " ", text), soft_wrap=True)


def _console(file: TextIO):
    from rich.console import Console

    # In a file or a pipe nothing is folded.
    return Console(file=file, highlight=False, markup=False, emoji=False, width=None if file.isatty() else 1000)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
