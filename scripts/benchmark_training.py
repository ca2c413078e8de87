"""
Time of an optimizer step of `CoAugTrainer` over that of plain TRL's `GRPOTrainer`, in the same run, and what takes it:

    python scripts/benchmark_training.py --model runs/quickstart/untrained
    python scripts/benchmark_training.py --model runs/quickstart/untrained --steps 30 --output runs/benchmark

Both trainers get the same prompts in the same order, the same batch arithmetic and the same generation settings; the
plain one has a constant reward. They take turns, and the medians over generation batches count, without the first of
each turn. Learning is as slow as can be, so that both keep generating completions of the same length. Two models are
measured, that of the quickstart (`make quickstart` makes it) and one of random weights and hidden size 256, on one
process and on two, each with one thread: more processes than cores measure nothing. `--clock cpu` counts the seconds
that the first process computes, which other work on the machine disturbs less, and leaves out waiting.

The parts: `generation`; `scoring`, old log-probabilities, where a generation batch has several updates; `reward`, from
when all processes have generated; `loss`, with the backward pass; `rest`, among it prompts, advantages, logging and the
optimizer.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
import trl
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, Collection, PromptSet
from coaug_trl.training.prompts import make_rows


ROOT = Path(__file__).parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("generation", "scoring", "reward", "loss", "rest")
# The arithmetic of the quickstart.
SETTINGS = {"groups_per_batch": 16, "group_size": 6, "num_relevant": 3, "updates_per_batch": 1}
SHARED = {
    "num_generations": 4,
    "max_completion_length": 12,
    "learning_rate": 1e-9,
    "loss_type": "dapo",
    "temperature": 1.2,
    "repetition_penalty": 1.2,
    "scale_rewards": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "disable_tqdm": True,
    "seed": 42,
}


class Timed:
    """Adds up the seconds of each part of an optimizer step."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, *args, **kwargs):
        self.seconds = defaultdict(float)
        super().__init__(*args, **kwargs)

    def _time(self, part, function, *args, **kwargs):
        start = self.clock()
        result = function(*args, **kwargs)
        self.seconds[part] += self.clock() - start
        return result

    def _generate(self, *args, **kwargs):
        return self._time("generation", super()._generate, *args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        self.accelerator.wait_for_everyone()  # or the slower process's generation would count as reward
        return self._time("reward", super()._calculate_rewards, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        part = "of the loss" if torch.is_grad_enabled() else "scoring"
        return self._time(part, super()._get_per_token_logps_and_entropies, *args, **kwargs)

    def _prepare_inputs(self, *args, **kwargs):
        return self._time("inputs", super()._prepare_inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        return self._time("training_step", super().training_step, *args, **kwargs)


class TimedCoAugTrainer(Timed, CoAugTrainer):
    """Ours, timed."""


class TimedGRPOTrainer(Timed, GRPOTrainer):
    """TRL's, timed."""


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step and of its parts; the first of each turn warms up."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = None

    def on_step_end(self, args, state, control, **kwargs):
        now, seconds = self.trainer.clock(), self.trainer.seconds
        if self._start is not None:
            parts = {part: seconds[part] for part in ("generation", "scoring", "reward")}
            parts["loss"] = seconds["training_step"] - seconds["inputs"]
            total = now - self._start
            self.steps.append({**parts, "rest": total - sum(parts.values()), "total": total})
        seconds.clear()
        self._start = self.trainer.clock()


def constant(completions, **kwargs) -> list[float]:
    """The reward of the plain trainer."""
    return [1.0] * len(completions)


def make_trainers(model: str, folder: str, steps: int) -> dict[str, Timed]:
    """Both trainers, with the same prompts in the same order."""
    collection = Collection.load("vocabulary-gap", "train")
    prompt_set = PromptSet.load(ROOT / "recipes/quickstart/prompt_set.yaml")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    num_processes = PartialState(cpu=True).num_processes
    completions = SETTINGS["groups_per_batch"] * SETTINGS["group_size"] * SHARED["num_generations"]
    per_device = completions // num_processes
    args = CoAugConfig(f"{folder}/ours", **SETTINGS, **SHARED, per_device_train_batch_size=per_device, max_steps=steps)
    ours = TimedCoAugTrainer(model, args, collection, BM25Retriever(), prompt_set, processing_class=tokenizer)
    groups = [ours.train_dataset[position] for position in range(steps * SETTINGS["groups_per_batch"])]
    given = (ours.train_collection, ours.prompt_set, ours.processing_class, ours.args.augment, ours.num_generations)
    rows, _ = make_rows(groups, *given)
    args = GRPOConfig(
        f"{folder}/plain",
        **SHARED,
        per_device_train_batch_size=per_device,
        steps_per_generation=1,
        shuffle_dataset=False,
        max_steps=steps,
    )
    plain = TimedGRPOTrainer(
        model=model,
        reward_funcs=constant,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows[:: SHARED["num_generations"]]]),
        processing_class=tokenizer,
    )
    return {"CoAugTrainer": ours, "GRPOTrainer": plain}


def measure(model: str, folder: str, steps: int, turns: int) -> dict[str, dict[str, float]]:
    """Median seconds of an optimizer step of both trainers, and of its parts."""
    trainers = make_trainers(model, folder, steps)
    times = {}
    for name, trainer in trainers.items():
        times[name] = StepTimes()
        times[name].trainer = trainer
        trainer.add_callback(times[name])
    for turn in range(turns):
        for name in sorted(trainers, reverse=turn % 2 == 1):
            trainers[name].train()
    return {
        name: {part: statistics.median(step[part] for step in found.steps) for part in (*PARTS, "total")}
        | {"steps": len(found.steps)}
        for name, found in times.items()
    }


def make_random_model(model: str, hidden_size: int, folder: str) -> str:
    """A Qwen2 model of random weights with the tokenizer of another."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def launch(num_processes: int, arguments: list[str]) -> dict[str, dict[str, float]]:
    """Measures in processes of their own."""
    config = ROOT / f"recipes/accelerate_configs/cpu-{num_processes}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config] if num_processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *launcher, __file__, *arguments, "--result", result]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            sys.exit(finished.stderr)
        return json.loads(result.read_text())


def render(results: list[dict]) -> Table:
    """One line for each model, number of processes and trainer."""
    table = Table(title="Median milliseconds of an optimizer step, and the share of its parts")
    for column in ("model", "processes", "trainer", "ms", *PARTS, "ratio"):
        table.add_column(column, justify="left" if column in ("model", "trainer") else "right")
    for result in results:
        for name, found in result["trainers"].items():
            shares = [f"{found[part] / found['total']:.1%}" for part in PARTS]
            ratio = f"{result['ratio']:.3f}" if name == "CoAugTrainer" else ""
            milliseconds = f"{1000 * found['total']:.0f}"
            table.add_row(result["model"], str(result["processes"]), name, milliseconds, *shares, ratio)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="model of the quickstart, such as runs/quickstart/untrained")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a turn; default: 10")
    parser.add_argument("--turns", type=int, default=4, help="turns of each trainer; default: 4")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what is counted; default: wall")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="default: 1 2")
    parser.add_argument("--output", metavar="DIR", help="folder for training.json")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:  # in a process of its own
        Timed.clock = staticmethod(CLOCKS[options.clock])
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options.model, folder, options.steps, options.turns)
        if PartialState().is_main_process:
            Path(options.result).write_text(json.dumps(found))
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
        os._exit(0)  # gloo's threads abort an interpreter that takes itself down now and then, when all is done

    results = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"quickstart": options.model, "random, hidden 256": make_random_model(options.model, 256, folder)}
        for name, model in models.items():
            for processes in options.processes:
                arguments = ["--model", model, "--steps", str(options.steps), "--turns", str(options.turns)]
                arguments += ["--clock", options.clock]
                trainers = launch(processes, arguments)
                ratio = trainers["CoAugTrainer"]["total"] / trainers["GRPOTrainer"]["total"]
                results.append({"model": name, "processes": processes, "ratio": ratio, "trainers": trainers})
    console = Console(width=120)
    console.print(render(results))
    for name in models:
        rewards = {r["processes"]: r["trainers"]["CoAugTrainer"]["reward"] for r in results if r["model"] == name}
        if len(rewards) == 2:
            console.print(
                f"{name}: the reward takes {1000 * rewards[1]:.0f} ms on one process and {1000 * rewards[2]:.0f} ms on "
                f"two, {rewards[1] / rewards[2]:.2f} times less"
            )
    machine = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, trl)},
        "settings": {**SETTINGS, **SHARED, "steps": options.steps, "turns": options.turns, "clock": options.clock},
    }
    console.print(f"{machine['date']}, {machine['machine']}, load {machine['load'][0]:.1f}")
    if options.output:
        Path(options.output).mkdir(parents=True, exist_ok=True)
        path = Path(options.output) / "training.json"
        path.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")
        console.print(str(path))


if __name__ == "__main__":
    main()
