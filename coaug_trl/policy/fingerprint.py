"""What a model is known by: its weights' fingerprint, or its commit on the Hub."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..utils.errors import InputError
from ..utils.files import read_json


ADAPTER_FILE = "adapter_config.json"
MODEL_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")


def folder_hash(folder: str | Path) -> str | None:
    """
    First 16 hexadecimal digits of a SHA-256 over the weights of a model folder, if there are any; of an adapter with its
    configuration, but for the name of its base model, which is another one on another machine.
    """
    patterns = (*MODEL_WEIGHTS, "pytorch_model*.bin", "adapter_model.bin", ADAPTER_FILE)
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    digest = hashlib.sha256()
    for path in paths:
        if path.name == ADAPTER_FILE:
            digest.update(_adapter_settings(path))
            continue
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if paths else None


def _adapter_settings(path: Path) -> bytes:
    config = read_json(path)
    config.pop("base_model_name_or_path", None)
    # PEFT keeps the names of modules in a set, and writes them in another order each time.
    sets = {name: sorted(value, key=str) for name, value in config.items() if isinstance(value, list)}
    return json.dumps(config | sets, sort_keys=True).encode()


def fingerprint(model: str, revision: str | None = None) -> str | None:
    """
    What a model is known by: the fingerprint of a folder's weights, or the commit on the Hub. That of an adapter is
    followed by that of its base model, after a plus sign.

    Args:
        model: Folder or Hub id.
        revision: Revision on the Hub.

    Returns: the fingerprint; `None` where there are no weights, as beside a server that has them.

    Raises `InputError`: The Hub cannot be reached.
    """
    if Path(model).is_dir():
        known, adapter = folder_hash(model), Path(model) / ADAPTER_FILE
    else:
        config, adapter = (_cached(model, name, revision) for name in ("config.json", ADAPTER_FILE))
        known = next((path.parent.name for path in (config, adapter) if path), None)
    if known is None or adapter is None or not adapter.is_file():
        return known or revision
    config = read_json(adapter)
    base = config.get("base_model_name_or_path")
    base = fingerprint(base, config.get("revision")) if isinstance(base, str) else None
    return f"{known}+{base}" if base else known


def _cached(model: str, name: str, revision: str | None) -> Path | None:
    """A small file of a model on the Hub, `None` if it has none."""
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        return None
    except HTTPError as error:
        raise InputError(f"{model} cannot be read: {error}") from None
