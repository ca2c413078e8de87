"""Advantages of rollouts, and what is logged of a generation batch."""

from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from ..data.groups import TEXT_TYPES
from .callbacks import RATIO, mean_sequence_ratio


def normalize_advantages(rewards: torch.Tensor, num_generations: int, normalization: str) -> torch.Tensor:
    """
    Advantages of the rollouts of a generation batch.

    Args:
        rewards, of shape `(N,)`: Rewards, the `num_generations` rollouts of a text together.
        num_generations: Rollouts a text.
        normalization: `"center"`: less the mean of the text's rollouts (arXiv 2506.18670, section 3.4); `"group"`:
            also divided by their standard deviation (GRPO); `"batch"`: less the mean and divided by the standard
            deviation of the whole batch (REINFORCE++).

    Returns: shape `(N,)`, advantages.
    """
    if normalization == "batch":
        return torch.nan_to_num((rewards - rewards.nanmean()) / (nanstd(rewards) + 1e-4), nan=0.0)
    texts = rewards.view(-1, num_generations)
    centered = texts - texts.mean(dim=1, keepdim=True)
    if normalization == "group":
        centered = centered / (texts.std(dim=1, keepdim=True) + 1e-4)
    return centered.reshape(-1)


def logged_rewards(trainer: GRPOTrainer) -> torch.Tensor:
    """Weighted rewards of the generation batch over all processes, shape `(N,)`, as TRL has just logged them."""
    columns = [list(trainer._logs["rewards"][name]) for name in trainer.reward_func_names]
    rewards = torch.tensor(columns, dtype=torch.float32, device=trainer.accelerator.device)
    weighted = (rewards * trainer.reward_weights.to(rewards.device).unsqueeze(1)).nansum(dim=0)
    weighted[rewards.isnan().all(dim=0)] = torch.nan  # without a reward, as TRL has it
    return weighted


def log_generation_batch(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], output: dict[str, Any], num_cut: int
) -> None:
    """
    Logs a generation batch by text type, and the advantages that the loss uses in place of TRL's.

    Args:
        trainer: Keeps the metrics.
        rows: Rows of this process, with their `text_type`.
        output: Completions and scaled advantages of this process.
        num_cut: Documents of this process that were cut.
    """
    gather, metrics = trainer.accelerator.gather, trainer._metrics["train"]
    advantages = gather(output["advantages"])
    trainer._logs["advantages"].clear()
    trainer._logs["advantages"].extend(advantages.tolist())
    text_types = gather_object([row["text_type"] for row in rows])
    _log_text_types(trainer, text_types, advantages, gather(_clipped(trainer, output)))
    num_cut = gather(torch.tensor([num_cut], device=advantages.device)).sum().item()
    metrics["documents_cut"].append(num_cut)
    trainer.say_cut(num_cut, "a generation batch")
    ratio = mean_sequence_ratio(output)
    if ratio is not None and not trainer.args.processors_of_sampler_alone:
        metrics[RATIO].append(gather(ratio).mean().item())


def _clipped(trainer: GRPOTrainer, output: dict[str, torch.Tensor]) -> torch.Tensor:
    """Whether each completion of this process reached the longest length."""
    lengths = output["completion_mask"].sum(dim=1)
    last = output["completion_ids"].gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    ends = torch.tensor([*trainer.eos_token_ids, trainer._tokenizer.pad_token_id], device=last.device)
    return (lengths == 0) | ~torch.isin(last, ends)  # TRL masks truncated completions whole if asked to


def _log_text_types(
    trainer: GRPOTrainer, text_types: list[str], advantages: torch.Tensor, clipped: torch.Tensor
) -> None:
    metrics, rewards = trainer._metrics["train"], logged_rewards(trainer)
    answers = list(trainer._logs["extra"]["answer"])
    spread = rewards.view(-1, trainer.num_generations)
    no_spread = (spread.amax(dim=1) - spread.amin(dim=1) < 1e-8).repeat_interleave(trainer.num_generations)
    words = torch.tensor([float(len(answer.split())) for answer in answers], device=rewards.device)
    for text_type in TEXT_TYPES:
        chosen = torch.tensor([each == text_type for each in text_types], device=rewards.device)
        if not chosen.any():
            continue
        metrics[f"{text_type}/reward"].append(rewards[chosen].nanmean().item())
        metrics[f"{text_type}/advantage_std"].append(advantages[chosen].std().item())
        metrics[f"{text_type}/zero_spread_share"].append(no_spread[chosen].float().mean().item())
        metrics[f"{text_type}/answer_rate"].append((words[chosen] > 0).float().mean().item())
        metrics[f"{text_type}/answer_words"].append(words[chosen].mean().item())
        spoken = [
            word
            for answer, each in zip(answers, text_types, strict=True)
            if each == text_type
            for word in answer.lower().split()
        ]
        metrics[f"{text_type}/distinct_words"].append(len(set(spoken)) / max(len(spoken), 1))
        metrics[f"{text_type}/clipped_ratio"].append(clipped[chosen].float().mean().item())
