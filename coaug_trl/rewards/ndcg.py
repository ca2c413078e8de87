"""
Expected NDCG@k of augmented queries and documents, exact or by sampling (arXiv 2506.18670, section 3.3).

Every document shows one of its rollouts, drawn uniformly and independently. A draw gives each query rollout a ranking
and an NDCG@k. The reward of a query rollout is the expectation over the draws; the reward of a document rollout is the
expectation given that its document shows it, averaged over the query rollouts.

The paper samples because it holds the expectation to be intractable. It is not:

1. NDCG is a sum over relevant documents, so each can be treated alone. Take relevant document j under its rollout b: a
   *case*. Its rank is 1 + the number of other documents that beat it: that score higher, or equal and come first.
2. The documents draw independently, so that number is a sum of independent coin flips: document l beats the case with
   probability p_l, the share of its rollouts that do (a Poisson-binomial law). Documents with p_l = 1 are counted;
   those with 0 < p_l < 1, the *uncertain* ones, are convolved one after the other.
3. Let V_u(m) be the expected discount when m documents beat the case already and the uncertain ones from u on are
   still to come: V_u(m) = (1 - p_u) V_{u+1}(m) + p_u V_{u+1}(m + 1). V_0(0) is the expected discount. Let F_u(m) be the
   probability that m of the uncertain ones before u beat it. What it costs the case to be beaten by u, rather than not,
   is then g_u = sum_m F_u(m) (V_{u+1}(m) - V_{u+1}(m + 1)).
4. The expected discount is linear in each p_u, with slope -g_u. Knowing that u shows a certain rollout replaces p_u by
   1 or 0, so it changes the expected discount by g_u (p_u - [that rollout beats the case]).

All counts stop at k, so the work grows with relevant documents x rollouts x uncertain documents x k.

Rollout counts differ between documents, so the core works on flat columns, one for each document rollout. Index names:
R query rollouts (rows), C document rollouts (columns), D documents.
"""

import numpy as np


# Elements of the largest temporary array: bounds the memory (8 MB an array), and larger ones are not faster.
_CHUNK_ELEMENTS = 1 << 20
# A case that makes the first k ranks with a probability under e^-45 (3e-20) is worth nothing in float64.
_NEGLIGIBLE_LOG_PROBABILITY = -45.0


def exact_ndcg_rewards(
    scores: np.ndarray, relevance: np.ndarray, k: int = 10, relevant_weight: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """
    Exact joint rewards of query and document rollouts: the expectation that [`sampled_ndcg_rewards`] estimates.

    Args:
        scores (`np.ndarray` of shape `(Q, A, D, B)`):
            Score of query `i` under its rollout `a` against document `j` under its rollout `b`. `-inf` means not
            retrieved: no rank, no gain, beats nobody. Equal scores rank by document index.
        relevance (`np.ndarray` of shape `(Q, D)`):
            Non-negative gains, used linearly, as in trec_eval's `ndcg_cut`.
        k (`int`, *optional*, defaults to `10`):
            Cut-off of NDCG.
        relevant_weight (`float`, *optional*, defaults to `0.0`):
            Query `i` weighs `1 + relevant_weight * relevance[i, j]` in the reward of document `j`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: query rewards of shape `(Q, A)` and document rewards of shape `(D, B)`, both
        float64 in [0, 1]. A query without a relevant document has reward 0 and no weight in the documents' rewards; a
        document that no query weighs has reward 0.

    Raises:
        `ValueError`: If an argument has a wrong shape or an impossible value.

    Source: arXiv 2506.18670, section 3.3, with the expectation computed instead of sampled.
    """
    columns, rollout_document, row_relevance = _flatten(scores, relevance)
    values, conditional = exact_ndcg(columns, rollout_document, row_relevance, k)
    return _unflatten(values, conditional, rollout_document, row_relevance, relevant_weight, np.shape(scores))


def sampled_ndcg_rewards(
    scores: np.ndarray,
    relevance: np.ndarray,
    k: int = 10,
    num_samples: int = 512,
    relevant_weight: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Joint rewards of query and document rollouts, estimated from random draws as the paper does.

    Args:
        scores (`np.ndarray` of shape `(Q, A, D, B)`):
            Score of query `i` under its rollout `a` against document `j` under its rollout `b`. `-inf` means not
            retrieved: no rank, no gain, beats nobody. Equal scores rank by document index.
        relevance (`np.ndarray` of shape `(Q, D)`):
            Non-negative gains, used linearly, as in trec_eval's `ndcg_cut`.
        k (`int`, *optional*, defaults to `10`):
            Cut-off of NDCG.
        num_samples (`int`, *optional*, defaults to `512`):
            Number of draws, each of one rollout for every document.
        relevant_weight (`float`, *optional*, defaults to `0.0`):
            Query `i` weighs `1 + relevant_weight * relevance[i, j]` in the reward of document `j`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: query rewards of shape `(Q, A)` and document rewards of shape `(D, B)`, as
        [`exact_ndcg_rewards`] returns them.

    Raises:
        `ValueError`: If an argument has a wrong shape or an impossible value.

    Source: arXiv 2506.18670, section 3.3.
    """
    columns, rollout_document, row_relevance = _flatten(scores, relevance)
    values, conditional = sampled_ndcg(columns, rollout_document, row_relevance, k, num_samples, seed)
    return _unflatten(values, conditional, rollout_document, row_relevance, relevant_weight, np.shape(scores))


def exact_ndcg(
    scores: np.ndarray,
    rollout_document: np.ndarray,
    relevance: np.ndarray,
    k: int = 10,
    ideal: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Exact expected NDCG@k of query rollouts, and the same given one document's rollout.

    Args:
        scores (`np.ndarray` of shape `(R, C)`):
            Score of each query rollout against each document rollout; `-inf` means not retrieved.
        rollout_document (`np.ndarray` of shape `(C,)`):
            Document of each column, non-decreasing, every document of `0..D-1` at least once. Of equal scores the
            lower document ranks first.
        relevance (`np.ndarray` of shape `(R, D)`):
            Non-negative linear gains of the query of each row.
        k (`int`, *optional*, defaults to `10`):
            Cut-off of NDCG.
        ideal (`np.ndarray` of shape `(R,)`, *optional*):
            Ideal DCG@k of each row; defaults to that of `relevance`. It is larger where relevant documents compete
            that are not among the columns.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: values of shape `(R,)`, the expected NDCG@k of each row, and conditional
        values of shape `(R, C)`, that expectation given that the column's document shows the column.

    Raises:
        `ValueError`: If an argument has a wrong shape or an impossible value.

    Source: the derivation is at the head of this module.
    """
    scores, rollout_document, relevance = _check_columns(scores, rollout_document, relevance, k)
    gains = _normalized_gains(relevance, ideal_dcg(relevance, k) if ideal is None else ideal)
    num_columns, num_documents = scores.shape[1], relevance.shape[1]
    k = min(k, num_documents)
    starts, rollouts = _documents(rollout_document)
    positions, ahead = _rank_columns(scores, 1.0 / rollouts[rollout_document])

    in_reach = np.isfinite(scores) & ~_hopeless(ahead, k)
    rows, columns = np.nonzero(in_reach & (gains > 0)[:, rollout_document])
    case_gain = gains[rows, rollout_document[columns]]

    own = np.zeros(scores.shape)
    conditional = np.zeros(scores.shape)
    chunk = max(1, _CHUNK_ELEMENTS // (num_columns + num_documents * k))
    for begin in range(0, len(rows), chunk):
        part = slice(begin, begin + chunk)
        row, column, gain = rows[part], columns[part], case_gain[part]
        own[row, column], change = _case_values(positions[row], column, gain, rollout_document, k)
        # Added up over the cases of a row.
        first = np.flatnonzero(np.diff(row, prepend=-1))
        conditional[row[first]] += np.add.reduceat(change, first, axis=0)

    contribution = np.add.reduceat(own, starts, axis=1) / rollouts
    values = contribution.sum(axis=1)
    conditional += values[:, None] + own - contribution[:, rollout_document]
    return values, conditional


def _case_values(
    positions: np.ndarray, column: np.ndarray, gain: np.ndarray, rollout_document: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    What cases, each a relevant document under one rollout in the ranking of a row, add to their rows: the expected gain
    of each, and what every column changes in it by being shown.
    """
    starts, rollouts = _documents(rollout_document)
    document = rollout_document[column]
    beats = positions < positions[np.arange(len(column)), column][:, None]
    share = np.add.reduceat(beats, starts, axis=1, dtype=np.int32) / rollouts
    share[np.arange(len(column)), document] = 0.0
    discount, cost = _expected_discount(share, k)
    cost *= (gain / rollouts[document])[:, None]
    return gain * discount, cost[:, rollout_document] * (share[:, rollout_document] - beats)


def _expected_discount(share: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Expected discount of each case, and what it costs the case to be beaten by each uncertain document (0 elsewhere).

    `share` of shape `(cases, D)` holds the probability that a document beats the case.
    """
    num_cases = len(share)
    uncertain = (share > 0) & (share < 1)
    case, document = np.nonzero(uncertain)
    step = np.cumsum(uncertain, axis=1)[case, document] - 1
    num_steps = step.max(initial=-1) + 1
    # Cases with fewer uncertain documents than num_steps end with p = 0, which changes nothing.
    p = np.zeros((num_steps, num_cases))
    p[step, case] = share[case, document]

    # V(m) and the drop V(m) - V(m + 1) obey the same recurrence; the drops are all that the costs need.
    table = np.zeros(share.shape[1] + k + 1)
    table[:k] = _discounts(k)
    value = table[np.count_nonzero(share == 1, axis=1) + np.arange(k + 1)[:, None]]
    drop = np.zeros((num_steps + 1, k + 1, num_cases))
    drop[num_steps, :k] = value[:-1] - value[1:]
    for u in reversed(range(num_steps)):
        after = drop[u + 1]
        np.subtract(after[1:], after[:-1], out=drop[u, :k])
        drop[u, :k] *= p[u]
        drop[u, :k] += after[:-1]

    cost = np.zeros(share.shape)
    step_cost = np.empty((num_steps, num_cases))
    law = np.zeros((k, num_cases))
    law[0] = 1.0
    for u in range(num_steps):
        np.einsum("mt,mt->t", law, drop[u + 1, :k], out=step_cost[u])
        moved = law * p[u]
        law -= moved
        law[1:] += moved[:-1]
    cost[case, document] = step_cost[step, case]
    # V(k) = 0, so the drops from 0 to k add up to V(0).
    return drop[0].sum(axis=0), cost


def sampled_ndcg(
    scores: np.ndarray,
    rollout_document: np.ndarray,
    relevance: np.ndarray,
    k: int = 10,
    num_samples: int = 512,
    seed: int | tuple[int, ...] = 0,
    ideal: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Expected NDCG@k of query rollouts, and the same given one document's rollout, estimated from random draws.

    The same draws serve every row, and they depend on nothing but `rollout_document`, `num_samples` and `seed`: a
    process that scores part of the rows gets the same values for them.

    Args:
        scores, rollout_document, relevance, k, ideal:
            As [`exact_ndcg`] takes them.
        num_samples (`int`, *optional*, defaults to `512`):
            Number of draws, each of one rollout for every document.
        seed (`int` or `tuple[int, ...]`, *optional*, defaults to `0`):
            Seed of the draws; a tuple, such as a run's seed and its step, seeds by all its numbers.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: values of shape `(R,)` and conditional values of shape `(R, C)`, as
        [`exact_ndcg`] returns them. A column that was never drawn gets the row's value.

    Raises:
        `ValueError`: If an argument has a wrong shape or an impossible value.

    Source: arXiv 2506.18670, section 3.3.
    """
    scores, rollout_document, relevance = _check_columns(scores, rollout_document, relevance, k)
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1, such as 512.")
    (num_rows, num_columns), num_documents = scores.shape, relevance.shape[1]
    starts, rollouts = _documents(rollout_document)
    gains = _normalized_gains(relevance, ideal_dcg(relevance, k) if ideal is None else ideal)
    positions, _ = _rank_columns(scores, 1.0 / rollouts[rollout_document])
    retrieved = np.isfinite(scores)
    table = np.pad(_discounts(k), (0, max(0, num_documents - k)))

    generator = np.random.default_rng(seed)
    times_drawn = np.zeros(num_columns)
    total = np.zeros(num_rows)
    column_total = np.zeros((num_rows, num_columns))
    chunk = max(1, _CHUNK_ELEMENTS // num_columns)
    for begin in range(0, num_samples, chunk):
        size = min(chunk, num_samples - begin)
        drawn = starts + generator.integers(rollouts, size=(size, num_documents))
        ndcg = _drawn_ndcg(drawn, positions, gains, table, retrieved)
        is_drawn = np.zeros((size, num_columns))
        np.put_along_axis(is_drawn, drawn, 1.0, axis=1)
        times_drawn += is_drawn.sum(axis=0)
        total += ndcg.sum(axis=1)
        column_total += ndcg @ is_drawn

    values = total / num_samples
    conditional = np.where(times_drawn > 0, column_total / np.maximum(times_drawn, 1), values[:, None])
    return values, conditional


def _drawn_ndcg(
    drawn: np.ndarray, positions: np.ndarray, gains: np.ndarray, table: np.ndarray, retrieved: np.ndarray
) -> np.ndarray:
    """NDCG of each row, shape (rows, draws), when the columns of `drawn`, shape (draws, documents), are shown."""
    ndcg = np.zeros((len(positions), len(drawn)))
    for row in range(len(positions)):
        position = positions[row][drawn]
        for document in np.flatnonzero(gains[row]):
            beaten_by = np.count_nonzero(position < position[:, document, None], axis=1)
            ndcg[row] += gains[row, document] * table[beaten_by] * retrieved[row][drawn[:, document]]
    return ndcg


def sum_document_rewards(
    conditional: np.ndarray, rollout_document: np.ndarray, relevance: np.ndarray, relevant_weight: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """
    Sums behind the document rewards. Those of processes that hold different rows add up to those of the whole.

    Args:
        conditional, of shape `(R, C)`: Conditional values, from [`exact_ndcg`] or [`sampled_ndcg`].
        rollout_document, of shape `(C,)`: Document of each column.
        relevance, of shape `(R, D)`: Gains of the query of each row.
        relevant_weight: A row weighs `1 + relevant_weight * relevance` in the reward of a document, or 0 if its query
            has no relevant document.

    Returns: weighted sums of shape `(C,)` and sums of the weights of shape `(D,)`, for [`divide_document_rewards`].

    Raises `ValueError`: If `relevant_weight` is negative or not finite.
    """
    if not 0 <= relevant_weight < np.inf:
        raise ValueError(f"relevant_weight is {relevant_weight}; it must be finite and not negative, such as 10.0.")
    relevance = np.asarray(relevance, dtype=np.float64)
    weight = np.where(relevance.any(axis=1, keepdims=True), 1.0 + relevant_weight * relevance, 0.0)
    return np.einsum("rc,rc->c", weight[:, rollout_document], conditional), weight.sum(axis=0)


def divide_document_rewards(numerator: np.ndarray, weight: np.ndarray, rollout_document: np.ndarray) -> np.ndarray:
    """
    Document rewards from the sums of [`sum_document_rewards`], added over processes.

    Args:
        numerator, of shape `(C,)`: Weighted sums.
        weight, of shape `(D,)`: Sums of the weights.
        rollout_document, of shape `(C,)`: Document of each column.

    Returns: shape `(C,)`, the reward of each document rollout; 0 where no row weighs the document.
    """
    weight = weight[rollout_document]
    return np.divide(numerator, weight, out=np.zeros(len(numerator)), where=weight > 0)


def _flatten(scores: np.ndarray, relevance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turns `(Q, A, D, B)` scores and `(Q, D)` relevance into the columns of the core."""
    scores = np.asarray(scores, dtype=np.float64)
    relevance = np.asarray(relevance, dtype=np.float64)
    if scores.ndim != 4 or 0 in scores.shape:
        raise ValueError(
            f"scores has shape {scores.shape}; it must be (queries, query rollouts, documents, document rollouts) "
            "with at least one of each, such as (1, 5, 15, 5)."
        )
    num_queries, num_query_rollouts, num_documents, num_document_rollouts = scores.shape
    if relevance.shape != (num_queries, num_documents):
        raise ValueError(
            f"relevance has shape {relevance.shape}; for these scores it must be (queries, documents) = "
            f"{(num_queries, num_documents)}."
        )
    return (
        scores.reshape(num_queries * num_query_rollouts, num_documents * num_document_rollouts),
        np.repeat(np.arange(num_documents), num_document_rollouts),
        np.repeat(relevance, num_query_rollouts, axis=0),
    )


def _unflatten(
    values: np.ndarray,
    conditional: np.ndarray,
    rollout_document: np.ndarray,
    relevance: np.ndarray,
    relevant_weight: float,
    shape: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Turns the core's results into rewards of shape `(Q, A)` and `(D, B)`."""
    numerator, weight = sum_document_rewards(conditional, rollout_document, relevance, relevant_weight)
    document_rewards = divide_document_rewards(numerator, weight, rollout_document)
    return values.reshape(shape[:2]), document_rewards.reshape(shape[2:])


def _check_columns(
    scores: np.ndarray, rollout_document: np.ndarray, relevance: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the core's arguments as arrays, or says which one is wrong."""
    scores = np.asarray(scores, dtype=np.float64)
    rollout_document = np.asarray(rollout_document)
    relevance = np.asarray(relevance, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(
            f"scores has shape {scores.shape}; it must be (query rollouts, document rollouts) with at least one "
            "document rollout, such as (5, 75)."
        )
    if relevance.ndim != 2 or len(relevance) != len(scores):
        raise ValueError(
            f"relevance has shape {relevance.shape}; it must be (query rollouts, documents) with a row for each of "
            f"the {len(scores)} rows of scores, such as ({len(scores)}, 15)."
        )
    if rollout_document.shape != scores.shape[1:]:
        raise ValueError(
            f"rollout_document has shape {rollout_document.shape}; it must have an entry for each column of scores: "
            f"({scores.shape[1]},)."
        )
    if not np.array_equal(np.unique(rollout_document), np.arange(relevance.shape[1])) or np.any(
        np.diff(rollout_document) < 0
    ):
        raise ValueError(
            f"rollout_document is {rollout_document}; it must be non-decreasing and name every document of "
            f"0..{relevance.shape[1] - 1}, such as [0, 0, 1, 1, ...]."
        )
    illegal = np.isnan(scores) | (scores == np.inf)
    if illegal.any():
        raise ValueError(
            f"scores holds {scores[illegal][0]}; a score must be finite, such as 1.5, or -inf for a document that is "
            "not retrieved."
        )
    illegal = ~(np.isfinite(relevance) & (relevance >= 0))
    if illegal.any():
        raise ValueError(
            f"relevance holds {relevance[illegal][0]}; a gain must be finite and not negative: 0 for a document that "
            "is not relevant, else such as 1."
        )
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1, such as 10.")
    return scores, rollout_document, relevance


def _documents(rollout_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First column and number of rollouts of each document."""
    rollouts = np.bincount(rollout_document)
    return np.cumsum(rollouts) - rollouts, rollouts


def _discounts(k: int) -> np.ndarray:
    """Discounts of the ranks 1 to k."""
    return 1.0 / np.log2(np.arange(2, k + 2))


def ideal_dcg(relevance: np.ndarray, k: int) -> np.ndarray:
    """DCG@k of the best ranking of documents with these gains, along the last axis."""
    best = -np.sort(-relevance, axis=-1)[..., :k]
    return best @ _discounts(best.shape[-1])


def _normalized_gains(relevance: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    """Gains divided by the row's ideal DCG; 0 in rows without a relevant document."""
    ideal = np.asarray(ideal, dtype=np.float64)[:, None]
    return np.divide(relevance, ideal, out=np.zeros(relevance.shape), where=ideal > 0)


def _rank_columns(scores: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Position of each column in its row's ranking of all columns, and the probability of the columns ahead of it.

    Columns are in document order, so a stable sort applies the tie rule: from here on, beating is having the lower
    position. Columns that are not retrieved come last and beat none that is.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    positions = np.empty(scores.shape, dtype=np.int32)
    np.put_along_axis(positions, order, np.arange(scores.shape[1], dtype=np.int32)[None], axis=1)
    up_to = np.cumsum(probability[order], axis=1)
    return positions, np.take_along_axis(up_to, positions, axis=1) - probability


def _hopeless(ahead: np.ndarray, k: int) -> np.ndarray:
    """
    Cases whose probability of making the first k ranks is negligible by Chernoff's bound.

    They are most of the cases of a large pool. For a sum N of independent coin flips with k - 1 < mean,
    P(N <= k - 1) <= exp(-mean) (e mean / (k - 1))^(k - 1). Of the probability ahead of a case, up to 1 belongs to
    the case's own document, and up to 1 is undone by knowing that another document does not beat it.
    """
    mean = np.maximum(ahead - 2.0, k)
    most = k - 1
    log_probability = -mean + (most + most * np.log(mean / most) if most > 0 else 0.0)
    return log_probability < _NEGLIGIBLE_LOG_PROBABILITY
