"""Checkpoints that can be trusted: whole or named as incomplete, and holding the rollouts a run was training on."""

import errno
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer

from ..utils.errors import InputError
from ..utils.files import read_json, write_json


logger = logging.getLogger(__name__)

# The files of a checkpoint and their sizes, written when all of them are there.
FILES_FILE = "coaug_files.json"
STATE_FILE = "coaug_state.json"


def finish_checkpoint(checkpoint: Path, resumable: bool = True) -> None:
    """
    Marks a checkpoint as whole, when every process has written its files.

    Args:
        checkpoint: Its folder.
        resumable: Whether it has what training needs to go on, which `save_only_model` leaves out.
    """
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*"))}
    sizes = {name: path.stat().st_size for name, path in files.items() if path.is_file() and name != FILES_FILE}
    write_json(checkpoint / FILES_FILE, {"resumable": resumable, "files": sizes})


def why_incomplete(checkpoint: str | Path) -> str | None:
    """
    What a checkpoint lacks to resume from it.

    Its files and their sizes are compared with the list written last. Checkpoints of runs that wrote no such list are
    whole if they have `trainer_state.json`, which transformers writes last.

    Args:
        checkpoint: Its folder.

    Returns: the reason, `None` if it is whole.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    listed = {"files": {}}
    if (checkpoint / FILES_FILE).exists():
        try:
            listed = read_json(checkpoint / FILES_FILE)
        except InputError:
            return f"{FILES_FILE} cannot be read"
        if listed["files"] is None:
            return "it was not written to its end"
    for name, size in listed["files"].items():
        if not (checkpoint / name).is_file():
            return f"it lacks {name}"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it lacks {TRAINER_STATE_NAME}"
    if not listed.get("resumable", True):
        return "it was saved with save_only_model, without the state of the optimizer"
    return None


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
        output_dir: Folder of the run.
        before: Step that it has to come before.
        quiet: Without the warning.

    Returns: its folder, `None` if there is none.
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
        folder: A checkpoint, or `output_dir` itself.
        output_dir: Folder of the run.

    Raises `OSError`: A file could not be written.
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


@contextmanager
def writing_checkpoint(folder: Path, trainer: GRPOTrainer) -> Iterator[Path]:
    """
    A checkpoint is marked as begun before anything is written into it, and as whole when every process has written its
    files. Older ones go after that: the base class would delete them while this one may still lack files.

    Args:
        folder: The checkpoint.
        trainer: Writes it while the block runs.
    """
    args, wait = trainer.args, trainer.accelerator.wait_for_everyone
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        with saving(folder, folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
            if args.should_save:
                write_json(folder / FILES_FILE, {"files": None})
            wait()
            yield folder
            wait()
            if args.should_save:
                finish_checkpoint(folder, resumable=not args.save_only_model)
    finally:
        args.save_total_limit = limit
    if args.should_save:
        rotate_checkpoints(str(folder.parent), limit, trainer.state.best_model_checkpoint, use_mtime=True)
    wait()


def save_state(folder: Path, trainer: GRPOTrainer) -> None:
    """Saves what this package adds to a checkpoint: the rollouts in use, the step within them, BM25's statistics."""
    step = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations)
    if step:
        save_rollouts(trainer._buffered_inputs, _rollouts_path(folder, trainer))
    if trainer.args.should_save:
        state = {"step": step, "batch": _batch_arithmetic(trainer), "retriever_state": trainer.retriever.state()}
        write_json(folder / STATE_FILE, state)


def load_state(folder: Path, trainer: GRPOTrainer) -> None:
    """
    Loads what [`save_state`] saved, if the checkpoint has it.

    Raises `InputError`: It was saved within a generation batch of other settings, or lacks its rollouts.
    """
    if not (folder / STATE_FILE).is_file():
        return
    state = read_json(folder / STATE_FILE, "resume from another checkpoint")
    trainer.retriever.load_state(state["retriever_state"])
    trainer._step = state["step"]
    if trainer._step:
        if state["batch"] != _batch_arithmetic(trainer):
            raise InputError(
                f"{folder} was saved within a generation batch of {state['batch']}, which cannot go on as one of "
                f"{_batch_arithmetic(trainer)}. Resume with the same settings and number of processes, or from a "
                "checkpoint at the end of a generation batch."
            )
        trainer._buffered_inputs = load_rollouts(_rollouts_path(folder, trainer), trainer.accelerator.device)


def _batch_arithmetic(trainer: GRPOTrainer) -> dict[str, int]:
    names = ("world_size", "generation_batch_size", "steps_per_generation", "num_iterations")
    return {name: getattr(trainer.args, name) for name in names}


def _rollouts_path(folder: Path, trainer: GRPOTrainer) -> Path:
    return folder / f"rollouts_{trainer.accelerator.process_index}.safetensors"


def save_rollouts(slices: list[dict[str, torch.Tensor | None]], path: Path) -> None:
    """
    Saves the generation batch that a process is training on.

    Args:
        slices: Its micro-batches.
        path: File to write.
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
