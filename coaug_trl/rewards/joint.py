"""The joint reward as a TRL reward function: from completions to the expected NDCG of every rollout."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ..data.collection import Collection
from ..data.groups import Group
from ..policy.prompts import PromptSet, extract_answer
from ..retrieval import EncodedDocuments, Retriever
from ..utils.distributed import run_together
from .ndcg import divide_document_rewards, exact_ndcg, ideal_dcg, sampled_ndcg, sum_document_rewards
from .pool import Column, Corpus, Pool, Rollouts
from .together import describe_batch


class RewardSettings(Protocol):
    """What the reward reads of [`~coaug_trl.CoAugConfig`], which documents it."""

    augment: str
    candidate_pool: str
    bm25_statistics: str
    reward_estimator: str
    num_reward_samples: int
    relevant_weight: float
    ndcg_k: int
    ignore_identical_ids: bool
    seed: int


class JointReward:
    """
    Expected NDCG@k of query and document rollouts (arXiv 2506.18670, section 3.3), as a TRL reward function.

    Every process scores the query rollouts of its own groups. With `candidate_pool="batch"` they are ranked against
    the documents of all processes, where a document drawn by several groups stands once, with the rollouts of all;
    with `"corpus"` also against all documents outside the batch, each with the one text that `corpus` gives it, and
    the ideal ranking is that of all judged documents. For the same completions the rewards do not depend on the number
    of processes. Documents are encoded by the process that generated them, once a generation batch.

    Args:
        collection: Texts and judgments.
        retriever: Scores queries against documents, with statistics that are fixed within a batch.
        prompt_set: Composes texts and answers.
        args: `augment`, `candidate_pool`, `reward_estimator`, `num_reward_samples`, `relevant_weight`, `ndcg_k`,
            `seed`, `ignore_identical_ids`, `bm25_statistics`.
        corpus: All documents, for `candidate_pool="corpus"`.
    """

    __name__ = "joint_ndcg"

    def __init__(
        self,
        collection: Collection,
        retriever: Retriever,
        prompt_set: PromptSet,
        args: RewardSettings,
        corpus: Corpus | None = None,
    ):
        self.collection = collection
        self.corpus = corpus
        self.retriever = retriever
        self.prompt_set = prompt_set
        self.args = args
        self.follows = args.bm25_statistics == "running" and retriever.kind == "sparse"

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
            completions: Strings or messages, in groups, the rollouts of a text together.
            group, text_type, text_id: For each completion its group, `"query"`, `"relevant"` or `"irrelevant"`, and
                its text's id.
            trainer_state: Its `global_step` seeds the order of the pool and the sampled draws.
            log_extra: Takes columns of the completions table.

        Returns: a reward between 0 and 1 for each completion.

        Raises `RuntimeError`: On every process, when the reward failed on one, naming process and batch.
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
        where = f"{self.__name__}, {describe_batch(step, group, text_id)}"
        if self.args.candidate_pool == "group":
            rewards, _ = run_together(self._group_rewards, group, keys, answers, step, where=where)
        else:
            rewards = self._batch_rewards(group, keys, answers, step, where)
        return [rewards[key] for key in keys]

    def _compose(self, groups: list[Group], keys: list[tuple], answers: list[str]) -> Rollouts:
        """Composes the texts of this process's groups, and encodes the documents among them."""
        answers_of = defaultdict(list)
        for (position, side, text_id, _), answer in zip(keys, answers, strict=True):
            answers_of[position, side, text_id].append(answer)
        compose_query, compose_document = self.prompt_set.compose_query, self.prompt_set.compose_document
        field = self.retriever.answer_field
        rows, queries, columns, documents = [], [], [], []
        for group in dict.fromkeys(groups):
            for id_ in group.queries:
                for i, answer in enumerate(answers_of.get((group.position, "query", id_), [""])):
                    rows.append((group.position, id_, i))
                    queries.append(compose_query(self.collection.queries[id_], answer))
            for id_ in group.documents:
                for i, answer in enumerate(answers_of.get((group.position, "document", id_), [""])):
                    columns.append((group.position, id_, i))
                    documents.append(compose_document(self.collection.corpus[id_], answer, field))
        rollouts = Rollouts(rows, queries, columns, self.retriever.encode(documents))
        if self.follows:
            rollouts.original_ids = list(dict.fromkeys(document_id for _, document_id, _ in columns))
            originals = [self.collection.corpus[id_] for id_ in rollouts.original_ids]
            rollouts.originals = self.retriever.encode(originals)
        return rollouts

    def _group_rewards(self, groups: list[Group], keys: list[tuple], answers: list[str], step: int) -> dict:
        own = self._compose(groups, keys, answers)
        scores = self._mask(own.rows, self.retriever.score(own.queries, own.documents), own.columns)
        rewards = {}
        for group in dict.fromkeys(groups):
            rows = [place for place, (position, *_) in enumerate(own.rows) if position == group.position]
            first = next(place for place, (position, *_) in enumerate(own.columns) if position == group.position)
            columns = [column for column in own.columns if column[0] == group.position]
            pool = self._merge(columns, self._shuffle(step, group.position))
            group_scores = scores[np.ix_(rows, first + pool.places)]
            group_rows = [own.rows[place] for place in rows]
            query_rewards, numerator, weight = self._expect(group_rows, group_scores, pool, step)
            document_rewards = divide_document_rewards(numerator, weight, pool.rollout_document)
            rewards.update(_by_key(query_rewards, pool, document_rewards))
        return rewards

    def _batch_rewards(
        self, groups: list[Group], keys: list[tuple], answers: list[str], step: int, where: str
    ) -> dict:
        own, processes = run_together(self._compose, groups, keys, answers, where=where)
        order = self.corpus.order if self.corpus else self._shuffle(step)
        pool = self._merge([column for process in processes for column in process.columns], order)
        documents = own.documents.concatenate([process.documents for process in processes]).take(pool.places)
        (query_rewards, *_), expected = run_together(self._score, own, pool, documents, step, where=where)
        numerator = sum(numerator for _, numerator, _ in expected)
        weight = sum(weight for _, _, weight in expected)
        document_rewards = divide_document_rewards(numerator, weight, pool.rollout_document)
        if self.follows:
            ids = [id_ for process in processes for id_ in process.original_ids]
            place = {id_: place for place, id_ in enumerate(ids)}
            originals = own.originals.concatenate([process.originals for process in processes])
            originals = originals.take(np.array([place[id_] for id_ in pool.document_ids]))
            self.retriever.follow(originals, documents, pool.rollout_document)
        return _by_key(query_rewards, pool, document_rewards)

    def _merge(self, columns: list[Column], order: Callable[[list[str]], list[str]]) -> Pool:
        return Pool.merge(columns, verbatim=self.args.augment == "query", order=order)

    def _shuffle(self, *seed: int) -> Callable[[list[str]], list[str]]:
        generator = np.random.default_rng((self.args.seed, *seed))
        return lambda ids: [ids[index] for index in generator.permutation(len(ids))]

    def _score(
        self, own: Rollouts, pool: Pool, documents: EncodedDocuments, step: int
    ) -> tuple[dict[tuple, float], np.ndarray, np.ndarray]:
        scores = self._mask(own.rows, self.retriever.score(own.queries, documents), pool.columns)
        if self.corpus is None:
            return self._expect(own.rows, scores, pool, step)
        left_out = np.zeros(len(self.corpus.documents), dtype=bool)
        places = np.array([self.corpus.place[id_] for id_ in pool.document_ids])
        left_out[places] = True
        # Of the documents outside the batch only the best k can take a place that counts, or make others lose one.
        k = self.args.ndcg_k + self.args.ignore_identical_ids
        other_scores, other_places = self.retriever.nearest(own.queries, self.corpus.documents, k, left_out)
        other_ids = [[self.corpus.document_ids[place] for place in row] for row in other_places]
        if self.args.ignore_identical_ids:
            query_ids = np.array([[query_id] for _, query_id, _ in own.rows], dtype=object)
            other_scores[np.array(other_ids, dtype=object) == query_ids] = -np.inf
        scores = _rank_together(scores, places[pool.rollout_document], other_scores, other_places)
        return self._expect(own.rows, scores, pool, step, other_ids)

    def _mask(self, rows: list[tuple[int, str, int]], scores: np.ndarray, columns: list[Column]) -> np.ndarray:
        """Takes the documents that are a query itself out of its ranking, if asked to."""
        if self.args.ignore_identical_ids:
            query_ids = np.array([[query_id] for _, query_id, _ in rows], dtype=object)
            document_ids = np.array([document_id for _, document_id, _ in columns], dtype=object)
            scores[document_ids == query_ids] = -np.inf
        return scores

    def _expect(
        self,
        rows: list[tuple[int, str, int]],
        scores: np.ndarray,
        pool: Pool,
        step: int,
        other_ids: list[list[str]] | None = None,
    ) -> tuple[dict[tuple, float], np.ndarray, np.ndarray]:
        """
        Rewards of query rollouts, and what they add to the sums behind the document rewards.

        `other_ids` are, for each row, the documents outside the batch in the last columns of its scores.
        """
        qrels = self.collection.qrels
        judged = {id_: qrels.get(id_, {}) for _, id_, _ in rows}
        gains = {id_: [grades.get(each, 0) for each in pool.document_ids] for id_, grades in judged.items()}
        relevance = np.array([gains[id_] for _, id_, _ in rows], dtype=np.float64)
        rollout_document, ideal, k = pool.rollout_document, None, self.args.ndcg_k
        if other_ids is not None:
            other_gains = [
                [judged[id_].get(each, 0) for each in others]
                for (_, id_, _), others in zip(rows, other_ids, strict=True)
            ]
            relevance = np.hstack([relevance, np.array(other_gains, dtype=np.float64)])
            num_others = scores.shape[1] - len(rollout_document)
            rollout_document = np.hstack([rollout_document, len(pool.document_ids) + np.arange(num_others)])
            best = {id_: ideal_dcg(np.array([*grades.values(), 0], dtype=float), k) for id_, grades in judged.items()}
            ideal = np.array([best[id_] for _, id_, _ in rows])
        arguments = (scores, rollout_document, relevance, k)
        if self.args.reward_estimator == "exact":
            values, conditional = exact_ndcg(*arguments, ideal=ideal)
        else:
            values, conditional = sampled_ndcg(
                *arguments, num_samples=self.args.num_reward_samples, seed=(self.args.seed, step), ideal=ideal
            )
        numerator, weight = sum_document_rewards(conditional, rollout_document, relevance, self.args.relevant_weight)
        query_rewards = {
            (position, "query", id_, i): value for (position, id_, i), value in zip(rows, values.tolist(), strict=True)
        }
        return query_rewards, numerator[: len(pool.columns)], weight[: len(pool.document_ids)]


def _rank_together(
    scores: np.ndarray, places: np.ndarray, other_scores: np.ndarray, other_places: np.ndarray
) -> np.ndarray:
    """
    Scores of a pool's columns, and after them those of each row's other documents, replaced by their negative ranks:
    the order of the whole corpus decides between equal scores, whichever side of the batch they are on.

    `places` are those of the columns' documents in the corpus, `other_places` those of the other documents.
    """
    scores = np.hstack([scores, other_scores])
    places = np.hstack([np.broadcast_to(places, (len(scores), len(places))), other_places])
    order = np.lexsort((places, -scores), axis=-1)
    ranks = np.empty(scores.shape)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1], dtype=float)[None], axis=1)
    return np.where(scores > -np.inf, -ranks, -np.inf)


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
        for (position, id_, rollout), reward in zip(pool.columns, document_rewards.tolist(), strict=True)
    }
    return query_rewards | documents
