"""Answers on disk: shards that are whole or absent, so that work on a large corpus survives whatever ends it."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..utils.files import atomic_open
from ..utils.terminal import note


# Of a row: hash of text and settings, what was generated, at which attempt, and what it cost.
ROW_KEYS = ("key", "augmentation", "complete", "truncated", "attempt", "tokens", "seconds")
SHARDS_IN_MEMORY = 64
_ENTRY = np.dtype(
    [("key", np.uint64), ("complete", bool), ("attempt", np.uint16), ("shard", np.int32), ("offset", np.int64)]
)


class AnswerStore:
    """
    A folder of shards, each a JSONL file named by the SHA-256 of its content.

    Any number of processes may add shards, and none ever changes one. Of each answer only where it stands is kept in
    memory, 23 bytes.

    Args:
        folder: The folder; made when the first shard is written.

    `tokens` and `seconds` are what all answers that were read took to generate, those that others replaced included,
    processes added up; not a number where a row of an earlier version does not say.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: list[str] = []
        self._best = np.empty(0, _ENTRY)
        self.tokens = self.seconds = 0.0
        self._content = lru_cache(maxsize=SHARDS_IN_MEMORY)(self._read_shard)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows of `ROW_KEYS` as a shard; when it returns, they are there to stay."""
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()}.jsonl"
        try:
            with atomic_open(path) as file:
                file.write(content)
        except OSError as error:  # a full disk does not name the file
            error.filename = error.filename or str(path)
            raise

    def refresh(self) -> None:
        """Reads the shards that have been added; sets those aside that are damaged, and says so."""
        known = set(self._names)
        paths = sorted(path for path in self.folder.glob("*.jsonl") if path.name not in known)
        read = [self._best]
        for path in tqdm(paths, desc="Reading answers", unit=" shards", delay=2, leave=False):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:  # not what was written
                _set_aside(path)
                continue
            rows = list(_rows(content, len(self._names)))
            self._names.append(path.name)
            read.append(np.array([entry for entry, _, _ in rows], _ENTRY))
            self.tokens += sum(tokens for _, tokens, _ in rows)
            self.seconds += sum(seconds for _, _, seconds in rows)
        if len(read) > 1:
            entries = np.concatenate(read)
            read.clear()  # a million answers take 22 MB, each time
            # Of several answers to a text a complete one counts, else that of the last attempt.
            entries = entries[np.lexsort((entries["attempt"], entries["complete"], entries["key"]))]
            self._best = entries[np.append(entries["key"][1:] != entries["key"][:-1], True)]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Indices of the answers with `keys`, −1 where there is none."""
        if not len(self._best):
            return np.full(len(keys), -1)
        places = np.searchsorted(self._best["key"], keys).clip(max=len(self._best) - 1)
        return np.where(self._best["key"][places] == keys, places, -1)

    def unfinished(self, keys: np.ndarray, attempts: int) -> np.ndarray:
        """Which of `keys` have no answer, or an incomplete one that was tried again less than `attempts` times."""
        places = self.find(keys)
        if not len(self._best):
            return places < 0
        best = self._best[places]
        return (places < 0) | (~best["complete"] & (best["attempt"] < attempts))

    def row(self, place: int) -> dict[str, Any]:
        """An answer by its index."""
        entry = self._best[place]
        content, offset = self._content(self._names[entry["shard"]]), int(entry["offset"])
        return json.loads(content[offset : content.index(b"\n", offset)])

    def _read_shard(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def _rows(content: bytes, shard: int) -> Iterator[tuple[tuple, float, float]]:
    """Where each answer of a shard stands, and its tokens and seconds."""
    offset = 0
    for line in content.splitlines(keepends=True):
        row = json.loads(line)
        entry = int(row["key"], 16), row["complete"], row["attempt"], shard, offset
        yield entry, row.get("tokens", math.nan), row.get("seconds", math.nan)
        offset += len(line)


def _set_aside(path: Path) -> None:
    try:
        os.replace(path, path.with_suffix(".damaged"))
    except FileNotFoundError:  # another process was faster
        return
    note(
        f"{path} is damaged: its content does not have the SHA-256 of its name. It is now called "
        f"{path.with_suffix('.damaged').name}, and what it held is generated again"
    )
