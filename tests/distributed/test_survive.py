"""What two processes survive together, whichever of them it happens to."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_trainer import DEFAULTS, PROMPT_SET, assert_equal_weights, saved_weights

from coaug_trl.training.checkpoints import last_whole_checkpoint


FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
TIME_LIMIT = 240
SETTINGS = {
    **DEFAULTS,
    "updates_per_batch": 3,
    "per_device_train_batch_size": 6,
    "log_completions": False,
    "learning_rate": 2e-3,
}
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", str(ROOT / "recipes/accelerate_configs/cpu-2.yaml")),
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{FOLDER}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def output_dir(beir_folder, tiny_model, tmp_path_factory):
    """Where both processes left what happened to them."""
    folder = tmp_path_factory.mktemp("survive")
    given = {"collection": str(beir_folder), "model": str(tiny_model), "settings": SETTINGS}
    (folder / "given.json").write_text(json.dumps(given))
    process = subprocess.run(
        [*LAUNCH, FOLDER / "survive_worker.py", folder / "given.json", folder],
        env=ENVIRONMENT,
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


def test_a_signal_to_one_process_stops_both_after_the_same_step(two, output_dir):
    for results in two:
        assert (results["signal"]["kind"], results["signal"]["message"]) == ("SystemExit", "143")
        assert results["signal"]["step"] == 2  # the second of three on a generation batch
        assert results["resumed"] == {"step": 4, "equal": True}
    assert last_whole_checkpoint(output_dir / "signal") == str(output_dir / "signal" / "checkpoint-2")


def test_nan_on_one_process_stops_both(two, output_dir):
    path = output_dir / "nan" / "not_finite_step_2_process_1.jsonl"
    assert [results["nan"]["kind"] for results in two] == ["TrainingStopped", "TrainingStopped"]
    assert two[0]["nan"]["message"] == two[1]["nan"]["message"]
    assert str(path) in two[0]["nan"]["message"] and path.is_file()
    assert str(output_dir / "nan" / "checkpoint-1") in two[0]["nan"]["message"]
    assert not path.with_name("not_finite_step_2_process_0.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"process 1: ZeroDivisionError: the second process alone (reward function reward_fails, step 1, "),
        ("short", r"process 1: ValueError: 35 rewards for 36 completions (reward function reward_is_short, step 1, "),
        ("retriever", r"process 1: ZeroDivisionError: the second process alone (joint_ndcg, step 1, "),
    ],
)
def test_a_reward_that_fails_on_one_process_stops_both_and_names_its_batch(two, name, message):
    for results in two:
        assert results[name]["kind"] == "RuntimeError"
        assert results[name]["message"].startswith(message + "groups 2 to 3, first texts train-")
    assert abs(two[0][name]["at"] - two[1][name]["at"]) < 10


def test_an_asynchronous_reward_is_refused_on_both(two):
    for results in two:
        assert results["asynchronous"].startswith("The reward function reward_later is asynchronous: with several ")


# The command, under the launcher


@pytest.fixture
def command(beir_folder, tiny_model, tmp_path):
    def command(output_dir, **changes) -> list[str]:
        PROMPT_SET.save(tmp_path)
        settings = {
            "model_name_or_path": str(tiny_model),
            "collection": str(beir_folder),
            "output_dir": str(output_dir),
            "prompt_set": str(tmp_path / "prompt_set.yaml"),
            **{key: value for key, value in SETTINGS.items() if key != "num_completions_to_print"},
            "save_strategy": "steps",
            "save_steps": 1,
            **changes,
        }
        path = tmp_path / f"{output_dir.name}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return [*LAUNCH, str(ROOT / "scripts/train.py"), "--config", str(path)]

    return command


def start(arguments) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-5000:]
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_saves_and_says_how_to_go_on(command, tmp_path, number):
    run = tmp_path / "run"
    process = start(command(run, max_steps=1000, save_total_limit=2))
    wait_for(run / "checkpoint-2" / "trainer_state.json", process)
    if number == signal.SIGINT:  # as a terminal sends it
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode != 0
    assert "saving when this step has ended, if all processes are still there" in errors
    checkpoint = last_whole_checkpoint(run)
    (line,) = [line for line in errors.splitlines() if "the same command goes on from" in line]
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    step = checkpoint.split("-")[-1]
    assert line.endswith(f"Stopped by {name} after step {step}: the same command goes on from {checkpoint}.")
    assert not (run / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_killed_at_random_end_with_the_same_weights(command, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = start(command(whole, max_steps=7))
    assert process.communicate(timeout=TIME_LIMIT) and process.returncode == 0
    for step in (1, 3, 5):
        process = start(command(run, max_steps=7))
        wait_for(run / f"checkpoint-{step}", process)
        time.sleep(random.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(command(run, max_steps=7))
    assert process.communicate(timeout=TIME_LIMIT) and process.returncode == 0
    assert_equal_weights(saved_weights(run), saved_weights(whole))
