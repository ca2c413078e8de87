"""The Hugging Face Hub: what `coaug push` puts there, and how it is taken back."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
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
from .names import has_hub_form, is_hub_id
from .policy import ADAPTER_FILE, MODEL_WEIGHTS, POLICY_FILE, folder_hash
from .prompts import PROMPT_SET_FILE


CARD_FILE, MANIFEST, CURVES_FILE = "README.md", "manifest.json", "reward.png"
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
# What a push puts there, by kind: beginnings of folders, "" for the root, and names in them.
_PUSHED = {
    "policy": {"": (*RUN_FILES, CURVES_FILE), "evaluations/": EVALUATION_FILES},
    "index": {"": (*INDEX_FILES, *BM25S_FILES), "field_": BM25S_FILES},
    "dataset": {"": (MANIFEST, PROMPT_SET_FILE), "queries/": ("*.parquet",), "documents/": ("*.parquet",)},
    "space": {
        "": ("app.py", "requirements.txt", "queries.jsonl", "qrels.trec"),
        **dict.fromkeys(("coaug_trl/", "index/", "model/"), ("*",)),
    },
}
# And by which files a repository shows that it was pushed as that.
_MARKS = {
    "policy": {POLICY_FILE},
    "index": {MANIFEST, "retriever.json"},
    "dataset": {MANIFEST, PROMPT_SET_FILE},
    "space": {"app.py", "coaug_trl/demo.py"},
}
_NAMES = {"policy": "a policy", "index": "an index", "dataset": "augmentations", "space": "a Space"}


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
    """

    repo_type: str
    files: dict[str, Path | bytes]
    card: RepoCard | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """`"policy"`, `"index"`, `"dataset"` or `"space"`."""
        return self.repo_type if self.repo_type != "model" else "policy" if POLICY_FILE in self.files else "index"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path."""
        sizes = {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }
        if self.card:
            sizes[CARD_FILE] = len(str(self.card).encode())
        return sizes


# Pushing


def check_repo_id(repo_id: str) -> None:
    """Raises an `InputError` for what is not the name of a repository in a namespace."""
    try:
        validate_repo_id(repo_id)
        if not has_hub_form(repo_id):
            raise HFValidationError("it has no namespace, or one with other characters")
    except HFValidationError as error:
        raise InputError(f"repo_id is {repo_id!r}, which is no USER/NAME: {error}") from None


def check_access(token: str | None = None) -> None:
    """Raises an `InputError` if nothing could be uploaded: offline, or without a token."""
    if is_offline_mode():
        raise InputError("Nothing can be pushed in offline mode; unset HF_HUB_OFFLINE.")
    if (token or get_token()) is None:
        raise InputError("There is no token for the Hub; log in by hf auth login, or set HF_TOKEN.")


def check_private(repo_id: str, repo_type: str = "model", token: str | None = None) -> None:
    """Raises an `InputError` if a repository is one that others can see."""
    if not HfApi(token=token).repo_info(repo_id, repo_type=repo_type).private:
        raise InputError(
            f"{repo_id} is there already and public; make it private in its settings, or choose another repo_id."
        )


def push(
    upload: Upload,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload by coaug push",
    token: str | None = None,
) -> CommitInfo:
    """
    Uploads in one commit, so that a repository never holds half of one push and half of another; what an earlier push
    left there beside it goes. Of a push that failed halfway the Hub keeps the contents that it has, and the same push
    again sends the others only. That is why augmentations are Parquet files of this commit: `Dataset.push_to_hub`
    makes a commit of its own for each configuration.

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
        if private:
            check_private(**place, token=token)
        if revision:
            api.create_branch(**place, branch=revision, exist_ok=True)
        stale = _stale_files(upload, api.list_repo_files(**place, revision=revision), repo_id)
        files = dict(upload.files)
        if upload.card:
            files[CARD_FILE] = str(upload.card).encode()
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, file) for name, file in files.items()]
        return api.create_commit(**place, operations=operations, commit_message=commit_message, revision=revision)


def _stale_files(upload: Upload, present: list[str], repo_id: str) -> list[str]:
    """What an earlier push left that would mix with these files; refuses a repository of something else."""
    kinds = ("policy", "index") if upload.repo_type == "model" else (upload.kind,)
    held = next((kind for kind in kinds if _MARKS[kind] <= set(present)), None)
    others = [name for name in present if name not in (".gitattributes", CARD_FILE)]
    if held != upload.kind and others:
        holds = _NAMES[held] if held else f"{others[0]}, which no coaug push put there"
        raise InputError(f"{repo_id} holds {holds}, and this is {_NAMES[upload.kind]}; choose another repo_id.")
    return [name for name in others if name not in upload.files and _is_pushed(name, upload.kind)]


def _is_pushed(path: str, kind: str) -> bool:
    """Whether a file has the place and the name of one that is pushed."""
    folder, slash, name = path.rpartition("/")
    return any(
        (folder + slash).startswith(beginning) if beginning else not folder
        for beginning, patterns in _PUSHED[kind].items()
        if any(fnmatch(name, pattern) for pattern in patterns)
    )


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


def fingerprint(model: str, revision: str | None = None) -> str | None:
    """
    What a model is known by: the fingerprint of a folder's weights, or the commit on the Hub. That of an adapter is
    followed by that of its base model, after a plus sign.

    Args:
        model (`str`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `str`: the fingerprint; `None` where there are no weights, as beside a server that has them.

    Raises:
        `InputError`: The Hub cannot be reached.
    """
    if Path(model).is_dir():
        known, adapter = folder_hash(model), Path(model) / ADAPTER_FILE
    else:
        config, adapter = (_cached(model, name, revision) for name in ("config.json", ADAPTER_FILE))
        known = next((path.parent.name for path in (config, adapter) if path), None)
    if known is None or adapter is None or not adapter.is_file():
        return known or revision
    try:
        config = json.loads(adapter.read_text(encoding="utf-8"))
        base, base_revision = config.get("base_model_name_or_path"), config.get("revision")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{adapter}: not the configuration of an adapter ({error}); restore the file.") from None
    base = fingerprint(base, base_revision) if isinstance(base, str) else None
    return f"{known}+{base}" if base else known


def _cached(model: str, name: str, revision: str | None) -> Path | None:
    """A small file of a model on the Hub, `None` if it has none."""
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        return None
    except HTTPError as error:
        raise InputError(f"{model} cannot be read: {error}") from None


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
