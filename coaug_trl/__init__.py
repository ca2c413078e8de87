"""Teach one language model to augment both queries and documents (arXiv 2506.18670), as a TRL trainer."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.2.0"

# Public names and where they live. Loaded on first use, so that `import coaug_trl` does not import torch.
_PUBLIC = {
    "Augmenter": "augmentation.augmenter",
    "BM25Retriever": "retrieval",
    "CoAugConfig": "training.config",
    "CoAugTrainer": "training.trainer",
    "Collection": "data",
    "DenseRetriever": "retrieval",
    "Document": "data",
    "InputError": "utils.errors",
    "PromptSet": "policy.prompts",
    "RetrievalMetric": "evaluation.metric",
    "exact_ndcg_rewards": "rewards",
    "sampled_ndcg_rewards": "rewards",
}
__all__ = [
    "Augmenter",
    "BM25Retriever",
    "CoAugConfig",
    "CoAugTrainer",
    "Collection",
    "DenseRetriever",
    "Document",
    "InputError",
    "PromptSet",
    "RetrievalMetric",
    "exact_ndcg_rewards",
    "sampled_ndcg_rewards",
]

if TYPE_CHECKING:
    from .augmentation.augmenter import Augmenter
    from .data import Collection, Document
    from .evaluation.metric import RetrievalMetric
    from .policy.prompts import PromptSet
    from .retrieval import BM25Retriever, DenseRetriever
    from .rewards import exact_ndcg_rewards, sampled_ndcg_rewards
    from .training.config import CoAugConfig
    from .training.trainer import CoAugTrainer
    from .utils.errors import InputError


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__():
    return __all__
