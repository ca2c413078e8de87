"""What a policy was trained on and how, kept beside it."""

import re
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from ..policy.download import CARD_FILE
from ..utils.names import is_hub_id, last_part


if TYPE_CHECKING:
    from ..data.collection import Collection
    from .config import CoAugConfig

TRAINING_FILE = "training.json"
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


def describe_training(
    args: "CoAugConfig",
    train_collection: "Collection",
    eval_collection: "Collection | None",
    model: Any,
    device: str,
) -> dict[str, Any]:
    """
    What a policy is trained on and how, as `training.json` has it.

    Args:
        args: Configuration; what differs from the defaults is kept, but folders and secrets.
        train_collection: Trained on.
        eval_collection: Evaluated on in training.
        model: What training began with.
        device: Name of the device of a process.

    Returns: JSON-able.
    """
    base_model = model if isinstance(model, str) else model.name_or_path
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
        model: Folder or Hub id.

    Returns: `license` and, if they are there, `license_name` and `license_link`; empty if no licence is stated or the
        card cannot be reached.
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
