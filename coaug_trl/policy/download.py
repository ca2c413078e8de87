"""Policies, indexes and augmentations taken back from the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from ..utils.errors import InputError
from ..utils.names import is_hub_id
from .fingerprint import ADAPTER_FILE, MODEL_WEIGHTS
from .prompts import PROMPT_SET_FILE
from .settings import POLICY_FILE


CARD_FILE, CURVES_FILE = "README.md", "reward.png"
MANIFEST = "manifest.json"
# What goes out is named, so that nothing else does: checkpoints, optimizer states, logs, completions, other people's
# files. No name is that of a format that can run code.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    ADAPTER_FILE,
    *MODEL_WEIGHTS,
    "model.safetensors.index.json",
    "adapter_model.safetensors.index.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
RUN_FILES = (*MODEL_FILES, *TOKENIZER_FILES, POLICY_FILE, PROMPT_SET_FILE, "training.json", "trainer_state.json")
INDEX_FILES = (
    MANIFEST,
    PROMPT_SET_FILE,
    "documents.jsonl",
    "document_ids.json",
    "retriever.json",
    "statistics.json",
    "index.faiss",
)
BM25S_FILES = ("*.index.npy", "*.index.json")


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """What fails on the Hub or on the way to it becomes an `InputError` that says what to do."""
    try:
        yield
    except InputError:
        raise
    except OfflineModeIsEnabled:
        raise InputError("The Hub is not reached in offline mode; unset HF_HUB_OFFLINE.") from None
    except HFValidationError as error:
        raise InputError(f"{repo_id}: {error}") from None
    # RuntimeError is what a failed upload of a file becomes, ValueError what the Hub says against one.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file of this machine
            raise
        raise InputError(_reason(repo_id, error)) from error


def _reason(repo_id: str, error: BaseException) -> str:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if answer is None and not any(isinstance(cause, (HTTPError, OSError)) for cause in causes):
        return f"{repo_id}: {error}"
    status = answer.response.status_code if answer is not None else None
    if status == 401:
        return f"{repo_id}: the Hub does not accept the token; log in again by hf auth login, or renew HF_TOKEN."
    if status in (403, 404):
        return (
            f"{repo_id} cannot be written to with this token: it is someone else's, or the token may not write; choose "
            "a repo_id of your own, or a token with write permission."
        )
    said = (
        f"answers {status}: {answer.server_message or answer}" if answer is not None else f"was not reached: {error}"
    )
    passes = status is None or status in (408, 429) or status >= 500
    return f"{repo_id}: the Hub {said.rstrip('. ')}.{' What is uploaded stays; the same command goes on.' * passes}"


def policy_folder(name: str | Path, revision: str | None = None) -> str:
    """
    The folder of a policy, which is downloaded if it is on the Hub.

    Args:
        name: Folder or Hub id of a policy or of any other model.
        revision: Revision on the Hub.

    Returns: the local folder of a policy; any other name as it is.

    Raises `InputError`: The Hub fails while the policy is read.
    """
    if not is_hub_id(name):
        return str(name)
    try:
        hf_hub_download(str(name), POLICY_FILE, revision=revision)
    except LocalEntryNotFoundError as error:
        # Without the Hub, what is not in the cache is no policy that was used before. A Hub that fails says nothing.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise InputError(f"{name} cannot be read: {_reason(str(name), error.__cause__)}") from None
        return str(name)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return str(name)  # transformers says if it is no model either
    except HTTPError as error:
        raise InputError(f"{name} cannot be read: the Hub was not reached: {error}") from None
    patterns = [pattern for pattern in RUN_FILES if pattern != "trainer_state.json"]
    return str(_download(name, "model", revision, patterns, ["*/*"]))


def index_folder(name: str | Path, revision: str | None = None) -> Path:
    """As [`policy_folder`], of an index that `coaug push` put on the Hub; a name that is nowhere stays as it is."""
    if not is_hub_id(name):
        return Path(name)
    return _download(name, "model", revision, [*INDEX_FILES, *BM25S_FILES], []) or Path(name)


def augmentations_folder(name: str | Path) -> Path:
    """As [`policy_folder`], of augmentations that `coaug push` put on the Hub."""
    if not is_hub_id(name):
        return Path(name)
    return _download(name, "dataset", None, [MANIFEST, PROMPT_SET_FILE, "*.parquet"], []) or Path(name)


class _Progress(tqdm):
    """Shown where there is something to wait for, rather than whenever what is in the cache is looked up."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"delay": 2, "leave": False})


def _download(
    name: str | Path, repo_type: str, revision: str | None, patterns: list[str], ignored: list[str]
) -> Path | None:
    """The local copy of some files of a repository; `None` if there is none."""
    try:
        folder = snapshot_download(
            str(name),
            repo_type=repo_type,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=ignored,
            tqdm_class=_Progress,
        )
    except RepositoryNotFoundError:
        return None
    except RevisionNotFoundError:
        raise InputError(
            f"{name} has no revision {revision!r} on the Hub; choose a branch, a tag or a commit."
        ) from None
    except LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            return None
        raise InputError(f"{name} cannot be downloaded: {error}") from None
    except (HTTPError, OSError) as error:
        raise InputError(f"{name} cannot be downloaded: {error}") from None
    return Path(folder)
