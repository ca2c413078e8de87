"""What every engine takes and gives, and which one is best here."""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


ENGINES = ("vllm", "transformers")


class Completion(NamedTuple):
    """
    What a model wrote.

    Args:
        text: Without special tokens.
        num_tokens: Its length in tokens.
    """

    text: str
    num_tokens: int


Prompts = Iterable[tuple[Any, list[int]]]
Completions = Iterator[tuple[Any, Completion]]


def process_index() -> int:
    """Index of this process among those that a launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """How many processes a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def best_engine() -> str:
    """`"vllm"` where it is installed, else `"transformers"`."""
    spec = importlib.util.find_spec("vllm")
    return "vllm" if spec is not None and spec.origin is not None else "transformers"
