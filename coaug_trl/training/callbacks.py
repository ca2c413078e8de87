"""What watches a run: stops that went wrong, and signals that end one."""

import logging
import math
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.groups import TEXT_TYPES
from ..utils.distributed import largest
from ..utils.errors import TrainingStopped
from ..utils.files import write_jsonl
from .checkpoints import last_whole_checkpoint


if TYPE_CHECKING:
    from .config import CoAugConfig

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


def refuse_not_finite_weights(model: torch.nn.Module, state: TrainerState, output_dir: str | Path) -> None:
    """
    Raises a `TrainingStopped` on all processes if trained weights of one are NaN or Inf.

    Called before generation, where such weights end in an error that says nothing, on a GPU in one that kills the
    process.
    """
    names, sums = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            names.append(name)
            sums.append(local.detach().sum(dtype=torch.float32))
    # a model that is spread over several GPUs has them on each
    finite = torch.stack([each.to(sums[0].device) for each in sums]).isfinite().tolist() if sums else []
    broken = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if largest(len(broken)):
        every = list(dict.fromkeys(gather_object(broken)))
        raise TrainingStopped(
            f"Training stopped after step {state.global_step}: {len(every)} weights are NaN or Inf, the first of them "
            f"in {every[0]}. {describe_checkpoints(state, output_dir)}"
        )


def refuse_not_finite_gradient(
    norm: torch.Tensor | float | None, state: TrainerState, output_dir: str | Path, already_stepped: bool = False
) -> None:
    """
    Raises a `TrainingStopped` if the norm of the gradient, the same on all processes, is NaN or Inf.

    Args:
        norm (`torch.Tensor` or `float`):
            The norm, `None` if it is not known.
        state ([`~transformers.TrainerState`]):
            For the step and the checkpoints.
        output_dir (`str` or `Path`):
            Folder of the run.
        already_stepped (`bool`, *optional*, defaults to `False`):
            Whether the weights have been updated with this gradient, as DeepSpeed does within the backward pass.
    """
    norm = norm.item() if isinstance(norm, torch.Tensor) else norm
    if norm is not None and not math.isfinite(norm):
        unchanged = "" if already_stepped else ", and no weight was changed by it"
        raise TrainingStopped(
            f"Training stopped at step {state.global_step + 1}: the gradient's norm is {norm}{unchanged}. "
            f"{describe_checkpoints(state, output_dir)}"
        )


def refuse_not_finite_loss(
    loss: torch.Tensor,
    log_probs: torch.Tensor,
    batch: dict[str, Any],
    tokenizer: Any,
    state: TrainerState,
    output_dir: str | Path,
) -> None:
    """
    Raises a `TrainingStopped` on all processes if the loss or a log-probability of one is NaN or Inf.

    The rows at fault are saved as `not_finite_step_S_process_P.jsonl` in `output_dir`, all rows of the micro-batch if
    none can be blamed.

    Args:
        loss (`torch.Tensor`):
            Loss of the micro-batch.
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the completions' tokens by the policy.
        batch (`dict[str, Any]`):
            The micro-batch that TRL's loss was given.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes its texts.
        state ([`~transformers.TrainerState`]):
            For the step and the checkpoints.
        output_dir (`str` or `Path`):
            Folder of the run.
    """
    batch = {**batch, "log_probs": log_probs}
    at_fault = {name: rows for name, rows in _rows_at_fault(batch).items() if rows.any()}
    if not torch.isfinite(loss):
        at_fault["loss"] = torch.zeros(len(log_probs), dtype=torch.bool, device=log_probs.device)
    if not largest(len(at_fault)):
        return
    step, process = state.global_step + 1, PartialState().process_index
    found = []
    if at_fault:
        rows = torch.stack(list(at_fault.values())).any(dim=0)
        rows = rows if rows.any() else torch.ones_like(rows)
        path = Path(output_dir) / f"not_finite_step_{step}_process_{process}.jsonl"
        write_jsonl(path, [_describe_row(batch, index, tokenizer) for index in rows.nonzero().flatten().tolist()])
        found.append(f"{', '.join(at_fault)} ({int(rows.sum())} rows, in {path})")
    raise TrainingStopped(
        f"Training stopped at step {step}: NaN or Inf in {'; '.join(gather_object(found))}. "
        f"{describe_checkpoints(state, output_dir)}"
    )


def _rows_at_fault(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """For each kind of number that has to be finite, the rows where it is not."""
    mask = batch["completion_mask"].bool()
    rows = {"advantages": ~torch.isfinite(batch["advantages"])}
    for name in LOG_PROBS:
        values = batch.get(name)
        if values is None:
            continue
        bad = ~torch.isfinite(values) & mask
        if name == "sampling_per_token_logps":
            # vLLM gives none for single tokens now and then, which TRL takes as equal; for a whole completion it may not
            missing = torch.isnan(values) & mask
            bad = bad & ~missing | (missing == mask).all(dim=1, keepdim=True) & mask
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
    Stops training when the policy has collapsed: when the entropy, the share of answers, their distinct words or the
    length of completions has been below its threshold for `collapse_steps` optimizer steps in succession.

    Shares and words count as collapsed when they are for every text type. Completions that grow without end show as
    missing answers, since a cut answer is none.

    Args:
        args ([`~coaug_trl.CoAugConfig`]):
            Thresholds; those of 0 or `None` are off.
        metrics (`dict[str, list[float]]`):
            Where the trainer collects the metrics of training until they are logged.
    """

    def __init__(self, args: "CoAugConfig", metrics: dict[str, list[float]]):
        self.metrics = metrics
        self.thresholds = {
            "entropy": args.collapse_entropy,
            "answer_rate": args.collapse_answer_rate,
            "distinct_words": args.collapse_distinct_words,
            "completions/mean_length": args.collapse_completion_length,
        }
        self.num_steps = args.collapse_steps
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
        if not self.num_steps:
            return
        values = self._values(args.gradient_accumulation_steps)
        for name, value in values.items():
            below = self.thresholds[name] and value < self.thresholds[name]
            self._steps_below[name] = self._steps_below[name] + 1 if below else 0
        collapsed = [name for name, steps in self._steps_below.items() if steps >= self.num_steps]
        if not largest(len(collapsed)):
            return
        first = state.global_step - self.num_steps + 1
        found = ", ".join(f"{name} below {self.thresholds[name]:g} (now {values[name]:.4g})" for name in collapsed)
        raise TrainingStopped(
            f"Training stopped after step {state.global_step}: the policy has collapsed, with {found} since step "
            f"{first}. {describe_checkpoints(state, args.output_dir, before=first)}"
        )


# An alarm


def mean_sequence_ratio(batch: dict[str, Any]) -> torch.Tensor | None:
    """
    How far the trainer agrees with vLLM on the completions before the first update on them.

    Args:
        batch (`dict[str, Any]`):
            Rollouts of a process, as TRL generates and scores them.

    Returns:
        `torch.Tensor`: mean over the completions of their probability by the trainer over that by vLLM, uncorrected and
        unmasked; `None` if one of the two is not known: without vLLM, or where TRL computes the trainer's only during
        the update, with one update per batch and without its importance sampling correction.
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
        self.received = 0
        self._since = 0.0
        self._agreed = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals while the block runs. Only the main thread can, and what is ignored stays ignored."""
        self.received = self._agreed = 0
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    replaced[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)
        if self.received:  # after the last step, which nothing is left to save of
            signal.raise_signal(self.received)

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
            raise SystemExit(128 + self._agreed)
