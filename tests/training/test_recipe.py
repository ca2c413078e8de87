"""`coaug train` from recipe to saved policy: settings, errors, interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from coaug_trl import PromptSet
from coaug_trl.cli.main import main
from coaug_trl.policy.settings import PolicySettings


ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(beir_folder, tiny_model, tmp_path) -> dict:
    return {
        "model_name_or_path": str(tiny_model),
        "collection": str(beir_folder),
        "output_dir": str(tmp_path / "run"),
        "groups_per_batch": 4,
        "group_size": 6,
        "num_relevant": 2,
        "num_generations": 3,
        "updates_per_batch": 2,
        "per_device_train_batch_size": 12,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": "2e-3",
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
    }


@pytest.fixture
def train(recipe, tmp_path):
    """Runs `coaug train` on the recipe with changes; an argument without a value is left out of it."""

    def train(*arguments, **changes) -> int:
        settings = {name: value for name, value in {**recipe, **changes}.items() if value is not ...}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return exit_code(["train", "--config", str(path), *map(str, arguments)])

    return train


def exit_code(arguments) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse's own way out
        return stop.code


def saved(folder) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Training


def test_a_recipe_trains_and_saves_a_policy(train, recipe, tiny_model, tmp_path, caplog):
    assert train("--max_steps", 2, eval_strategy="steps", eval_steps=2) == 0
    run = tmp_path / "run"
    assert PolicySettings.load(run).generation.max_new_tokens == 8
    assert not equal(saved(run), saved(tiny_model))
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    metrics = yaml.safe_load((run / "eval_results.json").read_text())
    assert 0 <= metrics["eval_nDCG@10"] <= 1
    assert (run / "train_results.json").is_file() and (run / "trainer_state.json").is_file()
    assert "1 generation batch = 4 groups × 6 texts × 3 rollouts = 72 completions, 2 optimizer steps" in caplog.text


def test_completions_go_to_files_and_not_between_what_is_printed(train, tmp_path, capsys):
    logged = {"log_completions": True, "num_completions_to_print": 0, "save_strategy": "no", "max_steps": 2}
    assert train(**logged, eval_strategy="steps", eval_steps=2) == 0
    printed = capsys.readouterr().out
    assert "Step 2" not in printed and "step 2: eval_nDCG@10 = " in printed
    assert len(list((tmp_path / "run" / "completions").glob("*.parquet"))) == 2
    logged |= {"output_dir": str(tmp_path / "other"), "num_completions_to_print": 2}
    assert train("--json", **logged) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["folder"] == str(tmp_path / "other")
    assert "Step 2" in printed.err


def test_an_adapter_is_not_a_model_to_begin_from(train, tmp_path, capsys):
    assert train(use_peft=True, max_steps=1, save_strategy="no") == 0
    capsys.readouterr()
    assert_one_error(
        train(model_name_or_path=str(tmp_path / "run")), capsys.readouterr().err, "is an adapter.*merge it"
    )


def test_the_nfcorpus_recipe_trains_with_a_small_model(beir_folder, tiny_model, tmp_path):
    """On the command line: model, collection, sizes, and what needs a GPU."""
    overrides = {
        "model_name_or_path": tiny_model,
        "collection": beir_folder,
        "output_dir": tmp_path / "run",
        "groups_per_batch": 4,
        "group_size": 6,
        "num_relevant": 2,
        "num_generations": 3,
        "updates_per_batch": 2,
        "per_device_train_batch_size": 6,
        "max_completion_length": 8,
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "dtype": "float32",
        "use_vllm": "false",
        "use_peft": "false",
        "bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
    }
    arguments = [str(part) for name, value in overrides.items() for part in (f"--{name}", value)]
    path = ROOT / "recipes/nfcorpus/qwen2.5-7b-bm25.yaml"
    assert exit_code(["train", "--config", str(path), *arguments]) == 0
    settings = PolicySettings.load(tmp_path / "run")
    assert settings.retriever["fields"] == yaml.safe_load(path.read_text())["fields"]
    assert not equal(saved(tmp_path / "run"), saved(tiny_model))
    assert len(list((tmp_path / "run" / "completions").glob("*.parquet"))) == 2


# The plan


def test_a_dry_run_prints_the_plan_and_builds_no_model(train, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("coaug_trl.training.recipe.CoAugTrainer", None)
    assert train("--dry_run", "true", num_iterations=2) == 0
    printed = capsys.readouterr().out
    assert "1 generation batch = 4 groups × 6 texts × 3 rollouts = 72 completions, 2 optimizer steps" in printed
    assert "1 epoch = 2 generation batches = 8 optimizer steps" in printed
    assert "3 × 12 completions" in printed
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(train, tmp_path, capsys):
    assert train("--dry_run", "true", candidate_pool="corpus") == 0
    assert "every query competes with 40 documents; texts outside the batch: the collection" in capsys.readouterr().out
    PromptSet.default("dense").save(tmp_path)
    for changes, message in (
        ({"prompt_set": str(tmp_path / "prompt_set.yaml")}, "The prompt set is for dense retrievers"),
        ({"candidate_pool": "corpus", "augmentations": str(tmp_path / "none")}, "no augmentations there"),
    ):
        assert train("--dry_run", "true", **changes) == 2
        assert message in capsys.readouterr().err


# Errors


WRONG_SETTINGS = {
    "misspelt field": ({"group_siez": 6}, "no field 'group_siez'; did you mean group_size?"),
    "word for a number": ({"group_size": "many"}, "--group_size.*invalid int value: 'many'"),
    "list for a number": ({"group_size": [6]}, "value of the wrong kind"),
    "nothing for a number": ({"group_size": None}, "value of the wrong kind"),
    "impossible value": ({"updates_per_batch": 5}, "updates_per_batch is 5.*use 4 or 6"),
    "unknown choice": ({"augment": "queries"}, "augment is 'queries'; use one of both, query, document"),
    "unknown retriever": ({"retriever": "splade"}, "retriever is 'splade'"),
    "unknown fields": ({"fields": "titles"}, "titles"),
    "missing model": ({"model_name_or_path": "/no/such/model"}, "/no/such/model"),
    "no model": ({"model_name_or_path": ...}, "model_name_or_path is missing"),
    "missing collection": ({"collection": "/no/such/collection"}, "/no/such/collection does not exist"),
    "no collection": ({"collection": ...}, "collection"),
    "test split to evaluate": ({"eval_strategy": "steps", "eval_split": "test"}, "test split"),
    "test split to train": ({"train_split": "test"}, "test split"),
    "missing split": ({"train_split": "training"}, "no split 'training'"),
    "missing prompt set": ({"prompt_set": "/no/such.yaml"}, "/no/such.yaml"),
    "prompt set of another kind": (
        {"prompt_set": str(ROOT / "coaug_trl/policy/prompt_sets/dense.yaml")},
        "prompt set is for dense retrievers",
    ),
    "missing checkpoint": ({"resume_from_checkpoint": "/no/such/checkpoint"}, "/no/such/checkpoint"),
    "group larger than corpus": ({"group_size": 99, "per_device_train_batch_size": 1}, "corpus has 40"),
    "learning on nothing": ({"dtype": "bfloat16", "learning_rate": 1e-6}, "dtype: float32"),
}


def assert_one_error(code, printed, expected):
    lines = [line for line in printed.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in printed, printed
    assert re.search(expected, lines[0])
    assert len(printed) < 2000  # not argparse's list of all fields


@pytest.mark.parametrize(("changes", "expected"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_wrong_settings_end_in_one_error_line(train, capsys, changes, expected):
    assert_one_error(train(**changes), capsys.readouterr().err, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "/no/such/recipe.yaml"], "/no/such/recipe.yaml: there is no such recipe"),
        (["--config"], "--config names no recipe"),
        ([], "--collection"),
    ],
)
def test_a_missing_recipe_ends_in_one_error_line(capsys, arguments, expected):
    assert_one_error(exit_code(["train", *arguments]), capsys.readouterr().err, expected)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [1\nb: {"])
def test_a_recipe_that_is_no_yaml_mapping_ends_in_one_error_line(tmp_path, capsys, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert_one_error(exit_code(["train", "--config", str(path)]), capsys.readouterr().err, "")


def test_an_unknown_option_ends_in_one_error_line(train, capsys):
    assert_one_error(train("--group_siez", 6), capsys.readouterr().err, "--group_siez; did you mean --group_size?")
    assert_one_error(train("--group_siez=6"), capsys.readouterr().err, "--group_siez; did you mean --group_size?")


def test_errors_of_a_process_of_its_own_have_no_traceback(tmp_path):
    """What a shell sees, from the interpreter's start to its end."""
    command = [sys.executable, "-m", "coaug_trl.cli.main", "train", "--config", str(tmp_path / "missing.yaml")]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert_one_error(process.returncode, process.stderr, "missing.yaml")


# Interruption


def test_the_same_command_goes_on_from_the_last_whole_checkpoint(train, tmp_path, caplog):
    run = tmp_path / "run"
    assert train() == 0
    finished = saved(run)
    # as if the run had been stopped while it wrote checkpoint-4, having written checkpoint-3
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    (run / "model.safetensors").unlink()
    caplog.clear()
    assert train() == 0
    assert f"{run / 'checkpoint-4'} is incomplete and skipped" in caplog.text
    assert f"Resuming from {run / 'checkpoint-3'}" in caplog.text
    assert equal(saved(run), finished)
    assert (run / "checkpoint-4" / "trainer_state.json").is_file()


def test_a_new_output_folder_starts_afresh(train, tmp_path, caplog):
    assert train(max_steps=1) == 0
    assert "Resuming" not in caplog.text
    assert train(max_steps=1, output_dir=str(tmp_path / "other")) == 0
    assert "Resuming" not in caplog.text
    assert equal(saved(tmp_path / "run"), saved(tmp_path / "other"))


@pytest.mark.slow
def test_a_killed_run_taken_up_again_ends_with_the_same_weights(train, recipe, tmp_path):
    """A process that is killed at any moment, several times over, against one that is left alone."""
    steps = 12
    assert train(max_steps=steps, output_dir=str(tmp_path / "whole")) == 0
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump({**recipe, "max_steps": steps}), encoding="utf-8")
    command = [sys.executable, "-m", "coaug_trl.cli.main", "train", "--config", str(path)]
    run = tmp_path / "run"
    for step in (2, 5, 8):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (run / f"checkpoint-{step}").is_dir():
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (run / "model.safetensors").exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    assert equal(saved(run), saved(tmp_path / "whole"))
