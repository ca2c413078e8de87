"""Files that are whole or absent: everything is written under a temporary name, then renamed."""

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .errors import InputError


@contextmanager
def atomic_open(path: str | Path) -> Iterator[TextIO]:
    """Opens a text file for writing that takes its name only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes sure that a new name in a folder outlives a power cut, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(
    path: str | Path, remedy: str = "restore the file", kind: type = dict, missing: Any | None = None
) -> Any:
    """
    Reads a small JSON file.

    Args:
        path: The file.
        remedy: What to do if it is damaged, for the message.
        kind: What the file holds: `dict` or `list`.
        missing: Returned if there is no such file.

    Raises:
        `InputError`: The file is damaged, or holds something else.
        `FileNotFoundError`: There is no such file, and `missing` is not given.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if missing is None:
            raise
        return missing
    except ValueError as error:
        raise InputError(f"{path}: not JSON: it is damaged ({error}); {remedy}.") from None
    if not isinstance(content, kind):
        wanted = "a JSON object" if kind is dict else "a list"
        raise InputError(f"{path}: not {wanted}: it is damaged (a {type(content).__name__}); {remedy}.")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as indented JSON."""
    with atomic_open(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    with atomic_open(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
