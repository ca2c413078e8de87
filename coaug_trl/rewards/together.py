"""Reward functions of the user, beside the joint reward."""

import math
from typing import Any

import torch
from accelerate import PartialState
from trl.trainer.utils import get_callable_name, is_async_callable

from ..data.groups import Group
from ..utils.distributed import run_together
from ..utils.errors import InputError


def describe_batch(step: int, groups: list[Group], text_ids: list[str]) -> str:
    """Names what a process computes rewards of: the optimizer step, its groups and their first texts."""
    positions = [group.position for group in groups]
    first = ", ".join(list(dict.fromkeys(text_ids))[:3])
    return f"step {step + 1}, groups {min(positions)} to {max(positions)}, first texts {first}"


def fail_together(reward: Any) -> Any:
    """
    Makes a reward function that fails on one process fail on all, since the others would wait for its rewards forever.

    Args:
        reward: Reward as TRL takes it. Only synchronous functions are wrapped: TRL runs asynchronous ones
            concurrently, so that processes could not exchange in one order which of them failed, and reward models
            itself.

    Returns: the same reward under the same name, with an error that names process and batch.

    Raises `InputError`: The reward is asynchronous and there are several processes.
    """
    if is_async_callable(reward) and PartialState().num_processes > 1:
        raise InputError(
            f"The reward function {get_callable_name(reward)} is asynchronous: with several processes, one that fails "
            "would leave the others waiting. Give a synchronous function that runs it with asyncio.run."
        )
    if not callable(reward) or isinstance(reward, torch.nn.Module) or is_async_callable(reward):
        return reward

    def rewards(kwargs: dict[str, Any]) -> list[float | None]:
        values = [None if value is None else float(value) for value in reward(**kwargs)]
        for place, value in enumerate(values):
            if value in (math.inf, -math.inf):
                raise ValueError(f"reward {value} for completion {place}")
        if len(values) != len(kwargs["completions"]):
            raise ValueError(f"{len(values)} rewards for {len(kwargs['completions'])} completions")
        return values

    def together(**kwargs) -> list[float | None]:
        batch = describe_batch(kwargs["trainer_state"].global_step, kwargs["group"], kwargs["text_id"])
        return run_together(rewards, kwargs, where=f"reward function {together.__name__}, {batch}")[0]

    together.__name__ = get_callable_name(reward)  # under which TRL logs it
    return together
