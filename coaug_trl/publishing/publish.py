"""What a run, augmentations or an index are on the Hub: which files, without paths of this machine, and which card."""

import json
import tempfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import RepoCard

from ..policy.download import BM25S_FILES, CARD_FILE, CURVES_FILE, INDEX_FILES, MANIFEST, RUN_FILES
from ..policy.fingerprint import ADAPTER_FILE, MODEL_WEIGHTS
from ..policy.prompts import PROMPT_SET_FILE
from ..policy.settings import POLICY_FILE
from ..utils.errors import InputError
from ..utils.files import read_json
from ..utils.names import is_local, last_part, without_folders
from .record import RunRecord, load_record
from .upload import EVALUATION_FILES, Upload, check_repo_id


if TYPE_CHECKING:
    from ..augmentation.folder import AugmentedCollection
    from ..training.trainer import CoAugTrainer

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
        folder (`str` or `Path`):
            `output_dir` of a training, or a folder made by `coaug augment` or `coaug index`.
        repo_id (`str`):
            `USER/NAME`, for the card.
        evaluations (`Iterable[str | Path]`, *optional*):
            Of a run: evaluation folders that are not beneath it.
        collection (`str`, *optional*):
            Of augmentations: the collection they belong to, whose texts then go out with them.
        split (`str`, *optional*, defaults to `"test"`):
            Its split.

    Returns:
        [`Upload`]: for [`push`].

    Raises:
        `InputError`: There is nothing that could be pushed, or it is not finished.
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
        return prepare_index(folder, repo_id)
    if kind == "augmentations":
        return prepare_augmentations(folder, repo_id, collection, split)
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
        folder (`str` or `Path`):
            `output_dir` of the training, or a checkpoint in it.
        repo_id (`str`):
            As in [`prepare`].
        evaluations (`Iterable[str | Path]`, *optional*):
            Likewise.
        tags (`Iterable[str]`, *optional*):
            Further tags of the card.

    Returns:
        [`Upload`]: to a model repository.

    Raises:
        `InputError`: There are no weights, or not all of them, or a file is damaged.
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
        trainer ([`~coaug_trl.CoAugTrainer`]):
            The run.
        name (`str`, *optional*):
            The model's name, where the trainer has no `hub_model_id`.
        tags (`Iterable[str]`, *optional*):
            Further tags.
    """
    folder = Path(trainer.args.output_dir)
    record = RunRecord(folder, trainer.settings, trainer.training, trainer.state.log_history, [])
    name = trainer.hub_model_id or trainer.args.hub_model_id or name or folder.absolute().name
    card, pictures = describe_run(record, name, tags)
    card.save(folder / CARD_FILE)
    for picture, content in pictures.items():
        (folder / picture).write_bytes(content)


def prepare_index(folder: str | Path, repo_id: str) -> Upload:
    """
    An index, with its first field at the root of the repository, where `bm25s.hf.BM25HF` looks for an index.

    Args:
        folder (`str` or `Path`):
            Made by `coaug index`.
        repo_id (`str`):
            As in [`prepare`].

    Returns:
        [`Upload`]: to a model repository, as bm25s has its indexes.

    Raises:
        `InputError`: The index is not finished, or is damaged.
    """
    from ..retrieval.bm25 import field_folder
    from ..serving.index import SearchIndex
    from .cards import index_card

    index = SearchIndex.load(folder)
    folder = index.folder
    files = select_files(folder, INDEX_FILES)
    for place in range(len(list(folder.glob("field_*"))) or 1):
        inner = f"field_{place}/" if place else ""
        files |= {inner + name: file for name, file in select_files(field_folder(folder, place), BM25S_FILES).items()}
    card = index_card(index.manifest, repo_id)
    return Upload("model", files, card, _note_encoder(index.manifest["retriever"]))


def prepare_augmentations(folder: str | Path, repo_id: str, collection: str | None, split: str) -> Upload:
    """
    Augmentations as a dataset of the configurations `queries` and `documents`.

    Args:
        folder (`str` or `Path`):
            Made by `coaug augment`.
        repo_id (`str`):
            As in [`prepare`].
        collection (`str` or `None`):
            Collection whose texts go out as well, alone and composed with what is added to them, so that anyone can
            index them.
        split (`str`):
            Its split.

    Returns:
        [`Upload`]: to a dataset repository. Columns are `_id`, `augmentation`, `complete`; with texts also `title` (of
        documents), `text` and `augmented_text`.

    Raises:
        `InputError`: The augmentations are not finished, or belong to another collection or split.
    """
    import pyarrow
    from pyarrow import parquet

    from ..augmentation.folder import FILES, AugmentedCollection, read_rows
    from ..data.collection import Collection
    from .cards import augmentations_card

    folder = Path(folder)
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
    card = augmentations_card(augmented.manifest, repo_id, loaded is not None)
    return Upload("dataset", files, card)


def _texts(
    augmented: "AugmentedCollection", collection: Any, side: str, ids: list[str], folder: Path
) -> dict[str, list[str]]:
    """Columns of the texts of one side."""
    from ..data.document import document_text

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


def prepare_space(folder: str | Path, paths: Iterable[Path]) -> Upload:
    """Those files of a folder that [`~coaug_trl.publishing.space.write_space`] wrote, with the Space's own card among them."""
    return Upload("space", {path.relative_to(folder).as_posix(): path for path in paths})


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
