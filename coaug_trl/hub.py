"""The Hugging Face Hub: what `coaug push` puts there, and how it is taken back."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    RepoCard,
    get_token,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
)
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
from huggingface_hub.utils import tqdm, validate_repo_id

from .errors import InputError
from .policy import POLICY_FILE
from .prompts import PROMPT_SET_FILE


if TYPE_CHECKING:
    from datasets import Dataset

CARD_FILE, MANIFEST = "README.md", "manifest.json"
# What goes out is named, so that nothing else does: checkpoints, optimizer states, logs, completions, other people's
# files. No name is that of a format that can run code.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
)
RUN_FILES = (*MODEL_FILES, *TOKENIZER_FILES, POLICY_FILE, PROMPT_SET_FILE, "training.json", "trainer_state.json")
# Without the texts, which are those of the collection.
EVALUATION_FILES = (MANIFEST, "metrics.json", "run.trec", "qrels.trec", "per_query.jsonl")
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
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Upload:
    """
    What goes into a repository.

    Args:
        repo_type (`str`):
            `"model"`, `"dataset"` or `"space"`.
        files (`dict[str, Path | bytes]`):
            By their path in the repository: a file, or the content of one.
        card (`RepoCard`, *optional*):
            The page of the repository; `None` for files that have their own.
        notes (`list[str]`, *optional*):
            What its user should know beforehand, a line each.
        tables (`dict[str, Dataset]`, *optional*):
            Configurations of a dataset by name.
    """

    repo_type: str
    files: dict[str, Path | bytes]
    card: RepoCard | None = None
    notes: list[str] = field(default_factory=list)
    tables: "dict[str, Dataset]" = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path; of tables as they are in memory, which is more than as Parquet."""
        sizes = {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }
        if self.card:
            sizes[CARD_FILE] = len(str(self.card).encode())
        return sizes | {f"{name}/*.parquet": table.data.nbytes for name, table in self.tables.items()}


# Pushing


def check_repo_id(repo_id: str) -> None:
    """Raises an `InputError` for what is not the name of a repository in a namespace."""
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it has no namespace")
    except HFValidationError as error:
        raise InputError(f"repo_id is {repo_id!r}, which is no USER/NAME: {error}") from None


def check_access(token: str | None = None) -> None:
    """Raises an `InputError` if nothing could be uploaded: offline, or without a token."""
    if is_offline_mode():
        raise InputError("Nothing can be pushed in offline mode; unset HF_HUB_OFFLINE.")
    if (token or get_token()) is None:
        raise InputError("There is no token for the Hub; log in by hf auth login, or set HF_TOKEN.")


def push(
    upload: Upload,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload by coaug push",
    token: str | None = None,
) -> CommitInfo:
    """
    Uploads in one commit, and the tables of a dataset in one each before it. Of a push that failed halfway the Hub
    keeps the files that it has, and the same push again sends the others only.

    Args:
        upload ([`Upload`]):
            What [`prepare`] returned.
        repo_id (`str`):
            `USER/NAME`; made if it is not there.
        private (`bool`, *optional*):
            Whether others may not see it; the namespace decides by default.
        revision (`str`, *optional*):
            Branch, made if it is not there; defaults to the main one.
        commit_message (`str`, *optional*, defaults to `"Upload by coaug push"`):
            As git shows it.
        token (`str`, *optional*):
            Of the Hub; defaults to that of `hf auth login` or `HF_TOKEN`.

    Returns:
        `CommitInfo`: with `repo_url` and `commit_url`.

    Raises:
        `InputError`: There is no token, the repository is not the user's, or is public where `private` is asked for, or
            holds something else, or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    check_access(token)
    api, place = HfApi(token=token), {"repo_id": repo_id, "repo_type": upload.repo_type}
    with explained(repo_id):
        sdk = {"space_sdk": "gradio"} if upload.repo_type == "space" else {}
        api.create_repo(**place, private=private, exist_ok=True, **sdk)
        if private and not api.repo_info(**place).private:
            raise InputError(
                f"{repo_id} is there already and public; make it private in its settings, or choose another repo_id."
            )
        if revision:
            api.create_branch(**place, branch=revision, exist_ok=True)
        stale = _stale_files(upload, api.list_repo_files(**place, revision=revision), repo_id)
        if upload.tables:
            with _quiet_datasets():
                for name, table in upload.tables.items():
                    table.push_to_hub(repo_id, name, token=token, revision=revision, commit_message=commit_message)
            _take_configurations(upload.card, repo_id, revision, token)
        files = dict(upload.files)
        if upload.card:
            files[CARD_FILE] = str(upload.card).encode()
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, file) for name, file in files.items()]
        return api.create_commit(**place, operations=operations, commit_message=commit_message, revision=revision)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the warnings of datasets about its own defaults, and its progress bars beside those of the upload."""
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    logger, shown = logging.getLogger("datasets"), is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            enable_progress_bars()


def _stale_files(upload: Upload, present: list[str], repo_id: str) -> list[str]:
    """What an earlier push left that would mix with these files; refuses a repository of something else."""
    if upload.repo_type == "space":
        ours = ("coaug_trl/", "index/", "model/")
        return [name for name in present if name not in upload.files and name.startswith(ours)]
    if upload.repo_type == "dataset":  # whose tables are replaced
        return []
    ours, theirs = (POLICY_FILE, MANIFEST) if POLICY_FILE in upload.files else (MANIFEST, POLICY_FILE)
    if theirs in present:
        kinds = {POLICY_FILE: "a policy", MANIFEST: "an index"}
        raise InputError(f"{repo_id} holds {kinds[theirs]}, and this is {kinds[ours]}; choose another repo_id.")
    patterns = (*MODEL_FILES, *BM25S_FILES, "index.faiss", PROMPT_SET_FILE)
    return [
        name
        for name in present
        if ours in present
        and name not in upload.files
        and (name.startswith("field_") or "/" not in name and any(fnmatch(name, pattern) for pattern in patterns))
    ]


def _take_configurations(card: RepoCard, repo_id: str, revision: str | None, token: str | None) -> None:
    """Gives a dataset's card what `push_to_hub` has written about its tables, which load_dataset reads."""
    path = hf_hub_download(repo_id, CARD_FILE, repo_type="dataset", revision=revision, token=token)
    data = DatasetCard(Path(path).read_text(encoding="utf-8")).data
    for name in ("configs", "dataset_info"):
        card.data[name] = data.get(name)


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """What fails on the Hub or on the way to it becomes an `InputError` that says what to do."""
    try:
        yield
    except InputError:
        raise
    except OfflineModeIsEnabled:
        raise InputError("The Hub is not reached in offline mode; unset HF_HUB_OFFLINE.") from None
    # RuntimeError is what a failed upload of a file becomes, ValueError what the Hub says against one.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file of this machine
            raise
        raise InputError(_reason(repo_id, error)) from error


def _reason(repo_id: str, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    status = cause.response.status_code if cause is not None else None
    if status == 401:
        return f"{repo_id}: the Hub does not accept the token; log in again by hf auth login, or renew HF_TOKEN."
    if status in (403, 404):
        return (
            f"{repo_id} cannot be written to with this token: it is someone else's, or the token may not write; choose "
            "a repo_id of your own, or a token with write permission."
        )
    said = f"answers {status}: {cause.server_message or cause}" if cause is not None else f"was not reached: {error}"
    return f"{repo_id}: the Hub {said.rstrip('. ')}. What is uploaded stays; the same command goes on."


# Coming back


def policy_folder(name: str | Path, revision: str | None = None) -> str:
    """
    The folder of a policy, which is downloaded if it is on the Hub.

    Args:
        name (`str` or `Path`):
            Folder or Hub id of a policy or of any other model.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `str`: the local folder of a policy; any other name as it is.

    Raises:
        `InputError`: The Hub fails while the policy is read.
    """
    if not _is_hub_id(name):
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
    patterns = [pattern for pattern in RUN_FILES if pattern != "trainer_state.json"]
    return str(_download(name, "model", revision, patterns, ["*/*"]))


def index_folder(name: str | Path, revision: str | None = None) -> Path:
    """As [`policy_folder`], of an index that `coaug push` put on the Hub; a name that is nowhere stays as it is."""
    if not _is_hub_id(name):
        return Path(name)
    return _download(name, "model", revision, [*INDEX_FILES, *BM25S_FILES], []) or Path(name)


def augmentations_folder(name: str | Path) -> Path:
    """As [`policy_folder`], of augmentations that `coaug push` put on the Hub."""
    if not _is_hub_id(name):
        return Path(name)
    return _download(name, "dataset", None, [MANIFEST, PROMPT_SET_FILE, "*.parquet"], []) or Path(name)


def commit_of(model: str, revision: str | None = None) -> str | None:
    """The commit of a model on the Hub, be it an adapter; `None` for one whose configuration is not there."""
    for name in ("config.json", "adapter_config.json"):
        try:
            return Path(hf_hub_download(model, name, revision=revision)).parent.name
        except EntryNotFoundError:
            continue
    return None


def _is_hub_id(name: str | Path) -> bool:
    return not Path(name).exists() and _HUB_ID.fullmatch(str(name)) is not None


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
