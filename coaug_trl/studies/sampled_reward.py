"""The sampled reward against the exact one."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..rewards.ndcg import exact_ndcg_rewards, sampled_ndcg_rewards
from ..utils.charts import draw_errors, import_figure
from ..utils.errors import InputError
from ..utils.files import write_json
from ..utils.tables import Table


# Error of the sampled reward

NUM_ROLLOUTS, NUM_RELEVANT, DOCUMENTS_PER_QUERY, MOST_QUERIES = 5, 5, 15, 32
NDCG_K = 10
CLAIMED_ERROR = 1e-2


@dataclass(frozen=True)
class RewardError:
    """
    How far the sampled rewards of a pool are from the exact ones. Rewards are NDCG@10, from 0 to 1.

    Args:
        num_documents: Documents in the pool, with five rollouts each.
        num_queries: Queries ranked against it, with five rollouts each.
        num_samples: Draws of the sampled estimator.
        query_error: Mean absolute error of the reward of a query rollout.
        query_largest: The largest, over all rollouts and repeats.
        query_variance: Variance of the estimate over repeats, mean over the rollouts.
        document_error: As for queries.
        document_largest: As for queries.
        document_variance: As for queries.
        sampled_seconds: Time of the sampled rewards of the pool, median over repeats.
        exact_seconds: Time of the exact ones, likewise.
    """

    num_documents: int
    num_queries: int
    num_samples: int
    query_error: float
    query_largest: float
    query_variance: float
    document_error: float
    document_largest: float
    document_variance: float
    sampled_seconds: float
    exact_seconds: float


def generate_scores(num_documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Generates scores like those of BM25 in a training batch.

    There is a query for every 15 documents, up to 32 (the paper's batch), with 5 documents relevant to it and to no
    other. A pair of a query and a document has words in common with probability 0.9 if relevant, else 0.4, and then a
    score from a gamma distribution with mean 6, or 4. Under each pair of rollouts the two augmentations share a word
    with probability 0.3 if relevant, else 0.1, which adds a score with mean 2. What each rollout brings to the other
    side's original text adds noise with a standard deviation of 0.5. Pairs with nothing in common are not retrieved:
    −inf.

    Args:
        num_documents: Documents in the pool.
        seed: Seed.

    Returns: scores of shape (queries, 5, documents, 5) and relevance, 0 or 1, of shape (queries, documents).
    """
    generator = np.random.default_rng((seed, num_documents))
    num_queries = _num_queries(num_documents)
    relevant = np.arange(num_documents) // NUM_RELEVANT == np.arange(num_queries)[:, None]
    relevant = relevant[:, generator.permutation(num_documents)]
    of_pair = relevant[:, None, :, None]
    shape = (num_queries, NUM_ROLLOUTS, num_documents, NUM_ROLLOUTS)

    common = generator.random(of_pair.shape) < np.where(of_pair, 0.9, 0.4)
    scores = np.where(common, generator.gamma(2.0, np.where(of_pair, 3.0, 2.0)), 0.0)
    from_query = generator.normal(0.0, 0.5, (num_queries, NUM_ROLLOUTS, num_documents, 1))
    from_document = generator.normal(0.0, 0.5, (num_queries, 1, num_documents, NUM_ROLLOUTS))
    matched = generator.random(shape) < np.where(of_pair, 0.3, 0.1)
    scores = scores + np.where(common, from_query + from_document, 0.0)
    scores = scores + np.where(matched, generator.gamma(2.0, 1.0, shape), 0.0)
    return np.where(common | matched, scores, -np.inf), relevant.astype(np.float64)


def _num_queries(num_documents: int) -> int:
    return max(1, min(MOST_QUERIES, num_documents // DOCUMENTS_PER_QUERY))


def study_rewards(
    pools: Sequence[int] = (15, 100, 480, 1000),
    samples: Sequence[int] = (16, 64, 256, 512, 1024, 4096),
    repeats: int = 10,
    seed: int = 0,
) -> list[RewardError]:
    """
    Compares sampled rewards with the exact ones, on generated scores.

    Args:
        pools: Numbers of documents: 15 is a group of the paper, 480 are its generation batch.
        samples: Numbers of draws.
        repeats: Estimates of each kind, with different draws for the same scores.
        seed: Seed of the scores; the draws of the r-th repeat have the seed `seed + r`.

    Returns: pool by pool, each by the number of draws.

    Raises `InputError`: A number is too small.

    Source: arXiv 2506.18670, section 3.3 (error below 1e-2) and 3.4 (variance about 1e-5).
    """
    for name, numbers, least in (
        ("pools", pools, NUM_RELEVANT),
        ("samples", samples, 1),
        ("repeats", [repeats], 2),
        ("seed", [seed], 0),
    ):
        if min(numbers) < least:
            raise InputError(f"{name}: {min(numbers)} is too small; use at least {least}.")
    rows = []
    samples = sorted(set(samples))
    # Time grows with documents × queries × draws.
    work = {pool: pool * _num_queries(pool) for pool in sorted(set(pools))}
    total = sum(work.values()) * sum(samples) * repeats
    with tqdm(total=total, desc="Sampling", delay=2, leave=False, bar_format="{l_bar}{bar}| {elapsed}") as progress:
        for pool in work:
            scores, relevance = generate_scores(pool, seed)
            exact = [_timed(exact_ndcg_rewards, scores, relevance, NDCG_K) for _ in range(repeats)]
            for num_samples in samples:
                sampled = []
                for repeat in range(repeats):
                    arguments = (scores, relevance, NDCG_K, num_samples)
                    sampled.append(_timed(sampled_ndcg_rewards, *arguments, seed=seed + repeat))
                    progress.update(work[pool] * num_samples)
                rows.append(_compare(scores.shape, num_samples, sampled, exact))
    return rows


def _compare(
    shape: tuple[int, int, int, int],
    num_samples: int,
    sampled: list[tuple[Any, float]],
    exact: list[tuple[Any, float]],
) -> RewardError:
    """Of the rewards of a pool, sampled and exact, each with its seconds."""
    num_queries, _, num_documents, _ = shape
    (exact_queries, exact_documents), _ = exact[0]
    return RewardError(
        num_documents,
        num_queries,
        num_samples,
        *_errors([queries for (queries, _), _ in sampled], exact_queries),
        *_errors([documents for (_, documents), _ in sampled], exact_documents),
        sampled_seconds=float(np.median([seconds for _, seconds in sampled])),
        exact_seconds=float(np.median([seconds for _, seconds in exact])),
    )


def _timed(function: Callable, *args, **kwargs) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def _errors(estimates: list[np.ndarray], exact: np.ndarray) -> tuple[float, float, float]:
    """Mean absolute error, the largest, and the mean of the variances over the estimates."""
    errors = np.abs(np.stack(estimates) - exact)
    return float(errors.mean()), float(errors.max()), float(np.var(estimates, axis=0, ddof=1).mean())


def errors_table(rows: Sequence[RewardError], title: str) -> Table:
    """Sets the rows of [`study_rewards`] as a table."""
    sides = [f"{side} {value}" for side in ("query", "doc.") for value in ("error", "largest", "variance")]
    header = ["documents", "queries", "samples", *sides, "sampled s", "exact s"]
    cells = [
        [f"{row.num_documents:,}", f"{row.num_queries:,}", f"{row.num_samples:,}"]
        + [f"{row.query_error:.4f}", f"{row.query_largest:.4f}", f"{row.query_variance:.1e}"]
        + [f"{row.document_error:.4f}", f"{row.document_largest:.4f}", f"{row.document_variance:.1e}"]
        + [f"{row.sampled_seconds:.4f}", f"{row.exact_seconds:.4f}"]
        for row in rows
    ]
    return Table(title, header, cells, left=0)


def save_study(rows: Sequence[RewardError], settings: dict[str, Any], output_dir: str | Path) -> None:
    """
    Writes the rows of [`study_rewards`] as `reward_study.json` and draws them as `reward_study.png`.

    Args:
        rows: The rows.
        settings: What they were made with.
        output_dir: The folder, made if it is not there.

    Raises `InputError`: matplotlib is not installed.
    """
    import_figure()  # before anything is written
    rows, output_dir = [asdict(row) for row in rows], Path(output_dir)
    write_json(output_dir / "reward_study.json", settings | {"rows": rows})
    path = output_dir / "reward_study.png"
    path.with_suffix(".tmp").write_bytes(draw_errors(rows, NDCG_K, CLAIMED_ERROR))
    os.replace(path.with_suffix(".tmp"), path)
