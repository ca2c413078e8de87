"""RM3, expansion of queries by the terms of the documents they find: a baseline without any language model."""

from collections import Counter
from typing import Any

from ..data.document import Document
from ..utils.errors import InputError
from .base import check_depth
from .bm25 import FIELDS, BM25Retriever


# A term in more than this share of the documents is as good as a stop word, and one in a longer word likely no word.
MAX_DOCUMENT_SHARE = 0.1
TERM_LENGTHS = range(2, 21)


class RM3:
    """
    Searches a BM25 index twice: the first hits say which terms are added to a query for the second search.

    The relevance model (RM1) is P(w|R) ∝ Σ_d P(w|d) · P(Q|d) over the feedback documents d: P(w|d) is the share of w
    among the words of d that may be added, P(Q|d) is the BM25 score, both as in Anserini. Its `feedback_terms` most
    probable terms, scaled to sum to 1, are mixed with the query:
    P'(w|Q) = original_weight · P(w|Q) + (1 − original_weight) · P(w|R). The score of a document is
    Σ_w P'(w|Q) · BM25(w, d), times the number of words of the query, so that at `original_weight` 1 it is BM25's own.

    Words that may be added are the analyzer's terms of 2 to 20 characters, letters and digits only, that stand in no
    more than a tenth of the documents. Document vectors are of title and text together. With best fields the second
    search scores each field with the expanded query and combines them as the first does.

    Args:
        retriever: With an index of `documents` when [`search`] is called.
        documents: The indexed documents.
        feedback_documents: First hits that the terms are taken from.
        feedback_terms: Terms that are added.
        original_weight: Weight of the query as it was, from 0 to 1.

    Raises `InputError`: a setting out of its range.

    Sources: Lavrenko and Croft 2001 (https://doi.org/10.1145/383952.383972) for the relevance model, Abdul-Jaleel et
    al. 2004 (UMass at TREC 2004) for the mixture.
    """

    def __init__(
        self,
        retriever: BM25Retriever,
        documents: list[Document],
        feedback_documents: int = 10,
        feedback_terms: int = 10,
        original_weight: float = 0.5,
    ):
        if feedback_documents < 1 or feedback_terms < 1 or not 0 <= original_weight <= 1:
            raise InputError(
                "RM3 needs at least one feedback document, at least one feedback term and a weight from 0 to 1; given "
                f"are {feedback_documents}, {feedback_terms} and {original_weight}."
            )
        self.retriever, self.documents = retriever, documents
        self.feedback_documents, self.feedback_terms = feedback_documents, feedback_terms
        self.original_weight = original_weight

    @property
    def config(self) -> dict[str, Any]:
        """The retriever's, and beside it RM3's own settings."""
        return self.retriever.config | {
            "rm3": {
                "feedback_documents": self.feedback_documents,
                "feedback_terms": self.feedback_terms,
                "original_weight": self.original_weight,
            }
        }

    def search(self, queries: list[str], k: int = 10) -> list[list[tuple[str, float]]]:
        """
        Searches with expanded queries.

        Args:
            queries: Query texts.
            k: The most hits a query gets.

        Returns: as [`BM25Retriever.search`]. A query that finds nothing the first time has no hits.
        """
        check_depth(k)  # rather now than after the first search
        return self.retriever.search_terms(self.expand(queries), k)

    def expand(self, queries: list[str]) -> list[dict[str, float]]:
        """
        Weighs the terms of expanded queries.

        Args:
            queries: Query texts.

        Returns: for each query term to weight; the weights sum to the number of the query's words. A query without
            hits, or whose hits have no word to add, has the counts of its own words.
        """
        found = self.retriever.search(queries, self.feedback_documents)
        wanted = {document_id for hits in found for document_id, _ in hits}
        feedback = [document for document in self.documents if document.id in wanted]
        counts = map(Counter, self.retriever.analyzer.terms([FIELDS["flat"][0](document) for document in feedback]))
        vectors = {
            document.id: {term: count for term, count in terms.items() if self._may_be_added(term)}
            for document, terms in zip(feedback, counts, strict=True)
        }
        expanded = []
        for query, hits in zip(map(Counter, self.retriever.analyzer.terms(queries)), found, strict=True):
            model = self._relevance_model(hits, vectors)
            share = self.original_weight if model else 1.0
            weights = {term: share * count for term, count in query.items()}
            for term, probability in model.items():
                weights[term] = weights.get(term, 0.0) + (1 - share) * query.total() * probability
            expanded.append(weights)
        return expanded

    def _relevance_model(self, hits: list[tuple[str, float]], vectors: dict[str, dict[str, int]]) -> dict[str, float]:
        """The most probable terms of RM1 and their probabilities, empty where there is none."""
        model = Counter()
        for document_id, score in hits:
            length = sum(vectors[document_id].values())
            for term, count in vectors[document_id].items():
                model[term] += count / length * score
        # Equally probable terms in alphabetical order, so that the choice depends on nothing else.
        best = sorted(model.items(), key=lambda item: (-item[1], item[0]))[: self.feedback_terms]
        total = sum(weight for _, weight in best)
        return {term: weight / total for term, weight in best}

    def _may_be_added(self, term: str) -> bool:
        return (
            len(term) in TERM_LENGTHS and term.isalnum() and self.retriever.document_share(term) <= MAX_DOCUMENT_SHARE
        )
