"""What `coaug push` puts on the Hugging Face Hub."""

import re
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
    is_offline_mode,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..policy.download import BM25S_FILES, CARD_FILE, CURVES_FILE, INDEX_FILES, MANIFEST, RUN_FILES, explained
from ..policy.prompts import PROMPT_SET_FILE
from ..policy.settings import POLICY_FILE
from ..utils.errors import InputError
from ..utils.names import has_hub_form


# Without the texts, which are those of the collection.
EVALUATION_FILES = (MANIFEST, "metrics.json", "run.trec", "qrels.trec", "per_query.jsonl")
# What a push puts there, by kind: beginnings of folders, "" for the root, and names in them.
_PUSHED = {
    "policy": {"": (*RUN_FILES, CURVES_FILE), "evaluations/": EVALUATION_FILES},
    "index": {"": (*INDEX_FILES, *BM25S_FILES), "field_": BM25S_FILES},
    "dataset": {"": (MANIFEST, PROMPT_SET_FILE), "queries/": ("*.parquet",), "documents/": ("*.parquet",)},
    "space": {
        "": ("app.py", "requirements.txt", "queries.jsonl", "qrels.trec"),
        **dict.fromkeys(("coaug_trl/", "index/", "model/"), ("*",)),  # coaug_trl/ up to version 0.1
    },
}
# And by which files a repository shows that it was pushed as that; a Space also by what its app imports.
_MARKS = {
    "policy": {POLICY_FILE},
    "index": {MANIFEST, "retriever.json"},
    "dataset": {MANIFEST, PROMPT_SET_FILE},
    "space": {"app.py", "requirements.txt"},
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


def is_demo_app(path: str | Path) -> bool:
    """Whether `app.py` is one that `coaug push` wrote, in this version or in 0.1."""
    app = Path(path).read_text(encoding="utf-8", errors="replace")
    return re.search(r"from coaug_trl\.(serving\.)?demo import Demo", app) is not None


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


def reserve(repo_id: str, private: bool | None, token: str | None = None) -> None:
    """
    Makes a repository that a training will be pushed to when it has ended.

    Raises:
        `InputError`: Nothing could be pushed to it, or it is to be private and others can see it.
    """
    check_access(token)
    with explained(repo_id):
        repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private:  # a repository that was there stays as public as it is
            check_private(repo_id, token=token)


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
        present = api.list_repo_files(**place, revision=revision)
        if upload.repo_type == "space" and _MARKS["space"] <= set(present):
            app = api.hf_hub_download(**place, filename="app.py", revision=revision)
            if not is_demo_app(app):
                raise InputError(f"{repo_id} holds another app than a demo of coaug push; choose another repo_id.")
        stale = _stale_files(upload, present, repo_id)
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
