"""The folder that keeps an evaluation."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..data.document import document_text
from ..policy.settings import package_versions
from ..retrieval.base import Run
from ..utils.errors import InputError
from ..utils.files import atomic_open, read_json, write_json, write_jsonl
from .measures import MEASURES, Qrels, break_ties, evaluate_run


if TYPE_CHECKING:
    from ..augmentation.folder import AugmentedCollection
    from ..data.collection import Collection
    from ..data.document import Document

TEXTS_FILE = "texts.jsonl"


def judged_texts(
    collection: "Collection", answers: dict[str, dict[str, str]] | None = None
) -> Iterator[dict[str, str]]:
    """
    The texts that show what a system did with its queries: the judged queries and the documents relevant to them.

    Args:
        collection: Whose queries and documents.
        answers: What was added: side (`"query"`, `"document"`) to id to answer, as in
            [`~coaug_trl.augmentation.folder.AugmentedCollection`]; defaults to nothing.

    Returns: `_id`, `type` (the side), `text` and `augmentation`, empty where nothing was added.
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
    How an evaluation is made, for [`~coaug_trl.evaluation.folder.save_evaluation`].

    Args:
        collection: What is evaluated on.
        augmented: What was added to its texts.
        config: The retriever's.
        queries: As [`compose`] gives them.
        documents: Likewise.
        k: Depth of the run.
        ignore_identical_ids: As in [`~coaug_trl.retrieval.base.retrieve`].

    Returns: JSON-able; two evaluations with equal manifests have equal runs, since `hashes` are of all texts and
        judgments.
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
        folder: Where to write; made if it is not there.
        run: Query id to document id to score.
        qrels: Query id to document id to grade.
        manifest: How the run was made, JSON-able; `manifest["retriever"]` is the retriever's `config`.
        measures: Names of measures as [`parse_measures`] reads them.
        texts: Rows of [`judged_texts`], for the examples of `coaug compare`; without them there is no `texts.jsonl`.

    Returns: the content of `metrics.json`: the means, `num_queries`, `num_queries_without_hits` and `retriever`.

    Raises `InputError`: as in [`evaluate_run`], or an id is empty or has whitespace in it, which TREC files cannot
        hold.
    """
    _check_ids(run, qrels)
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
    _write_trec(folder, ranked, qrels)
    if texts is None:  # those of an evaluation that was here before are not of this one
        (folder / TEXTS_FILE).unlink(missing_ok=True)
    else:
        write_jsonl(folder / TEXTS_FILE, texts)
    write_jsonl(folder / "per_query.jsonl", ({"_id": query_id, **values} for query_id, values in per_query.items()))
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "metrics.json", metrics)
    return metrics


def _check_ids(*tables: dict[str, dict[str, Any]]) -> None:
    for query_id, documents in chain.from_iterable(table.items() for table in tables):
        for trec_id in (query_id, *documents):
            if trec_id.split() != [trec_id]:
                raise InputError(f"Id {trec_id!r} is empty or has whitespace in it: TREC files cannot hold it.")


def _write_trec(folder: Path, run: Run, qrels: Qrels) -> None:
    with atomic_open(folder / "run.trec") as file:
        for query_id, scores in run.items():
            for rank, (document_id, score) in enumerate(scores.items(), start=1):
                # nine digits tell any two single-precision numbers apart
                file.write(f"{query_id} Q0 {document_id} {rank} {score:.9g} coaug_trl\n")
    with atomic_open(folder / "qrels.trec") as file:
        for query_id, judgments in qrels.items():
            for document_id, grade in judgments.items():
                file.write(f"{query_id} 0 {document_id} {grade}\n")


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation folder, read.

    Args:
        metrics: Content of `metrics.json`.
        per_query: Query id to measure to value; every query has the same measures.
        manifest: How the run was made.
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
        folder: The evaluation folder.

    Returns: with the queries in the order of the file.

    Raises `InputError`: a file is missing or damaged, or the values of the queries do not have the means that
        `metrics.json` states, as when an evaluation was begun anew there and interrupted.
    """
    folder = Path(folder)
    files = ("run.trec", "qrels.trec", "per_query.jsonl", "manifest.json", "metrics.json")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is not a finished evaluation: {', '.join(missing)} is missing; make it with coaug evaluate."
        )
    metrics, manifest = (read_json(folder / name, "evaluate again") for name in ("metrics.json", "manifest.json"))
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
