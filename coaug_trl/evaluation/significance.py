"""Paired tests of the differences between systems."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..utils.errors import InputError


# Sign flips that the randomisation test draws, and signs held at once (8 bytes each, a few times over).
NUM_FLIPS = 9999
FLIPS_AT_ONCE = 2_000_000


def compare(values_a: dict[str, float], values_b: dict[str, float], seed: int = 0) -> dict[str, Any]:
    """
    Compares two systems by one measure on the same queries.

    Args:
        values_a: Query id to value of the first system.
        values_b: Query id to value of the second system.
        seed: Seed of the randomisation test, which draws 9,999 of the sign flips when there are more (14 queries on).

    Returns: `mean_difference` (first minus second), its 95 % confidence `interval` (Student's t; not a number for a
        single query), `effect_size`, two-sided `p_t_test` (paired Student) and `p_randomization` (Fisher; Smucker et
        al. 2007, https://doi.org/10.1145/1321440.1321528), `wins`, `ties` and `losses` of the first, and
        `num_queries`. Where no difference can be tested (identical values, a single query) p is 1.

    Raises `InputError`: the queries differ, or there are none.
    """
    if values_a.keys() != values_b.keys():
        example = sorted(values_a.keys() ^ values_b.keys())[0]
        raise InputError(f"A paired test needs the same queries on both sides; query {example!r} is on one only.")
    if not values_a:
        raise InputError("A paired test needs at least one query.")
    differences = [[values_a[query_id] - values_b[query_id]] for query_id in values_a]
    return compare_differences(np.array(differences, dtype=float), seed)[0]


def compare_differences(differences: np.ndarray, seed: int = 0) -> list[dict[str, Any]]:
    """
    Tests the differences of many pairs of systems on the same queries, which is faster than pair by pair.

    Args:
        differences: Of shape (queries, pairs).
        seed: As in [`compare`].

    Returns: for each pair what [`compare`] gives.
    """
    count = len(differences)
    results = []
    for column, p_randomization in zip(differences.T, randomization_p_values(differences, seed), strict=True):
        p_t_test, interval = 1.0, (math.nan, math.nan)
        if count > 1:
            mean, margin = column.mean(), stats.t.ppf(0.975, count - 1) * column.std(ddof=1) / math.sqrt(count)
            interval = (float(mean - margin), float(mean + margin))
        if count > 1 and column.any():
            with warnings.catch_warnings():
                # the same difference on every query: infinitely significant, and scipy warns that it is
                warnings.simplefilter("ignore", RuntimeWarning)
                p_t_test = float(stats.ttest_1samp(column, 0).pvalue)
        results.append(
            {
                "mean_difference": float(column.mean()),
                "interval": interval,
                "effect_size": effect_size(column),
                "p_t_test": p_t_test,
                "p_randomization": float(p_randomization),
                "wins": int((column > 0).sum()),
                "ties": int((column == 0).sum()),
                "losses": int((column < 0).sum()),
                "num_queries": count,
            }
        )
    return results


def randomization_p_values(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Fisher's randomisation test of paired differences, by [`scipy.stats.permutation_test`].

    All flips of the queries' signs are gone through up to 13 queries; from 14 on 9,999 are drawn, and the observed
    signs count as one more. Signs are drawn once for all pairs, because drawing them is what takes time: on one core
    2.9 s for a pair and 5,000 queries, and 3.1 s for the 105 of seven systems and five measures, which pair by pair
    would take five minutes.

    Args:
        differences: Of shape (queries, pairs).
        seed: Seed of the draws.

    Returns: two-sided p-value of each pair, of shape (pairs,): twice the smaller of the shares of flips whose sum is
        at least and at most that observed.
    """
    if len(differences) == 1:
        return np.ones(differences.shape[1])
    return stats.permutation_test(
        (np.ones(len(differences)),),
        # rounded, since sums that are equal may differ by the rounding of their terms
        lambda signs, axis: np.round(signs @ differences, 9),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_FLIPS,
        batch=max(1, FLIPS_AT_ONCE // len(differences)),
        random_state=np.random.default_rng(seed),
    ).pvalue


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Corrects p-values for their number, so that the chance of one false finding or more stays below the level tested.

    Args:
        p_values: The p-values of the family of tests.

    Returns: the corrected ones, in the order given.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6(2), 65-70.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        # a larger p never becomes the smaller
        least = corrected[place] = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
    return corrected


def effect_size(differences: np.ndarray) -> float:
    """
    Cohen's d_z of paired differences: their mean over their standard deviation.

    Args:
        differences: Of shape (queries,).

    Returns: 0 where nothing differs, infinite where all queries differ by the same, not a number for a single query.
    """
    if len(differences) < 2:
        return math.nan
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if deviation < 1e-12:  # equal but for the rounding of the values' own subtraction
        return math.copysign(math.inf, mean) if abs(mean) > 1e-12 else 0.0
    return mean / deviation
