"""`coaug train --dry_run`: what it counts, what it refuses, and what it says of the memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.import_utils import is_vllm_available

from coaug_trl import CoAugConfig, PromptSet
from coaug_trl.data.document import document_text
from coaug_trl.training.dry_run import gpu_bytes, longest_prompt
from coaug_trl.training.memory import GIB


ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(beir_folder, tiny_model, tmp_path) -> dict:
    return {
        "model_name_or_path": str(tiny_model),
        "collection": str(beir_folder),
        "output_dir": str(tmp_path / "run"),
        "groups_per_batch": 4,
        "group_size": 6,
        "num_relevant": 2,
        "num_generations": 3,
        "updates_per_batch": 2,
        "per_device_train_batch_size": 6,
        "max_completion_length": 16,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dry_run": True,
    }


@pytest.fixture
def recipe(settings, tmp_path):
    """Writes the recipe with changes; an argument without a value is left out of it."""

    def recipe(**changes) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: v for name, v in {**settings, **changes}.items() if v is not ...}))
        return ["train", "--config", str(path)]

    return recipe


@pytest.fixture
def plan(coaug, recipe):
    """What a dry run prints."""

    def plan(**changes) -> str:
        code, printed, errors = coaug(*recipe(**changes))
        assert code == 0, errors
        return printed

    return plan


def gib(printed, name) -> float:
    return float(re.search(rf"^  {name} +([0-9.]+) GiB", printed, flags=re.MULTILINE)[1])


@pytest.fixture
def large(tiny_model, tmp_path) -> str:
    """The configuration of Qwen2.5-7B beside a small tokenizer, without weights."""
    folder = tmp_path / "large"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    AutoConfig.for_model(
        "qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return str(folder)


def test_tokens_and_steps(plan, tiny_model, collection):
    printed = plan(num_iterations=2)
    parameters = AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    assert f"{parameters:,} parameters, all trained" in printed
    # 72 completions in 2 updates; 8 queries in groups of 1, 4 at a time, each batch trained on twice
    assert "1 optimizer step on each of 1 processes = 6 × 6 completions" in printed
    assert "1 epoch = 2 generation batches = 8 optimizer steps" in printed
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [
        PromptSet.default("sparse").prompt(side, text, tokenizer)
        for side, texts in (
            ("query", [collection.queries[query_id] for query_id in collection.qrels]),
            ("document", [document_text(document) for document in collection.corpus.values()]),
        )
        for text in texts
    ]
    longest = max(
        len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]) for prompt in prompts
    )
    assert (
        f"36 completions, at most {36 * 16:,} tokens, and {36 * (longest + 16):,} with prompts ({longest:,} the"
        in (printed)
    )


@pytest.mark.parametrize("augment", ["query", "document"])
def test_prompts_are_those_of_the_sides_that_are_trained(augment, collection, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt_set = PromptSet("sparse", "query: " + "long " * 50, "document:")
    both = longest_prompt("both", collection, prompt_set, tokenizer)
    one = longest_prompt(augment, collection, prompt_set, tokenizer)
    assert (one == both) == (augment == "query")


def test_an_adapter_is_counted_by_peft(plan, large):
    printed = plan(model_name_or_path=large, use_peft=True, lora_r=8, lora_target_modules=["q_proj", "v_proj"])
    trained = 28 * 8 * (2 * 3584 + 3584 + 512)
    assert f"7,615,616,512 parameters, and {trained:,} of an adapter" in printed
    assert gib(printed, "optimizer") == pytest.approx(8 * trained / GIB, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "weights", "note"),
    [
        ({}, 28.37, "in 32 bits"),
        ({"dtype": "bfloat16", "learning_rate": 1e-5}, 14.19, "in 16 bits"),
        ({"dtype": "bfloat16", "use_peft": True, "load_in_4bit": True, "lora_r": 1}, 5.45, "parameters in 4 bits"),
        ({"dtype": "bfloat16", "use_peft": True, "load_in_8bit": True, "lora_r": 1}, 8.11, "parameters in 8 bits"),
    ],
)
def test_weights_as_they_are_loaded(plan, large, changes, weights, note):
    printed = plan(model_name_or_path=large, **{"lora_target_modules": "all-linear", **changes})
    assert gib(printed, "weights") == pytest.approx(weights, abs=0.02)
    assert note in printed


def test_memory_that_suffices_and_memory_that_does_not(plan, large):
    changes = {"model_name_or_path": large, "dtype": "float32", "max_completion_length": 256}
    least = int(re.search(r"smallest GPU it fits on: (\d+) GiB", plan(**changes))[1])
    assert "--gpu_memory_gib N" in plan(**changes)
    enough, too_little = (plan(**changes, gpu_memory_gib=size) for size in (least, least - 1))
    assert f"fits on a GPU of {least} GiB" in enough and "What needs less" not in enough
    assert f"does not fit on a GPU of {least - 1} GiB" in too_little
    printed = plan(**changes, gpu_memory_gib=24)
    for change in ("per_device_train_batch_size", "gradient_checkpointing: true", "use_peft: true", "fsdp2.yaml"):
        assert re.search(rf"^  .*{change}", printed, flags=re.MULTILINE), change


def test_the_engine_is_a_share_of_the_gpu(plan, large):
    changes = {"model_name_or_path": large, "use_peft": True, "dtype": "bfloat16", "use_vllm": True}
    lora = {"lora_target_modules": "all-linear"}
    printed = plan(**changes, **lora, vllm_gpu_memory_utilization=0.25, gpu_memory_gib=80)
    assert gib(printed, "vLLM") == 20 and "fits on a GPU of 80 GiB" in printed
    printed = plan(**changes, **lora, vllm_gpu_memory_utilization=0.1, gpu_memory_gib=80)
    assert "does not fit" in printed
    assert re.search(r"vLLM .*10% of|vLLM .*; needs [0-9.]+ GiB for weights", printed)
    assert "on other GPUs" in plan(**changes, **lora, vllm_mode="server")
    assert "fits on: none, vLLM gets all of it or nothing" in plan(**changes, **lora, vllm_gpu_memory_utilization=1.0)


def test_a_gpu_that_is_named_comes_before_the_one_there_is(monkeypatch):
    assert gpu_bytes(1.5) == 3 * GIB // 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_bytes(None) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "bfloat16", "learning_rate": 1e-6}, "learning_rate is 1e-06.*dtype: float32"),
        (
            {"dtype": "bfloat16", "learning_rate": 1e-6, "use_peft": True, "load_in_4bit": True},
            "learning_rate is 1e-06",
        ),
        ({"use_peft": True, "lora_target_modules": ["no_such"]}, "lora_target_modules do not fit .*no_such"),
        ({"gpu_memory_gib": 0}, "gpu_memory_gib is 0"),
        ({"gpu_memory_gib": float("inf")}, "gpu_memory_gib is inf"),
        ({"gpu_memory_gib": float("nan")}, "gpu_memory_gib is nan"),
        ({"attn_implementation": "flash_atention_2"}, "attn_implementation is 'flash_atention_2'; use one of .*sdpa"),
        ({"use_vllm": True, "vllm_mode": "servr"}, "vllm_mode is 'servr'; use one of server, colocate"),
        ({"use_vllm": True, "use_peft": True, "load_in_4bit": True}, "use_vllm is True with a quantized model"),
        ({"use_vllm": True, "use_peft": True, "load_in_8bit": True}, "use_vllm is True with a quantized model"),
        ({"max_completion_length": 0}, "max_completion_length is 0; use at least 1"),
        ({"gpu_memory_gib": ["much"]}, "wrong kind"),
    ],
)
def test_what_a_dry_run_refuses(refused, recipe, changes, expected):
    assert re.search(expected, refused(*recipe(**changes)))


def test_a_prompt_that_the_engine_has_no_room_for_is_refused(refused, recipe, plan):
    error = refused(*recipe(use_vllm=True, vllm_max_model_length=12))
    needed = int(re.search(r"vllm_max_model_length is 12, .* 16; use at least (\d+)\.", error)[1])
    assert f"use at least {needed}" in refused(*recipe(use_vllm=True, vllm_max_model_length=needed - 1))
    assert "peak: " in plan(use_vllm=True, vllm_max_model_length=needed)
    assert "peak: " in plan(use_vllm=True, vllm_mode="server", vllm_max_model_length=12)  # the server's own matters


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2", "kernels-community/flash-attn"])
def test_a_plan_for_another_machine_may_name_attention_that_is_not_installed(plan, attention):
    assert "peak: " in plan(attn_implementation=attention)


@pytest.mark.skipif(is_vllm_available(), reason="vllm is installed")
def test_a_package_that_is_missing_is_named(refused, recipe):
    error = refused(*recipe(dry_run=False, use_vllm=True))
    assert "A package that the settings need is missing" in error and "vLLM" in error


def test_updates_of_bfloat16_weights_do_not_vanish_under_deepspeed(coaug, recipe, monkeypatch):
    """ZeRO trains float32 copies, and its sharded head cannot be penalised: as the trainer has it."""
    plugin = SimpleNamespace(zero_stage=3)
    monkeypatch.setattr(CoAugConfig, "__post_init__", with_plugin(CoAugConfig.__post_init__, plugin))
    code, printed, errors = coaug(*recipe(dtype="bfloat16", learning_rate=1e-6))
    assert code == 0, errors
    assert "under zero3" in printed
    code, _, errors = coaug(*recipe(penalize_log_probs=True))
    assert code == 2 and "penalize_log_probs is True under ZeRO-3" in errors


def with_plugin(post_init, plugin):
    """What `accelerate launch` makes of a configuration with `distributed_type: DEEPSPEED`."""

    def wrapped(self, *given):
        post_init(self, *given)
        self.deepspeed_plugin = plugin

    return wrapped


def test_an_adapter_on_bfloat16_weights_is_float32_and_trains_at_any_rate(plan):
    assert "of an adapter" in plan(
        dtype="bfloat16", learning_rate=1e-6, use_peft=True, lora_target_modules="all-linear"
    )


def test_auto_is_the_type_the_configuration_names(refused, recipe, plan, large):
    changes = {"model_name_or_path": large, "dtype": "auto", "learning_rate": 1e-6}
    path = Path(large) / "config.json"
    for dtype, gibibytes in (("float32", 28.37), ("bfloat16", None)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))
        if gibibytes:
            assert gib(plan(**changes), "weights") == pytest.approx(gibibytes, abs=0.02)
        else:
            assert "learning_rate is 1e-06" in refused(*recipe(**changes))


def test_a_model_without_a_configuration_is_refused(refused, recipe, tiny_model, tmp_path):
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "tokenizer")
    assert "no configuration of a causal language model" in refused(
        *recipe(model_name_or_path=str(tmp_path / "tokenizer"))
    )
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "no configuration of a causal language model" in refused(
        *recipe(model_name_or_path=str(tmp_path / "tokenizer"))
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [pytest.param("ddp", "do not share weights", marks=pytest.mark.slow), ("fsdp2", "under fsdp2")],
)
def test_the_launcher_is_counted(name, expected, recipe, large, tmp_path):
    config = yaml.safe_load((ROOT / f"recipes/accelerate_configs/{name}.yaml").read_text())
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**config, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, ROOT / "scripts/train.py"]
    process = subprocess.run(
        [*command, *recipe(model_name_or_path=large)[1:]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stdout.count("memory, estimated, for each of 2 processes") == 1
    assert expected in process.stdout
    assert gib(process.stdout, "weights") == pytest.approx(28.37 / (2 if name == "fsdp2" else 1), abs=0.02)
    assert "1 optimizer step on each of 2 processes = 3 × 6 completions" in process.stdout
