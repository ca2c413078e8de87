"""The folder that `coaug augment` writes: its manifest, its answers, and the texts they make."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.collection import Collection
from ..data.document import Document, document_text
from ..policy.download import augmentations_folder
from ..policy.prompts import PromptSet
from ..policy.settings import GenerationSettings, PolicySettings
from ..utils.errors import InputError
from ..utils.files import read_json


# vLLM's CPU engine cannot live beside what bm25s loads, and generating needs no retriever.
if TYPE_CHECKING:
    from ..retrieval import Retriever

MANIFEST = "manifest.json"
SIDES = ("query", "document")
FILES = {"query": "queries.jsonl", "document": "documents.jsonl"}
# What must agree for answers to be used together: resuming, and queries beside documents. The model is known by its
# revision, the fingerprint of its weights, wherever they lie; by its name only where there is no revision.
IDENTITY = ("revision", "prompt_hash", "generation", "collection")
_ANSWER_KEYS = ("_id", "augmentation", "complete")


@dataclass(frozen=True)
class AugmentedCollection:
    """
    Augmentations read from a folder, and the texts they make.

    Args:
        prompt_set: Composes texts and answers.
        manifest: Where the answers come from.
        answers: By side, answers by id; a side that was not augmented is absent.
    """

    prompt_set: PromptSet
    manifest: dict[str, Any]
    answers: dict[str, dict[str, str]] = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path, sides: Iterable[str] = SIDES) -> "AugmentedCollection":
        """
        Reads a folder of augmentations, or a dataset on the Hub that `coaug push` made of one.

        Raises `InputError`: The folder holds no finished augmentations of any of `sides`, has begun one and not
            finished it, or a file is damaged or was changed.
        """
        name, folder = folder, augmentations_folder(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(f"{name}: no augmentations there ({MANIFEST} is missing); make them with coaug augment.")
        answers = {}
        for side in sides:
            path = folder / FILES[side]
            if side in manifest["sides"] and (path.is_file() or path.with_suffix("").is_dir()):
                answers[side] = {row["_id"]: row["augmentation"] for row in read_rows(path)}
            elif path.with_suffix(".shards").is_dir() or path.with_suffix(".partial.jsonl").is_file():
                raise InputError(f"{path} was begun but not finished; run coaug augment again to go on.")
            elif side in manifest["sides"]:
                raise InputError(f"{name}: {path.name} is missing there; restore it, or run coaug augment again.")
        if not answers:
            wanted = " or ".join(FILES[side] for side in sides)
            raise InputError(f"{folder}: there is no {wanted} yet; make them with coaug augment.")
        prompt_set = PromptSet.load(folder)
        if prompt_set.hash != manifest["prompt_hash"]:
            raise InputError(
                f"{folder}: the prompt set has the hash {prompt_set.hash}, but the augmentations were made with "
                f"{manifest['prompt_hash']}; restore its file, or augment again into another folder."
            )
        return cls(prompt_set, manifest, answers)

    @property
    def settings(self) -> PolicySettings:
        """What they were made with."""
        generation = GenerationSettings(**self.manifest["generation"])
        return PolicySettings(self.prompt_set, generation, self.manifest["retriever"])

    def check(self, collection: Collection, prompt_set: PromptSet, retriever: dict[str, Any]) -> None:
        """Raises an `InputError` if training with these could not have made such augmentations."""
        ours, labels = self.prompt_set.hash, ("the augmentations", "training")
        advice = "augment the documents with a policy of the same settings"
        if self.manifest["collection"] != collection.name:
            raise InputError(
                f"The augmentations were made for the collection {self.manifest['collection']}, and training is for "
                f"{collection.name}; {advice}."
            )
        said = f"The augmentations were made for the prompt set {ours}, and training is for {prompt_set.hash}"
        self.settings.refuse_mismatch(said, labels, advice, prompt_set=prompt_set)
        said = (
            f"The augmentations were made for the retriever {self.settings.retriever}, and training is for {retriever}"
        )
        self.settings.refuse_mismatch(said, labels, advice, retriever=retriever)

    def queries(self, collection: Collection) -> dict[str, str]:
        """Texts to search for the judged queries, by id."""
        answers = self._checked("query", collection.qrels)
        return {
            id_: self.prompt_set.compose_query(collection.queries[id_], answers.get(id_, ""))
            for id_ in collection.qrels
        }

    def documents(self, collection: Collection, field: str = "text") -> list[Document]:
        """Documents to index; `field` is the retriever's `answer_field`."""
        answers = self._checked("document", collection.corpus)
        return [
            self.prompt_set.compose_document(document, answers.get(id_, ""), field)
            for id_, document in collection.corpus.items()
        ]

    def _checked(self, side: str, ids: Iterable[str]) -> dict[str, str]:
        answers = self.answers.get(side)
        if answers is None:
            return {}
        missing = [id_ for id_ in ids if id_ not in answers]
        if missing:
            raise InputError(
                f"The augmentations of {self.manifest['collection']} lack {len(missing)} {FILES[side][:-6]}, such as "
                f"{missing[0]!r}; augment this split with coaug augment --side {side}."
            )
        return answers


def side_texts(collection: Collection, side: str) -> Iterator[tuple[str, str]]:
    """Ids and texts of one side, as the model reads them: all documents, or the judged queries."""
    if side == "query":
        return ((id_, collection.queries[id_]) for id_ in collection.qrels)
    return ((document.id, document_text(document)) for document in collection.corpus.values())


def describe_side(side: str, counts: dict[str, Any]) -> str:
    """A line on one side of a manifest."""
    line = (
        f"{side}: {counts['texts']:,} texts, {counts['empty']:,} left as they were, {counts['incomplete']:,} answers "
        f"incomplete, {counts['truncated']:,} texts cut"
    )
    if retried := counts.get("retried"):
        line += f"; {retried['texts']:,} answers were tried again, of which {retried['repaired']:,} are complete"
    return line


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a folder, `None` if there is none; an `InputError` if it is not one of augmentations."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, "restore it, or augment again into another folder")
    wanted = {"model", *IDENTITY, "retriever", "sides"}
    if not manifest.keys() >= wanted or not all(
        isinstance(manifest[key], dict) for key in ("generation", "retriever", "sides")
    ):
        raise InputError(f"{path}: not the manifest of augmentations; choose another folder.")
    return manifest


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of answers, which is a folder of Parquet files on the Hub; none if there is neither."""
    if not path.is_file():
        from pyarrow import parquet

        for part in sorted(path.with_suffix("").glob("*.parquet")):
            try:
                yield from map(_check_row, parquet.read_table(part, columns=list(_ANSWER_KEYS)).to_pylist())
            except (ValueError, TypeError) as error:  # Arrow's own errors are ValueErrors
                raise InputError(
                    f"{part}: not rows of {', '.join(_ANSWER_KEYS)} ({error}); push the augmentations again."
                ) from None
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = _check_row(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}: not a row of {', '.join(_ANSWER_KEYS)}; delete the file and run coaug "
                    "augment again, which writes it from what is recorded."
                ) from None
            yield row


def _check_row(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row["_id"], str) or not isinstance(row["augmentation"], str):
        raise TypeError(f"_id is {row['_id']!r}, augmentation is {row['augmentation']!r}")
    return {key: row[key] for key in _ANSWER_KEYS}


def compose(
    collection: Collection, augmented: AugmentedCollection | None, retriever: "Retriever"
) -> tuple[dict[str, str], list[Document]]:
    """
    The texts that are searched for and indexed.

    Args:
        collection: Its judged queries and its documents.
        augmented: What is added to them.
        retriever: Knows the field that an augmentation joins.

    Returns: queries by id, and documents.
    """
    if augmented is None:
        queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
        return queries, list(collection.corpus.values())
    return augmented.queries(collection), augmented.documents(collection, retriever.answer_field)
