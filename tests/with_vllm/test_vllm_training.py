"""
Training with the real vLLM engine: what it generates with are the weights that were trained.

Run by `make test-vllm` in an environment with vLLM for CPU; elsewhere these tests are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("vllm")

from conftest import make_tiny_model, teach_answers  # noqa: E402

from coaug_trl.data.document import document_text  # noqa: E402


WORKER = Path(__file__).parent / "colocate_worker.py"
CPU_2 = Path(__file__).parents[2] / "recipes/accelerate_configs/cpu-2.yaml"
TOLERANCE = 0.005
SETTINGS = dict(
    groups_per_batch=4,
    group_size=8,
    num_relevant=3,
    num_generations=4,
    updates_per_batch=1,
    per_device_train_batch_size=16,
    max_completion_length=16,
    temperature=1.0,
    repetition_penalty=1.0,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    max_steps=2,
    eval_strategy="no",
    save_strategy="no",
    logging_steps=1,
    report_to="none",
    disable_tqdm=True,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory, collection):
    """Models with heads of the smallest size that vLLM's CPU attention has: tied embeddings, and untied."""
    import torch
    from transformers import AutoModelForCausalLM

    texts = [document_text(document) for document in collection.corpus.values()] + list(collection.queries.values())
    tied = make_tiny_model(tmp_path_factory.mktemp("models") / "tied", texts * 3, hidden_size=64)
    teach_answers(tied, texts)
    untied = tmp_path_factory.mktemp("models") / "untied"
    model = AutoModelForCausalLM.from_pretrained(tied)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(untied)
    for path in tied.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            (untied / path.name).write_bytes(path.read_bytes())
    return {"tied": tied, "untied": untied}


@pytest.fixture
def train(models, beir_folder, tmp_path):
    """Trains in new processes, since an engine takes the one it is in; returns what each process wrote down."""

    def run(model="tied", processes=1, lora=False, stale=False, dtype="float32", **settings):
        given = {
            "model": str(models[model]),
            "collection": str(beir_folder),
            "lora": lora,
            "stale": stale,
            "dtype": dtype,
            "settings": SETTINGS | settings,
        }
        (tmp_path / "input.json").write_text(json.dumps(given))
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "accelerate.commands.launch", "--config_file", str(CPU_2), "--main_process_port", "0"]
        command = [*launch, str(WORKER), str(tmp_path / "input.json"), str(tmp_path)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_CI_ENV": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        results = [tmp_path / f"result_{rank}.json" for rank in range(processes)]
        assert all(path.is_file() for path in results), done.stdout[-3000:] + done.stderr[-6000:]
        results = [json.loads(path.read_text()) for path in results]
        assert all(result["change"] > 1e-3 for result in results)  # or there would be nothing to send
        return results

    return run


@pytest.mark.parametrize(
    ("model", "processes", "lora"), [("tied", 1, False), ("untied", 1, False), ("tied", 1, True), ("tied", 2, False)]
)
def test_after_a_sync_the_engine_has_the_trained_weights(train, model, processes, lora):
    for result in train(model, processes, lora):
        assert result["error"] < TOLERANCE


def test_in_bfloat16_the_difference_is_that_of_rounding(train):
    (result,) = train(dtype="auto")
    assert 0 < result["error"] < TOLERANCE + result["rounding"]


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_stale_weights_would_be_seen(train, model):
    """Without the syncs after the first, the same comparison shows the two steps."""
    (result,) = train(model, stale=True)
    assert result["error"] > 10 * TOLERANCE


def test_with_penalized_log_probs_the_ratio_is_one_and_the_correction_may_stay_on(train):
    (result,) = train(
        temperature=1.2, repetition_penalty=1.2, penalize_log_probs=True, vllm_importance_sampling_correction=True
    )
    for entry in result["log"]:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-2)
        assert entry["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-2)
        assert entry["sampling/sequence_ratio"] == pytest.approx(1, abs=1e-2)


def test_dev_evaluation_is_greedy_with_the_engine(train):
    (first,), (second,) = train(eval_strategy="steps", eval_steps=2), train(eval_strategy="steps", eval_steps=2)
    assert 0 < first["eval"]["eval_nDCG@10"] <= 1
    assert first["eval"]["eval_nDCG@10"] == second["eval"]["eval_nDCG@10"]
