"""BM25's statistics of a field: fixed, refreshed, or following the rollouts."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Self

import bm25s
import numpy as np
from bm25s.tokenization import Tokenized
from scipy import sparse


# The running estimate of [`BM25Retriever.follow`]: how far a batch moves it, which makes it one of the last 20 batches
# or so; and what counts as no document, so that it does not grow by every word ever tried.
FOLLOW_RATE = 0.05
LEAST_DOCUMENTS = 0.01


@dataclass(frozen=True)
class FieldStatistics:
    """
    What BM25 knows of a corpus, for one field.

    Args:
        num_documents: Documents of the corpus.
        average_length: Mean number of terms in a document.
        document_frequencies: How many documents have a term.
        added_shares: Share of the documents that have a term by augmentation alone, as estimated by [`follow`].
        added_length: Mean number of terms that augmentation adds, likewise.
    """

    num_documents: int
    average_length: float
    document_frequencies: dict[str, int]
    added_shares: dict[str, float] = field(default_factory=dict)
    added_length: float = 0.0

    @classmethod
    def count(cls, tokens: Tokenized) -> Self:
        frequencies = Counter(chain.from_iterable(map(set, tokens.ids)))
        return cls(
            num_documents=len(tokens.ids),
            average_length=sum(map(len, tokens.ids)) / len(tokens.ids),
            document_frequencies={term: frequencies[i] for term, i in tokens.vocab.items()},
        )

    @classmethod
    def of_index(cls, field_index: bm25s.BM25, average_length: float) -> Self:
        """Those of the indexed texts; the index knows all but their average length."""
        frequencies = np.diff(field_index.scores["indptr"]).tolist()
        return cls(
            num_documents=field_index.scores["num_docs"],
            average_length=average_length,
            document_frequencies={term: frequencies[i] for term, i in field_index.vocab_dict.items()},
        )

    @property
    def length(self) -> float:
        """Mean number of terms in a document, with what augmentation adds."""
        return self.average_length + self.added_length

    def idf(self, terms: list[str]) -> np.ndarray:
        """Lucene's IDF; a term no document has is worth as much as one that a single document has."""
        frequencies = [
            self.document_frequencies.get(term, 0) + self.num_documents * self.added_shares.get(term, 0.0)
            for term in terms
        ]
        frequencies = np.clip(np.array(frequencies, dtype=float), 1.0, self.num_documents)
        return np.log1p((self.num_documents - frequencies + 0.5) / (frequencies + 0.5))

    def follow(self, originals: "FieldCounts", rollouts: "FieldCounts", probabilities: np.ndarray) -> Self:
        """One step of the running estimate; see [`BM25Retriever.follow`]."""
        before, before_length = originals.expect(np.full(originals.counts.shape[0], 1 / originals.counts.shape[0]))
        after, after_length = rollouts.expect(probabilities)
        added_shares = {}
        for term in self.added_shares | after:
            added = after.get(term, 0.0) - before.get(term, 0.0)
            share = (1 - FOLLOW_RATE) * self.added_shares.get(term, 0.0) + FOLLOW_RATE * added
            if share * self.num_documents >= LEAST_DOCUMENTS:
                added_shares[term] = share
        added_length = (1 - FOLLOW_RATE) * self.added_length + FOLLOW_RATE * (after_length - before_length)
        return replace(self, added_shares=added_shares, added_length=added_length)


@dataclass
class FieldCounts:
    """
    How often each term occurs in each document, for one field.

    Args:
        vocabulary: Column of each term.
        counts, of shape `(documents, terms)`: The counts.
    """

    vocabulary: dict[str, int]
    counts: sparse.csr_array
    # What [`saturate`] made last and from what: a corpus is saturated for many batches.
    _inverted: sparse.csr_array | None = field(default=None, init=False, repr=False)
    _saturated: tuple[tuple, sparse.csr_array] | None = field(default=None, init=False, repr=False)

    @classmethod
    def count(cls, tokens: Tokenized) -> Self:
        return cls(dict(tokens.vocab), count_terms(tokens.ids, len(tokens.vocab)))

    def expect(self, probabilities: np.ndarray) -> tuple[dict[str, float], float]:
        """For a document drawn with these probabilities: that it has a term, by term, and its expected length."""
        probabilities_of_entries = np.repeat(probabilities, np.diff(self.counts.indptr))
        shares = np.bincount(self.counts.indices, probabilities_of_entries, minlength=len(self.vocabulary)).tolist()
        shares = {term: shares[column] for term, column in self.vocabulary.items() if shares[column]}
        return shares, float(self.counts.sum(axis=1) @ probabilities)

    def saturate(self, k1: float, b: float, statistics: FieldStatistics) -> sparse.csr_array:
        """tf / (tf + k1 · (1 − b + b · length / average length)), shape (terms, documents)."""
        made_with = (k1, b, statistics.length)
        if self._saturated is None or self._saturated[0] != made_with:
            if self._inverted is None:
                self._inverted = self.counts.T.tocsr()
            # Where no document of the corpus has a word in this field there is no average to divide by.
            norms = k1 * (1 - b + b * self.counts.sum(axis=1) / (statistics.length or 1.0))
            counts = self._inverted.data
            saturated = counts / (counts + norms[self._inverted.indices])
            matrix = sparse.csr_array(
                (saturated, self._inverted.indices, self._inverted.indptr), shape=self._inverted.shape
            )
            self._saturated = made_with, matrix
        return self._saturated[1]


@dataclass
class TermCounts:
    """Documents as BM25 reads them."""

    fields: list[FieldCounts]

    def __len__(self) -> int:
        return self.fields[0].counts.shape[0]

    def take(self, places: np.ndarray) -> Self:
        return TermCounts([FieldCounts(each.vocabulary, each.counts[places]) for each in self.fields])

    @classmethod
    def concatenate(cls, parts: "list[Self]") -> Self:
        if len(parts) == 1:
            return parts[0]
        return cls([_concatenate_field(fields) for fields in zip(*(part.fields for part in parts), strict=True)])


def _concatenate_field(parts: Iterable[FieldCounts]) -> FieldCounts:
    vocabulary, columns = {}, []
    for part in parts:
        columns.append(np.array([vocabulary.setdefault(term, len(vocabulary)) for term in part.vocabulary], np.int32))
    blocks = [
        sparse.csr_array(
            (part.counts.data, column[part.counts.indices], part.counts.indptr),
            shape=(part.counts.shape[0], len(vocabulary)),
        )
        for part, column in zip(parts, columns, strict=True)
    ]
    return FieldCounts(vocabulary, sparse.vstack(blocks, format="csr"))


def count_terms(token_ids: list[list[int]], num_terms: int) -> sparse.csr_array:
    """
    Counts of terms, shape (texts, terms).

    The entries of a row stay in the order of the text, not of the term ids, which differ from call to call: a sparse
    product adds them up in that order, so that equal texts have equal scores to the last bit.
    """
    counters = [Counter(ids) for ids in token_ids]
    data = np.fromiter(chain.from_iterable(counter.values() for counter in counters), dtype=float)
    indices = np.fromiter(chain.from_iterable(counters), dtype=np.int32)
    indptr = np.cumsum([0, *map(len, counters)])
    return sparse.csr_array((data, indices, indptr), shape=(len(counters), num_terms))
