"""What watches a run: stops that went wrong, and signals that end one."""

import logging
import math
import os
import signal
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..data.groups import TEXT_TYPES
from ..utils.distributed import largest
from ..utils.errors import TrainingStopped
from ..utils.files import write_jsonl
from .checkpoints import last_whole_checkpoint


logger = logging.getLogger(__name__)
RATIO = "sampling/sequence_ratio"
LOG_PROBS = ("log_probs", "old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps")


def describe_checkpoints(state: TrainerState, output_dir: str | Path, before: int | None = None) -> str:
    """Which checkpoints a run has left, the best one, if known, and the last whole one before a step; and what to do."""
    best = state.best_model_checkpoint
    last = last_whole_checkpoint(output_dir, before)
    parts = [f"the best checkpoint is {best}"] * bool(best)
    parts += [f"the last whole one{' before that' if before else ''} is {last}"] * (last not in (best, None))
    if not parts:
        return "There is no checkpoint from before. Start again in another output_dir with a lower learning_rate."
    found = "; ".join(parts)
    # Resuming would take the learning rate of the checkpoint, whatever is given.
    return (
        f"{found[0].upper()}{found[1:]}. Train on from one as model_name_or_path, in another output_dir, with a lower "
        "learning_rate or a higher beta."
    )


# NaN and Inf


class FiniteGuard(TrainerCallback):
    """
    Stops training, on all processes together, when the trained weights or a gradient are NaN or Inf.

    Weights are looked at before a generation, where they would end in an error that says nothing, on a GPU in one that
    kills the process. Gradients are looked at before the optimizer steps: the micro-batches of the step are then read
    again, and the rows at fault saved as `not_finite_step_S_process_P.jsonl` in `output_dir`. Under float16 a step with
    such a gradient is left out and the loss scaled down, and DeepSpeed has updated the weights by then: both are left
    to the look at the weights.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer._step % (args.steps_per_generation * self.trainer.num_iterations):
            return
        trained = {name: each for name, each in self.trainer.model.named_parameters() if each.requires_grad}
        broken = _not_finite(trained)
        if largest(len(broken)):
            every = list(dict.fromkeys(gather_object(broken)))
            raise TrainingStopped(
                f"Training stopped after step {state.global_step}: {len(every)} weights are NaN or Inf, the first of "
                f"them in {every[0]}. {describe_checkpoints(state, args.output_dir)}"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.accelerator.mixed_precision == "fp16":
            return
        gradients = {name: each.grad for name, each in self.trainer.model.named_parameters() if each.grad is not None}
        if not largest(len(_not_finite(gradients))):
            return
        step, process = state.global_step + 1, PartialState().process_index
        rows, names = self._rows_at_fault(args.steps_per_generation)
        found = []
        if rows:
            path = Path(args.output_dir) / f"not_finite_step_{step}_process_{process}.jsonl"
            write_jsonl(path, rows)
            found.append(f"{', '.join(names)} ({len(rows)} rows, in {path})")
        found = gather_object(found)
        reason = f"NaN or Inf in {'; '.join(found)}" if found else "the gradient's norm is NaN or Inf"
        raise TrainingStopped(
            f"Training stopped at step {step}: {reason}, and no weight was changed by it. "
            f"{describe_checkpoints(state, args.output_dir)}"
        )

    def _rows_at_fault(self, steps_per_generation: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Rows of the optimizer step that have what is not finite, and the kinds of numbers that are not."""
        trainer, rows, names = self.trainer, [], {}
        for place in range(trainer._step - trainer.current_gradient_accumulation_steps, trainer._step):
            batch = dict(trainer._buffered_inputs[place % steps_per_generation])
            ids, mask = (
                torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
            )
            with torch.no_grad():
                length = batch["completion_ids"].size(1)
                batch["log_probs"] = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]
            at_fault = {name: found for name, found in _rows_at_fault(batch).items() if found.any()}
            names |= at_fault
            if at_fault:
                chosen = torch.stack(list(at_fault.values())).any(dim=0)
                rows += [
                    _describe_row(batch, index, trainer._tokenizer) for index in chosen.nonzero().flatten().tolist()
                ]
        return rows, list(names)


def _not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors whose part on this process has NaN or Inf."""
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors.values()]
    sums = [each.detach().sum(dtype=torch.float32) for each in local]
    # a model that is spread over several GPUs has them on each
    finite = torch.stack([each.to(sums[0].device) for each in sums]).isfinite().tolist() if sums else []
    return [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]


def _rows_at_fault(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """For each kind of number that has to be finite, the rows where it is not."""
    mask = batch["completion_mask"].bool()
    rows = {"advantages": ~torch.isfinite(batch["advantages"])}
    for name in LOG_PROBS:
        values = batch.get(name)
        if values is None or name == "sampling_per_token_logps":  # vLLM gives none for single tokens now and then
            continue
        bad = ~torch.isfinite(values) & mask
        rows[name] = bad.any(dim=1)
    return rows


def _describe_row(batch: dict[str, Any], index: int, tokenizer: Any) -> dict[str, Any]:
    prompt, completion = batch["prompt_mask"][index].bool(), batch["completion_mask"][index].bool()
    row = {
        "prompt": tokenizer.decode(batch["prompt_ids"][index][prompt]),
        "completion": tokenizer.decode(batch["completion_ids"][index][completion]),
        "advantage": _number(batch["advantages"][index].item()),
    }
    for name in LOG_PROBS:
        if batch.get(name) is not None:
            row[name] = [_number(value) for value in batch[name][index][completion].tolist()]
    return row


def _number(value: float) -> float | str:
    """JSON has neither NaN nor Inf."""
    return value if math.isfinite(value) else str(value)


# Collapse


class CollapseGuard(TrainerCallback):
    """
    Stops training when the policy has collapsed: when one of four measures has been below its threshold for 50 optimizer
    steps in succession. They are the mean entropy at a token (0.01 nats), the share of completions with an answer (0.02),
    the distinct words of a generation batch's answers divided by all their words (0.001), and the mean length of
    completions (2 tokens).

    Shares and words count as collapsed when they are for every text type. Completions that grow without end show as
    missing answers, since a cut answer is none.

    Args:
        metrics: Where the trainer collects the metrics of training until they are logged.
    """

    THRESHOLDS = {"entropy": 0.01, "answer_rate": 0.02, "distinct_words": 0.001, "completions/mean_length": 2.0}
    NUM_STEPS = 50

    def __init__(self, metrics: dict[str, list[float]]):
        self.metrics = metrics
        self._latest: dict[str, float] = {}
        self._steps_below = defaultdict(int)

    def _values(self, num_micro_batches: int) -> dict[str, float]:
        """The latest value of each metric; all but the entropy come once a generation batch."""
        metrics = {name: values for name, values in self.metrics.items() if values}
        if "entropy" in metrics:
            last = metrics["entropy"][-num_micro_batches:]
            self._latest["entropy"] = sum(last) / len(last)
        if "completions/mean_length" in metrics:
            self._latest["completions/mean_length"] = metrics["completions/mean_length"][-1]
        for name in ("answer_rate", "distinct_words"):
            columns = [f"{text_type}/{name}" for text_type in TEXT_TYPES if f"{text_type}/{name}" in metrics]
            if columns:
                self._latest[name] = max(metrics[column][-1] for column in columns)
        return self._latest

    def on_step_end(self, args, state, control, **kwargs):
        values = self._values(args.gradient_accumulation_steps)
        for name, value in values.items():
            below = value < self.THRESHOLDS[name]
            self._steps_below[name] = self._steps_below[name] + 1 if below else 0
        collapsed = [name for name, steps in self._steps_below.items() if steps >= self.NUM_STEPS]
        if not largest(len(collapsed)):
            return
        first = state.global_step - self.NUM_STEPS + 1
        found = ", ".join(f"{name} below {self.THRESHOLDS[name]:g} (now {values[name]:.4g})" for name in collapsed)
        raise TrainingStopped(
            f"Training stopped after step {state.global_step}: the policy has collapsed, with {found} since step "
            f"{first}. {describe_checkpoints(state, args.output_dir, before=first)}"
        )


# An alarm


def mean_sequence_ratio(batch: dict[str, Any]) -> torch.Tensor | None:
    """
    How far the trainer agrees with vLLM on the completions before the first update on them.

    Args:
        batch: Rollouts of a process, as TRL generates and scores them.

    Returns: mean over the completions of their probability by the trainer over that by vLLM, uncorrected and unmasked;
        `None` if one of the two is not known: without vLLM, or where TRL computes the trainer's only during the
        update, with one update per batch and without its importance sampling correction.
    """
    trainer, sampler = (batch.get(name) for name in ("old_per_token_logps", "sampling_per_token_logps"))
    if trainer is None or sampler is None:
        return None
    # as TRL does, single tokens that vLLM gives none for count as equal
    difference = torch.nan_to_num((trainer - sampler) * batch["completion_mask"], nan=0.0)
    return difference.sum(dim=1).exp().mean()


class RatioAlarm(TrainerCallback):
    """
    Warns when vLLM and the trainer disagree on the probability of the completions: when the mean importance ratio
    leaves [0.5, 2]. Once, until it has come back.

    The ratio is logged as `sampling/sequence_ratio`, see [`mean_sequence_ratio`]. It would say nothing where vLLM's
    probabilities include what the trainer's do not, a repetition penalty without `penalize_log_probs`, `top_p`, `top_k`
    or `min_p`: there it is not logged, and there is no alarm.
    """

    def __init__(self):
        self._outside = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        ratio = (logs or {}).get(RATIO)
        if ratio is None:
            return
        outside = not 0.5 <= ratio <= 2
        if outside and not self._outside and state.is_world_process_zero:
            logger.warning(
                f"step {state.global_step}: the mean importance ratio between trainer and vLLM is {ratio:.3g}, outside "
                "[0.5, 2]: they disagree on the policy, so that it is not trained on its own completions, and TRL's "
                "correction would scale most of the loss away. Check that vLLM has the trained weights and the same "
                "precision."
            )
        self._outside = outside


NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
# torchrun sends a Ctrl-C on to processes that have had it from the terminal: not yet the second one of the user.
SECONDS_OF_ONE_CTRL_C = 3.0


class StopOnSignal(TrainerCallback):
    """
    On Ctrl-C or SIGTERM, lets the running optimizer step end, saves a checkpoint and leaves, with the exit code of the
    signal (130 or 143). A second Ctrl-C interrupts at once.

    All processes leave together, whichever of them got the signal. An evaluation that is due at this step comes first,
    so that the resumed run is the same as one that was not interrupted.

    Launchers of several processes wait for a while before they kill: torchrun and `accelerate launch` 30 s, unless
    `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` says more. They send SIGTERM also when one process has died. The others then wait
    for it, in a step that never ends, until they are killed: the longer the timeout, the longer the machine stands
    still. For a single process `accelerate launch` passes no signal on; use `coaug train`, or signal the process.
    """

    def __init__(self):
        self.received = self._agreed = 0
        self._since = 0.0
        self._replaced = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Handles the signals from here on. Only the main thread can, and what is ignored stays ignored."""
        self.received = self._agreed = 0
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._replaced[number] = signal.signal(number, self._receive)

    def on_train_end(self, args, state, control, **kwargs):
        self.release()
        if self.received:  # after the last step, which nothing is left to save of
            signal.raise_signal(self.received)

    def release(self) -> None:
        """Gives the signals back to those who handled them before, which a training that failed has not done."""
        while self._replaced:
            signal.signal(*self._replaced.popitem())

    def _receive(self, number: int, frame) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if int(os.environ.get("RANK", 0)) == 0:
                # Not by print or logging, which may be what was interrupted.
                more = ", if all processes are still there" * (int(os.environ.get("WORLD_SIZE", 1)) > 1)
                more += "; once more to stop at once" * (number == signal.SIGINT)
                os.write(2, f"\n{NAMES[number]}: saving when this step has ended{more}\n".encode())
            return
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if number == signal.SIGINT and time.monotonic() - self._since > SECONDS_OF_ONE_CTRL_C * launched:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        self._agreed = largest(self.received)
        if self._agreed:
            args.save_only_model = False  # or nothing could go on from the checkpoint
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._agreed:
            if state.is_world_process_zero:
                checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
                command = "--resume_from_checkpoint" if args.resume_from_checkpoint else "the same command"
                logger.warning(
                    f"Stopped by {NAMES[self._agreed]} after step {state.global_step}: {command} goes on from "
                    f"{checkpoint}."
                )
            self.release()
            raise SystemExit(128 + self._agreed)
