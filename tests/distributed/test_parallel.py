"""DDP and FSDP2 on two CPU processes (gloo), whole models and adapters, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import DEFAULTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from coaug_trl import Augmenter
from coaug_trl.data.document import document_text
from coaug_trl.policy.settings import PolicySettings


FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
CONFIGS = ROOT / "recipes/accelerate_configs"
TIME_LIMIT = 300
SETTINGS = {**DEFAULTS, "per_device_train_batch_size": 6, "log_completions": False, "learning_rate": 2e-3}
SETTINGS |= {"repetition_penalty": 1.2, "penalize_log_probs": True}
WORDS = "statin heart attack wheat bread pain salty snacks sweet cause adult espresso".split()


@pytest.fixture(scope="module")
def given(beir_folder, tiny_model):
    return {"collection": str(beir_folder), "model": str(tiny_model), "settings": SETTINGS, "words": WORDS}


def accelerate_config(name: str, folder: Path) -> Path:
    """The configuration for eight GPUs, for two processes on the CPU."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}))
    return path


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, given, tmp_path_factory):
    """Name, folder and results of both processes."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "given.json").write_text(json.dumps(given))
    launch = ["accelerate.commands.launch", "--config_file", accelerate_config(request.param, folder)]
    process = subprocess.run(
        [sys.executable, "-m", *launch, FOLDER / "parallel_worker.py", folder / "given.json", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,  # processes that wait for each other do so forever
    )
    assert process.returncode == 0, process.stderr[-15000:]
    results = [json.loads((folder / f"results_{process}.json").read_text()) for process in (0, 1)]
    return request.param, folder, results


@pytest.fixture(scope="module")
def one(given, tmp_path_factory):
    """The same training on one process."""
    import parallel_worker

    folder = tmp_path_factory.mktemp("one")
    return {name: parallel_worker.train_as_given(given, folder, name) for name in ("full", "adapter")}, folder


@pytest.fixture(scope="module")
def untrained(tiny_model):
    return dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())


def test_weights_are_divided_or_not(two):
    name, _, results = two
    for process in results:
        for kind in ("full", "adapter"):
            assert process[kind]["distributed_type"].endswith("FSDP" if name == "fsdp2" else "MULTI_CPU")
            share = process[kind]["local_bytes"] / process[kind]["all_bytes"]
            assert share == pytest.approx(0.5 if name == "fsdp2" else 1.0, abs=0.01)
            # AdamW's two moments of what is trained, divided as the weights are.
            trained = 2 * process[kind]["trained_bytes"] if kind == "adapter" else 0
            assert process[kind]["optimizer_bytes"] == pytest.approx(trained * share, rel=0.01)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_groups_and_rewards_are_those_of_one_process(two, one, kind):
    _, _, results = two
    batches = zip(*(process[kind]["groups"] for process in results), strict=True)
    assert [first + second for first, second in batches] == one[0][kind].groups
    for process in results:
        assert len(process[kind]["rewards"]) == len(one[0][kind].rewards) > 0
        for found, expected in zip(process[kind]["rewards"], one[0][kind].rewards, strict=True):
            assert found == pytest.approx(expected, abs=1e-6)
            assert max(expected) - min(expected) > 0.02


def test_a_step_is_that_of_one_process_and_changes_every_parameter(two, one, untrained):
    _, folder, _ = two
    alone = dict(one[0]["full"].model.named_parameters())
    final = load_file(folder / "full" / "final.safetensors")
    assert final.keys() == untrained.keys() == alone.keys()
    for key, weight in final.items():
        assert not torch.equal(weight, untrained[key]), key
        step = (alone[key] - untrained[key]).abs().max()
        # No float32 weight can come nearer than the spacing of such numbers: keys' biases hardly move, since they
        # shift all attention scores of a query alike.
        spacing = torch.finfo(torch.float32).eps * weight.abs().max()
        assert (weight - alone[key]).abs().max() < 1e-3 * step + spacing, key


def test_the_saved_model_loads_and_is_the_trained_one(two):
    _, folder, _ = two
    final = load_file(folder / "full" / "final.safetensors")
    saved = dict(AutoModelForCausalLM.from_pretrained(folder / "full").named_parameters())
    assert all(torch.equal(saved[key], final[key]) for key in final)
    assert PolicySettings.load(folder / "full").generation.max_new_tokens == SETTINGS["max_completion_length"]


def test_an_adapter_alone_changes(two, untrained):
    _, folder, results = two
    final = load_file(folder / "adapter" / "final.safetensors")
    trained = results[0]["adapter"]["trained"]
    assert trained and all("lora_" in key for key in trained)
    for key, weight in final.items():
        if "lora_" not in key:
            name = key.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, untrained[name]), key  # to the last bit
        elif "lora_B" in key:
            assert weight.any(), key  # a fresh one is zero
    assert len(final) == len(untrained) + len(trained)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    for key, weight in saved.items():
        assert torch.equal(weight, final[key.replace(".weight", ".default.weight")]), key


def test_first_matrices_of_the_adapter_change_too(two, one):
    """They start from random numbers, which are the same with one process: after its three steps all are others."""
    _, folder, _ = two
    final = load_file(folder / "adapter" / "final.safetensors")
    alone = dict(one[0]["adapter"].model.named_parameters())
    start = load_file(one[1] / "adapter" / "start.safetensors")
    first = [key for key in final if "lora_A" in key]
    assert first
    for key in first:
        assert not torch.equal(final[key], start[key]) and not torch.equal(alone[key], start[key]), key
        assert (final[key] - start[key]).abs().max() < 0.1, key


def test_a_run_taken_up_within_a_generation_batch_ends_with_the_same_weights(two):
    for process in two[2]:
        assert process["resumed"] == {"same weights": True, "batches": [1, 0]}


def test_merged_and_unmerged_adapters_augment_identically(two, given, collection, tmp_path):
    _, folder, _ = two
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given["model"]), folder / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder / "adapter").save_pretrained(tmp_path)
    PolicySettings.load(folder / "adapter").save(tmp_path)
    texts = {
        "query": list(collection.queries.values()),
        "document": [document_text(document) for document in collection.corpus.values()],
    }
    settings = PolicySettings.load(tmp_path)
    answers = []
    for policy, own in ((folder / "adapter", {}), (tmp_path, {}), (given["model"], vars(settings))):
        augmenter = Augmenter.from_pretrained(
            str(policy), **{name: own[name] for name in ("prompt_set", "generation") if name in own}
        )
        answers.append({side: augmenter.generate(side, texts[side]) for side in texts})
    unmerged, merged, base = answers
    assert unmerged == merged
    assert any(augmentation.answer for augmentation in merged["document"])
    assert merged != base  # or the adapter would have been left out of both
