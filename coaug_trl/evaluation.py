"""Measures of runs, significance of differences, and the folder that keeps an evaluation."""

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from subprocess import SubprocessError
from typing import TYPE_CHECKING, Any

import ir_measures
import numpy as np
from scipy import stats

from .errors import InputError
from .files import atomic_open, write_json, write_jsonl
from .policy import package_versions
from .prompts import document_text
from .retrieval.base import Retriever, check_depth


if TYPE_CHECKING:
    from .augmented import AugmentedCollection
    from .data import Collection, Document

MEASURES = ("nDCG@10", "nDCG@100", "R@100", "RR@10", "AP")
TEXTS_FILE = "texts.jsonl"
# Sign flips that the randomisation test draws, and signs held at once (8 bytes each).
NUM_FLIPS = 9999
FLIPS_AT_ONCE = 4_000_000

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]


def compose(
    collection: "Collection", augmented: "AugmentedCollection | None", retriever: Retriever
) -> tuple[dict[str, str], list["Document"]]:
    """
    The texts that are searched for and indexed.

    Args:
        collection ([`~coaug_trl.Collection`]):
            Its judged queries and its documents.
        augmented ([`~coaug_trl.augmented.AugmentedCollection`] or `None`):
            What is added to them.
        retriever ([`~coaug_trl.retrieval.base.Retriever`]):
            Knows the field that an augmentation joins.

    Returns:
        `tuple[dict[str, str], list[Document]]`: queries by id, and documents.
    """
    if augmented is None:
        queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
        return queries, list(collection.corpus.values())
    return augmented.queries(collection), augmented.documents(collection, retriever.answer_field)


def retrieve(retriever: Retriever, queries: dict[str, str], k: int = 1000, ignore_identical_ids: bool = False) -> Run:
    """
    Searches for every query.

    Args:
        retriever ([`~coaug_trl.retrieval.base.Retriever`]):
            With an index.
        queries (`dict[str, str]`):
            Texts to search for, by query id.
        k (`int`, *optional*, defaults to `1000`):
            The most hits a query gets.
        ignore_identical_ids (`bool`, *optional*, defaults to `False`):
            Whether to leave out a hit with the id of the query, and take the next one instead. For collections whose
            queries are documents of the corpus, such as ArguAna and Quora, where each would find itself first; BEIR's
            own evaluation does the same.

    Returns:
        `dict[str, dict[str, float]]`: query id to document id to score, best first. A query that finds nothing has an
        empty dictionary.

    Raises:
        `InputError`: `k` is less than 1.
    """
    check_depth(k)
    run = {}
    found = retriever.search(list(queries.values()), k + ignore_identical_ids)
    for query_id, hits in zip(queries, found, strict=True):
        if ignore_identical_ids:
            hits = [hit for hit in hits if hit[0] != query_id][:k]
        run[query_id] = dict(hits)
    return run


def parse_measures(names: Iterable[str]) -> dict[ir_measures.Measure, str]:
    """
    Reads names of measures and tries each on a judged document, so that a wrong one is refused before long work.

    Args:
        names (`Iterable[str]`):
            Names as [ir_measures](https://ir-measur.es) writes them, such as `nDCG@10` or `P(rel=2)@5`.

    Returns:
        `dict`: the measures and the names they were given by, each once, in the order given.

    Raises:
        `InputError`: there is no such measure, it lacks a cutoff or has one that cannot be, or it needs a package that
            is not installed.
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
        qrels (`dict[str, dict[str, int]]`):
            Query id to document id to grade. A query with an empty dictionary is not judged.
        run (`dict[str, dict[str, float]]`):
            Query id to document id to score. Queries without judgments are ignored.
        measures (`Iterable[str]`, *optional*, defaults to `("nDCG@10", "nDCG@100", "R@100", "RR@10", "AP")`):
            Names of measures as [`parse_measures`] reads them.

    Returns:
        `tuple`: the means (`{measure: value}`), and the values they are means of (`{query id: {measure: value}}`).

    Raises:
        `InputError`: no query is judged, there is no such measure, or a score is not a finite number.
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
        run (`dict[str, dict[str, float]]`):
            Query id to document id to score.

    Returns:
        `dict[str, dict[str, float]]`: the same documents, best first, with distinct single-precision scores.

    Raises:
        `InputError`: a score is not a finite number in single precision.
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


def judged_texts(
    collection: "Collection", answers: dict[str, dict[str, str]] | None = None
) -> Iterator[dict[str, str]]:
    """
    The texts that show what a system did with its queries: the judged queries and the documents relevant to them.

    Args:
        collection ([`~coaug_trl.Collection`]):
            Whose queries and documents.
        answers (`dict[str, dict[str, str]]`, *optional*):
            What was added: side (`"query"`, `"document"`) to id to answer, as in
            [`~coaug_trl.augmented.AugmentedCollection`]; defaults to nothing.

    Returns:
        `Iterator[dict[str, str]]`: `_id`, `type` (the side), `text` and `augmentation`, empty where nothing was added.
    """
    documents = dict.fromkeys(chain.from_iterable(map(collection.relevant_documents, collection.qrels)))
    texts = {
        "query": {query_id: collection.queries[query_id] for query_id in collection.qrels},
        "document": {document_id: document_text(collection.corpus[document_id]) for document_id in documents},
    }
    for side in texts:
        added = (answers or {}).get(side, {})
        for text_id, text in texts[side].items():
            yield {"_id": text_id, "type": side, "text": text, "augmentation": added.get(text_id, "")}


def evaluation_manifest(
    collection: "Collection",
    augmented: "AugmentedCollection | None",
    config: dict[str, Any],
    queries: dict[str, str],
    documents: list["Document"],
    k: int,
    ignore_identical_ids: bool,
) -> dict[str, Any]:
    """
    How an evaluation is made, for [`~coaug_trl.evaluation.save_evaluation`].

    Args:
        collection ([`~coaug_trl.Collection`]):
            What is evaluated on.
        augmented ([`~coaug_trl.augmented.AugmentedCollection`] or `None`):
            What was added to its texts.
        config (`dict[str, Any]`):
            The retriever's.
        queries (`dict[str, str]`):
            As [`compose`] gives them.
        documents (`list[Document]`):
            Likewise.
        k (`int`):
            Depth of the run.
        ignore_identical_ids (`bool`):
            As in [`~coaug_trl.evaluation.retrieve`].

    Returns:
        `dict[str, Any]`: JSON-able; two evaluations with equal manifests have equal runs, since `hashes` are of all
        texts and judgments.
    """
    return {
        "collection": collection.name,
        "split": collection.split,
        "retriever": config,
        "depth": k,
        "ignore_identical_ids": ignore_identical_ids,
        "augmentations": augmented.manifest if augmented else None,
        "augmented_sides": sorted(augmented.answers) if augmented else [],
        "hashes": {
            "queries": _hash(queries.items()),
            "documents": _hash((document.id, document.title, document.text) for document in documents),
            "judgments": _hash(collection.qrels.items()),
        },
        "versions": package_versions(),
    }


def _hash(rows: Iterable[Any]) -> str:
    """First 16 hexadecimal digits of a SHA-256 over rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()[:16]


def save_evaluation(
    folder: str | Path,
    run: Run,
    qrels: Qrels,
    manifest: dict[str, Any],
    measures: Iterable[str] = MEASURES,
    texts: Iterable[dict[str, str]] | None = None,
) -> dict[str, Any]:
    """
    Measures a run and writes what is needed to check and to compare it.

    The files are `run.trec` (with the scores of [`break_ties`]), `qrels.trec`, `texts.jsonl`, `per_query.jsonl`,
    `manifest.json` and, last, `metrics.json`. Reading the two TREC files with any evaluation tool gives the numbers of
    `metrics.json`.

    Args:
        folder (`str` or `Path`):
            Where to write; made if it is not there.
        run (`dict[str, dict[str, float]]`):
            Query id to document id to score.
        qrels (`dict[str, dict[str, int]]`):
            Query id to document id to grade.
        manifest (`dict[str, Any]`):
            How the run was made, JSON-able; `manifest["retriever"]` is the retriever's `config`.
        measures (`Iterable[str]`, *optional*, defaults to `("nDCG@10", "nDCG@100", "R@100", "RR@10", "AP")`):
            Names of measures as [`parse_measures`] reads them.
        texts (`Iterable[dict[str, str]]`, *optional*):
            Rows of [`judged_texts`], for the examples of `coaug compare`; without them there is no `texts.jsonl`.

    Returns:
        `dict[str, Any]`: the content of `metrics.json`: the means, `num_queries`, `num_queries_without_hits` and
        `retriever`.

    Raises:
        `InputError`: as in [`evaluate_run`], or an id is empty or has whitespace in it, which TREC files cannot hold.
    """
    for table in (run, qrels):
        for query_id, documents in table.items():
            for trec_id in (query_id, *documents):
                if trec_id.split() != [trec_id]:
                    raise InputError(f"Id {trec_id!r} is empty or has whitespace in it: TREC files cannot hold it.")

    ranked = break_ties(run)
    means, per_query = evaluate_run(qrels, ranked, measures)
    metrics = {
        **means,
        "num_queries": len(per_query),
        "num_queries_without_hits": sum(not ranked.get(query_id) for query_id in per_query),
        "retriever": manifest["retriever"],
    }

    folder = Path(folder)
    (folder / "metrics.json").unlink(missing_ok=True)  # until it is there again the folder is unfinished
    with atomic_open(folder / "run.trec") as file:
        for query_id, scores in ranked.items():
            for rank, (document_id, score) in enumerate(scores.items(), start=1):
                # nine digits tell any two single-precision numbers apart
                file.write(f"{query_id} Q0 {document_id} {rank} {score:.9g} coaug_trl\n")
    with atomic_open(folder / "qrels.trec") as file:
        for query_id, judgments in qrels.items():
            for document_id, grade in judgments.items():
                file.write(f"{query_id} 0 {document_id} {grade}\n")
    if texts is None:  # those of an evaluation that was here before are not of this one
        (folder / TEXTS_FILE).unlink(missing_ok=True)
    else:
        write_jsonl(folder / TEXTS_FILE, texts)
    write_jsonl(folder / "per_query.jsonl", ({"_id": query_id, **values} for query_id, values in per_query.items()))
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "metrics.json", metrics)
    return metrics


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation folder, read.

    Args:
        metrics (`dict[str, Any]`):
            Content of `metrics.json`.
        per_query (`dict[str, dict[str, float]]`):
            Query id to measure to value; every query has the same measures.
        manifest (`dict[str, Any]`):
            How the run was made.
    """

    metrics: dict[str, Any]
    per_query: dict[str, dict[str, float]]
    manifest: dict[str, Any]

    @property
    def measures(self) -> list[str]:
        """Names of the measures of each query."""
        return list(next(iter(self.per_query.values())))


def load_evaluation(folder: str | Path) -> Evaluation:
    """
    Reads what [`save_evaluation`] wrote, the run, the judgments and the texts excepted.

    Args:
        folder (`str` or `Path`):
            The evaluation folder.

    Returns:
        [`Evaluation`]: with the queries in the order of the file.

    Raises:
        `InputError`: a file is missing or damaged, or the values of the queries do not have the means that
            `metrics.json` states, as when an evaluation was begun anew there and interrupted.
    """
    folder = Path(folder)
    files = ("run.trec", "qrels.trec", "per_query.jsonl", "manifest.json", "metrics.json")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is not a finished evaluation: {', '.join(missing)} is missing; make it with coaug evaluate."
        )
    metrics, manifest = _read_object(folder / "metrics.json"), _read_object(folder / "manifest.json")
    if not isinstance(manifest.get("retriever"), dict):
        raise InputError(f"{folder / 'manifest.json'} does not say with which retriever; evaluate again.")
    path = folder / "per_query.jsonl"
    per_query: dict[str, dict[str, float]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            query_id = row.pop("_id")
            values = {name: float(value) for name, value in row.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}, line {number}: not an _id and values of measures; evaluate again.") from None
        if per_query and values.keys() != next(iter(per_query.values())).keys():
            raise InputError(f"{path}, line {number}: other measures than on the lines before; evaluate again.")
        if query_id in per_query:
            raise InputError(f"{path}, line {number}: query {query_id!r} is there twice; evaluate again.")
        per_query[query_id] = values
    if not per_query:
        raise InputError(f"{path} has no query; evaluate again.")
    evaluation = Evaluation(metrics, per_query, manifest)
    for name in evaluation.measures:
        mean, stated = fmean(values[name] for values in per_query.values()), metrics.get(name)
        if not isinstance(stated, (int, float)) or not math.isclose(mean, stated, abs_tol=1e-9):
            raise InputError(
                f"{folder}: the mean {name} of per_query.jsonl is {mean:.4f}, but metrics.json says {stated}: the "
                "files are not of one evaluation; evaluate again."
            )
    return evaluation


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); evaluate again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; evaluate again.")
    return content
