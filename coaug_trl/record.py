"""What a training run left in its folder, read for its card and its report."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from .compare import Comparison, compare_folders
from .errors import InputError
from .evaluation import Evaluation, load_evaluation
from .hub import CARD_FILE
from .names import is_hub_id, last_part
from .policy import PolicySettings, folder_hash


if TYPE_CHECKING:
    from .config import CoAugConfig
    from .data import Collection

TRAINING_FILE = "training.json"
TRAINER_STATE = "trainer_state.json"
# How deep evaluations may lie in a run's folder: runs/mine/baselines/rm3.
DEPTH = 3
# Of the machine rather than of the run, or following from other arguments.
NOT_KEPT = (
    "deepspeed",
    "accelerator_config",
    "logging_nan_inf_filter",
    "run_name",
    "resume_from_checkpoint",
    "debug",
    "do_eval",
    "disable_tqdm",
    "dataloader_pin_memory",
    "report_to",
    "generation_batch_size",
    "steps_per_generation",
    "gradient_accumulation_steps",
)
# Endings of names of folders, secrets and machines, and what a token of the Hub looks like under any name.
PRIVATE = ("_dir", "token", "_url", "_host", "_port", "password", "secret", "api_key")
TOKEN = re.compile(r"\bhf_\w+")
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Evaluated:
    """
    An evaluation folder and what was evaluated there.

    Args:
        folder (`Path`):
            The folder.
        evaluation ([`~coaug_trl.evaluation.Evaluation`]):
            Its content.
        system (`str`):
            `"policy"` for texts augmented by this run's policy, `"none"` for texts as they are, `"other"`.
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
        folder (`Path`):
            The folder: `output_dir` of the training.
        settings ([`~coaug_trl.policy.PolicySettings`]):
            Prompts, generation settings, retriever, sides.
        training (`dict[str, Any]`):
            Content of `training.json`: what was trained on and with which arguments; empty for a run of version 0.1.0.
        history (`list[dict[str, Any]]`):
            What the trainer logged, in order, each with its `step`; empty if the folder has no `trainer_state.json`.
        evaluations (`list[Evaluated]`):
            Evaluations found: those without augmentation first, those of this policy last, and of these last what it
            was trained for: with its retriever and all its sides.
        identity (`dict[str, Any]`, *optional*):
            What augmentations of this policy have in their manifest: `revision` and `prompt_hash`.
        best_step (`int`, *optional*):
            Step of the best checkpoint, if the trainer kept account of it.
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

    def compare(self, group: Sequence[Evaluated]) -> Comparison | None:
        """Tests a group of [`comparable`] evaluations pair by pair, without examples; `None` for a single one."""
        folders = [evaluated.folder for evaluated in group]
        return compare_folders(folders, examples=False) if len(folders) > 1 else None


def describe_training(
    args: "CoAugConfig",
    train_collection: "Collection",
    eval_collection: "Collection | None",
    base_model: str,
    device: str,
) -> dict[str, Any]:
    """
    What a policy is trained on and how, as `training.json` has it.

    Args:
        args ([`~coaug_trl.CoAugConfig`]):
            Configuration; what differs from the defaults is kept, but folders and secrets.
        train_collection ([`~coaug_trl.Collection`]):
            Trained on.
        eval_collection ([`~coaug_trl.Collection`] or `None`):
            Evaluated on in training.
        base_model (`str`):
            Model that training began with.
        device (`str`):
            Name of the device of a process.

    Returns:
        `dict[str, Any]`: JSON-able.
    """
    return {
        "base_model": base_model,
        "base_model_is_folder": Path(base_model).is_dir(),
        "base_license": license_of(base_model),
        "collection": train_collection.name,
        "train_split": train_collection.split,
        "eval_split": eval_collection.split if eval_collection else None,
        "num_documents": len(train_collection.corpus),
        "num_train_queries": len(train_collection.qrels),
        "num_train_judgments": sum(map(len, train_collection.qrels.values())),
        "completions_per_batch": args.generation_batch_size,
        "steps_per_batch": args.updates_per_batch * args.num_iterations,
        "num_processes": args.world_size,
        "device": device,
        "arguments": _changed_arguments(args),
    }


def _changed_arguments(args: "CoAugConfig") -> dict[str, Any]:
    changed = {}
    for field in fields(args):
        value = getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value == default or field.name.endswith(PRIVATE) or field.name in NOT_KEPT:
            continue
        if isinstance(value, (str, int, float, bool, list, tuple, dict)):
            changed[field.name] = _without_secrets(value)
    return {name: value for name, value in changed.items() if value not in (None, [], {})}


def _without_secrets(value: Any) -> Any:
    """A setting without what is not for others, and of a folder only its name; `None` for a token."""
    if isinstance(value, dict):
        kept = {key: _without_secrets(each) for key, each in value.items() if not str(key).lower().endswith(PRIVATE)}
        return {key: each for key, each in kept.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [each for each in map(_without_secrets, value) if each is not None]
    if isinstance(value, str):
        return None if TOKEN.search(value) else last_part(value) if "/" in value and Path(value).is_dir() else value
    return value


def license_of(model: str | None) -> dict[str, str]:
    """
    What the card of a model states of its licence.

    Args:
        model (`str` or `None`):
            Folder or Hub id.

    Returns:
        `dict[str, str]`: `license` and, if they are there, `license_name` and `license_link`; empty if no licence is
        stated or the card cannot be reached.
    """
    path = Path(model or "") / CARD_FILE
    try:
        if model and not path.is_file() and is_hub_id(model):
            path = Path(hf_hub_download(model, CARD_FILE))
        data = ModelCard.load(path, ignore_metadata_errors=True).data if path.is_file() else {}
    # Without network, or without readable metadata: no licence is stated.
    except (OSError, HTTPError, EntryNotFoundError, ValueError, yaml.YAMLError):
        return {}
    found = {name: data.get(name) for name in LICENSE_FIELDS if isinstance(data.get(name), str)}
    return found if "license" in found else {}


def load_record(folder: str | Path, evaluations: Iterable[str | Path] = ()) -> RunRecord:
    """
    Reads a run's folder, and the evaluations beneath it.

    Args:
        folder (`str` or `Path`):
            `output_dir` of a training.
        evaluations (`Iterable[str | Path]`, *optional*):
            Further evaluation folders, or folders of them, such as those that `coaug baselines` makes.

    Returns:
        [`RunRecord`]: what was found.

    Raises:
        `InputError`: The folder holds no trained policy, or a file is damaged, or there is no evaluation in a folder
            that was given for its evaluations.
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
    training, state = read_object(folder / TRAINING_FILE), read_object(folder / TRAINER_STATE)
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


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore the file.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; restore the file.")
    return content
