"""Paired tests of the differences between systems."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..utils.errors import InputError


# Sign flips that the randomisation test draws, and signs held at once (8 bytes each).
NUM_FLIPS = 9999
FLIPS_AT_ONCE = 4_000_000


def compare(values_a: dict[str, float], values_b: dict[str, float], seed: int = 0) -> dict[str, Any]:
    """
    Compares two systems by one measure on the same queries.

    Args:
        values_a (`dict[str, float]`):
            Query id to value of the first system.
        values_b (`dict[str, float]`):
            Query id to value of the second system.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the randomisation test, which draws 9,999 of the sign flips when there are more (14 queries on).

    Returns:
        `dict`: `mean_difference` (first minus second), its 95 % confidence `interval` (Student's t; not a number for a
        single query), two-sided `p_t_test` (paired Student) and `p_randomization` (Fisher; Smucker et al. 2007,
        https://doi.org/10.1145/1321440.1321528), `wins`, `ties` and `losses` of the first, and `num_queries`. Where no
        difference can be tested (identical values, a single query) p is 1.

    Raises:
        `InputError`: the queries differ, or there are none.
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
        differences (`np.ndarray`):
            Of shape (queries, pairs).
        seed (`int`, *optional*, defaults to `0`):
            As in [`compare`].

    Returns:
        `list[dict]`: for each pair what [`compare`] gives.
    """
    count = len(differences)
    randomization = randomization_p_values(differences, seed)
    results = []
    for column, p_randomization in zip(differences.T, randomization, strict=True):
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
    Fisher's randomisation test of paired differences: the signs of the queries are flipped, all columns alike.

    All flips are gone through up to 13 queries; from 14 on 9,999 are drawn, and the observed signs count as one more.

    Args:
        differences (`np.ndarray`):
            Of shape (queries, pairs).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `np.ndarray`: two-sided p-value of each pair, of shape (pairs,): twice the smaller of the shares of flips whose
        sum is at least and at most that observed.
    """
    count, num_pairs = differences.shape
    exact = 2**count <= NUM_FLIPS
    num_flips = 2**count if exact else NUM_FLIPS
    generator = np.random.default_rng(seed)
    observed = differences.sum(axis=0)
    # sums that are equal but for rounding, which depends on the order of the terms
    tolerance = 1e-12 * np.abs(differences).sum(axis=0)
    at_least, at_most = np.zeros(num_pairs), np.zeros(num_pairs)
    rows = max(1, FLIPS_AT_ONCE // count)
    for first in range(0, num_flips, rows):
        numbers = np.arange(first, min(first + rows, num_flips))
        if exact:
            flipped = numbers[:, None] >> np.arange(count) & 1
        else:
            flipped = generator.integers(0, 2, (len(numbers), count), dtype=np.int8)
        sums = (1.0 - 2.0 * flipped) @ differences
        at_least += (sums >= observed - tolerance).sum(axis=0)
        at_most += (sums <= observed + tolerance).sum(axis=0)
    added = 0 if exact else 1
    return np.minimum(1, 2 * (np.minimum(at_least, at_most) + added) / (num_flips + added))


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Corrects p-values for their number, so that the chance of one false finding or more stays below the level tested.

    Args:
        p_values (`Sequence[float]`):
            The p-values of the family of tests.

    Returns:
        `list[float]`: the corrected ones, in the order given.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6(2), 65-70.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        # a larger p never becomes the smaller
        least = corrected[place] = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
    return corrected


def effect_size(values_a: dict[str, float], values_b: dict[str, float]) -> float:
    """
    Cohen's d_z of paired values: the mean of the differences over their standard deviation.

    Args:
        values_a (`dict[str, float]`):
            Query id to value of the first system.
        values_b (`dict[str, float]`):
            Query id to value of the second system.

    Returns:
        `float`: positive where the first is better; 0 where nothing differs, infinite where all queries differ by the
        same, not a number for a single query.
    """
    differences = np.array([values_a[query_id] - values_b[query_id] for query_id in values_a])
    if len(differences) < 2:
        return math.nan
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if deviation < 1e-12:  # equal but for the rounding of the values' own subtraction
        return math.copysign(math.inf, mean) if abs(mean) > 1e-12 else 0.0
    return mean / deviation
