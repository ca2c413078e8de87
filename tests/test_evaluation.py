import json
from itertools import product

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from scipy import stats

from coaug_trl.errors import InputError
from coaug_trl.evaluation import break_ties, compare, evaluate_run, save_evaluation


MANIFEST = {"retriever": {"retriever": "bm25", "k1": 1.2}}


def random_qrels_and_run(seed, num_queries=20, num_documents=150, ties=False):
    rng = np.random.default_rng(seed)
    documents = [f"doc-{i}" for i in range(num_documents)]
    qrels, run = {}, {}
    for i in range(num_queries):
        qrels[f"q{i}"] = {d: int(rng.integers(0, 3)) for d in rng.choice(documents, 30, replace=False)}
        scores = rng.integers(0, 5, num_documents) if ties else rng.normal(0, 10, num_documents)
        found = rng.random(num_documents) < 0.8
        run[f"q{i}"] = {d: float(s) for d, s, f in zip(documents, scores, found, strict=True) if f}
    return qrels, run


def first_ten(run):
    """The run's ten best in trec_eval's order, for a reciprocal rank that ends there."""
    return {q: dict(sorted(scores.items(), key=lambda x: x[::-1], reverse=True)[:10]) for q, scores in run.items()}


class TestEvaluateRun:
    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_trec_eval(self, seed, ties):
        qrels, run = random_qrels_and_run(seed, ties=ties)
        means, per_query = evaluate_run(qrels, run)
        expected = pytrec_eval.RelevanceEvaluator(qrels, ["ndcg_cut_10", "recall_100", "map"]).evaluate(run)
        expected_rr = pytrec_eval.RelevanceEvaluator(qrels, ["recip_rank"]).evaluate(first_ten(run))
        for query_id, values in per_query.items():
            assert values == pytest.approx(
                {
                    "nDCG@10": expected[query_id]["ndcg_cut_10"],
                    "R@100": expected[query_id]["recall_100"],
                    "RR@10": expected_rr[query_id]["recip_rank"],
                    "AP": expected[query_id]["map"],
                },
                abs=1e-9,
            )
        for measure, mean in means.items():
            assert mean == pytest.approx(np.mean([values[measure] for values in per_query.values()]), abs=1e-12)

    def test_every_judged_query_counts(self):
        qrels = {"found": {"a": 1}, "missing": {"a": 1}, "empty": {"b": 2}, "all 0": {"a": 0}, "unjudged": {}}
        run = {"found": {"a": 1.0}, "empty": {}, "all 0": {"a": 1.0}, "unjudged": {"a": 1.0}, "no qrels": {"a": 1.0}}
        means, per_query = evaluate_run(qrels, run)
        assert means == {"nDCG@10": 0.25, "R@100": 0.25, "RR@10": 0.25, "AP": 0.25}
        assert list(per_query) == ["found", "missing", "empty", "all 0"]
        assert per_query["missing"] == {"nDCG@10": 0.0, "R@100": 0.0, "RR@10": 0.0, "AP": 0.0}

    def test_an_empty_run(self):
        assert evaluate_run({"q": {"a": 1}}, {})[0]["AP"] == 0

    def test_other_measures(self):
        means, per_query = evaluate_run({"q": {"a": 2, "b": 1}}, {"q": {"b": 2.0, "a": 1.0}}, ["P(rel=2)@1", "nDCG@1"])
        assert means == per_query["q"] == {"P(rel=2)@1": 0.0, "nDCG@1": 0.5}

    def test_bad_input_is_refused(self):
        with pytest.raises(InputError, match="no judged query"):
            evaluate_run({"q": {}}, {"q": {"a": 1.0}})
        for score in (float("nan"), float("-inf"), 1e60):
            with pytest.raises(InputError, match="'a' for query 'q'"):
                evaluate_run({"q": {"a": 1}}, {"q": {"b": 1.0, "a": score, "c": 2.0}})


class TestBreakTies:
    def test_trec_evals_order_with_strictly_decreasing_scores(self):
        # b is not above a in single precision; the ties then overrun c, the next lower score
        run = {"q": {"c": np.nextafter(np.float32(1), np.float32(0)), "a": 1.0 + 1e-12, "b": 1.0, "d": 5.0, "e": -3.0}}
        ranked = break_ties(run)["q"]
        assert list(ranked) == ["d", "b", "a", "c", "e"]
        singles = np.array(list(ranked.values()), dtype=np.float32)
        assert (np.diff(singles) < 0).all()
        assert np.allclose(singles, [5, 1, 1, 1, -3], rtol=1e-6)

    def test_a_ranked_run_stays_as_it_is(self):
        run = break_ties(random_qrels_and_run(0, ties=True)[1])
        assert break_ties(run) == run


class TestCompare:
    def test_against_scipy(self):
        rng = np.random.default_rng(1)
        a = rng.random(60)
        b = a + rng.normal(0.03, 0.1, 60)
        queries = [f"q{i}" for i in range(60)]
        result = compare(dict(zip(queries, a, strict=True)), dict(zip(queries[::-1], b[::-1], strict=True)))
        assert result["p_t_test"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
        assert result["p_randomization"] == pytest.approx(result["p_t_test"], abs=0.02)
        assert result["mean_difference"] == pytest.approx(np.mean(a) - np.mean(b))
        assert (result["wins"], result["ties"], result["losses"]) == ((a > b).sum(), 0, (a < b).sum())
        assert result["num_queries"] == 60

    def test_against_all_sign_flips(self):
        differences = np.array([0.3, -0.1, 0.25, 0.0, 0.4, 0.15, -0.05, 0.2])
        queries = [f"q{i}" for i in range(len(differences))]
        result = compare(dict(zip(queries, differences, strict=True)), dict.fromkeys(queries, 0.0))
        flipped = np.array(list(product([1, -1], repeat=len(differences)))) @ differences
        expected = np.mean(np.abs(flipped) >= abs(differences.sum()) - 1e-12)
        assert result["p_randomization"] == pytest.approx(expected)
        assert (result["wins"], result["ties"], result["losses"]) == (5, 1, 2)

    def test_the_seed_decides_the_draws(self):
        rng = np.random.default_rng(2)
        a, b = ({f"q{i}": float(x) for i, x in enumerate(rng.random(40))} for _ in range(2))
        assert compare(a, b, seed=3) == compare(a, b, seed=3)

    def test_nothing_to_test(self):
        same = {"q1": 0.5, "q2": 0.25}
        for a, b in [(same, dict(same)), ({"q": 1.0}, {"q": 0.0})]:
            result = compare(a, b)
            assert result["p_t_test"] == result["p_randomization"] == 1

    def test_a_constant_difference(self, recwarn):
        result = compare({f"q{i}": 0.5 for i in range(20)}, {f"q{i}": 0.25 for i in range(20)})
        assert result["p_t_test"] == 0 and result["p_randomization"] < 0.001
        assert not recwarn.list

    def test_the_queries_must_be_the_same(self):
        with pytest.raises(InputError, match="'q2'"):
            compare({"q1": 0.5, "q2": 0.1}, {"q1": 0.5})
        with pytest.raises(InputError, match="at least one"):
            compare({}, {})


class TestSaveEvaluation:
    @pytest.mark.parametrize("ties", [False, True])
    def test_the_files_give_the_same_numbers(self, ties, tmp_path):
        qrels, run = random_qrels_and_run(5, ties=ties)
        qrels["no-hits"] = {"doc-1": 1}
        run["unjudged"] = {"doc-1": 1.5}
        metrics = save_evaluation(tmp_path / "new" / "folder", run, qrels, MANIFEST)
        folder = tmp_path / "new" / "folder"
        assert {path.name for path in folder.iterdir()} == {
            "metrics.json",
            "run.trec",
            "qrels.trec",
            "per_query.jsonl",
            "manifest.json",
        }
        means, per_query = evaluate_run(qrels, run)
        assert metrics == {**means, "num_queries": 21, "num_queries_without_hits": 1, **MANIFEST}
        assert json.loads((folder / "metrics.json").read_text()) == metrics
        assert json.loads((folder / "manifest.json").read_text()) == MANIFEST
        rows = [json.loads(line) for line in (folder / "per_query.jsonl").read_text().splitlines()]
        assert {row.pop("_id"): row for row in rows} == per_query

        # ir_measures takes nDCG, R and AP from trec_eval and RR@10 from MS MARCO's script: two rules for ties
        measures = [ir_measures.parse_measure(name) for name in means]
        read_qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels.trec")))
        read_run = list(ir_measures.read_trec_run(str(folder / "run.trec")))
        read = ir_measures.calc_aggregate(measures, read_qrels, read_run)
        assert {str(measure): value for measure, value in read.items()} == pytest.approx(means, abs=1e-12)

    def test_the_run_file(self, tmp_path):
        save_evaluation(tmp_path, {"q": {"a": 1.5, "b": 1 / 3, "c": 20.0}}, {"q": {"a": 1}}, MANIFEST)
        assert (tmp_path / "run.trec").read_text() == (
            "q Q0 c 1 20 coaug_trl\nq Q0 a 2 1.5 coaug_trl\nq Q0 b 3 0.333333343 coaug_trl\n"
        )
        assert (tmp_path / "qrels.trec").read_text() == "q 0 a 1\n"

    @pytest.mark.parametrize(
        "run, qrels",
        [
            ({"q": {"a b": 1.0}}, {"q": {"a": 1}}),
            ({"q": {"a": 1.0}}, {"q": {"a\n": 1}}),
            ({"q 1": {"a": 1.0}}, {"q": {"a": 1}}),
            ({}, {"q": {"": 1}}),
        ],
    )
    def test_ids_a_trec_file_cannot_hold(self, run, qrels, tmp_path):
        with pytest.raises(InputError, match="whitespace"):
            save_evaluation(tmp_path, run, qrels, MANIFEST)
        assert not list(tmp_path.iterdir())
