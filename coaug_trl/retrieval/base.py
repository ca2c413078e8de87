"""The interface that training, augmentation, evaluation and serving share."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from ..data.document import Document
from ..utils.errors import InputError
from ..utils.files import read_json


Run = dict[str, dict[str, float]]
SCORE_CHUNK = 1 << 22  # scores held at a time: 32 MB in float64
SAMPLE_EVERY = 16  # a larger sample costs more to sort, a smaller one leaves more
INDEX_AGAIN = "index the collection again"  # what to do about a damaged index


class EncodedDocuments(Protocol):
    """Documents as a retriever reads them, to be scored many times: term counts for BM25, embeddings for dense."""

    def __len__(self) -> int: ...

    def take(self, places: np.ndarray) -> Self:
        """The documents at these places, in this order."""

    @classmethod
    def concatenate(cls, parts: "list[Self]") -> Self:
        """One after the other, as of several processes."""


class PlainDocuments(list[Document]):
    """Documents as they are."""

    def take(self, places: np.ndarray) -> Self:
        return PlainDocuments(self[place] for place in places)

    @classmethod
    def concatenate(cls, parts: "list[Self]") -> Self:
        return cls(document for part in parts for document in part)


class Retriever(ABC):
    """
    Scores queries against documents, in a training step ([`score`]) and from an index ([`search`]).

    One retriever with one `config` serves training, evaluation and deployment. What it learns from a corpus (BM25:
    document frequencies and the average length) is separate from what it scores: [`fit`] sets it, [`score`] uses it
    whatever documents it is given.
    """

    kind: ClassVar[str]
    """`"sparse"` or `"dense"`: prompts are chosen by it."""

    answer_field: str = "text"
    """The field of a document that an augmentation joins, `"text"` or `"title"`."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The settings that change scores, JSON-able; `"retriever"` names the class of retriever."""

    @abstractmethod
    def fit(self, documents: list[Document]) -> None:
        """Sets the corpus statistics [`score`] uses; a retriever without any does nothing."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The settings and the corpus statistics, JSON-able, for a training checkpoint."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the statistics of [`state`]; refuses those of other settings with an `InputError`."""

    def encode(self, documents: list[Document], keep: bool = False) -> EncodedDocuments:
        """
        Reads documents once, to score them many times, with the statistics of the time of scoring. A retriever that
        has nothing to prepare keeps them as they are.

        Args:
            documents (`list[Document]`):
                The documents.
            keep (`bool`, *optional*, defaults to `False`):
                Whether the same texts will come again in other runs, so that a cache should keep what was read.
        """
        return PlainDocuments(documents)

    @abstractmethod
    def score(self, queries: list[str], documents: list[Document] | EncodedDocuments) -> np.ndarray:
        """
        Scores every query against every document.

        Returns:
            `np.ndarray`: shape (queries, documents), floating point; higher is better, −inf is "not retrieved".
        """

    def follow(self, originals: EncodedDocuments, rollouts: EncodedDocuments, rollout_document: np.ndarray) -> None:
        """
        Moves the corpus statistics towards those of the corpus as it is augmented now; a retriever without any does
        nothing.

        Args:
            originals ([`EncodedDocuments`]):
                The `D` documents of a batch as they are in the collection.
            rollouts ([`EncodedDocuments`]):
                Their `C` rollouts.
            rollout_document (`np.ndarray` of shape `(C,)`):
                Index of each rollout's document.
        """
        return None

    def nearest(
        self, queries: list[str], documents: EncodedDocuments, k: int, left_out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        The best documents for each query by [`score`]; memory does not grow with queries × documents.

        Args:
            queries (`list[str]`):
                Query texts.
            documents ([`EncodedDocuments`]):
                The documents; equal scores rank in their order.
            k (`int`):
                How many a query gets.
            left_out (`np.ndarray` of shape `(documents,)`):
                True for the documents that no query gets.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: scores and places of the documents, both of shape (queries, k), best
            first; −inf and 0 fill up where fewer are retrieved.
        """
        size = max(1, SCORE_CHUNK // max(1, len(documents)))
        parts = (self.score(queries[first : first + size], documents) for first in range(0, len(queries), size))
        return select_nearest(parts, k, left_out)

    def rank(self, queries: list[str], documents: list[Document], k: int) -> list[list[tuple[str, float]]]:
        """
        Ranks documents by [`score`], without an index; memory does not grow with queries × documents.

        Returns:
            `list`: as [`search`].
        """
        hits = [[] for _ in queries]
        size = max(1, SCORE_CHUNK // max(1, len(queries)))
        for first in range(0, len(documents), size):
            chunk = documents[first : first + size]
            for found, scores in zip(hits, self.score(queries, chunk), strict=True):
                found += [(chunk[place].id, float(scores[place])) for place in best_places(scores, k)]
                found.sort(key=lambda hit: -hit[1])
                del found[k:]
        return hits

    @abstractmethod
    def index(self, documents: list[Document]) -> None:
        """Builds the search index of `documents`, and fits the statistics on them."""

    @abstractmethod
    def search(self, queries: list[str], k: int = 10) -> list[list[tuple[str, float]]]:
        """
        Searches the index.

        Returns:
            `list`: for each query up to `k` pairs of document id and score, best first; equal scores in the order of
            indexing. A query that finds nothing has an empty list.
        """

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the index and the settings to `folder`."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a retriever that [`save`] wrote, with the settings it was saved with (see [`config`])."""


def select_nearest(parts: Iterable[np.ndarray], k: int, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What [`Retriever.nearest`] returns, from the scores of some queries after the other."""
    scores, places = [], []
    for part in parts:
        part[:, left_out] = -np.inf
        for row in part:
            best = best_places(row, k)
            missing = k - len(best)
            scores.append(np.pad(row[best].astype(float), (0, missing), constant_values=-np.inf))
            places.append(np.pad(best, (0, missing)))
    return np.array(scores).reshape(-1, k), np.array(places, dtype=np.int64).reshape(-1, k)


def best_places(scores: np.ndarray, k: int, above: float = -np.inf) -> np.ndarray:
    """The places of the up to `k` best scores above a value, best first and equal scores in their order."""
    # The kth best of some scores is at most the kth best of all, and leaves little to sort.
    sample = scores[::SAMPLE_EVERY]
    threshold = np.partition(sample, -k)[-k] if k <= len(sample) else above
    places = np.flatnonzero(scores >= threshold if threshold > above else scores > above)
    if len(places) > k:
        found = scores[places]
        places = places[found >= np.partition(found, -k)[-k]]
    return places[np.argsort(-scores[places], kind="stable")][:k]


def check_depth(k: int) -> None:
    """Raises an `InputError` if `k` is no number of hits to search for."""
    if k < 1:
        raise InputError(f"k is the number of hits wanted, at least 1, not {k}.")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config` that [`Retriever.save`] wrote last; an `InputError` if it did not come so far."""
    path = Path(folder) / "retriever.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no finished index (there is no retriever.json): index the corpus again.")
    return read_json(path, INDEX_AGAIN)


def check_settings(folder: str | Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Refuses settings that no `config` has: an index from elsewhere must not say where this machine keeps a cache."""
    if unknown := sorted(config.keys() - set(names)):
        raise InputError(
            f"{folder}: the index is damaged (retriever.json has {unknown[0]!r}); index the collection again."
        )


def unique_ids(documents: list["Document"]) -> list[str]:
    """The documents' ids; an `InputError` if one occurs twice."""
    document_ids = [document.id for document in documents]
    repeated = [document_id for document_id, count in Counter(document_ids).items() if count > 1]
    if repeated:
        raise InputError(f"Document id {repeated[0]!r} occurs twice in the documents to index.")
    return document_ids


def retrieve(retriever: Retriever, queries: dict[str, str], k: int = 1000, ignore_identical_ids: bool = False) -> Run:
    """
    Searches for every query.

    Args:
        retriever: With an index.
        queries: Texts to search for, by query id.
        k: The most hits a query gets.
        ignore_identical_ids: Whether to leave out a hit with the id of the query, and take the next one instead. For
            collections whose queries are documents of the corpus, such as ArguAna and Quora, where each would find
            itself first; BEIR's own evaluation does the same.

    Returns: query id to document id to score, best first. A query that finds nothing has an empty dictionary.

    Raises `InputError`: `k` is less than 1.
    """
    check_depth(k)
    run = {}
    found = retriever.search(list(queries.values()), k + ignore_identical_ids)
    for query_id, hits in zip(queries, found, strict=True):
        if ignore_identical_ids:
            hits = [hit for hit in hits if hit[0] != query_id][:k]
        run[query_id] = dict(hits)
    return run
