"""Names of models, datasets and folders: which are of the Hub, and what of a path may leave this machine."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# Keys of JSON content whose value is a model or a folder, so that runs/mine is no name of the Hub where it is a folder.
_PLACES = ("model", "base_model", "base_model_name_or_path", "_name_or_path", "best_model_checkpoint", "augmentations")


def has_hub_form(name: str) -> bool:
    """Whether a name could be that of a repository, `USER/NAME`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is that of a repository rather than of a folder, which wins where it is both."""
    return has_hub_form(str(name)) and not Path(name).exists()


def last_part(path: str) -> str:
    """The name of a file or folder without the way to it."""
    if path.rstrip("/\\") in ("..", ".") or path.endswith("/.."):
        return Path(path).resolve().name
    pure = PureWindowsPath(path) if "\\" in path else PurePosixPath(path)
    return pure.name or path


def without_folders(content: Any, name: str = "") -> Any:
    """
    JSON content without paths, which say where files are on a machine: of each only the last part stays.

    Args:
        content: JSON content. Of an object with `model` and a true `model_is_folder` the model is a folder, likewise
            of `base_model`.
        name: Its name, if it is a value of an object; the text of a token is left as it is.

    Returns: a copy.
    """
    if isinstance(content, dict):
        folders = {key for key, value in content.items() if content.get(f"{key}_is_folder") and isinstance(value, str)}
        return {
            key: last_part(value) if key in folders else without_folders(value, str(key))
            for key, value in content.items()
        }
    if isinstance(content, (list, tuple)):
        return [without_folders(value, name) for value in content]
    is_token = name.endswith(("_token", "_tokens")) or name == "content"
    if isinstance(content, str) and not is_token and "\n" not in content and _is_path(content, name):
        return last_part(content)
    return content


def _is_path(text: str, name: str) -> bool:
    if text.startswith(("~/", "~\\", "./", ".\\", "../", "..\\", "file://")) or text == "..":
        return True
    if any(path.name and path.is_absolute() for path in (PurePosixPath(text), PureWindowsPath(text))):
        return True
    return name in _PLACES and "/" in text and "://" not in text and not is_hub_id(text)


def is_local(name: str | None) -> bool:
    """Whether a model's name is that of a folder, here or where it was trained."""
    return bool(name) and (Path(name).expanduser().exists() or without_folders(name, "model") != name)
