"""Checkpoints that can be trusted: whole or named as incomplete, and holding the rollouts a run was training on."""

import errno
import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.errors import InputError
from ..utils.files import write_json


logger = logging.getLogger(__name__)

# The files of a checkpoint and their sizes, written when all of them are there.
FILES_FILE = "coaug_files.json"
STATE_FILE = "coaug_state.json"


def begin_checkpoint(checkpoint: Path) -> None:
    """Marks a checkpoint as not yet whole, before anything else is written into it."""
    write_json(checkpoint / FILES_FILE, {"files": None})


def finish_checkpoint(checkpoint: Path, resumable: bool = True) -> None:
    """
    Marks a checkpoint as whole, when every process has written its files.

    Args:
        checkpoint (`Path`):
            Its folder.
        resumable (`bool`, *optional*, defaults to `True`):
            Whether it has what training needs to go on, which `save_only_model` leaves out.
    """
    files = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != FILES_FILE
    }
    write_json(checkpoint / FILES_FILE, {"resumable": resumable, "files": files})


def why_incomplete(checkpoint: str | Path) -> str | None:
    """
    What a checkpoint lacks to resume from it.

    Its files and their sizes are compared with the list written last, and must be of the kind that their names say.
    Other bytes within a tensor are not seen: that would take reading all of them. Checkpoints of runs that wrote no
    such list are whole if `trainer_state.json`, which transformers writes last, can be read.

    Args:
        checkpoint (`str` or `Path`):
            Its folder.

    Returns:
        `str`: the reason, `None` if it is whole.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    listed = {"files": {}}
    if (checkpoint / FILES_FILE).exists():
        listed = _read_object(checkpoint / FILES_FILE)
        if listed is None:
            return f"{FILES_FILE} cannot be read"
        if listed.get("files") is None:
            return "it was not written to its end"
    for name, size in listed["files"].items():
        if not (checkpoint / name).is_file():
            return f"it lacks {name}"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        if _is_damaged(checkpoint / name):
            return f"{name} is damaged"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it lacks {TRAINER_STATE_NAME}"
    if "global_step" not in (_read_object(checkpoint / TRAINER_STATE_NAME) or {}):
        return f"{TRAINER_STATE_NAME} cannot be read"
    if not listed.get("resumable", True):
        return "it was saved with save_only_model, without the state of the optimizer"
    return None


def _is_damaged(path: Path) -> bool:
    """Whether the headers of a file of tensors, or a file of JSON, cannot be read."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):  # archives, as torch.save writes them
            with ZipFile(path) as archive:
                for name in archive.namelist():
                    archive.open(name).close()
    except (ValueError, RuntimeError, SafetensorError, BadZipFile):
        return True
    return False


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check_checkpoint(checkpoint: str | Path) -> None:
    """Raises an `InputError` if training cannot be resumed from a checkpoint."""
    reason = why_incomplete(checkpoint)
    if reason:
        whole = last_whole_checkpoint(Path(checkpoint).parent, quiet=True)
        raise InputError(
            f"resume_from_checkpoint is {checkpoint}, no whole checkpoint: {reason}. "
            + (f"Use {whole}." if whole else "Leave it out to go on from the last whole one of output_dir, if any.")
        )


def last_whole_checkpoint(output_dir: str | Path, before: int | None = None, quiet: bool = False) -> str | None:
    """
    The newest checkpoint of a run that was written to its end.

    Those that were not are named in a warning and skipped.

    Args:
        output_dir (`str` or `Path`):
            Folder of the run.
        before (`int`, *optional*):
            Step that it has to come before.
        quiet (`bool`, *optional*, defaults to `False`):
            Without the warning.

    Returns:
        `str`: its folder, `None` if there is none.
    """
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir() and (before is None or int(step) < before):
            found[int(step)] = path
    for step in sorted(found, reverse=True):
        reason = why_incomplete(found[step])
        if reason is None:
            return str(found[step])
        if not quiet:
            logger.warning(f"{found[step]} is incomplete and skipped: {reason}. Delete it.")
    return None


@contextmanager
def saving(folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """
    Files are written into `folder`: if they cannot be, above all on a full disk, the half-written folder of a
    checkpoint is removed and the error says what is left.

    Args:
        folder (`str` or `Path`):
            A checkpoint, or `output_dir` itself.
        output_dir (`str` or `Path`):
            Folder of the run.

    Raises:
        `OSError`: A file could not be written.
    """
    folder = Path(folder)
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no error of its own: this is its writer in C++
        if type(error) is RuntimeError and "inline_container" not in str(error) and "PytorchStream" not in str(error):
            raise
        # Other processes may be writing into it; where none removes it, it is skipped as incomplete.
        if folder != Path(output_dir) and PartialState().is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        whole = last_whole_checkpoint(output_dir)
        free = shutil.disk_usage(output_dir).free / 2**30
        reason = " ".join(str(error).split())
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"could not be saved: {reason}. {free:.2f} GiB are free there; free some (save_total_limit keeps fewer "
            f"checkpoints) or mend what the error names, and the same command goes on from "
            f"{whole or 'the start, since no whole checkpoint was saved before'}.",
            str(folder),
        ) from error


def save_rollouts(slices: list[dict[str, torch.Tensor | None]], path: Path) -> None:
    """
    Saves the generation batch that a process is training on.

    Args:
        slices (`list[dict[str, torch.Tensor]]`):
            Its micro-batches.
        path (`Path`):
            File to write.
    """
    tensors = {
        f"{index}.{name}": value.clone()  # one tensor may serve all slices, which safetensors refuses
        for index, slice_ in enumerate(slices)
        for name, value in slice_.items()
        if value is not None
    }
    save_file(tensors, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_rollouts(path: Path, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Loads what [`save_rollouts`] saved."""
    if not path.is_file():
        raise InputError(f"{path.parent} lacks {path.name}, the rollouts it was training on; resume from another.")
    slices = defaultdict(dict)
    for key, value in load_file(path).items():
        index, name = key.split(".", 1)
        slices[int(index)][name] = value.to(device)
    return [slices[index] for index in range(len(slices))]
