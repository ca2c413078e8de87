"""
What test_survive.py runs on each of two processes:

accelerate launch --config_file recipes/accelerate_configs/cpu-2.yaml survive_worker.py INPUT.json OUTPUT_DIR
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainerCallback
from two_processes_worker import FailsOnTheSecondProcess, equal, weights

from coaug_trl import CoAugConfig, CoAugTrainer, Collection, InputError
from coaug_trl.policy.prompts import PromptSet
from coaug_trl.retrieval import BM25Retriever
from coaug_trl.utils.errors import TrainingStopped


class OnTheSecondProcess(TrainerCallback):
    """Does something on the second process alone, in the middle of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1 and args.process_index == 1:
            self.act(model)
            self.act = lambda model: None


def outcome(trainer) -> dict:
    """How training ends on this process, and how many seconds after the other one at most."""
    message, kind = "", "finished"
    try:
        trainer.train()
    except (TrainingStopped, RuntimeError, SystemExit) as error:
        kind, message = type(error).__name__, str(error)
    return {"kind": kind, "message": message, "at": time.time(), "step": trainer.state.global_step}


def reward_fails(completions, **kwargs):
    if PartialState().process_index == 1:
        raise ZeroDivisionError("the second process alone")
    return [0.0] * len(completions)


def reward_is_short(completions, **kwargs):
    return [0.0] * (len(completions) - PartialState().process_index)


async def reward_later(completions, **kwargs):
    return [0.0] * len(completions)


def build_with(given, output_dir, callbacks=(), reward_funcs=(), retriever=None, **changes):
    collection = Collection.load(given["collection"])
    args = CoAugConfig(output_dir=str(output_dir), **{**given["settings"], **changes})
    return CoAugTrainer(
        given["model"],
        args,
        collection,
        retriever or BM25Retriever(),
        PromptSet("sparse", "query:", "document:"),
        callbacks=list(callbacks),
        reward_funcs=list(reward_funcs),
    )


def spoil(model):
    with torch.no_grad():
        next(model.parameters())[:] = torch.nan


def main():
    given = json.loads(Path(sys.argv[1]).read_text())
    output_dir = Path(sys.argv[2])
    state = PartialState(cpu=True)
    save = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}

    trainer = build_with(given, output_dir / "whole", bm25_statistics="running", **save)
    trainer.train()
    expected, statistics = weights(trainer), trainer.retriever.state()
    if state.is_main_process:
        save_file(expected, output_dir / "final.safetensors")

    results = {}
    signalled = OnTheSecondProcess(2, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    no_save = save | {"save_strategy": "no"}
    folder = output_dir / "signal"
    trainer = build_with(given, folder, [signalled], bm25_statistics="running", **no_save)
    results["signal"] = outcome(trainer)
    state.wait_for_everyone()
    trainer = build_with(given, folder, bm25_statistics="running", **no_save)
    results["resumed"] = outcome_of_resuming(trainer) | {
        "equal": equal(weights(trainer), expected) and trainer.retriever.state() == statistics
    }
    trainer = build_with(given, output_dir / "nan", [OnTheSecondProcess(2, spoil)], **save)
    results["nan"] = outcome(trainer)
    for name, changes in {
        "fails": {"reward_funcs": [reward_fails]},
        "short": {"reward_funcs": [reward_is_short]},
        "retriever": {"retriever": FailsOnTheSecondProcess()},
    }.items():
        results[name] = outcome(build_with(given, output_dir / name, **changes))
    try:
        build_with(given, output_dir / "asynchronous", reward_funcs=[reward_later])
    except InputError as error:
        results["asynchronous"] = str(error)
    (output_dir / f"results_{state.process_index}.json").write_text(json.dumps(results))
    state.wait_for_everyone()
    state.destroy_process_group()
    os._exit(0)  # gloo's threads abort an interpreter that takes itself down now and then, when all is done


def outcome_of_resuming(trainer) -> dict:
    trainer.train(resume_from_checkpoint=True)
    return {"step": trainer.state.global_step}


if __name__ == "__main__":
    main()
