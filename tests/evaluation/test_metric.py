"""The metric for Hugging Face's evaluate, on its own machinery: Arrow files, batches, `evaluate.save`."""

import json

import evaluate
import numpy as np
import pytest

from coaug_trl import InputError, RetrievalMetric
from coaug_trl.evaluation.folder import save_evaluation
from coaug_trl.evaluation.measures import evaluate_run


@pytest.fixture
def metric(tmp_path):
    return RetrievalMetric(cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def qrels_and_run():
    rng = np.random.default_rng(0)
    documents = [f"doc-{i}" for i in range(60)]
    qrels = {f"q{i}": {d: int(rng.integers(0, 3)) for d in rng.choice(documents, 10, replace=False)} for i in range(9)}
    run = {query_id: {d: float(rng.integers(0, 20)) for d in documents if rng.random() < 0.7} for query_id in qrels}
    run["q3"] = {}
    return qrels, run


def entries(qrels, run):
    predictions = [{"query": q, "documents": list(hits), "scores": list(hits.values())} for q, hits in run.items()]
    references = [{"query": q, "documents": list(j), "relevances": list(j.values())} for q, j in qrels.items()]
    return predictions, references


def test_equal_to_an_evaluation_folder(metric, qrels_and_run, tmp_path):
    qrels, run = qrels_and_run
    predictions, references = entries(qrels, run)
    result = metric.compute(predictions=predictions, references=references[::-1])
    expected = save_evaluation(tmp_path / "evaluation", run, qrels, {"retriever": {}})
    assert result | {"retriever": {}} == expected
    assert (result["num_queries"], result["num_queries_without_hits"]) == (9, 1)


def test_equal_to_coaug_evaluate(metric, coaug, beir_folder, tmp_path):
    assert coaug("evaluate", "--collection", beir_folder, "--output", tmp_path)[0] == 0
    run, qrels = {}, {}
    for line in (tmp_path / "run.trec").read_text().splitlines():
        query_id, _, document_id, _, score, _ = line.split()
        run.setdefault(query_id, {})[document_id] = float(score)
    for line in (tmp_path / "qrels.trec").read_text().splitlines():
        query_id, _, document_id, grade = line.split()
        qrels.setdefault(query_id, {})[document_id] = int(grade)
    predictions, references = entries(qrels, run)
    result = metric.compute(predictions=predictions, references=references)
    expected = json.loads((tmp_path / "metrics.json").read_text())
    assert result.items() <= expected.items()
    assert expected.keys() - result.keys() == {"retriever"}


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_batches_and_single_entries(qrels_and_run, tmp_path, keep_in_memory):
    metric = RetrievalMetric(cache_dir=str(tmp_path), keep_in_memory=keep_in_memory)
    predictions, references = entries(*qrels_and_run)
    for first in range(0, 6, 2):
        last = first + 2
        metric.add_batch(predictions=predictions[first:last], references=references[first:last])
    for prediction, reference in zip(predictions[6:], references[6:], strict=True):
        metric.add(prediction=prediction, reference=reference)
    result = metric.compute(measures=["nDCG@5", "P(rel=2)@3"])
    assert list(result) == ["nDCG@5", "P(rel=2)@3", "num_queries", "num_queries_without_hits"]
    means, _ = evaluate_run(*qrels_and_run, ["nDCG@5", "P(rel=2)@3"])
    assert {name: result[name] for name in means} == means
    # and it starts anew
    assert metric.compute(predictions=predictions[3:4], references=references[3:4], measures=["AP"])["AP"] == 0


def test_a_query_without_judgments_is_not_judged(metric):
    predictions, references = entries({"a": {"d": 1}, "b": {}}, {"a": {"d": 1.0}, "b": {"d": 1.0}})
    result = metric.compute(predictions=predictions, references=references, measures=["AP"])
    assert result == {"AP": 1.0, "num_queries": 1, "num_queries_without_hits": 0}
    assert metric.compute(predictions=predictions, references=references, measures="AP") == result


def test_results_are_saved_by_evaluate(metric, qrels_and_run, tmp_path):
    predictions, references = entries(*qrels_and_run)
    result = metric.compute(predictions=predictions, references=references)
    path = evaluate.save(tmp_path / "results.json", **result, experiment="BM25")
    saved = json.loads(path.read_text())
    assert result.items() <= saved.items()
    assert saved["experiment"] == "BM25"
    assert saved["_evaluate_version"] == evaluate.__version__


def test_it_combines_with_others(metric, qrels_and_run, tmp_path):
    predictions, references = entries(*qrels_and_run)
    both = evaluate.combine([metric, RetrievalMetric(cache_dir=str(tmp_path / "other"))], force_prefix=True)
    values = both.compute(predictions=predictions, references=references)
    assert values["retrieval_metric_0_AP"] == values["retrieval_metric_1_AP"] > 0


def test_it_says_what_it_takes(metric):
    assert "measures (`list[str]`" in metric.compute.__doc__
    assert set(metric.features) == {"predictions", "references"}


GOOD = {"query": "q", "documents": ["a", "b"], "scores": [2.0, 1.0]}
JUDGED = {"query": "q", "documents": ["a"], "relevances": [1]}


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (GOOD, JUDGED | {"query": "p"}, "Query 'q' is in the predictions, but not in the references"),
        (GOOD | {"scores": [1.0]}, JUDGED, "Query 'q' has 2 documents, but 1 scores"),
        (GOOD, JUDGED | {"relevances": []}, "Query 'q' has 1 documents, but 0 relevances"),
        (GOOD | {"documents": ["a", "a"]}, JUDGED, "Query 'q' has document 'a' twice"),
        (GOOD | {"scores": [1.0, float("nan")]}, JUDGED, "score of document 'b' for query 'q' is nan"),
        (GOOD, {"query": "q", "documents": [], "relevances": []}, "no judged query"),
    ],
)
def test_bad_entries_are_refused(metric, prediction, reference, message):
    with pytest.raises(InputError, match=message):
        metric.compute(predictions=[prediction], references=[reference])
    # what was refused does not stay behind
    assert metric.compute(predictions=[GOOD], references=[JUDGED], measures=["AP"])["AP"] == 1


def test_a_query_on_one_side_only_is_refused(metric):
    others = [{"query": "p", "documents": [], "scores": []}, {"query": "r", "documents": ["a"], "relevances": [1]}]
    with pytest.raises(InputError, match="Query 'p' is in the predictions, but not in the references"):
        metric.compute(predictions=[GOOD, others[0]], references=[JUDGED, others[1]])
    with pytest.raises(InputError, match="Query 'q' has two entries with relevances"):
        metric.compute(predictions=[GOOD, others[0]], references=[JUDGED, JUDGED])


def test_an_unknown_measure_is_refused(metric):
    with pytest.raises(InputError, match="no measure 'ndcg@10'"):
        metric.compute(predictions=[GOOD], references=[JUDGED], measures=["ndcg@10"])
