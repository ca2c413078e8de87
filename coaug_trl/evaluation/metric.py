"""The measures of `coaug evaluate` as a metric of Hugging Face's `evaluate`."""

from collections.abc import Iterable
from typing import Any

import evaluate
from datasets import Features, Value

from ..retrieval.base import Run
from ..utils.errors import InputError
from .measures import MEASURES, Qrels, evaluate_run


_DESCRIPTION = """\
Measures of ranked retrieval, computed by ir-measures, with means over every judged query: one without hits counts 0, \
as in trec_eval -c.
"""
_INPUTS = """
Args:
    predictions (`list[dict]`):
        What was retrieved, an entry a query: `"query"` (its id), `"documents"` (ids) and `"scores"` (one a document,
        higher is better). The order of the documents does not matter. Both lists are empty where nothing was found.
    references (`list[dict]`):
        What is relevant, an entry a query: `"query"`, `"documents"` and `"relevances"` (a grade a document, 0 for not
        relevant). The queries are those of the predictions, in any order; one without documents is not judged.
    measures (`list[str]`, *optional*, defaults to `["nDCG@10", "nDCG@100", "R@100", "RR@10", "AP"]`):
        Names of measures as ir-measures writes them.

Returns:
    `dict`: measure to mean, and the counts `"num_queries"` (the judged ones) and `"num_queries_without_hits"`, as in the
    `metrics.json` of `coaug evaluate`.

Example:

```python
>>> from coaug_trl import RetrievalMetric

>>> metric = RetrievalMetric()
>>> metric.compute(
...     predictions=[{"query": "q1", "documents": ["d1", "d2"], "scores": [2.5, 1.0]}],
...     references=[{"query": "q1", "documents": ["d2"], "relevances": [1]}],
...     measures=["RR@10"],
... )
{'RR@10': 0.5, 'num_queries': 1, 'num_queries_without_hits': 0}
```
"""
_CITATION = """\
@inproceedings{macavaney2022streamlining,
  author = {MacAvaney, Sean and Macdonald, Craig and Ounis, Iadh},
  title = {Streamlining Evaluation with ir-measures},
  booktitle = {Advances in Information Retrieval (ECIR)},
  year = {2022},
}
"""


class RetrievalMetric(evaluate.Metric):
    """
    Retrieval measures for those who evaluate with Hugging Face's `evaluate`, equal to those of `coaug evaluate`.

    It is made directly, without `evaluate.load`; [`compute`], [`add`] and [`add_batch`] are `evaluate`'s own, and what
    [`compute`] returns goes into `evaluate.save`. See [`inputs_description`] for what it takes.

    Example:

    ```python
    >>> import evaluate
    >>> from coaug_trl import RetrievalMetric

    >>> metric = RetrievalMetric()
    >>> for predictions, references in batches:
    ...     metric.add_batch(predictions=predictions, references=references)
    >>> evaluate.save("results/", **metric.compute(), experiment="NFCorpus, BM25")
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features(
                {
                    "predictions": {
                        "query": Value("string"),
                        "documents": [Value("string")],
                        "scores": [Value("float64")],
                    },
                    "references": {
                        "query": Value("string"),
                        "documents": [Value("string")],
                        "relevances": [Value("int64")],
                    },
                }
            ),
            reference_urls=["https://ir-measur.es", "https://huggingface.co/papers/2506.18670"],
        )

    def _compute(
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]], measures: Iterable[str] = MEASURES
    ) -> dict[str, float | int]:
        measures = [measures] if isinstance(measures, str) else measures
        run: Run = _by_query(predictions, "scores")
        qrels: Qrels = _by_query(references, "relevances")
        for query_id in [*run, *qrels]:
            if query_id not in qrels or query_id not in run:
                has, lacks = ("predictions", "references") if query_id in run else ("references", "predictions")
                raise InputError(
                    f"Query {query_id!r} is in the {has}, but not in the {lacks}; give every query an entry in both, "
                    "with empty lists where it found nothing or has no judgments."
                )
        means, per_query = evaluate_run(qrels, run, measures)
        return {
            **means,
            "num_queries": len(per_query),
            "num_queries_without_hits": sum(not run[query_id] for query_id in per_query),
        }


def _by_query(entries: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Query id to document id to the value of `name`; refuses what would overwrite another value."""
    table = {}
    for entry in entries:
        query_id, documents, values = entry["query"], entry["documents"], entry[name]
        if query_id in table:
            raise InputError(f"Query {query_id!r} has two entries with {name}; put its documents into one.")
        if len(documents) != len(values):
            raise InputError(f"Query {query_id!r} has {len(documents)} documents, but {len(values)} {name}.")
        table[query_id] = dict(zip(documents, values, strict=True))
        if len(table[query_id]) < len(documents):
            repeated = next(document_id for document_id in documents if documents.count(document_id) > 1)
            raise InputError(f"Query {query_id!r} has document {repeated!r} twice; keep one with its {name}.")
    return table
