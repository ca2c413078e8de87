"""Advantages of rollouts, normalised per text."""

import torch


def normalize_advantages(rewards: torch.Tensor, num_generations: int, normalization: str) -> torch.Tensor:
    """
    Advantages of the rollouts of a generation batch.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards, the `num_generations` rollouts of a text together.
        num_generations (`int`):
            Rollouts a text.
        normalization (`str`):
            `"center"`: less the mean of the text's rollouts (arXiv 2506.18670, section 3.4); `"group"`: also divided
            by their standard deviation (GRPO); `"batch"`: less the mean and divided by the standard deviation of the
            whole batch (REINFORCE++).

    Returns:
        `torch.Tensor` of shape `(N,)`: advantages.
    """
    if normalization == "batch":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    texts = rewards.view(-1, num_generations)
    centered = texts - texts.mean(dim=1, keepdim=True)
    if normalization == "group":
        centered = centered / (texts.std(dim=1, keepdim=True) + 1e-4)
    return centered.reshape(-1)
