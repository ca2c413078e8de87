"""What a training run left in its folder, read for its card and its report."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..evaluation.comparison import Comparison, compare_folders
from ..evaluation.folder import Evaluation, load_evaluation
from ..policy.fingerprint import folder_hash
from ..policy.settings import PolicySettings
from ..training.record import TRAINING_FILE
from ..utils.errors import InputError
from ..utils.files import read_json


TRAINER_STATE = "trainer_state.json"
# How deep evaluations may lie in a run's folder: runs/mine/baselines/rm3.
DEPTH = 3


@dataclass(frozen=True)
class Evaluated:
    """
    An evaluation folder and what was evaluated there.

    Args:
        folder: The folder.
        evaluation: Its content.
        system: `"policy"` for texts augmented by this run's policy, `"none"` for texts as they are, `"other"`.
    """

    folder: Path
    evaluation: Evaluation
    system: str

    @property
    def sides(self) -> list[str]:
        """The sides that were augmented, sorted; empty for none."""
        return sorted(self.evaluation.manifest.get("augmented_sides") or [])

    @property
    def key(self) -> tuple[str, ...]:
        """What evaluations must have in common to be compared: collection, split, and judgments."""
        manifest = self.evaluation.manifest
        judgments = manifest.get("hashes", {}).get("judgments", "")
        return tuple(str(part) for part in (manifest.get("collection"), manifest.get("split"), judgments))


@dataclass(frozen=True)
class RunRecord:
    """
    A run's folder, read.

    Args:
        folder: The folder: `output_dir` of the training.
        settings: Prompts, generation settings, retriever, sides.
        training: Content of `training.json`: what was trained on and with which arguments; empty for a run of version
            0.1.0.
        history: What the trainer logged, in order, each with its `step`; empty if the folder has no
            `trainer_state.json`.
        evaluations: Evaluations found: those without augmentation first, those of this policy last, and of these last
            what it was trained for: with its retriever and all its sides.
        identity: What augmentations of this policy have in their manifest: `revision` and `prompt_hash`.
        best_step: Step of the best checkpoint, if the trainer kept account of it.
    """

    folder: Path
    settings: PolicySettings
    training: dict[str, Any]
    history: list[dict[str, Any]]
    evaluations: list[Evaluated]
    identity: dict[str, Any] | None = None
    best_step: int | None = None

    def curve(self, name: str) -> list[tuple[int, float]]:
        """A logged metric by optimizer step; empty if it was never logged."""
        return [(entry["step"], entry[name]) for entry in self.history if isinstance(entry.get(name), (int, float))]

    def points(self, name: str) -> list[tuple[int, float]]:
        """The same where it is finite, in order; the last value where a step was logged twice."""
        return sorted({step: float(value) for step, value in self.curve(name) if math.isfinite(value)}.items())

    def last(self, name: str) -> Any:
        """What a metric was when it was last logged, or `None`."""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)

    @property
    def num_completions(self) -> int | None:
        """How many completions were generated in training; `None` for a run that does not say."""
        if not self.history or "completions_per_batch" not in self.training:
            return None
        batches = math.ceil(self.history[-1]["step"] / self.training["steps_per_batch"])
        return batches * self.training["completions_per_batch"]

    @property
    def step_seconds(self) -> float:
        """
        Wall-clock time of all optimizer steps with their generation, over interruptions; evaluations and saving are not
        in it.
        """
        times = self.curve("step_time")
        before = [0, *(step for step, _ in times)]
        return sum(seconds * (step - last) for (step, seconds), last in zip(times, before, strict=False))

    @property
    def adapter(self) -> bool:
        """Whether the run trained an adapter."""
        return (self.folder / "adapter_config.json").is_file()

    @cached_property
    def comparable(self) -> list[list[Evaluated]]:
        """
        The evaluations, those that can be compared together; the first group is that of the test split if there is
        one, the last are those of the queries that were trained on. Within a group what is not augmented comes first
        and what the policy was trained for last.
        """
        groups: dict[tuple[str, ...], list[Evaluated]] = {}
        for evaluated in self.evaluations:
            groups.setdefault(evaluated.key, []).append(evaluated)

        def order(group: list[Evaluated]) -> tuple[Any, ...]:
            split = group[0].key[1]
            used = {"train_split": 2, "eval_split": 1}  # in training
            rank = max((rank for name, rank in used.items() if self.uses(group, name)), default=0)
            return (split != "test", rank, -len(group), group[0].key)

        return sorted(groups.values(), key=order)

    def uses(self, group: Sequence[Evaluated], name: str) -> bool:
        """Whether the queries of a group are those of the training's `train_split` or `eval_split`."""
        collection, split, _ = group[0].key
        return [collection, split] == [self.training.get("collection"), self.training.get(name)]

    def seen(self, group: Sequence[Evaluated]) -> str | None:
        """What was learnt of the queries of a group: `"trained"` on them, or checkpoints `"chosen"` by them."""
        if self.uses(group, "train_split"):
            return "trained"
        chosen = self.best_step is not None or self.training.get("arguments", {}).get("load_best_model_at_end")
        return "chosen" if chosen and self.uses(group, "eval_split") else None

    def compare(self, group: Sequence[Evaluated]) -> Comparison | None:
        """Tests a group of [`comparable`] evaluations pair by pair, without examples; `None` for a single one."""
        folders = [evaluated.folder for evaluated in group]
        return compare_folders(folders, examples=False) if len(folders) > 1 else None


def load_record(folder: str | Path, evaluations: Iterable[str | Path] = ()) -> RunRecord:
    """
    Reads a run's folder, and the evaluations beneath it.

    Args:
        folder: `output_dir` of a training.
        evaluations: Further evaluation folders, or folders of them, such as those that `coaug baselines` makes.

    Returns: what was found.

    Raises `InputError`: The folder holds no trained policy, or a file is damaged, or there is no evaluation in a
        folder that was given for its evaluations.
    """
    folder = Path(folder)
    settings = PolicySettings.load(folder) if folder.is_dir() else None
    if settings is None:
        raise InputError(f"{folder}: not the folder of a trained policy (it has no coaug.json); give its output_dir.")
    found = dict.fromkeys(find_evaluations(folder))
    for given in evaluations:
        beneath = find_evaluations(Path(given))
        if not beneath:
            raise InputError(f"{given}: no finished evaluation is there; make one with coaug evaluate.")
        found |= dict.fromkeys(beneath)
    identity = {"revision": folder_hash(folder), "prompt_hash": settings.prompt_set.hash}
    read = [_read_evaluation(path, identity) for path in {path.resolve(): path for path in found}.values()]
    read.sort(key=lambda each: _order(each, settings))
    training, state = read_json(folder / TRAINING_FILE, missing={}), read_json(folder / TRAINER_STATE, missing={})
    _check_training(folder / TRAINING_FILE, training)
    _check_state(folder / TRAINER_STATE, state)
    best_step = state.get("best_global_step")
    if best_step is None and state.get("best_model_checkpoint"):  # of an older transformers
        number = state["best_model_checkpoint"].rpartition("-")[2]
        best_step = int(number) if number.isdecimal() else None
    return RunRecord(folder, settings, training, state.get("log_history", []), read, identity, best_step)


def _order(evaluated: Evaluated, settings: PolicySettings) -> tuple[Any, ...]:
    policy = evaluated.system == "policy"
    return (
        {"none": 0, "other": 1, "policy": 2}[evaluated.system],
        policy and evaluated.evaluation.manifest["retriever"] == settings.retriever,
        policy and evaluated.sides == sorted(settings.sides),
        len(evaluated.sides),
        str(evaluated.folder),
    )


# Name to type and whether a file of an older version may lack it.
_TRAINING = {
    "base_model": (str, True),
    "collection": (str, False),
    "train_split": (str, False),
    "eval_split": ((str, type(None)), False),
    "num_documents": (int, False),
    "num_train_queries": (int, False),
    "num_train_judgments": (int, False),
    "completions_per_batch": (int, True),
    "steps_per_batch": (int, True),
    "num_processes": (int, True),
    "device": (str, True),
    "arguments": (dict, True),
}


def _check_training(path: Path, training: dict[str, Any]) -> None:
    if not path.is_file():
        return
    for name, (type_, optional) in _TRAINING.items():
        if name not in training and not optional:
            raise InputError(f"{path}: {name} is missing; restore the file, or remove it to do without it.")
        if name in training and not isinstance(training[name], type_):
            raise InputError(f"{path}: {name} is {training[name]!r}; restore the file, or remove it to do without it.")
    if training.get("steps_per_batch", 1) < 1:
        raise InputError(f"{path}: steps_per_batch is {training['steps_per_batch']}; restore the file.")


def _check_state(path: Path, state: dict[str, Any]) -> None:
    history = state.get("log_history", [])
    if not isinstance(history, list):
        raise InputError(f"{path}: log_history is {history!r:.60}, not a list; restore the file.")
    for number, entry in enumerate(history, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise InputError(
                f"{path}: entry {number} of log_history is {entry!r:.60}, not an object with a step; restore the file."
            )
    for name, type_ in (("best_global_step", int), ("best_model_checkpoint", str)):
        if not isinstance(state.get(name), (type_, type(None))):
            raise InputError(f"{path}: {name} is {state[name]!r:.60}; restore the file.")


def find_evaluations(folder: Path) -> list[Path]:
    patterns = ["/".join(["*"] * depth + ["metrics.json"]) for depth in range(DEPTH + 1)]
    paths = [path.parent for pattern in patterns for path in folder.glob(pattern.removeprefix("/"))]
    return sorted(path for path in paths if (path / "run.trec").is_file() and (path / "manifest.json").is_file())


def _read_evaluation(folder: Path, identity: dict[str, Any]) -> Evaluated:
    evaluation = load_evaluation(folder)
    augmentations = evaluation.manifest.get("augmentations")
    if augmentations:
        # The revision of an adapter is followed by that of its base model.
        revision = str(augmentations.get("revision")).partition("+")[0]
        is_policy = all(
            (augmentations | {"revision": revision}).get(name) == value for name, value in identity.items()
        )
        return Evaluated(folder, evaluation, "policy" if is_policy else "other")
    return Evaluated(folder, evaluation, "other" if "rm3" in evaluation.manifest["retriever"] else "none")


class Run:
    """
    A run to be reported, and names of files relative to its folder.

    Args:
        folder: `output_dir` of a training. Of one that was interrupted, the last whole checkpoint is read.
        evaluations: As in [`load_record`].
    """

    def __init__(self, folder: Path, evaluations: Iterable[str | Path]):
        self.folder = folder
        checkpoint = None
        if folder.is_dir() and not (folder / TRAINER_STATE).is_file():  # interrupted, or only its weights were saved
            from ..training.checkpoints import last_whole_checkpoint  # with all of transformers' trainer

            checkpoint = last_whole_checkpoint(folder, quiet=True)
        if checkpoint:
            evaluations = [*evaluations, *find_evaluations(folder)]
        self.record: RunRecord = load_record(checkpoint or folder, evaluations)
        self.checkpoint = Path(checkpoint).name if checkpoint else None
        self.name = folder.resolve().name

    def source(self, *paths: Path) -> tuple[str, ...]:
        """Paths as the report names them."""
        relative = [Path(os.path.relpath(path.resolve(), self.folder.resolve())) for path in paths]
        shared = {(path.parent.parent, path.name) for path in relative}
        if len(relative) > 2 and len(shared) == 1:  # one path, as a shell would read it
            folders = ",".join(path.parent.name for path in relative)
            relative = [relative[0].parent.parent / f"{{{folders}}}" / relative[0].name]
        return tuple(path.as_posix() for path in relative)

    def of_record(self, *names: str) -> tuple[str, ...]:
        """Files of the run's own."""
        return self.source(*(self.record.folder / name for name in names))
