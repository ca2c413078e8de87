"""The folder that serves a collection: its index, its documents as they are, and which policy may augment queries."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from ..augmentation.folder import compose
from ..data.collection import Collection
from ..data.document import Document
from ..policy.prompts import PROMPT_SET_FILE, PromptSet
from ..policy.settings import GenerationSettings, PolicySettings, package_versions, retriever_differences
from ..retrieval import Retriever, load_retriever
from ..utils.errors import InputError
from ..utils.files import read_json, write_json, write_jsonl
from ..utils.terminal import note


# A search without a policy does without torch.
if TYPE_CHECKING:
    from ..augmentation.augmenter import Augmenter
    from ..augmentation.folder import AugmentedCollection

MANIFEST = "manifest.json"
DOCUMENTS_FILE = "documents.jsonl"
# What an index must know of its augmentations.
AUGMENTED_WITH = {"model", "revision", "prompt_hash", "generation", "retriever"}


class Result(NamedTuple):
    """
    What a search found for one query.

    Args:
        query: The query as it was asked.
        augmentation: What a policy added to it; `None` without a policy.
        hits: `rank`, `score`, `_id`, `title` and `text` of each hit, best first; texts are those of the collection.
    """

    query: str
    augmentation: str | None
    hits: list[dict[str, Any]]


class Timing(NamedTuple):
    """
    How long the parts of a search took, in seconds.

    Args:
        augment: Augmenting the query.
        search: Finding documents and reading their texts.
    """

    augment: float
    search: float

    @property
    def total(self) -> float:
        """Both."""
        return self.augment + self.search


@dataclass(frozen=True)
class SearchIndex:
    """
    An indexed collection, in a folder.

    Args:
        folder (`Path`):
            The folder.
        manifest (`dict[str, Any]`):
            What is indexed: collection, retriever, manifest of the augmentations if there are any, versions.
        retriever ([`~coaug_trl.retrieval.Retriever`]):
            With the index.
        hub_id (`str`, *optional*):
            Where on the Hub it is from.
    """

    folder: Path
    manifest: dict[str, Any]
    retriever: Retriever
    hub_id: str | None = None

    @property
    def name(self) -> str:
        """What messages call it: its id on the Hub, or its folder."""
        return self.hub_id or str(self.folder)

    @classmethod
    def build(
        cls, collection: Collection, augmented: "AugmentedCollection | None", retriever: Retriever, folder: str | Path
    ) -> "SearchIndex":
        """
        Indexes a collection into a folder; one that holds an index gets this one instead.

        Args:
            collection ([`~coaug_trl.Collection`]):
                Its documents.
            augmented ([`~coaug_trl.augmentation.folder.AugmentedCollection`] or `None`):
                What is added to them.
            retriever ([`~coaug_trl.retrieval.Retriever`]):
                Makes the index.
            folder (`str` or `Path`):
                The folder.

        Raises:
            `InputError`: The folder holds something else, or the retriever cannot index the documents.
        """
        folder = Path(folder)
        refuse_other_content(folder)
        _, documents = compose(collection, augmented, retriever)
        retriever.index(documents)
        manifest = {
            "finished": False,
            "collection": collection.name,
            "num_documents": len(collection.corpus),
            "retriever": retriever.config,
            "augmentations": augmented.manifest if augmented else None,
            "versions": package_versions(),
        }
        # Until the last line the manifest says that the index is not finished, also where it replaces another.
        write_json(folder / MANIFEST, manifest)
        (folder / PROMPT_SET_FILE).unlink(missing_ok=True)
        retriever.save(folder)
        # The documents as they are, not as they are indexed: a search shows what its user knows of the collection.
        write_jsonl(
            folder / DOCUMENTS_FILE,
            (
                {"_id": document.id, "title": document.title, "text": document.text}
                for document in collection.corpus.values()
            ),
        )
        if augmented:
            augmented.prompt_set.save(folder)
        manifest |= {"finished": True}
        write_json(folder / MANIFEST, manifest)
        return cls(folder, manifest, retriever)

    @classmethod
    def load(cls, name: str | Path, revision: str | None = None) -> "SearchIndex":
        """
        Reads an index that [`build`] made.

        Args:
            name (`str` or `Path`):
                Its folder, or where `coaug push` put it on the Hub.
            revision (`str`, *optional*):
                Revision on the Hub.

        Returns:
            [`SearchIndex`]: the index.

        Raises:
            `InputError`: There is no finished index, or a file is damaged.
        """
        folder = Path(name)
        if not folder.is_dir():
            from ..policy.download import index_folder  # a search of a local index starts faster without

            folder = index_folder(name, revision)
        manifest = _read_manifest(folder)
        if not manifest.get("finished"):
            fault = "the index was begun but not finished" if "finished" in manifest else "there is no index"
            raise InputError(f"{name}: {fault}; make it with coaug index.")
        _check_manifest(manifest, name)
        retriever = load_retriever(folder)
        if different := retriever_differences(manifest["retriever"], retriever.config):
            raise InputError(
                f"{name}: {MANIFEST} and retriever.json differ in {', '.join(different)}; index the collection again."
            )
        return cls(folder, manifest, retriever, hub_id=None if folder == Path(name) else str(name))

    def augmenter(self, model: str) -> "Augmenter":
        """
        Loads a policy that augments queries for this index, with the prompts its documents were augmented with.

        Args:
            model (`str`):
                Folder or Hub id.

        Returns:
            [`~coaug_trl.Augmenter`]: the policy. A note on standard error says if another one augmented the documents.

        Raises:
            `InputError`: There is no such model, or its prompts or retriever are not those of the index.
        """
        from ..augmentation.augmenter import Augmenter
        from ..policy.download import policy_folder

        made_with = self.manifest["augmentations"]
        settings = self._settings_for(model, PolicySettings.load(policy_folder(model)))
        augmenter = Augmenter.from_pretrained(model, settings.prompt_set, settings.generation)
        if made_with and augmenter.revision != made_with["revision"]:
            note(
                f"the queries are augmented by {augmenter.name} ({augmenter.revision}), the documents were by "
                f"{made_with['model']} ({made_with['revision']}); only one model for both sides has agreed on its "
                "words"
            )
        return augmenter

    def search(self, queries: Sequence[str], k: int = 10, augmenter: "Augmenter | None" = None) -> list[Result]:
        """
        Searches for queries.

        Args:
            queries (`Sequence[str]`):
                Query texts.
            k (`int`, *optional*, defaults to `10`):
                The most hits a query gets.
            augmenter ([`~coaug_trl.Augmenter`], *optional*):
                What [`augmenter`] loaded; without it queries are searched for as they are.

        Returns:
            `list[Result]`: one for each query.

        Raises:
            `InputError`: The folder lacks a document that was found.
        """
        return self._find(queries, self._answers(queries, augmenter), k, augmenter)

    def search_timed(
        self, queries: Sequence[str], k: int = 10, augmenter: "Augmenter | None" = None
    ) -> tuple[list[Result], list[Timing]]:
        """
        Searches for queries one at a time, as they come to a server, and measures how long each takes.

        Args:
            queries (`Sequence[str]`):
                As in [`search`].
            k (`int`, *optional*, defaults to `10`):
                Likewise.
            augmenter ([`~coaug_trl.Augmenter`], *optional*):
                Likewise.

        Returns:
            `tuple[list[Result], list[Timing]]`: one each for each query.
        """
        results, timings = [], []
        for query in queries:
            start = time.perf_counter()
            answers = self._answers([query], augmenter)
            augmented = time.perf_counter()
            results += self._find([query], answers, k, augmenter)
            timings.append(Timing(augmented - start, time.perf_counter() - augmented))
        return results, timings

    def documents(self, ids: set[str]) -> dict[str, dict[str, Any]]:
        """
        Reads documents as they are, not as they are indexed.

        Args:
            ids (`set[str]`):
                Their ids.

        Returns:
            `dict[str, dict[str, Any]]`: `_id`, `title` and `text` by id.

        Raises:
            `InputError`: The folder lacks one.
        """
        return _read_documents(self.folder / DOCUMENTS_FILE, ids)

    def read_all(self) -> list[Document]:
        """
        Reads all documents as they are, not as they are indexed.

        Raises:
            `InputError`: A line is damaged.
        """
        path, documents = self.folder / DOCUMENTS_FILE, []
        with open(path, "rb") as file:
            for line in tqdm(file, "Reading documents", self.manifest["num_documents"], delay=2, leave=False):
                try:
                    row = json.loads(line)
                    documents.append(Document(row["_id"], row["title"], row["text"]))
                except (ValueError, KeyError, TypeError):
                    raise InputError(
                        f"{path} is damaged, line {len(documents) + 1}; index the collection again."
                    ) from None
        return documents

    def _settings_for(self, model: str, settings: PolicySettings | None) -> PolicySettings:
        """Settings of a policy, or of another model those of the index; refused where the two do not belong together."""
        from ..policy.settings import PolicySettings

        made_with = self.manifest["augmentations"]
        theirs = PromptSet.load(self.folder) if made_with else None
        if theirs and theirs.hash != made_with["prompt_hash"]:
            raise InputError(f"{self.name}: {PROMPT_SET_FILE} has been changed; restore it, or index again.")
        generation = GenerationSettings(**made_with["generation"]) if made_with else GenerationSettings()
        settings = settings or PolicySettings(theirs or PromptSet.default(self.retriever.kind), generation)
        settings.refuse_mismatch(
            f"The policy {model} and the index {self.name} differ in their retriever",
            ("the policy", "the index"),
            "index the collection with the settings of the policy",
            retriever=self.retriever.config,
        )
        settings.refuse_mismatch(
            f"The documents of {self.name} were not augmented with the settings of {model}",
            ("the queries", "the documents"),
            "augment and index the collection with this model",
            prompt_set=theirs,
            generation=made_with and made_with["generation"],
        )
        settings.prompt_set.check_kind(self.retriever.kind, model)
        return settings

    def _answers(self, queries: Sequence[str], augmenter: "Augmenter | None") -> list[str | None]:
        if augmenter is None:
            return [None] * len(queries)
        return [augmentation.answer for augmentation in augmenter.generate("query", list(queries))]

    def _find(
        self, queries: Sequence[str], answers: list[str | None], k: int, augmenter: "Augmenter | None"
    ) -> list[Result]:
        texts = list(queries)
        if augmenter:
            compose_query = augmenter.settings.prompt_set.compose_query
            texts = [compose_query(query, answer) for query, answer in zip(queries, answers, strict=True)]
        found = self.retriever.search(texts, k)
        documents = self.documents({id_ for hits in found for id_, _ in hits})
        return [
            Result(
                query,
                answer,
                [{"rank": rank, "score": score} | documents[id_] for rank, (id_, score) in enumerate(hits, start=1)],
            )
            for query, answer, hits in zip(queries, answers, found, strict=True)
        ]


def refuse_other_content(folder: str | Path) -> None:
    """Refuses a folder that holds something other than an index, such as the augmentations to be indexed."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and "finished" not in _read_manifest(folder):
        raise InputError(f"{folder} holds something other than an index; choose another folder.")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index, or an empty dictionary if there is none that can be read."""
    try:
        return read_json(folder / MANIFEST, missing={})
    except InputError:
        return {}


def _check_manifest(manifest: dict[str, Any], name: str | Path) -> None:
    """Refuses a finished manifest that is not as [`SearchIndex.build`] writes it."""
    made_with, retriever = manifest.get("augmentations"), manifest.get("retriever")
    whole = (
        isinstance(manifest.get("collection"), str)
        and isinstance(manifest.get("num_documents"), int)
        and isinstance(retriever, dict)
        and "augmentations" in manifest
        and (
            made_with is None
            or isinstance(made_with, dict)
            and made_with.keys() >= AUGMENTED_WITH
            and isinstance(made_with["generation"], dict)
        )
    )
    if not whole:
        raise InputError(f"{name}: {MANIFEST} is damaged; index the collection again.")


def _read_documents(path: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    """The documents with these ids; the others of a large collection are not kept in memory."""
    # Only the lines that are wanted are parsed, by how they begin; no id holds a blank.
    beginnings = {json.dumps({"_id": id_}, ensure_ascii=False)[:-1].encode() for id_ in ids}
    documents = {}
    with open(path, "rb") as file:
        for line in file:
            if line.partition(b', "title": ')[0] in beginnings:
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                documents[row["_id"]] = row
                if len(documents) == len(ids):
                    break
    if len(documents) < len(ids):
        raise InputError(f"{path} is damaged: a document is missing; index the collection again.")
    return documents
