"""What `coaug push` puts on the Hugging Face Hub: which files, without paths of this machine, with which card."""

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from ..augmentation.folder import FILES, AugmentedCollection, read_rows
from ..data.collection import Collection
from ..data.document import document_text
from ..policy.download import BM25S_FILES, CARD_FILE, CURVES_FILE, INDEX_FILES, MANIFEST, RUN_FILES, explained
from ..policy.fingerprint import ADAPTER_FILE, MODEL_WEIGHTS
from ..policy.prompts import PROMPT_SET_FILE
from ..policy.settings import POLICY_FILE
from ..retrieval.bm25 import field_folder
from ..serving.index import SearchIndex
from ..utils.errors import InputError
from ..utils.files import read_json
from ..utils.names import has_hub_form, is_local, last_part, without_folders
from .record import RunRecord, load_record


if TYPE_CHECKING:
    from ..training.trainer import CoAugTrainer


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
DEMO_APP = re.compile(r"from coaug_trl\.(serving\.)?demo import Demo")  # without serving in version 0.1
_NAMES = {"policy": "a policy", "index": "an index", "dataset": "augmentations", "space": "a Space"}


# JSON files that may hold paths; in the others a string that looks like one is a token.
_WITH_PATHS = (
    "config.json",
    "generation_config.json",
    ADAPTER_FILE,
    "tokenizer_config.json",
    POLICY_FILE,
    "training.json",
    "trainer_state.json",
    "retriever.json",
    "metrics.json",
    MANIFEST,
)


@dataclass(frozen=True)
class Upload:
    """
    What goes into a repository.

    Args:
        repo_type: `"model"`, `"dataset"` or `"space"`.
        files: By their path in the repository: a file, or the content of one.
        card: The page of the repository; `None` for files that have their own.
        notes: What its user should know beforehand, a line each.
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
    def contents(self) -> dict[str, Path | bytes]:
        """The files, with the card among them."""
        return self.files | ({CARD_FILE: str(self.card).encode()} if self.card else {})

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.contents.items()
        }


def prepare(
    folder: str | Path,
    repo_id: str,
    evaluations: Iterable[str | Path] = (),
    collection: str | None = None,
    split: str = "test",
) -> Upload:
    """
    What a folder is on the Hub: a run, augmentations or an index, as its content says. Reads only.

    Args:
        folder: `output_dir` of a training, or a folder made by `coaug augment` or `coaug index`.
        repo_id: `USER/NAME`, for the card.
        evaluations: Of a run: evaluation folders that are not beneath it.
        collection: Of augmentations: the collection they belong to, whose texts then go out with them.
        split: Its split.

    Returns: for [`push`].

    Raises `InputError`: There is nothing that could be pushed, or it is not finished.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder.")
    manifest = read_json(folder / MANIFEST, missing={})
    kind = "run"
    if not (folder / POLICY_FILE).is_file():
        kind = "index" if "finished" in manifest else "augmentations" if "sides" in manifest else "other"
    if evaluations and kind != "run":
        raise InputError(f"{folder} holds no trained policy; leave --evaluations out.")
    if collection and kind != "augmentations":
        raise InputError(f"{folder} holds no augmentations; leave --collection out.")
    if kind == "run":
        return prepare_run(folder, repo_id, evaluations)
    if kind == "index":
        return _prepare_index(folder, repo_id)
    if kind == "augmentations":
        return _prepare_augmentations(folder, repo_id, collection, split)
    if checkpoints := sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime):
        raise InputError(
            f"{folder} has checkpoints but no finished policy; let the same coaug train command finish it, or push a "
            f"checkpoint: coaug push {checkpoints[-1]}."
        )
    raise InputError(
        f"{folder} holds nothing to push: give the output_dir of a training, a folder of augmentations made by coaug "
        "augment, or an index made by coaug index."
    )


def prepare_run(
    folder: str | Path, repo_id: str, evaluations: Iterable[str | Path] = (), tags: Iterable[str] = ()
) -> Upload:
    """
    A trained policy: model or adapter, tokenizer, prompts, retriever, training, evaluations, card and curves.

    Args:
        folder: `output_dir` of the training, or a checkpoint in it.
        repo_id: As in [`prepare`].
        evaluations: Likewise.
        tags: Further tags of the card.

    Returns: to a model repository.

    Raises `InputError`: There are no weights, or not all of them, or a file is damaged.
    """
    folder, evaluations = Path(folder), [Path(path) for path in evaluations]
    record = load_record(folder, evaluations)
    check_weights(folder)
    files = select_files(folder, RUN_FILES)
    for place, evaluated in _evaluation_places(record, evaluations).items():
        files |= {
            f"evaluations/{place}/{name}": file for name, file in select_files(evaluated, EVALUATION_FILES).items()
        }
    card, curves = describe_run(record, repo_id, tags)
    files |= curves
    notes = []
    adapter = read_json(folder / ADAPTER_FILE, missing={})
    if is_local(base := adapter.get("base_model_name_or_path")):
        notes.append(
            f"the adapter's base model is {base}, a folder of this machine: others cannot load it. Train from a model "
            "of the Hub, or merge the adapter into its base model before."
        )
    notes += _note_encoder(record.settings.retriever)
    if not record.evaluations:
        notes.append(
            f"the card shows no evaluation, since none is beneath {folder}; make some by coaug baselines --policy "
            f"{folder} --output {folder / 'baselines'}, or name a folder of them by --evaluations."
        )
    return Upload("model", files, card, notes)


def describe_run(
    record: RunRecord, repo_id: str, tags: Iterable[str] = ()
) -> tuple[RepoCard, dict[str, Path | bytes]]:
    """The card of a run, and the picture it shows, if there is something to draw."""
    from .cards import draw_curves, model_card

    card = model_card(record, repo_id)
    card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / CURVES_FILE
        return card, {CURVES_FILE: path.read_bytes()} if draw_curves(record, path) else {}


def write_run_card(trainer: "CoAugTrainer", name: str | None = None, tags: Iterable[str] = ()) -> None:
    """
    Writes the card of a run as it is now into its `output_dir`, with its picture: the `card_writer` of
    [`~coaug_trl.CoAugTrainer`].

    Args:
        trainer: The run.
        name: The model's name, where the trainer has no `hub_model_id`.
        tags: Further tags.
    """
    folder = Path(trainer.args.output_dir)
    record = RunRecord(folder, trainer.settings, trainer.training, trainer.state.log_history, [])
    name = trainer.hub_model_id or trainer.args.hub_model_id or name or folder.absolute().name
    card, pictures = describe_run(record, name, tags)
    card.save(folder / CARD_FILE)
    for picture, content in pictures.items():
        (folder / picture).write_bytes(content)


def _prepare_index(folder: Path, repo_id: str) -> Upload:
    """
    An index in a model repository, as bm25s has its indexes; its first field is at the root, where `BM25HF` of bm25s
    looks for one.
    """
    from .cards import index_card

    index = SearchIndex.load(folder)
    folder = index.folder
    files = select_files(folder, INDEX_FILES)
    for place in range(len(list(folder.glob("field_*"))) or 1):
        inner = f"field_{place}/" if place else ""
        files |= {inner + name: file for name, file in select_files(field_folder(folder, place), BM25S_FILES).items()}
    return Upload("model", files, index_card(index.manifest, repo_id), _note_encoder(index.manifest["retriever"]))


def _prepare_augmentations(folder: Path, repo_id: str, collection: str | None, split: str) -> Upload:
    """
    A dataset of the configurations `queries` and `documents`: `_id`, `augmentation`, `complete`. Where the collection
    is given its texts go out as well, alone and composed with what is added to them, so that anyone can index them.
    """
    import pyarrow
    from pyarrow import parquet

    from .cards import augmentations_card

    augmented = AugmentedCollection.load(folder)
    loaded = Collection.load(collection, split) if collection else None
    if loaded and loaded.name != augmented.manifest["collection"]:
        raise InputError(
            f"{folder} belongs to the collection {augmented.manifest['collection']}, not to {loaded.name}."
        )
    files = select_files(folder, (MANIFEST, PROMPT_SET_FILE))
    for side in augmented.answers:
        rows = list(read_rows(folder / FILES[side]))
        columns = {name: [row[name] for row in rows] for name in ("_id", "augmentation", "complete")}
        if loaded:
            columns |= _texts(augmented, loaded, side, columns["_id"], folder)
        table = BytesIO()
        parquet.write_table(pyarrow.table(columns), table)
        files[f"{Path(FILES[side]).stem}/train-00000-of-00001.parquet"] = table.getvalue()
    return Upload("dataset", files, augmentations_card(augmented.manifest, repo_id, loaded is not None))


def _texts(
    augmented: AugmentedCollection, collection: Collection, side: str, ids: list[str], folder: Path
) -> dict[str, list[str]]:
    """Columns of the texts of one side."""
    texts = collection.queries if side == "query" else collection.corpus
    if missing := next((id_ for id_ in ids if id_ not in texts), None):
        raise InputError(
            f"{folder} has {side} {missing!r}, which is not in {collection.name} ({collection.split}); give the split "
            "that was augmented as --split, or leave --collection out."
        )
    answers, compose = augmented.answers[side], augmented.prompt_set
    if side == "query":
        return {
            "text": [texts[id_] for id_ in ids],
            "augmented_text": [compose.compose_query(texts[id_], answers[id_]) for id_ in ids],
        }
    # As BM25Retriever has it: with two fields the answer joins the title.
    joined = "title" if augmented.manifest["retriever"].get("fields") == "best" else "text"
    return {
        "title": [texts[id_].title for id_ in ids],
        "text": [texts[id_].text for id_ in ids],
        "augmented_text": [document_text(compose.compose_document(texts[id_], answers[id_], joined)) for id_ in ids],
    }


def select_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path | bytes]:
    """The files of a folder with these names; those that hold absolute paths as contents without them."""
    paths = {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()}
    files: dict[str, Path | bytes] = {}
    for name, path in paths.items():
        if name.startswith("."):  # temporary
            continue
        files[name] = path
        if name in _WITH_PATHS:
            content = read_json(path, missing={})
            if (cleaned := without_folders(content)) != content:
                files[name] = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def check_weights(folder: Path) -> None:
    """Raises an `InputError` if weights are missing, or are in a format that can run code."""
    weights = [path for pattern in MODEL_WEIGHTS for path in folder.glob(pattern)]
    if not weights:
        pickles = next(iter(sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")])), None)
        if pickles:
            raise InputError(f"{pickles} is a pickle, which does not go out; save the model as safetensors.")
        raise InputError(
            f"{folder} holds no weights (*.safetensors); let the same coaug train command finish the run, or push a "
            "checkpoint of it."
        )
    shards = read_json(folder / "model.safetensors.index.json", missing={}).get("weight_map", {})
    if missing := sorted(set(shards.values()) - {path.name for path in weights}):
        raise InputError(
            f"{folder} lacks {missing[0]}, a part of the weights; bring it back, or save the model again."
        )


def _evaluation_places(record: RunRecord, given: list[Path]) -> dict[str, Path]:
    """Where each evaluation goes beneath `evaluations`: its path beneath the run, or beneath the folder given."""
    places: dict[str, Path] = {}
    for evaluated in record.evaluations:
        folder = evaluated.folder
        root = next((root for root in (record.folder, *given) if folder.is_relative_to(root)), folder)
        place = folder.relative_to(root).as_posix().removeprefix("evaluations/")
        place = folder.resolve().name if place == "." else place
        if place in places:  # of two folders given
            place = f"{root.resolve().name}/{place}"
        places[place] = folder
    return places


def _note_encoder(retriever: dict[str, Any]) -> list[str]:
    encoder = retriever.get("model")
    if not is_local(encoder):
        return []
    return [
        f"the retriever's encoder is {encoder}, a folder of this machine: others need a copy of it, as a folder "
        f"{last_part(encoder)} where they work or as --encoder. Push the encoder, and train and index with its Hub id."
    ]


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


def _make_repository(api: HfApi, repo_id: str, private: bool | None, **place: str) -> None:
    """Makes a repository if it is not there; refuses one that is to be private and that others can see."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **place).repo_id
    if private and not api.repo_info(repo_id, repo_type=place.get("repo_type")).private:
        raise InputError(
            f"{repo_id} is there already and public; make it private in its settings, or choose another repo_id."
        )


def reserve(repo_id: str, private: bool | None, token: str | None = None) -> None:
    """
    Makes a repository that a training will be pushed to when it has ended.

    Raises `InputError`: Nothing could be pushed to it, or it is to be private and others can see it.
    """
    check_access(token)
    with explained(repo_id):
        _make_repository(HfApi(token=token), repo_id, private)


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
        upload: What [`prepare`] returned.
        repo_id: `USER/NAME`; made if it is not there.
        private: Whether others may not see it; the namespace decides by default.
        revision: Branch, made if it is not there; defaults to the main one.
        commit_message: As git shows it.
        token: Of the Hub; defaults to that of `hf auth login` or `HF_TOKEN`.

    Returns: with `repo_url` and `commit_url`.

    Raises `InputError`: There is no token, the repository is not the user's, or is public where `private` is asked
        for, or holds something else, or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    check_access(token)
    api, place = HfApi(token=token), {"repo_id": repo_id, "repo_type": upload.repo_type}
    with explained(repo_id):
        sdk = {"space_sdk": "gradio"} if upload.repo_type == "space" else {}
        _make_repository(api, private=private, **place, **sdk)
        if revision:
            api.create_branch(**place, branch=revision, exist_ok=True)
        present = api.list_repo_files(**place, revision=revision)
        if upload.repo_type == "space" and _MARKS["space"] <= set(present):
            app = api.hf_hub_download(**place, filename="app.py", revision=revision)
            if not DEMO_APP.search(Path(app).read_text(encoding="utf-8", errors="replace")):
                raise InputError(f"{repo_id} holds another app than a demo of coaug push; choose another repo_id.")
        stale = _stale_files(upload, present, repo_id)
        operations = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, file) for name, file in upload.contents.items()]
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
