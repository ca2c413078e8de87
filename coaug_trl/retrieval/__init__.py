"""Retrievers: one interface for the reward of training, the index of serving and the runs of evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import InputError
from .base import EncodedDocuments, Retriever, read_config
from .bm25 import BM25Retriever


if TYPE_CHECKING:
    from .dense import DenseRetriever

__all__ = ["BM25Retriever", "DenseRetriever", "EncodedDocuments", "Retriever", "load_retriever", "make_retriever"]


def __getattr__(name: str):
    # Loaded on first use: it needs torch, and packages that BM25 does without.
    if name == "DenseRetriever":
        from .dense import DenseRetriever

        return DenseRetriever
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_retriever(retriever: str, **settings: Any) -> Retriever:
    """
    The retriever of a `config`.

    Args:
        retriever (`str`):
            `"bm25"` or `"dense"`.
        **settings:
            Arguments of [`BM25Retriever`] or [`DenseRetriever`].

    Returns:
        [`Retriever`]: without an index.

    Raises:
        `InputError`: a setting is not one of this retriever, or cannot work.
    """
    kind = _class_of(retriever)
    try:
        return kind(**settings)
    except TypeError as error:
        raise InputError(f"A retriever {retriever!r} does not take these settings: {error}") from None


def load_retriever(folder: str | Path) -> Retriever:
    """
    Reads an index of either kind.

    Raises:
        `InputError`: there is no finished index in the folder, or one of its files is missing or cut short.
    """
    try:
        return _class_of(read_config(folder)["retriever"]).load(folder)
    except InputError:
        raise
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: the index is damaged ({error}); index the collection again.") from None


def _class_of(retriever: str) -> type[Retriever]:
    if retriever == "bm25":
        return BM25Retriever
    if retriever == "dense":
        return __getattr__("DenseRetriever")
    raise InputError(f"There is no retriever {retriever!r}; use bm25 or dense.")
