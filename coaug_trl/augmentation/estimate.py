"""What augmenting took, and what it would take."""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..utils.terminal import describe_seconds
from .engines.base import num_processes
from .folder import side_texts
from .side import AnsweredSide, Throughput, answer_row


SAMPLED_PROMPTS = 1000  # texts that are tokenized for an estimate


@dataclass(frozen=True, slots=True)
class Estimate:
    """
    What augmenting one side would take.

    Args:
        texts: Texts of the side.
        to_do: Different ones among them that have no answer yet.
        prompt_tokens: Tokens of their prompts: the mean of `sampled_prompts` of them, times `to_do`.
        sampled_prompts: As said.
        most_tokens: Tokens generated if every answer were as long as it may be.
        sample: What was measured of the model, on some of the texts.
        bytes: Size of the answers on disk.
    """

    texts: int
    to_do: int
    prompt_tokens: int
    sampled_prompts: int
    most_tokens: int
    sample: Throughput
    bytes: int

    def __str__(self) -> str:
        lines = [f"{self.texts:,} texts, {self.to_do:,} to augment (different ones without an answer yet)"]
        if self.to_do:
            sample, processes = self.sample, num_processes()
            tokens = round(self.to_do * sample.tokens / sample.texts)
            seconds = self.to_do * sample.seconds / sample.texts / processes
            lines += [
                f"  prompts    about {self.prompt_tokens:,} tokens, from {self.sampled_prompts:,} of the texts",
                f"  answers    {self.to_do:,} to {self.most_tokens:,} tokens; about {tokens:,}, from {sample.texts:,} "
                "of the texts",
                f"  time       about {describe_seconds(seconds)} on {processes} process{'es' * (processes > 1)}: "
                f"{sample.texts:,} texts took {describe_seconds(sample.seconds)}",
                f"  disk       about {self.bytes / 2**20:,.1f} MiB",
            ]
        return "\n".join(lines)


def estimate_side(
    side: AnsweredSide, retry_incomplete: int, prompts: Callable, augment: Callable, width: int, most_tokens: int
) -> Estimate:
    """
    Tokenizes up to 1,000 of the texts without an answer, and augments as many as the engine takes at once.

    Args:
        side: The side.
        retry_incomplete: How often incomplete answers are tried again.
        prompts: [`Augmenter.prompts`].
        augment: [`Augmenter.augment`].
        width: Texts that the engine takes at once.
        most_tokens: Longest completion, in tokens.

    Returns: the estimate.
    """
    places = side.missing(retry_incomplete)
    draw = np.random.default_rng(0)
    sampled = np.zeros(len(side.keys), bool)
    sampled[draw.choice(places, min(len(places), SAMPLED_PROMPTS), replace=False)] = True
    texts = list(itertools.compress(side_texts(side.collection, side.name), sampled))
    draw.shuffle(texts)
    lengths = [len(ids) for _, ids in prompts(side.name, texts)]
    texts = texts[:width]
    list(augment(side.name, texts[:1]))  # the first call of a model takes longer
    start, tokens, size = time.perf_counter(), 0, 0
    for id_, augmentation, completion in augment(side.name, texts):
        tokens += completion.num_tokens
        row = answer_row(id_, {"augmentation": augmentation.answer, "complete": augmentation.complete})
        # in a shard, with its key, and in the file that is read
        size += 2 * len(json.dumps(row, ensure_ascii=False).encode()) + 50
    return Estimate(
        texts=len(side.keys),
        to_do=len(places),
        prompt_tokens=round(len(places) * sum(lengths) / max(len(lengths), 1)),
        sampled_prompts=len(lengths),
        most_tokens=len(places) * most_tokens,
        sample=Throughput(len(texts), tokens, time.perf_counter() - start),
        bytes=round(len(places) * size / max(len(texts), 1)),
    )
