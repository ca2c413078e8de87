"""What a run survives: kills, Ctrl-C, SIGTERM and full disks; and that it then goes on as if nothing had happened."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_trainer import DEFAULTS, PROMPT_SET, GivenDevAnswers, assert_equal_weights, saved_weights, weights
from transformers import TrainerCallback

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, InputError
from coaug_trl.cli.main import main
from coaug_trl.training.checkpoints import (
    FILES_FILE,
    STATE_FILE,
    check_checkpoint,
    last_whole_checkpoint,
    saving,
    why_incomplete,
)


ROOT = Path(__file__).parents[2]
# Three optimizer steps on a generation batch, six in an epoch, and statistics that follow the rollouts: much to lose
# between two saves.
SETTINGS = {
    **DEFAULTS,
    "log_completions": False,
    "updates_per_batch": 3,
    "learning_rate": 2e-3,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def build(tiny_model, collection):
    def build(output_dir, callbacks=(), eval_collection=None, trainer=CoAugTrainer, **changes):
        args = CoAugConfig(output_dir=str(output_dir), **{**SETTINGS, **changes})
        return trainer(
            str(tiny_model),
            args,
            collection,
            BM25Retriever(),
            PROMPT_SET,
            eval_collection=eval_collection,
            callbacks=list(callbacks),
        )

    return build


@pytest.fixture(scope="module")
def whole_run(build, tmp_path_factory):
    """A run that nothing disturbs."""
    trainer = build(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.fixture
def run_copy(whole_run, tmp_path):
    """A copy of its folder, to be damaged."""
    shutil.copytree(whole_run.args.output_dir, tmp_path / "copy")
    return tmp_path / "copy"


def logged(folder: Path) -> list[dict]:
    """What a checkpoint says was logged, without times."""
    times = ("step_time", "train_runtime", "num_tokens")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in row.items() if key not in times} for row in history]


def flat(state) -> list:
    """Tensors and other values of a nested state, in order."""
    if isinstance(state, dict):
        return [each for key in sorted(state, key=str) for each in flat(state[key])]
    if isinstance(state, list | tuple):
        return [each for value in state for each in flat(value)]
    return [torch.as_tensor(state) if isinstance(state, np.ndarray) else state]


def assert_equal_checkpoints(found: Path, expected: Path):
    """Weights, optimizer, scheduler, random numbers, buffered rollouts, statistics and what was logged."""
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [flat(torch.load(folder / name, weights_only=False)) for folder in (found, expected)]
        assert len(states[0]) == len(states[1]) > 0
        for one, other in zip(*states, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
    for path in expected.glob("*.safetensors"):
        assert_equal_weights(load_file(found / path.name), load_file(path))
    assert json.loads((found / STATE_FILE).read_text()) == json.loads((expected / STATE_FILE).read_text())
    assert logged(found) == logged(expected)


# Going on


def test_a_run_resumed_from_any_step_is_the_same_run(build, whole_run, tmp_path):
    expected = Path(whole_run.args.output_dir) / "checkpoint-8"
    assert json.loads((expected / STATE_FILE).read_text())["retriever_state"] != build(tmp_path).retriever.state()
    for step in range(1, 8):
        run = tmp_path / f"from-{step}"
        trainer = build(run)
        trainer.train(resume_from_checkpoint=str(expected.with_name(f"checkpoint-{step}")))
        assert_equal_checkpoints(run / "checkpoint-8", expected)
        assert_equal_weights(weights(trainer.model), weights(whole_run.model))


def test_a_finished_run_is_not_trained_on(build, whole_run, run_copy):
    trainer = build(run_copy)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert_equal_weights(weights(trainer.model), weights(whole_run.model))


# Whole checkpoints


def test_a_checkpoint_that_lacks_or_cuts_any_file_is_skipped_and_named(run_copy, caplog):
    newest, before = run_copy / "checkpoint-8", run_copy / "checkpoint-7"
    names = [path.name for path in newest.iterdir()]
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", STATE_FILE} <= set(names)
    assert (newest / "rollouts_0.safetensors").is_file()
    assert why_incomplete(newest) is None
    for name in set(names) - {FILES_FILE}:
        content = (newest / name).read_bytes()
        for damage in ("removed", "cut"):
            (newest / name).unlink() if damage == "removed" else (newest / name).write_bytes(content[:-1])
            caplog.clear()
            assert last_whole_checkpoint(run_copy) == str(before)
            assert f"{newest} is incomplete and skipped: " in caplog.text and name in caplog.text
            with pytest.raises(InputError, match=rf"{newest}, no whole checkpoint: .*{name}.* Use {before}"):
                check_checkpoint(newest)
            (newest / name).write_bytes(content)
    assert last_whole_checkpoint(run_copy) == str(newest)


def test_a_checkpoint_that_was_begun_is_not_whole(run_copy):
    newest = run_copy / "checkpoint-8"
    for content in ('{"files": null}', "", '{"fil'):
        (newest / FILES_FILE).write_text(content)
        assert why_incomplete(newest)
    shutil.rmtree(newest)
    newest.mkdir()
    assert why_incomplete(newest) == "it lacks trainer_state.json"
    assert last_whole_checkpoint(run_copy) == str(run_copy / "checkpoint-7")
    assert last_whole_checkpoint(run_copy, before=7) == str(run_copy / "checkpoint-6")


def test_checkpoints_of_older_runs_are_whole_if_they_have_their_state(run_copy):
    newest = run_copy / "checkpoint-8"
    (newest / FILES_FILE).unlink()
    assert why_incomplete(newest) is None
    (newest / "trainer_state.json").unlink()
    assert why_incomplete(newest) == "it lacks trainer_state.json"


def test_weights_alone_are_nothing_to_resume_from(build, tmp_path):
    build(tmp_path, max_steps=1, save_only_model=True).train()
    assert "save_only_model" in why_incomplete(tmp_path / "checkpoint-1")
    with pytest.raises(InputError, match="no whole checkpoint: it was saved with save_only_model"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_old_checkpoints_go_only_when_the_new_one_is_whole(build, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    trainer = build(tmp_path, save_total_limit=1, max_steps=2)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert trainer.args.save_total_limit == 1
    # all files are there, but it is not known yet
    monkeypatch.setattr("coaug_trl.training.checkpoints.finish_checkpoint", kill)
    with pytest.raises(Killed):
        build(tmp_path, save_total_limit=1, max_steps=3).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").is_file()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_the_best_checkpoint_is_that_of_the_best_evaluation(build, collection, tmp_path):
    trainer = build(
        tmp_path,
        trainer=GivenDevAnswers,
        eval_collection=collection.with_split("dev"),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        max_steps=3,
        learning_rate=2e-2,
    )
    trainer.train()
    measured = {row["step"]: row["eval_nDCG@10"] for row in trainer.state.log_history if "eval_nDCG@10" in row}
    assert len(set(measured.values())) > 1
    best = max(measured, key=measured.get)  # the first of equals
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert_equal_weights(weights(trainer.model), saved_weights(tmp_path / f"checkpoint-{best}"))


# Ctrl-C and SIGTERM


class SignalAt(TrainerCallback):
    """Sends this process signals while it works on a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)
            self.numbers = ()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(build, whole_run, tmp_path, caplog, number, code):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = build(tmp_path, [SignalAt(2, number)], save_strategy="no")
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    checkpoint = tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"Stopped by {name} after step 2: the same command goes on from {checkpoint}." in caplog.text
    resumed = build(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights(resumed.model), weights(whole_run.model))
    assert resumed.retriever.state() == whole_run.retriever.state()


def test_a_signal_saves_what_can_be_gone_on_from_though_only_weights_are_asked_for(build, tmp_path):
    with pytest.raises(SystemExit):
        build(tmp_path, [SignalAt(1, signal.SIGTERM)], save_only_model=True, save_steps=100).train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_second_ctrl_c_interrupts_at_once(build, tmp_path, capfd):
    trainer = build(tmp_path, [SignalAt(2, signal.SIGINT, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert "Ctrl-C: saving when this step has ended; once more to stop at once" in capfd.readouterr().err


def test_signals_that_are_ignored_stay_so(build, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = build(tmp_path, [SignalAt(1, signal.SIGINT)], max_steps=2)
        trainer.train()
        assert trainer.state.global_step == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_a_thread_leaves_signals_alone(build, tmp_path):
    trainer = build(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


# The command


@pytest.fixture
def command(beir_folder, tiny_model, tmp_path):
    """Arguments of `coaug train` for a run in a folder."""

    def command(output_dir, **changes) -> list[str]:
        settings = {
            "model_name_or_path": str(tiny_model),
            "collection": str(beir_folder),
            "output_dir": str(output_dir),
            "prompt_set": str(tmp_path / "prompt_set.yaml"),
            **{key: value for key, value in SETTINGS.items() if key != "num_completions_to_print"},
            **changes,
        }
        PROMPT_SET.save(tmp_path)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return ["train", "--config", str(path)]

    return command


def after(path: Path, act) -> threading.Thread:
    """Acts as soon as there is such a file."""

    def wait():
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def exit_code(arguments) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def whole(folder: Path) -> Path:
    """What is written when all the large files are there."""
    return folder / "trainer_state.json"


def test_an_interrupted_command_goes_on(command, tmp_path, caplog, capfd):
    run = tmp_path / "run"
    arguments = command(run, max_steps=60, save_steps=1, save_total_limit=2)
    after(whole(run / "checkpoint-1"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert exit_code(arguments) == 143
    checkpoint = last_whole_checkpoint(run)
    assert f"the same command goes on from {checkpoint}" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    assert not (run / "model.safetensors").exists()  # a run that is not over leaves no model that looks finished
    caplog.clear()
    after(run / f"checkpoint-{int(checkpoint.split('-')[-1]) + 1}", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert exit_code(arguments) == 130
    assert f"Resuming from {checkpoint}" in caplog.text
    assert last_whole_checkpoint(run) != checkpoint


@pytest.mark.parametrize("limit", [60_000, 250_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_previous_checkpoint(command, tmp_path, limit, capfd, whole_run):
    """The largest file that may be written is as much as there is room for."""
    run = tmp_path / "run"
    arguments = command(run)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = after(whole(run / "checkpoint-1"), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1])))
    try:
        code = exit_code(arguments)
    finally:
        fill.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_one_clear_error(code, capfd.readouterr().err, run)
    assert exit_code(arguments) == 0
    assert_equal_weights(saved_weights(run), weights(whole_run.model))


def assert_one_clear_error(code: int, printed: str, run: Path):
    checkpoint = last_whole_checkpoint(run)
    failed = run / f"checkpoint-{int(checkpoint.split('-')[-1]) + 1}"
    errors = [line for line in printed.splitlines() if "error:" in line]
    assert code == 2 and len(errors) == 1 and "Traceback" not in printed, printed
    assert errors[0].startswith(f"error: {failed}: could not be saved: ")
    assert "GiB are free there; free some" in errors[0] and errors[0].endswith(f"goes on from {checkpoint}.")
    assert not failed.exists()
    assert not (run / "model.safetensors").exists()


def test_an_incomplete_checkpoint_is_refused_by_name(command, run_copy, capfd, caplog):
    (run_copy / "checkpoint-8" / "optimizer.pt").unlink()
    given = ["--resume_from_checkpoint", str(run_copy / "checkpoint-8")]
    assert exit_code([*command(run_copy), *given]) == 2
    assert capfd.readouterr().err.endswith(
        f"error: resume_from_checkpoint is {run_copy / 'checkpoint-8'}, no whole checkpoint: it lacks optimizer.pt. "
        f"Use {run_copy / 'checkpoint-7'}.\n"
    )
    assert "Delete it" not in caplog.text  # the error says all


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("true", "resume_from_checkpoint is true, but {run} has no whole checkpoint; leave it out."),
        (True, "resume_from_checkpoint is True, but {run} has no whole checkpoint; leave it out."),
        ("false", "resume_from_checkpoint is false, but a run goes on from the last whole checkpoint of its"),
        (False, "resume_from_checkpoint is False, but a run goes on from the last whole checkpoint of its"),
    ],
)
def test_resume_from_checkpoint_is_no_folder_called_true(command, tmp_path, capfd, value, message):
    assert exit_code(command(tmp_path / "run", resume_from_checkpoint=value)) == 2
    assert f"error: {message.format(run=tmp_path / 'run')}" in capfd.readouterr().err


def test_a_run_that_is_told_to_resume_does(command, run_copy, caplog):
    assert exit_code([*command(run_copy), "--resume_from_checkpoint", "true"]) == 0
    assert f"Resuming from {run_copy / 'checkpoint-8'}" in caplog.text


def test_other_errors_while_saving_stay_what_they_are(run_copy):
    with pytest.raises(RuntimeError, match="^gloo$"), saving(run_copy / "checkpoint-8", run_copy):
        raise RuntimeError("gloo")
    assert why_incomplete(run_copy / "checkpoint-8") is None


def test_a_full_disk_while_completions_are_logged_ends_in_one_line(command, tmp_path, capfd):
    run = tmp_path / "run"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
    fill = after(run / "completions" / "completions_00001.parquet", limit)
    try:
        code = exit_code(command(run, log_completions=True, save_strategy="no", updates_per_batch=1))
    finally:
        fill.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    printed = capfd.readouterr().err
    assert code == 2 and "Traceback" not in printed and printed.count("error:") == 1
    assert "File too large" in printed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for little more than one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_for_real(command, small_disk, capfd, whole_run):
    run = small_disk / "run"
    arguments = command(run)
    code = exit_code(arguments)
    printed = capfd.readouterr().err
    assert_one_clear_error(code, printed, run)
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert exit_code(arguments) == 0
    assert_equal_weights(saved_weights(run), weights(whole_run.model))


# Killed


@pytest.mark.slow
def test_a_run_killed_at_random_is_the_same_run(command, tmp_path, whole_run):
    """SIGKILL at moments that depend on nothing but the clock, until the run gets through."""
    run = tmp_path / "run"
    arguments = command(run)
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "coaug_trl.cli.main", *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        trained = after(run / f"checkpoint-{kills + 1}", lambda: None)
        while trained.is_alive() and process.poll() is None:
            time.sleep(0.05)
        try:
            process.wait(timeout=int.from_bytes(os.urandom(2)) / 2**16)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0 and kills >= 2
    assert_equal_checkpoints(run / "checkpoint-8", Path(whole_run.args.output_dir) / "checkpoint-8")
    assert_equal_weights(saved_weights(run), weights(whole_run.model))
