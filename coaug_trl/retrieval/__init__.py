"""Retrievers: one interface for the reward of training, the index of serving and the runs of evaluation."""

from .base import Retriever
from .bm25 import BM25Retriever


__all__ = ["BM25Retriever", "Retriever"]
