"""Retrievers: one interface for the reward of training, the index of serving and the runs of evaluation."""

from typing import TYPE_CHECKING

from .base import Retriever
from .bm25 import BM25Retriever


if TYPE_CHECKING:
    from .dense import DenseRetriever

__all__ = ["BM25Retriever", "DenseRetriever", "Retriever"]


def __getattr__(name: str):
    # Loaded on first use: it needs torch, and packages that BM25 does without.
    if name == "DenseRetriever":
        from .dense import DenseRetriever

        return DenseRetriever
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
