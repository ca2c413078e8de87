"""A collection: documents, queries, and which documents are relevant to which queries."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..utils.errors import InputError
from .document import Document
from .sources import Judgment, Row, Source, open_source


@dataclass
class Collection:
    """
    Documents, queries, and the relevance judgments of one split.

    Args:
        name (`str`):
            What it was loaded by; for a BEIR folder, the folder's name.
        split (`str`):
            Split that `qrels` belongs to.
        corpus (`dict[str, Document]` or [`StreamedCorpus`]):
            Documents by id.
        queries (`dict[str, str]`):
            Texts of all queries by id, those of other splits too.
        qrels (`dict[str, dict[str, int]]`):
            Graded relevance, 0 or more, by query id and document id.
        splits (`tuple[str, ...]`):
            Splits that exist.
        source (`Source`, *optional*):
            Where [`Collection.load`] read it from, and where [`Collection.with_split`] reads.
    """

    name: str
    split: str
    corpus: "dict[str, Document] | StreamedCorpus" = field(repr=False)
    queries: dict[str, str] = field(repr=False)
    qrels: dict[str, dict[str, int]] = field(repr=False)
    splits: tuple[str, ...]
    source: Source | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, name_or_path: str | Path, split: str = "train", stream: bool = False) -> "Collection":
        """
        Reads a collection and checks all of it.

        Args:
            name_or_path (`str` or `Path`):
                One of:
                - a BEIR folder: `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, each of them plain or `.gz`;
                - a Hub id, `ORG/NAME`, laid out as `BeIR/NAME` with `BeIR/NAME-qrels` beside it;
                - `irds:NAME` for ir_datasets, where `irds:beir/nfcorpus` with split `dev` reads the judgments of
                  `beir/nfcorpus/dev`;
                - `vocabulary-gap`, which is generated.
            split (`str`, *optional*, defaults to `"train"`):
                Split to read judgments of.
            stream (`bool`, *optional*, defaults to `False`):
                Whether to leave the documents where they are and to read them whenever they are gone through, one at a
                time, for a corpus that memory does not hold; see [`StreamedCorpus`].

        Returns:
            [`Collection`]: With queries and documents in the order they were read.

        Raises:
            `InputError`: If something is missing or malformed, an id is used twice or unknown, or the split has
                no relevant pair.
        """
        source = open_source(str(name_or_path))
        _check_split(source, split)
        corpus = StreamedCorpus(source) if stream else dict(_documents(source))
        queries = _read_queries(source.queries(split))
        qrels = _read_qrels(source, split, queries, corpus)
        return cls(source.name, split, corpus, queries, qrels, source.splits, source)

    def with_split(self, split: str) -> "Collection":
        """
        The same collection with the judgments of another split; the corpus is shared, not read again.

        Args:
            split (`str`):
                Split to read judgments of.

        Returns:
            [`Collection`]: A new one; this one does not change.

        Raises:
            `InputError`: As in [`Collection.load`].
        """
        if split == self.split:
            return self
        if self.source is None:
            raise InputError(f"{self.name} was not loaded from anywhere, so it has only the split {self.split!r}")
        _check_split(self.source, split)
        queries = self.queries
        if self.source.queries_per_split:
            queries = _read_queries(self.source.queries(split))
        qrels = _read_qrels(self.source, split, queries, self.corpus)
        return replace(self, split=split, queries=queries, qrels=qrels)

    def relevant_documents(self, query_id: str) -> list[str]:
        """Ids of the documents judged relevant (above 0) to a query, in the order of the judgments."""
        return [document_id for document_id, relevance in self.qrels.get(query_id, {}).items() if relevance > 0]

    @cached_property
    def queries_with_relevant(self) -> list[str]:
        """Ids of the queries with at least one relevant document, in the order of the judgments."""
        return [query_id for query_id in self.qrels if self.relevant_documents(query_id)]

    @property
    def num_queries_without_relevant(self) -> int:
        """How many judged queries have no relevant document."""
        return len(self.qrels) - len(self.queries_with_relevant)

    @cached_property
    def num_empty_documents(self) -> int:
        """How many documents have neither a title nor a text."""
        return sum(not (document.title.strip() or document.text.strip()) for document in self.corpus.values())

    def summary(self) -> str:
        """One line of counts."""
        relevant_pairs = sum(len(self.relevant_documents(query_id)) for query_id in self.qrels)
        return (
            f"{self.name} ({self.split}): {len(self.corpus):,} documents ({self.num_empty_documents:,} empty), "
            f"{len(self.qrels):,} judged queries ({self.num_queries_without_relevant:,} without a relevant document), "
            f"{relevant_pairs:,} relevant pairs"
        )


def _check_split(source: Source, split: str) -> None:
    if split not in source.splits:
        raise InputError(f"{source.name} has no split {split!r}: choose from {', '.join(source.splits)}")


class StreamedCorpus:
    """
    The documents of a source, which are read and checked once, then read anew whenever they are gone through. In memory
    are 8 bytes for each.

    It offers what going through a corpus takes, `items`, `values`, the ids, their number, and whether an id is there,
    but no document by its id.

    Args:
        source: Where the documents are.

    Raises `InputError`: A document is malformed, or an id is used twice.
    """

    def __init__(self, source: Source):
        self._source = source
        rows = tqdm(source.documents(), desc="Reading documents", unit=" documents", delay=2, leave=False)
        hashes = np.sort(np.fromiter((hash(_document(place, row).id) for place, row in rows), np.int64))
        twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if twice:
            # The same hash is the same id, as good as always; this says so, and where.
            for _ in _documents(source, lambda document_id: hash(document_id) in twice):
                pass
        self._hashes = hashes

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, document_id: str) -> bool:
        place = np.searchsorted(self._hashes, hash(document_id))
        return bool(place < len(self) and self._hashes[place] == hash(document_id))

    def __iter__(self) -> Iterator[str]:
        return (document.id for document in self.values())

    def values(self) -> Iterator[Document]:
        """The documents, in the order of the source."""
        return (_document(place, row) for place, row in self._source.documents())

    def items(self) -> Iterator[tuple[str, Document]]:
        """Ids and documents."""
        return ((document.id, document) for document in self.values())


def _documents(source: Source, remember: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Document]]:
    """Ids and documents; an id that is there twice is refused, if it is one to remember."""
    taken = set()
    for place, row in source.documents():
        document = _document(place, row)
        if document.id in taken:
            raise InputError(f"{place}: the document id {document.id!r} is already taken: ids must be unique")
        if remember(document.id):
            taken.add(document.id)
        yield document.id, document


def _document(place: str, row: dict[str, Any]) -> Document:
    document_id = _id(place, row)
    # Titles are optional in BEIR: some exports leave the field out, others write null.
    title = "" if row.get("title") is None else _string(place, row, "title")
    return Document(document_id, title, _string(place, row, "text"))


def _read_queries(rows: Iterator[Row]) -> dict[str, str]:
    queries = {}
    for place, row in rows:
        query_id = _id(place, row)
        if query_id in queries:
            raise InputError(f"{place}: the query id {query_id!r} is already taken: ids must be unique")
        queries[query_id] = _string(place, row, "text")
    return queries


def _read_qrels(
    source: Source, split: str, queries: dict[str, str], corpus: dict[str, Document] | StreamedCorpus
) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for judgment in source.judgments(split):
        relevance = _relevance(judgment, queries, corpus)
        judged = qrels.setdefault(judgment.query_id, {})
        # The same judgment twice says nothing wrong, so only a contradiction is refused.
        if judged.setdefault(judgment.document_id, relevance) != relevance:
            raise InputError(
                f"{judgment.place}: query {judgment.query_id!r} and document {judgment.document_id!r} are judged "
                f"{relevance} here and {judged[judgment.document_id]} before: keep one of the two"
            )
    if not any(relevance > 0 for judged in qrels.values() for relevance in judged.values()):
        raise InputError(f"{source.name}: the split {split!r} has no relevant pair, one with a relevance above 0")
    return qrels


def _relevance(judgment: Judgment, queries: dict[str, str], corpus: dict[str, Document] | StreamedCorpus) -> int:
    if judgment.query_id not in queries:
        raise InputError(
            f"{judgment.place}: the query {judgment.query_id!r} is not among the queries: add it or remove the line"
        )
    if judgment.document_id not in corpus:
        raise InputError(
            f"{judgment.place}: the document {judgment.document_id!r} (judged for query {judgment.query_id!r}) is not "
            "in the corpus: add it or remove the line"
        )
    if not re.fullmatch("[0-9]{1,9}", judgment.relevance):
        raise InputError(
            f"{judgment.place}: the relevance of document {judgment.document_id!r} to query {judgment.query_id!r} is "
            f"{judgment.relevance!r}: write a whole number, 0 for not relevant"
        )
    return int(judgment.relevance)


def _id(place: str, row: dict[str, Any]) -> str:
    value = _string(place, row, "_id")
    # TREC run and judgment files separate their columns by blanks.
    if value.split() != [value]:
        raise InputError(f"{place}: the id {value!r} is empty or contains a blank, which TREC run files cannot hold")
    return value


def _string(place: str, row: dict[str, Any], name: str) -> str:
    if "_id" in row and name != "_id":
        place = f"{place}, _id {row['_id']!r}"
    if name not in row:
        raise InputError(f"{place}: `{name}` is missing: add it")
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f"{place}: `{name}` is {value!r}, but must be a string: put it in quotes")
    try:
        # JSON may escape half a surrogate pair; tokenizers fail on it, long after loading.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: `{name}` is not valid Unicode: {error}: remove the character") from error
    return value
