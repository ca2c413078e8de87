"""The documents that queries of a generation batch compete with."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from accelerate import PartialState

from ..data.document import Document
from ..retrieval import EncodedDocuments, Retriever
from ..utils.distributed import run_together


# (group position, document id, rollout)
Column = tuple[int, str, int]


@dataclass
class Rollouts:
    """
    The composed texts of some groups. Texts that are not augmented have one rollout.

    Args:
        rows: Group position, query id and rollout of each query rollout.
        queries: Their texts.
        columns: Group position, document id and rollout of each document rollout.
        documents: The document rollouts as the retriever reads them.
        originals: The documents without augmentation, each once, where the retriever's statistics follow the rollouts.
        original_ids: Their ids.
    """

    rows: list[tuple[int, str, int]]
    queries: list[str]
    columns: list[Column]
    documents: EncodedDocuments
    originals: EncodedDocuments | None = None
    original_ids: list[str] = field(default_factory=list)


@dataclass
class Pool:
    """
    The documents that compete, each once, in an order that knows nothing of relevance.

    Args:
        document_ids: Ids of the `D` documents.
        columns: The `C` document rollouts, those of a document together.
        rollout_document, of shape `(C,)`: Index of each column's document.
        places, of shape `(C,)`: Where each column stands among the rollouts that were merged.
    """

    document_ids: list[str]
    columns: list[Column]
    rollout_document: np.ndarray
    places: np.ndarray

    @classmethod
    def merge(cls, columns: list[Column], verbatim: bool, order: Callable[[list[str]], list[str]]) -> "Pool":
        """Merges the rollouts of documents that several groups drew; if `verbatim`, all of them are the same text."""
        places = defaultdict(list)
        for place, (_, document_id, _) in enumerate(columns):
            if not (verbatim and document_id in places):
                places[document_id].append(place)
        document_ids = order(sorted(places))
        in_order = [place for document_id in document_ids for place in places[document_id]]
        return cls(
            document_ids=document_ids,
            columns=[columns[place] for place in in_order],
            rollout_document=np.repeat(np.arange(len(places)), [len(places[id_]) for id_ in document_ids]),
            places=np.array(in_order),
        )


class Corpus:
    """
    All documents, each with the one text it has while it is not in the batch, in a seeded order that knows nothing of
    relevance and decides between equal scores.

    Every process encodes its share of the documents.

    Args:
        documents: The documents.
        retriever: Encodes them.
        seed: Seed of the order.
    """

    def __init__(self, documents: list[Document], retriever: Retriever, seed: int):
        order = np.random.default_rng(seed).permutation(len(documents))
        self.document_ids = [documents[index].id for index in order]
        self.place = {document_id: place for place, document_id in enumerate(self.document_ids)}
        state = PartialState()
        share = np.array_split(order, state.num_processes)[state.process_index]
        own, shares = run_together(retriever.encode, [documents[index] for index in share], True)
        self.documents = own.concatenate(shares)

    def order(self, document_ids: list[str]) -> list[str]:
        """Some of the documents, in the order of all."""
        return sorted(document_ids, key=self.place.__getitem__)
