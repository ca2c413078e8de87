"""
Composite groups: which texts are trained together, and in which order the trainer reads them.

A group is `num_queries` queries, some of their relevant documents, and irrelevant documents up to `group_size` texts
(arXiv 2506.18670, section 3.2). Groups are drawn when they are read, as a function of (seed, position), so memory
does not grow with their number. One generation batch as TRL reads it, for two processes, two groups of three texts
(one query `q`, two documents `d`, `e`) and two rollouts a text:

```
         ┌────────── process 0 ─────────┐ ┌────────── process 1 ─────────┐
position   0   0   0   0   0   0            1   1   1   1   1   1
row        q0  q0  d0  d0  e0  e0           q1  q1  d1  d1  e1  e1
```

The sampler yields `position` once a completion, the collator folds the repeats into groups again, and the trainer
renders their rows only when it is about to generate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch.utils.data

from ..utils.errors import InputError
from .collection import Collection


# What a text is in a group.
TEXT_TYPES = ("query", "relevant", "irrelevant")


@dataclass(frozen=True, slots=True)
class Group:
    """
    The texts of one composite group, by id.

    Args:
        position: Number of the group, counted through all epochs.
        queries: Query ids.
        documents: Document ids: those relevant to one of the queries, then the irrelevant ones, hard negatives first.
        num_relevant: How many of `documents` are relevant.
    """

    position: int
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    num_relevant: int

    def rows(self, augment: str) -> list[tuple[str, str]]:
        """
        The texts to generate for.

        Args:
            augment: `"both"`, `"query"` or `"document"`.

        Returns: (text type, id) pairs: queries, relevant documents, irrelevant documents.
        """
        queries = [("query", query_id) for query_id in self.queries]
        documents = [
            ("relevant" if index < self.num_relevant else "irrelevant", document_id)
            for index, document_id in enumerate(self.documents)
        ]
        return {"both": queries + documents, "query": queries, "document": documents}[augment]


class CompositeGroups(torch.utils.data.Dataset):
    """
    The groups of a collection, as a dataset indexed by position.

    Every query with a relevant document comes once an epoch, in an order that depends on (seed, epoch); the last
    generation batch is filled from the epoch's start. Irrelevant documents are not judged relevant to any query of the
    group: up to `num_hard_negatives` drawn from the hard negatives of its queries, the rest from the whole corpus.

    Args:
        collection: Where queries, documents and judgments come from.
        num_queries: Queries a group.
        group_size: Texts a group, queries and documents together.
        num_relevant: At most so many relevant documents per query; missing ones are replaced by irrelevant ones.
        groups_per_batch: Groups in a generation batch, over all processes.
        seed: Seed of order and draws.
        num_hard_negatives: At most so many irrelevant documents of a group are hard negatives.
        hard_negatives: Document ids by query id, from [`~coaug_trl.training.negatives.mine_hard_negatives`].

    Raises `InputError`: The collection has too few queries or documents for one group.
    """

    def __init__(
        self,
        collection: Collection,
        num_queries: int = 1,
        group_size: int = 16,
        num_relevant: int = 5,
        groups_per_batch: int = 32,
        seed: int = 0,
        num_hard_negatives: int = 0,
        hard_negatives: dict[str, list[str]] | None = None,
    ):
        self.collection = collection
        self.num_queries = num_queries
        self.group_size = group_size
        self.num_relevant = num_relevant
        self.groups_per_batch = groups_per_batch
        self.seed = seed
        self.num_hard_negatives = num_hard_negatives
        self.hard_negatives = hard_negatives or {}
        self.query_ids = collection.queries_with_relevant
        self.document_ids = list(collection.corpus)
        if len(self.query_ids) < num_queries:
            raise InputError(
                f"{collection.name}: a group takes {num_queries} queries, but the split '{collection.split}' has "
                f"{len(self.query_ids)} with a relevant document. Set queries_per_group to {len(self.query_ids)}."
            )
        if len(self.document_ids) < group_size - num_queries:
            raise InputError(
                f"{collection.name}: a group of {group_size} texts takes {group_size - num_queries} documents, but the "
                f"corpus has {len(self.document_ids)}. Set group_size to at most "
                f"{len(self.document_ids) + num_queries}."
            )
        num_groups = -(-len(self.query_ids) // num_queries)
        self.groups_per_epoch = -(-num_groups // groups_per_batch) * groups_per_batch
        self.num_filled = self.groups_per_epoch * num_queries - len(self.query_ids)
        self._epoch_order = lru_cache(maxsize=2)(self._draw_epoch_order)
        self._group = lru_cache(maxsize=groups_per_batch)(self._draw_group)

    def __len__(self) -> int:
        return self.groups_per_epoch

    def __getitem__(self, position: int) -> Group:
        return self._group(position)

    def _draw_epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.query_ids))

    def _draw_group(self, position: int) -> Group:
        epoch, offset = divmod(position, self.groups_per_epoch)
        order = self._epoch_order(epoch)
        places = np.arange(offset * self.num_queries, (offset + 1) * self.num_queries) % len(order)
        queries = [self.query_ids[index] for index in order[places]]

        generator = np.random.default_rng((self.seed, epoch, offset))
        relevant = {}
        excluded = set()
        for query_id in queries:
            candidates = self.collection.relevant_documents(query_id)
            excluded.update(candidates)
            drawn = generator.permutation(len(candidates))[: self.num_relevant]
            relevant.update(dict.fromkeys(candidates[index] for index in drawn))
        num_irrelevant = self.group_size - self.num_queries - len(relevant)
        hard = self._draw_hard_negatives(generator, min(self.num_hard_negatives, num_irrelevant), queries, excluded)
        random = self._draw_documents(generator, num_irrelevant - len(hard), excluded.union(hard))
        irrelevant = hard + random
        if len(irrelevant) < num_irrelevant:
            raise InputError(
                f"{self.collection.name}: only {len(irrelevant)} documents are irrelevant to a group that needs "
                f"{num_irrelevant}. Lower group_size or raise num_relevant."
            )
        return Group(position, tuple(queries), (*relevant, *irrelevant), len(relevant))

    def _draw_hard_negatives(
        self, generator: np.random.Generator, count: int, queries: list[str], excluded: set[str]
    ) -> list[str]:
        if not count:  # the generator, too, stays as it is without hard negatives
            return []
        mined = dict.fromkeys(id_ for query_id in queries for id_ in self.hard_negatives.get(query_id, ()))
        candidates = [id_ for id_ in mined if id_ not in excluded]
        draws = generator.permutation(len(candidates))[:count]
        return [candidates[index] for index in draws]

    def _draw_documents(self, generator: np.random.Generator, count: int, excluded: set[str]) -> list[str]:
        # So many distinct draws hold at least `count` documents outside `excluded`, wherever those lie.
        num_documents = len(self.document_ids)
        draws = generator.choice(num_documents, min(count + len(excluded), num_documents), replace=False)
        return [self.document_ids[index] for index in draws if self.document_ids[index] not in excluded][:count]


class GroupSampler(torch.utils.data.Sampler[int]):
    """
    Yields the position of a group once for each of its completions, generation batch by generation batch.

    Args:
        groups: The groups.
        completions_per_group: Rows of a group times rollouts of a row.
        repeat_count: How often the trainer reads each generation batch: `steps_per_generation * num_iterations`.
        current_epoch: Gives the epoch that starts. The trainer derives it from its global step, because `set_epoch`
            does not reach the sampler when a run of several processes resumes inside an epoch.
        has_ended: Whether the run is at its last step already: there is nothing to yield then. transformers would take
            one step more when a run is resumed at its end.
    """

    def __init__(
        self,
        groups: CompositeGroups,
        completions_per_group: int,
        repeat_count: int,
        current_epoch: Callable[[], int],
        has_ended: Callable[[], bool] = lambda: False,
    ):
        self.groups = groups
        self.completions_per_group = completions_per_group
        self.repeat_count = repeat_count
        self.current_epoch = current_epoch
        self.has_ended = has_ended

    def __iter__(self) -> Iterator[int]:
        if self.has_ended():
            return
        first = self.current_epoch() * self.groups.groups_per_epoch
        for batch in range(first, first + self.groups.groups_per_epoch, self.groups.groups_per_batch):
            for _ in range(self.repeat_count):
                for position in range(batch, batch + self.groups.groups_per_batch):
                    for _ in range(self.completions_per_group):
                        yield position

    def __len__(self) -> int:
        return self.groups.groups_per_epoch * self.completions_per_group * self.repeat_count


@dataclass(frozen=True)
class GroupCollator:
    """
    Folds the repeats of [`GroupSampler`] into the groups of one process.

    Args:
        completions_per_group: Rows of a group times rollouts of a row.
    """

    completions_per_group: int

    def __call__(self, repeats: list[Group]) -> list[Group]:
        groups = repeats[:: self.completions_per_group]
        if [group for group in groups for _ in range(self.completions_per_group)] != repeats:
            raise ValueError(
                f"A process received a part of a group: {len(repeats)} completions in groups of "
                f"{self.completions_per_group}. The batch arithmetic of `CoAugConfig` has been overridden."
            )
        return groups
