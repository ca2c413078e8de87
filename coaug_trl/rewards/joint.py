"""The joint reward as a TRL reward function: from completions to the expected NDCG of every rollout."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import Collection, Document
from ..distributed import run_together
from ..groups import Group
from ..prompts import PromptSet, extract_answer
from ..retrieval import Retriever
from .ndcg import divide_document_rewards, exact_ndcg, sampled_ndcg, sum_document_rewards


if TYPE_CHECKING:
    from ..config import CoAugConfig


@dataclass
class GroupRollouts:
    """What competes of one group: by id, one text a rollout. Texts that are not augmented have one rollout."""

    position: int
    queries: dict[str, list[str]]
    documents: dict[str, list[Document]]


@dataclass
class Pool:
    """
    The documents that compete, each once, in an order that knows nothing of relevance.

    Args:
        document_ids (`list[str]`):
            Ids of the `D` documents.
        columns (`list[Document]`):
            The `C` document rollouts, those of a document together.
        rollout_document (`np.ndarray` of shape `(C,)`):
            Index of each column's document.
        keys (`list[tuple[int, str, int]]`):
            Group position, id and rollout of each column.
    """

    document_ids: list[str]
    columns: list[Document]
    rollout_document: np.ndarray
    keys: list[tuple[int, str, int]]

    @classmethod
    def merge(cls, groups: list[GroupRollouts], verbatim: bool, seed: tuple[int, ...]) -> "Pool":
        """Merges the rollouts of documents that several groups drew; if `verbatim`, all of them are the same text."""
        rollouts = defaultdict(list)
        for group in groups:
            for document_id, documents in group.documents.items():
                if not (verbatim and document_id in rollouts):
                    rollouts[document_id] += [(group.position, i, each) for i, each in enumerate(documents)]
        ids = sorted(rollouts)
        document_ids = [ids[index] for index in np.random.default_rng(seed).permutation(len(ids))]
        columns = [(position, id_, i, each) for id_ in document_ids for position, i, each in rollouts[id_]]
        return cls(
            document_ids=document_ids,
            columns=[document for *_, document in columns],
            rollout_document=np.repeat(np.arange(len(ids)), [len(rollouts[id_]) for id_ in document_ids]),
            keys=[(position, id_, i) for position, id_, i, _ in columns],
        )


class JointReward:
    """
    Expected NDCG@k of query and document rollouts (arXiv 2506.18670, section 3.3), as a TRL reward function.

    Every process scores the query rollouts of its own groups. With `candidate_pool="batch"` they are ranked against
    the documents of all processes, where a document drawn by several groups stands once, with the rollouts of all.
    For the same completions the rewards do not depend on the number of processes.

    Args:
        collection ([`~coaug_trl.Collection`]):
            Texts and judgments.
        retriever ([`~coaug_trl.retrieval.Retriever`]):
            Scores queries against documents, with fixed statistics.
        prompt_set ([`~coaug_trl.PromptSet`]):
            Composes texts and answers.
        args ([`~coaug_trl.CoAugConfig`]):
            `augment`, `candidate_pool`, `reward_estimator`, `num_reward_samples`, `relevant_weight`, `ndcg_k`, `seed`.
    """

    __name__ = "joint_ndcg"

    def __init__(self, collection: Collection, retriever: Retriever, prompt_set: PromptSet, args: "CoAugConfig"):
        self.collection = collection
        self.retriever = retriever
        self.prompt_set = prompt_set
        self.args = args

    def __call__(
        self,
        completions: list[Any],
        group: list[Group],
        text_type: list[str],
        text_id: list[str],
        trainer_state: Any,
        log_extra: Callable[[str, list], None],
        **kwargs,
    ) -> list[float]:
        """
        Scores the completions of this process.

        Args:
            completions (`list`):
                Strings or messages, in groups, the rollouts of a text together.
            group, text_type, text_id (`list`):
                For each completion its group, `"query"`, `"relevant"` or `"irrelevant"`, and its text's id.
            trainer_state ([`~transformers.TrainerState`]):
                Its `global_step` seeds the order of the pool and the sampled draws.
            log_extra (`Callable`):
                Takes columns of the completions table.

        Returns:
            `list[float]`: a reward between 0 and 1 for each completion.

        Raises:
            `RuntimeError`: On every process, when the reward failed on one.
        """
        texts = [
            completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions
        ]
        answers = [extract_answer(text) for text in texts]
        log_extra("text_type", text_type)
        log_extra("text_id", text_id)
        log_extra("group", [each.position for each in group])
        log_extra("answer", answers)

        step = trainer_state.global_step
        keys = list(_rollout_keys(group, text_type, text_id))
        own_groups, all_groups = run_together(self._compose, group, keys, answers)
        if self.args.candidate_pool == "group":
            rewards, _ = run_together(self._group_rewards, own_groups, step)
        else:
            rewards = self._batch_rewards(own_groups, [each for process in all_groups for each in process], step)
        return [rewards[key] for key in keys]

    def _compose(self, groups: list[Group], keys: list[tuple], answers: list[str]) -> list[GroupRollouts]:
        answers_of = defaultdict(list)
        for (position, side, text_id, _), answer in zip(keys, answers, strict=True):
            answers_of[position, side, text_id].append(answer)
        compose_query, compose_document = self.prompt_set.compose_query, self.prompt_set.compose_document
        field = self.retriever.answer_field
        composed = []
        for group in dict.fromkeys(groups):
            queries, documents = {}, {}
            for id_ in group.queries:
                query = self.collection.queries[id_]
                rollouts = answers_of.get((group.position, "query", id_), [""])
                queries[id_] = [compose_query(query, answer) for answer in rollouts]
            for id_ in group.documents:
                document = self.collection.corpus[id_]
                rollouts = answers_of.get((group.position, "document", id_), [""])
                documents[id_] = [compose_document(document, answer, field) for answer in rollouts]
            composed.append(GroupRollouts(group.position, queries, documents))
        return composed

    def _group_rewards(self, groups: list[GroupRollouts], step: int) -> dict[tuple, float]:
        rewards = {}
        for group in groups:
            pool = self._pool([group], (self.args.seed, step, group.position))
            query_rewards, numerator, weight = self._score([group], pool, step)
            document_rewards = divide_document_rewards(numerator, weight, pool.rollout_document)
            rewards.update(_by_key(query_rewards, pool, document_rewards))
        return rewards

    def _batch_rewards(
        self, own_groups: list[GroupRollouts], all_groups: list[GroupRollouts], step: int
    ) -> dict[tuple, float]:
        pool = self._pool(all_groups, (self.args.seed, step))
        (query_rewards, *_), scored = run_together(self._score, own_groups, pool, step)
        numerator = sum(numerator for _, numerator, _ in scored)
        weight = sum(weight for _, _, weight in scored)
        document_rewards = divide_document_rewards(numerator, weight, pool.rollout_document)
        return _by_key(query_rewards, pool, document_rewards)

    def _pool(self, groups: list[GroupRollouts], seed: tuple[int, ...]) -> Pool:
        return Pool.merge(groups, verbatim=self.args.augment == "query", seed=seed)

    def _score(
        self, groups: list[GroupRollouts], pool: Pool, step: int
    ) -> tuple[dict[tuple, float], np.ndarray, np.ndarray]:
        """Rewards of the groups' query rollouts, and what they add to the sums behind the document rewards."""
        rows = [
            ((group.position, "query", id_, i), text)
            for group in groups
            for id_, rollouts in group.queries.items()
            for i, text in enumerate(rollouts)
        ]
        scores = self.retriever.score([text for _, text in rows], pool.columns)
        judged = {id_: self.collection.qrels.get(id_, {}) for group in groups for id_ in group.queries}
        gains = {id_: [grades.get(each, 0) for each in pool.document_ids] for id_, grades in judged.items()}
        relevance = np.array([gains[id_] for (_, _, id_, _), _ in rows], dtype=np.float64)
        arguments = (scores, pool.rollout_document, relevance, self.args.ndcg_k)
        if self.args.reward_estimator == "exact":
            values, conditional = exact_ndcg(*arguments)
        else:
            values, conditional = sampled_ndcg(
                *arguments, num_samples=self.args.num_reward_samples, seed=(self.args.seed, step)
            )
        sums = sum_document_rewards(conditional, pool.rollout_document, relevance, self.args.relevant_weight)
        return {key: value for (key, _), value in zip(rows, values.tolist(), strict=True)}, *sums


def _rollout_keys(groups: list[Group], text_types: list[str], text_ids: list[str]):
    """(group position, side, id, rollout) of each completion."""
    seen = defaultdict(int)
    for group, text_type, text_id in zip(groups, text_types, text_ids, strict=True):
        text = (group.position, "query" if text_type == "query" else "document", text_id)
        yield *text, seen[text]
        seen[text] += 1


def _by_key(query_rewards: dict[tuple, float], pool: Pool, document_rewards: np.ndarray) -> dict[tuple, float]:
    documents = {
        (position, "document", id_, rollout): reward
        for (position, id_, rollout), reward in zip(pool.keys, document_rewards.tolist(), strict=True)
    }
    return query_rewards | documents
