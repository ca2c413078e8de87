"""One side of a collection in a folder of augmentations: which answers are missing, and the file made of them."""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.collection import Collection
from ..utils.errors import InputError
from ..utils.files import write_jsonl
from ..utils.terminal import describe_seconds
from .engines.base import num_processes, process_index
from .folder import FILES, read_rows, side_texts
from .shards import AnswerStore


# A shard is written when it has so many answers, or is so old: what a killed process loses.
SHARD_TEXTS, SHARD_SECONDS = 256, 60
# How an incomplete answer is tried again: greedily it would come out the same.
RETRY_TEMPERATURE = 0.7
SECONDS_BETWEEN_LOOKS = 2


@dataclass(frozen=True, slots=True)
class Throughput:
    """
    What one call generated.

    Args:
        texts: Texts augmented.
        tokens: Tokens generated.
        seconds: Wall-clock time of it.
    """

    texts: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        speed = f" ({self.texts / self.seconds:,.1f} texts/s, {self.tokens / self.seconds:,.0f} tokens/s)"
        return (
            f"{self.texts:,} texts augmented in {describe_seconds(self.seconds)}, {self.tokens:,} tokens generated"
            f"{speed * (self.texts > 0)}"
        )


class AnsweredSide:
    """
    The texts of one side, and the answers to them that a folder has.

    Args:
        collection: Where the texts come from.
        name: `"query"` or `"document"`.
        folder: The folder of augmentations.
        made_with: All that decides an answer besides its text.

    `keys` has the key of each text, a `uint64` of shape `(num_texts,)`, in the collection's order.
    """

    def __init__(self, collection: Collection, name: str, folder: Path, made_with: bytes):
        self.collection, self.name = collection, name
        self.path = folder / FILES[name]
        self._made_with = made_with
        self._plural = FILES[name].removesuffix(".jsonl")
        self._store = AnswerStore(self.path.with_suffix(".shards"))
        self._store.refresh()
        texts = tqdm(self._texts(), desc=f"Reading {self._plural}", unit=" texts", delay=2, leave=False)
        self.keys = np.fromiter((int(self._key(text), 16) for _, text in texts), np.uint64)

    def _texts(self) -> Iterator[tuple[str, str]]:
        return side_texts(self.collection, self.name)

    def _key(self, text: str) -> str:
        """16 hexadecimal digits for a text and all that decides its answer."""
        return hashlib.sha256(self._made_with + text.encode()).hexdigest()[:16]

    def missing(self, attempts: int, own: np.ndarray | bool = True) -> np.ndarray:
        """Where each different text without an answer, or with an incomplete one to be tried again, stands first."""
        places = np.flatnonzero(own & self._store.unfinished(self.keys, attempts))
        return np.sort(places[np.unique(self.keys[places], return_index=True)[1]])

    def generate_missing(self, augment: Callable, retry_incomplete: int) -> Throughput:
        """
        Generates what is missing of this process's share, and writes it into shards.

        Args:
            augment: [`Augmenter.augment`].
            retry_incomplete: How often an incomplete answer is tried again.

        Returns: what was generated.

        Raises `InputError`: The collection changes meanwhile.
        """
        self._store.folder.mkdir(parents=True, exist_ok=True)  # this side is begun
        # A share is decided by the text alone, so that processes need not ask each other, and equal texts meet.
        own = self.keys % np.uint64(num_processes()) == process_index()
        num_texts = num_tokens = 0
        start = time.perf_counter()
        for attempt in range(retry_incomplete + 1):
            places = self.missing(attempt, own)
            if not len(places):
                continue
            to_do = np.zeros(len(self.keys), bool)
            to_do[places] = True
            texts = ((self._key(text), text) for _, text in itertools.compress(self._texts(), to_do))
            with self._progress(attempt, len(places)) as progress:
                count, tokens = self._record(augment, texts, attempt, progress)
            num_texts, num_tokens = num_texts + count, num_tokens + tokens
            self._store.refresh()
        if self._store.unfinished(self.keys[own], retry_incomplete).any():
            raise InputError(
                f"{self.collection.name} has changed while it was augmented; run the same command again, which "
                "generates for the changed texts only."
            )
        return Throughput(num_texts, num_tokens, time.perf_counter() - start)

    def _progress(self, attempt: int, to_do: int) -> tqdm:
        whole = num_processes() == 1 and not attempt  # what was done before counts
        shares = f" (process 1 of {num_processes()})" if num_processes() > 1 else ""
        return tqdm(
            total=len(self.keys) if whole else to_do,
            initial=len(self.keys) - to_do if whole else 0,
            desc=f"{'Trying again' if attempt else 'Augmenting'} {self._plural}{shares}",
            unit=" texts",
            disable=process_index() > 0,
        )

    def _record(
        self, augment: Callable, texts: Iterator[tuple[str, str]], attempt: int, progress: tqdm
    ) -> tuple[int, int]:
        """Generates for texts with their keys, and writes shards; returns how many texts and tokens that were."""
        num_texts = num_tokens = 0
        rows = []
        since = last = time.monotonic()
        temperature = RETRY_TEMPERATURE if attempt else 0.0
        try:
            for key, augmentation, completion in augment(self.name, texts, temperature, attempt):
                rows.append(
                    {
                        "key": key,
                        "augmentation": augmentation.answer,
                        "complete": augmentation.complete,
                        "truncated": augmentation.truncated,
                        "attempt": attempt,
                        "tokens": completion.num_tokens,
                        "seconds": round(time.monotonic() - last, 4),
                    }
                )
                last = time.monotonic()
                num_texts, num_tokens = num_texts + 1, num_tokens + completion.num_tokens
                progress.set_postfix_str(f"{num_tokens:,} tokens generated", refresh=False)
                progress.update()
                if len(rows) >= SHARD_TEXTS or time.monotonic() - since > SHARD_SECONDS:
                    self._store.add(rows)
                    rows, since = [], time.monotonic()
        finally:  # an interruption, or a server that stays down, loses nothing that is finished
            if rows:
                self._store.add(rows)
        return num_texts, num_tokens

    def wait_for_others(self, retry_incomplete: int) -> None:
        """Waits until the other processes have written their shares; if one fails, the launcher ends this one, too."""
        if num_processes() == 1:
            return
        with tqdm(desc="Waiting for the other processes", unit=" texts", delay=2, leave=False) as progress:
            while missing := int(self._store.unfinished(self.keys, retry_incomplete).sum()):
                progress.set_postfix_str(f"{missing:,} texts missing")
                time.sleep(SECONDS_BETWEEN_LOOKS)
                self._store.refresh()

    def write_answers(self, splits: list[str]) -> dict[str, Any]:
        """
        Writes the file of this side from the shards.

        Args:
            splits: Splits whose queries the file has already.

        Returns: what the manifest says of this side.

        Raises `InputError`: The collection has changed since its keys were read.
        """
        counts: dict[str, Any] = {"texts": 0, "empty": 0, "incomplete": 0, "truncated": 0}
        retried = {"texts": 0, "repaired": 0, "temperature": RETRY_TEMPERATURE}

        def rows() -> Iterator[dict[str, Any]]:
            for row in itertools.chain(self._answers(), others):
                counts["texts"] += 1
                counts["empty"] += not row["augmentation"]
                counts["incomplete"] += not row["complete"]
                counts["truncated"] += row.get("truncated", False)
                if row.get("attempt", 0):
                    retried["texts"] += 1
                    retried["repaired"] += row["complete"]
                yield answer_row(row["_id"], row)

        others: Any = ()
        if self.name == "query":  # those of other splits stay; a document that has left the corpus goes
            others = [row for row in read_rows(self.path) if row["_id"] not in self.collection.qrels]
        write_jsonl(self.path, rows())
        if retried["texts"]:
            counts["retried"] = retried
        if math.isfinite(self._store.tokens):
            counts["cost"] = {"tokens": int(self._store.tokens), "seconds": round(self._store.seconds, 1)}
        if self.name == "query":
            counts["splits"] = sorted({*splits, self.collection.split})
        return counts

    def _answers(self) -> Iterator[dict[str, Any]]:
        """The answer to each text, with its id."""
        texts = tqdm(self._texts(), f"Writing {self.path.name}", len(self.keys), unit=" texts", delay=2, leave=False)
        for text, key, place in itertools.zip_longest(texts, self.keys, self._store.find(self.keys)):
            if text is None or key is None or int(self._key(text[1]), 16) != key:
                raise InputError(f"{self.collection.name} has changed while it was augmented; run the command again.")
            yield {"_id": text[0]} | self._store.row(place)


def answer_row(id_: str, row: dict[str, Any]) -> dict[str, Any]:
    """What the file of a side says of one text."""
    return {"_id": id_, "augmentation": row["augmentation"], "complete": row["complete"]}
