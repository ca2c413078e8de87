import itertools
import math
import subprocess
import sys

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coaug_trl.rewards.ndcg import (
    divide_document_rewards,
    exact_ndcg,
    exact_ndcg_rewards,
    sampled_ndcg,
    sampled_ndcg_rewards,
    sum_document_rewards,
)


NOT_RETRIEVED = -math.inf


def plain_ndcg(scores, gains, k):
    """NDCG@k of one draw: `scores[j]` and `gains[j]` of each document."""
    ranking = sorted((j for j, score in enumerate(scores) if score > NOT_RETRIEVED), key=lambda j: (-scores[j], j))
    dcg = sum(gains[j] / math.log2(rank + 1) for rank, j in enumerate(ranking[:k], start=1))
    ideal = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(sorted(gains, reverse=True)[:k], start=1))
    return dcg / ideal if ideal > 0 else 0.0


def enumerate_draws(scores, rollout_document, relevance, k):
    """Row and conditional values by going through every draw of one column for each document."""
    choices = [
        [column for column, document in enumerate(rollout_document) if document == wanted]
        for wanted in range(len(relevance[0]))
    ]
    values, conditional = [], []
    for row_scores, gains in zip(scores, relevance, strict=True):
        every, by_column = [], [[] for _ in row_scores]
        for draw in itertools.product(*choices):
            ndcg = plain_ndcg([row_scores[column] for column in draw], gains, k)
            every.append(ndcg)
            for column in draw:
                by_column[column].append(ndcg)
        values.append(math.fsum(every) / len(every))
        conditional.append([math.fsum(column) / len(column) for column in by_column])
    return np.array(values), np.array(conditional)


def enumerate_rewards(scores, relevance, k, relevant_weight):
    """Query and document rewards by going through every draw of one rollout for each document."""
    num_queries, num_query_rollouts, num_documents, num_document_rollouts = scores.shape
    query_rewards = np.zeros((num_queries, num_query_rollouts))
    document_rewards = np.zeros((num_documents, num_document_rollouts))
    weights = np.zeros(num_documents)
    rollout_document = [j for j in range(num_documents) for _ in range(num_document_rollouts)]
    for i in range(num_queries):
        for a in range(num_query_rollouts):
            row = scores[i, a].reshape(1, -1).tolist()
            value, conditional = enumerate_draws(row, rollout_document, [relevance[i].tolist()], k)
            query_rewards[i, a] = value[0]
            if relevance[i].sum() == 0:
                continue
            for j in range(num_documents):
                weight = 1 + relevant_weight * relevance[i, j]
                weights[j] += weight
                for b in range(num_document_rollouts):
                    document_rewards[j, b] += weight * conditional[0, j * num_document_rollouts + b]
    for j in range(num_documents):
        if weights[j] > 0:
            document_rewards[j] /= weights[j]
    return query_rewards, document_rewards


def random_pool(seed, shape, levels=None, missing=0.0):
    """Scores (with ties if there are few levels, and a share of pairs not retrieved) and graded relevance."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=shape) if levels is None else generator.integers(levels, size=shape).astype(float)
    scores[generator.random(shape) < missing] = NOT_RETRIEVED
    relevance = generator.choice([0.0, 1.0, 2.0], size=(shape[0], shape[2]), p=[0.5, 0.3, 0.2])
    return scores, relevance


def uneven_pool(seed, num_rows, rollouts):
    """Core arguments with a different number of rollouts for each document, ties and missing pairs."""
    generator = np.random.default_rng(seed)
    rollout_document = np.repeat(np.arange(len(rollouts)), rollouts)
    scores = generator.integers(5, size=(num_rows, len(rollout_document))).astype(float)
    scores[scores == 0] = NOT_RETRIEVED
    relevance = generator.choice([0.0, 0.0, 1.0, 3.0], size=(num_rows, len(rollouts)))
    return scores, rollout_document, relevance


class TestExactAgainstEnumeration:
    @pytest.mark.parametrize("relevant_weight", [0.0, 10.0])
    @pytest.mark.parametrize("k", [1, 3, 5, 20])
    @pytest.mark.parametrize(
        "shape, levels, missing",
        [
            ((3, 2, 5, 3), None, 0.0),  # no ties
            ((3, 2, 5, 3), 3, 0.0),  # many ties
            ((2, 2, 6, 2), 4, 0.3),  # ties and pairs that are not retrieved
            ((2, 1, 4, 1), 4, 0.2),  # nothing to draw
            ((1, 1, 1, 3), None, 0.3),  # one document
        ],
    )
    def test_rewards(self, shape, levels, missing, k, relevant_weight):
        for seed in range(3):
            scores, relevance = random_pool(seed, shape, levels, missing)
            expected = enumerate_rewards(scores, relevance, k, relevant_weight)
            rewards = exact_ndcg_rewards(scores, relevance, k=k, relevant_weight=relevant_weight)
            for ours, wanted in zip(rewards, expected, strict=True):
                assert ours.dtype == np.float64
                np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("k", [1, 2, 4, 9])
    @pytest.mark.parametrize("rollouts", [[1, 4, 2, 3, 1], [5, 1, 5], [1, 1, 1, 1], [2, 1, 3, 1, 2, 2]])
    def test_uneven_rollouts(self, rollouts, k):
        for seed in range(3):
            scores, rollout_document, relevance = uneven_pool(seed, 3, rollouts)
            expected = enumerate_draws(scores.tolist(), rollout_document.tolist(), relevance.tolist(), k)
            for ours, wanted in zip(exact_ndcg(scores, rollout_document, relevance, k), expected, strict=True):
                np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-12)

    def test_same_relevant_document_in_several_queries(self):
        scores, _ = random_pool(0, (4, 2, 4, 3), levels=6)
        relevance = np.array([[1, 0, 0, 0], [1, 2, 0, 0], [2, 1, 1, 1], [1, 0, 0, 3]], dtype=float)
        expected = enumerate_rewards(scores, relevance, 3, 10.0)
        for ours, wanted in zip(exact_ndcg_rewards(scores, relevance, 3, 10.0), expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("rewards", [exact_ndcg_rewards, sampled_ndcg_rewards])
    def test_query_without_relevant_document(self, rewards):
        scores, _ = random_pool(1, (2, 3, 4, 2))
        relevance = np.array([[0, 0, 0, 0], [0, 1, 0, 1]], dtype=float)
        query_rewards, document_rewards = rewards(scores, relevance)
        assert (query_rewards[0] == 0).all() and (query_rewards[1] > 0).all()
        np.testing.assert_allclose(document_rewards, rewards(scores[1:], relevance[1:])[1], rtol=0, atol=1e-12)
        for nothing in rewards(scores, np.zeros((2, 4))):
            assert (nothing == 0).all()

    @pytest.mark.parametrize("relevant", [0, 1])
    def test_document_never_retrieved(self, relevant):
        scores, _ = random_pool(2, (2, 2, 4, 3))
        scores[:, :, 1] = NOT_RETRIEVED
        relevance = np.array([[1, relevant, 0, 0], [0, relevant, 2, 0]], dtype=float)
        expected = enumerate_rewards(scores, relevance, 3, 10.0)
        for ours, wanted in zip(exact_ndcg_rewards(scores, relevance, 3, 10.0), expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("k", [1, 10])
    def test_large_pool_against_sampling(self, k):
        """The pool is too large to enumerate, and most relevant documents are out of reach of the first ranks."""
        generator = np.random.default_rng(3)
        relevance = (generator.random((6, 300)) < 0.02).astype(float)
        scores = generator.normal(size=(6, 1, 300, 5)) + 2.0 * relevance[:, None, :, None]
        query_rewards, document_rewards = exact_ndcg_rewards(scores, relevance, k=k)
        sampled_query_rewards, sampled_document_rewards = sampled_ndcg_rewards(
            scores, relevance, k=k, num_samples=4096
        )
        np.testing.assert_allclose(query_rewards, sampled_query_rewards, rtol=0, atol=0.03)
        np.testing.assert_allclose(document_rewards, sampled_document_rewards, rtol=0, atol=0.03)

    def test_cases_out_of_reach_are_worth_nothing(self, monkeypatch):
        generator = np.random.default_rng(4)
        relevance = (generator.random((3, 300)) < 0.05).astype(float)
        scores = generator.normal(size=(3, 2, 300, 4))
        rewards = exact_ndcg_rewards(scores, relevance)
        monkeypatch.setattr("coaug_trl.rewards.ndcg._NEGLIGIBLE_LOG_PROBABILITY", -math.inf)
        for ours, complete in zip(rewards, exact_ndcg_rewards(scores, relevance), strict=True):
            np.testing.assert_allclose(ours, complete, rtol=0, atol=1e-15)

    def test_chunks_do_not_show(self, monkeypatch):
        scores, rollout_document, relevance = uneven_pool(5, 7, [3, 1, 2, 5, 4, 2, 3])
        whole = exact_ndcg(scores, rollout_document, relevance), sampled_ndcg(scores, rollout_document, relevance)
        monkeypatch.setattr("coaug_trl.rewards.ndcg._CHUNK_ELEMENTS", 100)
        parts = exact_ndcg(scores, rollout_document, relevance), sampled_ndcg(scores, rollout_document, relevance)
        for ours, wanted in zip(itertools.chain(*parts), itertools.chain(*whole), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-12)


class TestSampled:
    def test_converges_to_exact(self):
        scores, relevance = random_pool(0, (3, 2, 8, 4), levels=10, missing=0.1)
        exact = np.concatenate([rewards.ravel() for rewards in exact_ndcg_rewards(scores, relevance, 5, 10.0)])
        for num_samples in [100, 1_600, 25_600]:
            errors = []
            for seed in range(5):
                sampled = sampled_ndcg_rewards(scores, relevance, 5, num_samples, 10.0, seed)
                errors.append(np.concatenate([rewards.ravel() for rewards in sampled]) - exact)
            # NDCG is within [0, 1] and a document shows each of its 4 rollouts in a quarter of the draws.
            assert np.sqrt(np.mean(np.square(errors))) < 0.5 / math.sqrt(num_samples / 4)

    def test_uneven_rollouts(self):
        scores, rollout_document, relevance = uneven_pool(1, 4, [1, 4, 2, 3, 1])
        exact = exact_ndcg(scores, rollout_document, relevance, 3)
        sampled = sampled_ndcg(scores, rollout_document, relevance, 3, num_samples=20_000)
        for ours, wanted in zip(sampled, exact, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=0.02)

    def test_seed(self):
        scores, relevance = random_pool(1, (2, 3, 6, 4))
        first = sampled_ndcg_rewards(scores, relevance, num_samples=50, seed=7)
        again = sampled_ndcg_rewards(scores, relevance, num_samples=50, seed=7)
        other = sampled_ndcg_rewards(scores, relevance, num_samples=50, seed=8)
        for one, same, different in zip(first, again, other, strict=True):
            np.testing.assert_array_equal(one, same)
            assert not np.array_equal(one, different)

    def test_column_never_drawn_gets_the_value_of_the_row(self):
        scores, rollout_document, relevance = uneven_pool(2, 5, [4, 4, 4])
        values, conditional = sampled_ndcg(scores, rollout_document, relevance, num_samples=1)
        np.testing.assert_array_equal(conditional, np.repeat(values[:, None], 12, axis=1))

    @pytest.mark.parametrize("k", [2, 20])
    def test_nothing_to_draw(self, k):
        scores, relevance = random_pool(3, (3, 2, 6, 1), levels=4, missing=0.2)
        exact = exact_ndcg_rewards(scores, relevance, k=k)
        for ours, wanted in zip(sampled_ndcg_rewards(scores, relevance, k=k), exact, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rewards", [exact_ndcg_rewards, sampled_ndcg_rewards])
@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_one_rollout_is_trec_eval_ndcg(rewards, k):
    generator = np.random.default_rng(0)
    num_queries, num_documents = 20, 30
    scores = np.stack([generator.permutation(num_documents) for _ in range(num_queries)]).astype(float)
    scores[generator.random(scores.shape) < 0.3] = NOT_RETRIEVED
    relevance = generator.choice([0, 0, 0, 1, 2, 3], size=scores.shape)
    run, qrels = [], []
    for i, j in np.ndindex(scores.shape):
        qrels.append(ir_measures.Qrel(f"q{i}", f"d{j}", int(relevance[i, j])))
        if scores[i, j] > NOT_RETRIEVED:
            run.append(ir_measures.ScoredDoc(f"q{i}", f"d{j}", scores[i, j]))
    expected = {metric.query_id: metric.value for metric in ir_measures.iter_calc([ir_measures.nDCG @ k], qrels, run)}
    query_rewards, _ = rewards(scores[:, None, :, None], relevance, k=k)
    assert len(expected) == num_queries
    for i in range(num_queries):
        assert query_rewards[i, 0] == pytest.approx(expected[f"q{i}"], abs=1e-9)


@st.composite
def pools(draw, ties=True):
    """Small pools: `(scores, relevance, k)`; without ties every score of a row is different."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 3)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if ties:
        scores = generator.integers(-3, 4, size=shape).astype(float)
    else:
        scores = generator.permuted(np.arange(np.prod(shape), dtype=float)).reshape(shape)
    scores[generator.random(shape) < draw(st.sampled_from([0.0, 0.3]))] = NOT_RETRIEVED
    relevance = generator.choice([0.0, 0.0, 1.0, 2.5], size=(shape[0], shape[2]))
    return scores, relevance, draw(st.integers(1, 7))


class TestProperties:
    @given(pools())
    @settings(max_examples=60, deadline=None)
    def test_range(self, pool):
        scores, relevance, k = pool
        for rewards in (exact_ndcg_rewards(scores, relevance, k), sampled_ndcg_rewards(scores, relevance, k, 16)):
            for reward in rewards:
                assert (reward >= -1e-12).all() and (reward <= 1 + 1e-12).all()

    @given(pools(ties=False), st.randoms(use_true_random=False))
    @settings(max_examples=60, deadline=None)
    def test_order_of_documents(self, pool, random):
        scores, relevance, k = pool
        order = list(range(relevance.shape[1]))
        random.shuffle(order)
        query_rewards, document_rewards = exact_ndcg_rewards(scores, relevance, k, 10.0)
        permuted = exact_ndcg_rewards(scores[:, :, order], relevance[:, order], k, 10.0)
        np.testing.assert_allclose(permuted[0], query_rewards, rtol=0, atol=1e-12)
        np.testing.assert_allclose(permuted[1], document_rewards[order], rtol=0, atol=1e-12)

    @given(pools(), st.sampled_from([NOT_RETRIEVED, -100.0]), st.data())
    @settings(max_examples=60, deadline=None)
    def test_document_that_beats_nobody(self, pool, low, data):
        scores, relevance, k = pool
        place = data.draw(st.integers(0, relevance.shape[1]))
        query_rewards, document_rewards = exact_ndcg_rewards(scores, relevance, k, 10.0)
        larger = exact_ndcg_rewards(
            np.insert(scores, place, low, axis=2), np.insert(relevance, place, 0.0, axis=1), k, 10.0
        )
        np.testing.assert_allclose(larger[0], query_rewards, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.delete(larger[1], place, axis=0), document_rewards, rtol=0, atol=1e-12)

    @given(pools(), st.sampled_from([0.0, 10.0]))
    @settings(max_examples=60, deadline=None)
    def test_mean_over_the_rollouts_of_a_document(self, pool, relevant_weight):
        scores, relevance, k = pool
        query_rewards, document_rewards = exact_ndcg_rewards(scores, relevance, k, relevant_weight)
        weights = 1 + relevant_weight * relevance
        weights[relevance.sum(axis=1) == 0] = 0
        total = weights.sum(axis=0)
        expected = np.where(total > 0, query_rewards.mean(axis=1) @ weights / np.maximum(total, 1), 0)
        np.testing.assert_allclose(document_rewards.mean(axis=1), expected, rtol=0, atol=1e-12)

    @given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.sampled_from([exact_ndcg, sampled_ndcg]))
    @settings(max_examples=60, deadline=None)
    def test_rows_of_two_processes(self, seed, split, core):
        scores, rollout_document, relevance = uneven_pool(seed, 6, [2, 3, 1, 4])
        values, conditional = core(scores, rollout_document, relevance, 3)
        numerator, weight = sum_document_rewards(conditional, rollout_document, relevance, 10.0)
        parts, part_values = [], []
        for rows in (slice(0, split), slice(split, None)):
            part_value, part = core(scores[rows], rollout_document, relevance[rows], 3)
            part_values.append(part_value)
            parts.append(sum_document_rewards(part, rollout_document, relevance[rows], 10.0))
        np.testing.assert_allclose(np.concatenate(part_values), values, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            divide_document_rewards(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1], rollout_document),
            divide_document_rewards(numerator, weight, rollout_document),
            rtol=0,
            atol=1e-12,
        )


class TestArguments:
    scores = np.arange(24.0).reshape(2, 2, 3, 2)
    relevance = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]])

    @pytest.mark.parametrize("rewards", [exact_ndcg_rewards, sampled_ndcg_rewards])
    @pytest.mark.parametrize(
        "change, message",
        [
            ({"scores": np.zeros((2, 3, 2))}, r"scores has shape \(2, 3, 2\).*such as"),
            ({"scores": np.zeros((2, 2, 0, 2))}, r"scores has shape \(2, 2, 0, 2\).*such as"),
            ({"scores": np.full((2, 2, 3, 2), np.nan)}, "scores holds nan.*such as 1.5"),
            ({"scores": np.full((2, 2, 3, 2), np.inf)}, "scores holds inf.*such as 1.5"),
            ({"relevance": np.zeros((3, 2))}, r"relevance has shape \(3, 2\).*\(2, 3\)"),
            ({"relevance": np.full((2, 3), -1.0)}, "relevance holds -1.0.*such as 1"),
            ({"relevance": np.full((2, 3), np.nan)}, "relevance holds nan.*such as 1"),
            ({"k": 0}, "k is 0.*such as 10"),
            ({"relevant_weight": -1.0}, "relevant_weight is -1.0.*such as 10.0"),
        ],
    )
    def test_wrong_value(self, rewards, change, message):
        with pytest.raises(ValueError, match=message):
            rewards(**{"scores": self.scores, "relevance": self.relevance, **change})

    def test_wrong_num_samples(self):
        with pytest.raises(ValueError, match="num_samples is 0.*such as 512"):
            sampled_ndcg_rewards(self.scores, self.relevance, num_samples=0)

    @pytest.mark.parametrize("core", [exact_ndcg, sampled_ndcg])
    @pytest.mark.parametrize(
        "scores, rollout_document, relevance, message",
        [
            (np.zeros(3), [0, 1, 1], np.zeros((1, 2)), "scores has shape"),
            (np.zeros((1, 0)), [], np.zeros((1, 0)), "scores has shape"),
            (np.zeros((1, 3)), [0, 1, 1], np.zeros((2, 2)), "relevance has shape"),
            (np.zeros((1, 3)), [0, 1], np.zeros((1, 2)), "rollout_document has shape"),
            (np.zeros((1, 3)), [1, 0, 1], np.zeros((1, 2)), "rollout_document is"),
            (np.zeros((1, 3)), [0, 0, 2], np.zeros((1, 3)), "rollout_document is"),
            (np.zeros((1, 3)), [0, 1, 2], np.zeros((1, 2)), "rollout_document is"),
        ],
    )
    def test_wrong_columns(self, core, scores, rollout_document, relevance, message):
        with pytest.raises(ValueError, match=message):
            core(scores, np.array(rollout_document, dtype=int), relevance)


def test_imports_numpy_only():
    """The rewards must be usable, and quick to import, where no training library is installed."""
    heavy = "import sys, coaug_trl.rewards; assert not {'torch', 'transformers', 'trl', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], check=True)
