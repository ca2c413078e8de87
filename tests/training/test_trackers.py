"""Trackers: each text type has its curves, at the right steps, in TensorBoard and in Trackio, without a network."""

import json
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coaug_trl import CoAugConfig
from coaug_trl.data.groups import TEXT_TYPES


MEASURES = ("reward", "advantage_std", "zero_spread_share", "answer_rate", "answer_words", "distinct_words")
CURVES = [f"{text_type}/{measure}" for text_type in TEXT_TYPES for measure in MEASURES]


@pytest.fixture
def options(beir_folder, tiny_model, tmp_path) -> list[str]:
    """Of a training of two steps that is evaluated after the second."""
    settings = {
        "model_name_or_path": tiny_model,
        "collection": beir_folder,
        "output_dir": tmp_path / "mine",
        "groups_per_batch": 4,
        "group_size": 6,
        "num_relevant": 2,
        "num_generations": 3,
        "updates_per_batch": 1,
        "per_device_train_batch_size": 12,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "log_completions": "true",
        "num_completions_to_print": 0,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "bf16": "false",
        "use_cpu": "true",
    }
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def logged(folder, name: str) -> dict[int, float]:
    """What the trainer logged, by optimizer step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def test_tensorboard_has_the_curves_of_each_text_type(coaug, options, tmp_path):
    code, _, errors = coaug("train", *options, "--report_to", "tensorboard")
    assert code == 0, errors
    (folder,) = (tmp_path / "mine/runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in CURVES:
        curve = {scalar.step: scalar.value for scalar in events.Scalars(f"train/{name}")}
        assert curve.keys() == {1, 2}, name
        assert curve == pytest.approx(logged(tmp_path / "mine", name), rel=1e-5), name
    # after the second step, and again when the training has ended
    assert [scalar.step for scalar in events.Scalars("eval/nDCG@10")] == [2, 2]


READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("coaug")
print(json.dumps({run: SQLiteStorage.get_logs("coaug", run) for run in runs}))
"""


def test_trackio_has_the_curves_of_each_text_type(options, tmp_path):
    """In a process of its own, since Trackio's folder is set when it is imported; nobody is logged in there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRACKIO_"))}
    environment = kept | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    def run(*command) -> str:
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("-m", "coaug_trl.cli.main", "train", "--json", *options, "--report_to", "trackio")
    assert json.loads(printed)["folder"] == str(tmp_path / "mine")  # Trackio's own words are not among the results
    runs = json.loads(run("-c", READ))
    assert list(runs) == ["mine"]
    for name in CURVES:
        rows = [row for row in runs["mine"] if f"train/{name}" in row]
        curve = {row["train/global_step"]: row[f"train/{name}"] for row in rows}
        assert curve.keys() == {1, 2}, name
        assert curve == pytest.approx(logged(tmp_path / "mine", name)), name
    evaluated = [row["eval/nDCG@10"] for row in runs["mine"] if "eval/nDCG@10" in row]
    result = json.loads((tmp_path / "mine/eval_results.json").read_text())
    assert evaluated == [result["eval_nDCG@10"]]


def test_what_is_reported_is_named_and_stays_here(tmp_path):
    settings = {"bf16": False, "use_cpu": True, "report_to": "none"}
    args = CoAugConfig(str(tmp_path / "runs/mine"), **settings)
    assert (args.project, args.run_name, args.trackio_space_id) == ("coaug", "mine", None)
    # None would make a public Space when the model is pushed
    assert args.trackio_static_space_id is False
    assert CoAugConfig(str(tmp_path), run_name="other", **settings).run_name == "other"


def test_a_tracker_that_is_not_there_is_refused_before_the_work(refused, options, monkeypatch, tmp_path):
    assert "'trakio'" in refused("train", *options, "--report_to", "trakio")
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    for dry_run in ([], ["--dry_run", "true"]):
        line = refused("train", *options, "--report_to", "trackio", *dry_run)
        assert "pip install trackio" in line and "report_to to none" in line
    assert not (tmp_path / "mine").exists()
