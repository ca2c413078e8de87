"""Measures of runs."""

import math
from collections.abc import Iterable
from statistics import fmean
from subprocess import SubprocessError

import ir_measures
import numpy as np

from ..retrieval.base import Run
from ..utils.errors import InputError


MEASURES = ("nDCG@10", "nDCG@100", "R@100", "RR@10", "AP")
Qrels = dict[str, dict[str, int]]


def parse_measures(names: Iterable[str]) -> dict[ir_measures.Measure, str]:
    """
    Reads names of measures and tries each on a judged document, so that a wrong one is refused before long work.

    Args:
        names: Names as [ir_measures](https://ir-measur.es) writes them, such as `nDCG@10` or `P(rel=2)@5`.

    Returns: the measures and the names they were given by, each once, in the order given.

    Raises `InputError`: there is no such measure, it lacks a cutoff or has one that cannot be, or it needs a package
        that is not installed.
    """
    measures = {}
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
        except (NameError, ValueError, KeyError, TypeError):
            raise InputError(
                f"There is no measure {name!r}; names are those of ir-measures, such as {', '.join(MEASURES)} or "
                "P(rel=2)@5, in capitals and small letters as here."
            ) from None
        if measure.NAME in ("NumQ", "NumRel"):  # of judgments, where a query without hits does not count 0
            raise InputError(f"{name!r} counts judgments and measures no run; use such as {', '.join(MEASURES)}.")
        cutoff = measure.params.get("cutoff")
        try:
            if isinstance(cutoff, int) and cutoff < 1:  # trec_eval ends the process at such a cutoff
                raise ValueError(f"the cutoff is {cutoff}")
            list(ir_measures.iter_calc([measure], {"1": {"a": 1, "b": 0}}, {"1": {"a": 1.0, "b": 0.5}}))
        # what measures and their tools answer to parameters that they do not have or cannot take
        except (AssertionError, LookupError, ValueError, TypeError, RuntimeError, OSError, SubprocessError) as error:
            raise InputError(
                f"The measure {name!r} cannot be computed ({error}); give it as ir-measures documents it, such as "
                f"{', '.join(MEASURES)}."
            ) from None
        measures.setdefault(measure, name)
    return measures


def evaluate_run(
    qrels: Qrels, run: Run, measures: Iterable[str] = MEASURES
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """
    Measures a run by `ir_measures`.

    The means run over every judged query: one without hits counts 0, and so does one whose judgments are all 0, as in
    `trec_eval -c`. Leaving either out would make means of different systems means over different queries.

    Args:
        qrels: Query id to document id to grade. A query with an empty dictionary is not judged.
        run: Query id to document id to score. Queries without judgments are ignored.
        measures: Names of measures as [`parse_measures`] reads them.

    Returns: the means (`{measure: value}`), and the values they are means of (`{query id: {measure: value}}`).

    Raises `InputError`: no query is judged, there is no such measure, or a score is not a finite number.
    """
    judged = {query_id: judgments for query_id, judgments in qrels.items() if judgments}
    if not judged:
        raise InputError("There is no judged query to evaluate on: check the relevance judgments of this split.")
    names = parse_measures(measures)
    judged_run = break_ties({query_id: run[query_id] for query_id in judged if run.get(query_id)})
    per_query = {query_id: dict.fromkeys(names.values(), 0.0) for query_id in judged}
    # Queries go by numbers: gdeval, which ir_measures takes for ERR, reads no other ids.
    query_ids = {str(number): query_id for number, query_id in enumerate(judged, start=1)}
    numbered_qrels = {number: judged[query_id] for number, query_id in query_ids.items()}
    numbered_run = {number: judged_run[query_id] for number, query_id in query_ids.items() if query_id in judged_run}
    for metric in ir_measures.iter_calc(list(names), numbered_qrels, numbered_run):
        per_query[query_ids[metric.query_id]][names[metric.measure]] = float(metric.value)
    means = {name: fmean(values[name] for values in per_query.values()) for name in names.values()}
    return means, per_query


def break_ties(run: Run) -> Run:
    """
    Ranks a run as trec_eval does and makes its scores strictly decreasing, so that every tool ranks it alike.

    Tools agree on the order of scores, not on ties: trec_eval reads scores in single precision and puts equal ones in
    descending order of id, the MS MARCO script (which `ir_measures` takes for RR@10) in ascending order, others leave
    them as they come. So ties are broken here, by trec_eval's rule, and a score that is not below its predecessor's
    becomes the next smaller single-precision number.

    Args:
        run: Query id to document id to score.

    Returns: the same documents, best first, with distinct single-precision scores.

    Raises `InputError`: a score is not a finite number in single precision.
    """
    ranked = {}
    for query_id, scores in run.items():
        with np.errstate(over="ignore"):  # too large for single precision becomes infinite, which is refused below
            singles = {document_id: float(np.float32(score)) for document_id, score in scores.items()}
        ranked[query_id] = {}
        previous = math.inf
        for document_id in sorted(singles, key=lambda document_id: (singles[document_id], document_id), reverse=True):
            if not math.isfinite(singles[document_id]):
                raise InputError(
                    f"The score of document {document_id!r} for query {query_id!r} is {scores[document_id]}; "
                    "a run holds finite scores of retrieved documents only."
                )
            next_smaller = float(np.nextafter(np.float32(previous), np.float32(-np.inf)))
            previous = ranked[query_id][document_id] = min(singles[document_id], next_smaller)
    return ranked
