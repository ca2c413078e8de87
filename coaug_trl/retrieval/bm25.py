"""BM25, by bm25s for the index and by one sparse product for the scores of a training step."""

import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar, Self

import bm25s
import numpy as np
from bm25s.tokenization import Tokenized
from scipy import sparse
from tqdm.auto import tqdm

from ..data.document import Document
from ..utils.errors import InputError
from ..utils.files import read_json, write_json
from .analyzer import PROGRESS_FROM, Analyzer
from .base import INDEX_AGAIN, Retriever, best_places, check_depth, check_settings, read_config, unique_ids
from .statistics import FieldCounts, FieldStatistics, TermCounts, count_terms


FIELDS = {
    "flat": [lambda document: f"{document.title} {document.text}"],
    "best": [lambda document: document.title, lambda document: document.text],
}
TIE_BREAKER = 0.5
QUERIES_PER_TASK = 16  # what a thread is given at a time
THREADS_FROM = 100_000  # documents; with fewer a query takes so little that threads cost more than they bring


class BM25Retriever(Retriever):
    """
    BM25 as Lucene computes it: idf · tf / (tf + k1 · (1 − b + b · length / average length)), summed over the words of
    the query, a word that occurs twice counting twice.

    The analyzer, one for [`fit`], [`score`], [`index`] and [`search`], follows Lucene's English analyzer: words of one
    letter or more in lower case, possessive 's cut off, Lucene's 33 stop words left out, Porter stems. For another
    language it takes that language's Snowball stemmer, and its stop words where bm25s has them.

    Args:
        k1 (`float`, *optional*, defaults to `1.2`):
            How slowly a repeated word saturates.
        b (`float`, *optional*, defaults to `0.75`):
            How far long documents are scaled down, from 0 (not at all) to 1.
        language (`str`, *optional*, defaults to `"english"`):
            Name of a Snowball stemmer.
        fields (`str`, *optional*, defaults to `"flat"`):
            `"flat"`: title and text are one field. `"best"`: each is scored with statistics of its own, and the score
            is the better plus half the other, as Elasticsearch's `best_fields` with `tie_breaker` 0.5 (what BEIR's
            Elasticsearch baseline does).

    Raises:
        `InputError`: a setting out of its range.

    Sources: [Kamphuis et al. 2020](https://doi.org/10.1007/978-3-030-45442-5_4) for the formula's variants,
    [bm25s](https://huggingface.co/papers/2407.03618) for the index.
    """

    kind: ClassVar[str] = "sparse"

    def __init__(self, k1: float = 1.2, b: float = 0.75, language: str = "english", fields: str = "flat"):
        if k1 < 0 or not 0 <= b <= 1:
            raise InputError(f"BM25 needs k1 ≥ 0 and b between 0 and 1; given are k1={k1}, b={b}.")
        if fields not in FIELDS:
            raise InputError(f"fields is one of {', '.join(FIELDS)}, not {fields!r}.")
        self.k1, self.b, self.language, self.fields = k1, b, language, fields
        self._field_texts = FIELDS[fields]
        # With two fields a list of keywords belongs to the short one, as in the code published with the paper.
        self.answer_field = "title" if fields == "best" else "text"
        self.analyzer = Analyzer(language)
        self._statistics: list[FieldStatistics] = []
        self._indexes: list[bm25s.BM25] = []
        self._average_lengths: list[float] = []  # of the indexed texts
        self._document_ids = np.array([], dtype=object)

    @property
    def config(self) -> dict[str, Any]:
        return {
            "retriever": "bm25",
            "k1": self.k1,
            "b": self.b,
            "language": self.language,
            "fields": self.fields,
        }

    # Statistics and scores of a training step

    def fit(self, documents: list[Document]) -> None:
        self._statistics = [FieldStatistics.count(tokens) for tokens in self._tokenize_fields(documents)]

    def state(self) -> dict[str, Any]:
        return {"config": self.config, "fields": [asdict(statistics) for statistics in self._statistics]}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["config"] != self.config:
            raise InputError(f"The saved BM25 statistics are those of {state['config']}, not of {self.config}.")
        self._statistics = [FieldStatistics(**statistics) for statistics in state["fields"]]

    def follow(self, originals: "TermCounts", rollouts: "TermCounts", rollout_document: np.ndarray) -> None:
        """
        Moves the statistics towards those of the corpus as it is augmented now.

        The documents of a batch are taken for a sample of the corpus: the share of them that a term joins by
        augmentation, each rollout of a document counting alike, is averaged over batches (exponentially, with a weight
        of 0.05 for the last), and as many documents are added to the term's frequency in the fitted corpus. The
        average length follows in the same way.

        Args:
            originals ([`TermCounts`]):
                The `D` documents as they are in the collection.
            rollouts ([`TermCounts`]):
                Their `C` rollouts.
            rollout_document (`np.ndarray` of shape `(C,)`):
                Index of each rollout's document.
        """
        probabilities = 1 / (np.bincount(rollout_document)[rollout_document] * len(originals))
        self._statistics = [
            statistics.follow(original, rollout, probabilities)
            for statistics, original, rollout in zip(self._statistics, originals.fields, rollouts.fields, strict=True)
        ]

    def encode(self, documents: list[Document], keep: bool = False) -> "TermCounts":
        """Counts the terms of each field; there is no cache to keep them in."""
        return TermCounts(
            [
                FieldCounts.count(self.analyzer.tokenize([text_of(document) for document in documents]))
                for text_of in self._field_texts
            ]
        )

    def score(self, queries: list[str], documents: "list[Document] | TermCounts") -> np.ndarray:
        """
        Scores every query against every document with the statistics of the last [`fit`] or [`index`], which the
        given documents do not change.

        Args:
            queries (`list[str]`):
                Query texts.
            documents (`list[Document]` or [`TermCounts`]):
                Documents, of the fitted corpus or not, or what [`encode`] made of them.

        Returns:
            `np.ndarray`: shape (queries, documents), float64; −inf where query and document have no term in common.
            A value depends on its query and its document only, to the last bit, not on what else is scored.

        Raises:
            `RuntimeError`: there are no statistics yet.
        """
        if not self._statistics:
            raise RuntimeError("BM25 scores need corpus statistics: call fit(documents) or index(documents) first.")
        encoded = documents if isinstance(documents, TermCounts) else self.encode(documents)
        tokens = self.analyzer.tokenize(queries)
        scores = _combine(
            (self._weigh(statistics, tokens, field) @ field.saturate(self.k1, self.b, statistics)).toarray()
            for statistics, field in zip(self._statistics, encoded.fields, strict=True)
        )
        return np.where(scores > 0, scores, -np.inf)

    def _weigh(self, statistics: FieldStatistics, tokens: Tokenized, field: "FieldCounts") -> sparse.csr_array:
        """IDF of the queries' terms times how often they occur there, shape (queries, terms of the field)."""
        known = [term for term in tokens.vocab if term in field.vocabulary]
        columns = {tokens.vocab[term]: field.vocabulary[term] for term in known}
        idf = np.zeros(len(field.vocabulary))
        idf[list(columns.values())] = statistics.idf(known)
        weights = count_terms([[columns[i] for i in ids if i in columns] for ids in tokens.ids], len(field.vocabulary))
        weights.data *= idf[weights.indices]
        return weights

    # Index and search

    def index(self, documents: list[Document]) -> None:
        """
        Builds the bm25s index of `documents` and fits the statistics on the same texts.

        Args:
            documents (`list[Document]`):
                The corpus; ids must be unique.

        Raises:
            `InputError`: no documents, or an id occurs twice.
        """
        document_ids = unique_ids(documents)
        indexes, average_lengths = [], []
        for tokens in self._tokenize_fields(documents):
            # float64, so that search and score rank alike
            field_index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene", dtype="float64")
            with np.errstate(invalid="ignore"):  # the average length of a field that is empty everywhere is 0
                progress = {"show_progress": len(documents) >= PROGRESS_FROM, "leave_progress": False}
                field_index.index(tokens, create_empty_token=False, **progress)
            indexes.append(field_index)
            average_lengths.append(sum(map(len, tokens.ids)) / len(tokens.ids))
        self._take_index(indexes, average_lengths, document_ids)

    def search(self, queries: list[str], k: int = 10) -> list[list[tuple[str, float]]]:
        """
        Searches the index, with a thread on each core that the process may use when queries and documents are many.
        Memory grows with threads × documents, not with queries × documents.

        Args:
            queries (`list[str]`):
                Query texts.
            k (`int`, *optional*, defaults to `10`):
                The most hits a query gets.

        Returns:
            `list[list[tuple[str, float]]]`: for each query its hits as (document id, score), best first, equal scores
            in the order of indexing. Documents without a term of the query are no hits, so there may be none.

        Raises:
            `InputError`: `k` is less than 1.
            `RuntimeError`: nothing is indexed.
        """
        return self.search_terms(list(map(Counter, self.analyzer.terms(queries))), k)

    def search_terms(self, queries: list[dict[str, float]], k: int = 10) -> list[list[tuple[str, float]]]:
        """
        Searches the index for weighted terms.

        Args:
            queries (`list[dict[str, float]]`):
                Terms of the [`analyzer`] to weights of 0 or more: how often a text has them, or what an expansion
                gives them.
            k (`int`, *optional*, defaults to `10`):
                The most hits a query gets.

        Returns:
            `list[list[tuple[str, float]]]`: as [`search`].

        Raises:
            `InputError`: `k` is less than 1.
            `RuntimeError`: nothing is indexed.
        """
        check_depth(k)
        if not self._indexes:
            raise RuntimeError("There is nothing to search: call index(documents) or load(folder) first.")

        def search_one(query: dict[str, float]) -> list[tuple[str, float]]:
            scores = _combine(_index_scores(field_index, query) for field_index in self._indexes)
            places = best_places(scores, k, above=0.0)  # bm25s' own selection orders ties arbitrarily
            return list(zip(self._document_ids[places].tolist(), scores[places].tolist(), strict=True))

        progress = {"total": len(queries), "desc": "Searching", "delay": 2, "leave": False}
        num_threads = min(_num_cores(), math.ceil(len(queries) / QUERIES_PER_TASK))
        if num_threads <= 1 or len(self._document_ids) < THREADS_FROM:
            return list(tqdm(map(search_one, queries), **progress))
        # Selecting the best releases the interpreter's lock, adding up postings does not: two threads are worth 1.4.
        with ThreadPool(num_threads) as threads:
            return list(tqdm(threads.imap(search_one, queries, QUERIES_PER_TASK), **progress))

    def matches(self, terms: Iterable[str], document_ids: list[str]) -> list[set[str]]:
        """
        Says which terms of a query found which documents.

        Args:
            terms (`Iterable[str]`):
                Terms of the [`analyzer`].
            document_ids (`list[str]`):
                Ids of indexed documents.

        Returns:
            `list[set[str]]`: for each document those of the terms that it has, as it is indexed.
        """
        places = [np.flatnonzero(self._document_ids == document_id)[0] for document_id in document_ids]
        found = [set() for _ in places]
        for field_index in self._indexes:
            indptr, indices = field_index.scores["indptr"], field_index.scores["indices"]
            for term in set(terms) & field_index.vocab_dict.keys():
                column = field_index.vocab_dict[term]
                for row in np.flatnonzero(np.isin(places, indices[indptr[column] : indptr[column + 1]])):
                    found[row].add(term)
        return found

    def document_share(self, term: str) -> float:
        """The share of the documents that have a term, in the field where it is largest."""
        return max(each.document_frequencies.get(term, 0) / each.num_documents for each in self._statistics)

    def save(self, folder: str | Path) -> None:
        """
        Writes the index to `folder`: bm25s' own files for each field, the statistics and the document ids as JSON.

        Args:
            folder (`str` or `Path`):
                The folder, made if it is not there. `retriever.json` is written last: without it a folder is unfinished.

        Raises:
            `RuntimeError`: nothing is indexed.
        """
        if not self._indexes:
            raise RuntimeError("There is nothing to save: call index(documents) first.")
        folder = Path(folder)
        (folder / "retriever.json").unlink(missing_ok=True)
        for i, field_index in enumerate(self._indexes):
            _save_field(field_index, folder / f"field_{i}")
        write_json(folder / "document_ids.json", self._document_ids.tolist())
        write_json(folder / "statistics.json", {"average_lengths": self._average_lengths})
        write_json(folder / "retriever.json", self.config)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """
        Reads an index that [`save`] wrote. Postings stay in their files, mapped into memory, until a query needs them.

        Args:
            folder (`str` or `Path`):
                The folder.

        Returns:
            `BM25Retriever`: with the settings of the folder; compare its [`config`] with what is expected.

        Raises:
            `InputError`: there is no finished BM25 index in the folder.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.pop("retriever", None) != "bm25":
            raise InputError(f"{folder} holds an index of another retriever than BM25: see its retriever.json.")
        check_settings(folder, config, ("k1", "b", "language", "fields"))
        retriever = cls(**config)
        indexes = [_load_field(field_folder(folder, i)) for i in range(len(retriever._field_texts))]
        document_ids = read_json(folder / "document_ids.json", INDEX_AGAIN, list)
        if {index.scores["num_docs"] for index in indexes} != {len(document_ids)}:
            raise InputError(
                f"{folder}: the index is damaged ({len(document_ids)} ids are not those of its documents); index the "
                "collection again."
            )
        average_lengths = read_json(folder / "statistics.json", INDEX_AGAIN)["average_lengths"]
        retriever._take_index(indexes, average_lengths, document_ids)
        return retriever

    def _take_index(self, indexes: list[bm25s.BM25], average_lengths: list[float], document_ids: list[str]) -> None:
        self._indexes, self._average_lengths = indexes, average_lengths
        self._document_ids = np.array(document_ids, dtype=object)  # an array, to look up many at a time
        self._statistics = list(map(FieldStatistics.of_index, indexes, average_lengths))

    def _tokenize_fields(self, documents: list[Document]) -> list[Tokenized]:
        if not documents:
            raise InputError("There are no documents to take BM25 statistics from.")
        return [self.analyzer.tokenize([text_of(document) for document in documents]) for text_of in self._field_texts]


def _combine(field_scores: Iterable[np.ndarray]) -> np.ndarray:
    """The score of the one field, or of two the better plus half the other."""
    first, *rest = field_scores
    if not rest:
        return first
    return np.maximum(first, rest[0]) + TIE_BREAKER * np.minimum(first, rest[0])


def _index_scores(field_index: bm25s.BM25, weights: dict[str, float]) -> np.ndarray:
    """
    Scores of all indexed documents, 0 for those without a term of the query.

    A term weighs as often as the query has it: bm25s' own scoring would go through its postings again each time.
    """
    postings = field_index.scores
    scores = np.zeros(postings["num_docs"])
    columns = {field_index.vocab_dict[term]: weights[term] for term in weights if term in field_index.vocab_dict}
    terms = np.fromiter(columns, dtype=np.int64)
    starts, ends = postings["indptr"][terms].tolist(), postings["indptr"][terms + 1].tolist()
    for start, end, weight in zip(starts, ends, columns.values(), strict=True):
        values = postings["data"][start:end]
        np.add.at(scores, postings["indices"][start:end], values if weight == 1 else weight * values)
    return scores


def _num_cores() -> int:
    """Those that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save_field(field_index: bm25s.BM25, folder: Path) -> None:
    """Renames files into place: what is there may be mapped into memory, here or by another process that searches."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        field_index.save(temporary, allow_pickle=False, show_progress=False)
        for path in Path(temporary).iterdir():
            os.replace(path, folder / path.name)


def field_folder(folder: Path, place: int) -> Path:
    """Where the index of a field is: on the Hub the first one lies at the root, as bm25s expects its index there."""
    own = folder / f"field_{place}"
    return folder if place == 0 and not own.is_dir() else own


def _load_field(folder: Path) -> bm25s.BM25:
    """Maps the arrays into memory: a search reads the postings of its terms only."""
    field_index = bm25s.BM25.load(folder, mmap=True, allow_pickle=False, show_progress=False)
    for name in ("data", "indices", "indptr"):
        # The same memory as a plain array, which is sliced faster.
        field_index.scores[name] = np.asarray(field_index.scores[name])
    return field_index
