"""H(Q,D): how far the words of queries and documents are apart (arXiv 2506.18670, section 4)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..data.collection import Collection
from ..data.document import Document, document_text
from ..retrieval.analyzer import Analyzer
from ..utils.errors import InputError
from ..utils.tables import Table


COUNT_CHUNK = 10_000


@dataclass(frozen=True)
class Alignment:
    """
    How well the words of queries match those of documents.

    Args:
        folder: Folder of the augmentations; `None` for the texts as they are.
        texts: `"original"`, `"composed"` (original and augmentation, what is searched and indexed) or
            `"augmentations"` (without the originals).
        cross_entropy: H(Q, D) in nats a word; `None` where the queries have no word.
        query_words: Words of the queries.
        document_words: Words of the documents.
        vocabulary_size: Different words of queries and documents together.
        unseen_share: Share of the query words that occur in no document; `None` where the queries have no word.
    """

    folder: str | None
    texts: str
    cross_entropy: float | None
    query_words: int
    document_words: int
    vocabulary_size: int
    unseen_share: float | None


def measure_alignment(
    collection: Collection, folders: Sequence[str | Path], smoothing: float = 1.0, language: str = "english"
) -> list[Alignment]:
    """
    Measures the cross-entropy H(Q, D) of the words of queries and documents, with and without augmentations.

    The paper states neither base, smoothing, tokenizer nor whether the original texts count. Here: nats; add-α
    smoothing of the documents' distribution; words as BM25 reads them (lower case, no stop words, stemmed); over the
    judged queries of the split and all documents, each once, title and text. The composed texts and the augmentations
    alone are both measured.

    Args:
        collection: Whose judged queries and documents.
        folders: Folders made by [`~coaug_trl.Augmenter.augment_collection`].
        smoothing: What is added to the count of each word, α.
        language: Snowball stemmer of the analyzer.

    Returns: the original texts, then for each folder the composed ones, and the augmentations alone if both sides are
        augmented.

    Raises `InputError`: A folder holds no augmentations, those of another collection, or none of some text.

    Source: arXiv 2506.18670, section 4.3 and Table 3.
    """
    from ..augmentation.folder import AugmentedCollection

    check_smoothing(smoothing)  # rather now than after the counting
    augmented = {str(folder): AugmentedCollection.load(folder) for folder in folders}
    for folder, each in augmented.items():
        if each.manifest["collection"] != collection.name:
            raise InputError(
                f"{folder} belongs to the collection {each.manifest['collection']}, not to {collection.name}."
            )
    queries = [collection.queries[id_] for id_ in collection.qrels]
    settings = (smoothing, language)
    rows = [_align(None, "original", queries, collection.corpus.values(), *settings)]
    for folder, each in augmented.items():
        composed = each.queries(collection).values(), each.documents(collection)
        rows.append(_align(folder, "composed", *composed, *settings))
        if each.answers.keys() == {"query", "document"}:
            queries = [each.answers["query"][id_] for id_ in collection.qrels]
            documents = [Document(id_, "", each.answers["document"][id_]) for id_ in collection.corpus]
            rows.append(_align(folder, "augmentations", queries, documents, *settings))
    return rows


def _align(
    folder: str | None,
    texts: str,
    queries: Iterable[str],
    documents: Iterable[Document],
    smoothing: float,
    language: str,
) -> Alignment:
    query_words = count_words(queries, language)
    document_words = count_words(map(document_text, documents), language)
    unseen = sum(count for word, count in query_words.items() if word not in document_words)
    return Alignment(
        folder=folder,
        texts=texts,
        cross_entropy=cross_entropy(query_words, document_words, smoothing) if query_words else None,
        query_words=query_words.total(),
        document_words=document_words.total(),
        vocabulary_size=len(query_words.keys() | document_words.keys()),
        unseen_share=unseen / query_words.total() if query_words else None,
    )


def count_words(texts: Iterable[str], language: str = "english") -> Counter[str]:
    """
    Counts words as [`~coaug_trl.BM25Retriever`] reads them.

    Args:
        texts: The texts.
        language: Snowball stemmer of the analyzer.

    Returns: how often each stem occurs.
    """
    analyzer, texts = Analyzer(language), list(texts)
    words = Counter()
    for first in tqdm(range(0, len(texts), COUNT_CHUNK), desc="Counting words", delay=2, leave=False):
        words.update(chain.from_iterable(analyzer.terms(texts[first : first + COUNT_CHUNK])))
    return words


def cross_entropy(query_words: Counter[str], document_words: Counter[str], smoothing: float = 1.0) -> float:
    """
    Cross-entropy H(Q, D) = −Σ p_Q(w) ln p_D(w) of the words of queries relative to those of documents.

    Args:
        query_words: Count of each word in the queries, at least one; their distribution is taken as it is.
        document_words: Count of each word in the documents, whose distribution is smoothed over the words of both,
            since a query word that no document has would make H infinite.
        smoothing: What is added to the documents' count of each word.

    Returns: in nats a word; times 1.4427 in bits.

    Raises `InputError`: `smoothing` is not positive.
    """
    check_smoothing(smoothing)
    total = document_words.total() + smoothing * len(query_words.keys() | document_words.keys())
    counts = np.array(list(query_words.values()), dtype=np.float64)
    probabilities = np.array([document_words[word] + smoothing for word in query_words]) / total
    return float(-(counts / counts.sum()) @ np.log(probabilities))


def check_smoothing(smoothing: float) -> None:
    """Raises an `InputError` if the number cannot be added to counts."""
    if not 0 < smoothing < np.inf:
        raise InputError(
            f"smoothing is {smoothing}; it is added to each word's count: use a positive number, such as 1."
        )


def alignment_table(rows: Sequence[Alignment], title: str) -> Table:
    """Sets the rows of [`measure_alignment`] as a table."""
    header = ["augmentations", "texts", "H(Q,D)", "query words", "document words", "vocabulary", "unseen"]
    cells = [
        [
            row.folder or "none",
            {"augmentations": "augmentations alone"}.get(row.texts, row.texts),
            _number(row.cross_entropy, ".3f"),
            f"{row.query_words:,}",
            f"{row.document_words:,}",
            f"{row.vocabulary_size:,}",
            _number(row.unseen_share, ".1%"),
        ]
        for row in rows
    ]
    return Table(title, header, cells, left=2)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
