"""`coaug train`, and what `accelerate launch scripts/train.py` runs."""

import argparse
import logging
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import InputError, TrainingStopped
from ..utils.terminal import describe_seconds, is_json, show


# What loads torch is imported by the functions, so that `coaug --help` answers at once.
if TYPE_CHECKING:
    from ..training.config import CoAugConfig
    from ..training.trainer import CoAugTrainer


logger = logging.getLogger(__name__)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Names the command; `run` reads its options, the fields of three dataclasses, with TRL's parser."""
    commands.add_parser("train", help="train a policy; see coaug train --help", add_help=False)


def run(arguments: list[str] | None = None) -> None:
    """
    Trains a policy.

    Args:
        arguments: Command line: `--config RECIPE` and fields of [`CoAugScriptArguments`], [`~coaug_trl.CoAugConfig`]
            and [`trl.ModelConfig`], which go before those of the recipe. Defaults to that of the process.

    Raises:
        `InputError`: A setting or an input file has to be mended.
        `TrainingStopped`: The run has gone wrong.
        `SystemExit`: It was interrupted and has saved a checkpoint.
    """
    from accelerate import PartialState

    from ..publishing.upload import reserve, write_run_card
    from ..training.checkpoints import check_checkpoint
    from ..training.dry_run import print_plan
    from ..training.recipe import (
        check_trackers,
        given_checkpoint,
        make_parts,
        make_trainer,
        parse_arguments,
        set_up_logging,
    )

    set_up_logging()
    script_args, training_args, model_args = parse_arguments(arguments)
    check_trackers(training_args.report_to)
    given = given_checkpoint(training_args)
    if given:
        check_checkpoint(given)

    if script_args.dry_run:
        parts = make_parts(script_args, training_args, model_args)
        if PartialState().is_main_process:
            print_plan(script_args, training_args, model_args, *parts)
        return

    if training_args.push_to_hub:  # rather now than after the training
        name = training_args.hub_model_id or Path(training_args.output_dir).absolute().name
        reserve(name, training_args.hub_private_repo, training_args.hub_token)
    # TRL prints tables of completions
    with redirect_stdout(sys.stderr) if is_json() else nullcontext():
        trainer = make_trainer(script_args, training_args, model_args, write_run_card)
        metrics = _train(trainer, given)
        _evaluate(trainer, metrics)
    if training_args.push_to_hub and trainer.is_world_process_zero():
        push_run(trainer)
    if trainer.is_world_process_zero():
        show(metrics | {"folder": training_args.output_dir}, describe_run(trainer.state.log_history, training_args))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # processes that leave without it may abort when all is done


def _train(trainer: "CoAugTrainer", given: str | None) -> dict[str, float]:
    """Trains, from the last whole checkpoint if there is one, and saves the policy."""
    from ..training.checkpoints import last_whole_checkpoint, saving

    output_dir = trainer.args.output_dir
    checkpoint = given or last_whole_checkpoint(output_dir)
    if checkpoint:
        logger.warning(f"Resuming from {checkpoint}. To start afresh, choose another output_dir.")
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (TrainingStopped, SystemExit) as stop:  # on all processes together; the model is not that of a whole run
        if isinstance(stop, TrainingStopped):
            trainer.save_state()  # what was logged until then
        trainer.accelerator.end_training()
        raise
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    with saving(output_dir, output_dir):
        trainer.save_model(output_dir, _internal_call=True)  # it is pushed when it is evaluated
    return dict(result.metrics)


def _evaluate(trainer: "CoAugTrainer", metrics: dict[str, float]) -> None:
    """Evaluates on the dev split, if there is one, and adds that to the metrics and to the run's state."""
    from transformers.integrations import TrackioCallback

    if trainer.eval_collection is None:
        return
    # TRL times every generation into Trackio, whose run has ended with the training.
    trainer.args.report_to = [name for name in trainer.args.report_to if name != "trackio"]
    trainer.remove_callback(TrackioCallback)
    evaluated = trainer.evaluate()
    metrics |= evaluated
    trainer.save_metrics("eval", evaluated)
    trainer.save_state()  # with this evaluation, which the card shows


def push_run(trainer: "CoAugTrainer") -> None:
    """Pushes a run that has ended as `coaug push` does; what fails can be made up for without training again."""
    from ..publishing.upload import prepare_run, push

    args, repo_id = trainer.args, trainer.hub_model_id
    try:
        upload = prepare_run(args.output_dir, repo_id)
        push(upload, repo_id, args.hub_private_repo, args.hub_revision, "End of training", args.hub_token)
    except InputError as error:
        again = f"coaug push {args.output_dir} --repo_id {repo_id}"
        raise InputError(f"The policy is trained and saved, but not pushed; {again} goes on. {error}") from error


def describe_run(history: list[dict], args: "CoAugConfig") -> str:
    """What a run that has ended did, in a few lines."""
    lines = []
    for name, label in (("reward", "reward"), (f"eval_nDCG@{args.ndcg_k}", f"dev nDCG@{args.ndcg_k}")):
        curve = [(entry[name], entry["step"]) for entry in history if name in entry]
        if curve:
            best, step = max(curve, key=lambda point: point[0])  # the first of equals, as a checkpoint is chosen
            lines.append(f"{label}: {curve[0][0]:.4f} → {curve[-1][0]:.4f}, at best {best:.4f} at step {step:,}")
    last = {name: value for entry in history for name, value in entry.items()}
    cost = [f"{last['step']:,} optimizer steps"]
    if "num_tokens" in last:
        cost.append(f"{last['num_tokens']:,.0f} tokens read and generated")
    if "train_runtime" in last:
        cost.append(describe_seconds(last["train_runtime"]))
    return "\n".join([*lines, ", ".join(cost), f"policy: {args.output_dir}"])
