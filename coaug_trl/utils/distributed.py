"""Work that all processes share."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object


def run_together(function: Callable, *args, where: str = "") -> tuple[Any, list[Any]]:
    """
    Runs `function` on every process and exchanges the results; a failure on one process is raised on all.

    Args:
        function: What to run. It must not call a collective operation.
        *args:
            Its arguments, on this process.
        where: What this process is working on, for the message of a failure.

    Returns: this process's result, and the results of all processes in their order.

    Raises `RuntimeError`: On every process, naming those that failed.
    """
    result, failure = None, None
    try:
        result = function(*args)
    except Exception as error:  # whatever it is, this process must reach the exchange, or the others wait forever
        failure = error
    message = None if failure is None else f"{type(failure).__name__}: {failure}" + (f" ({where})" if where else "")
    outcomes = gather_object([(result, message)])
    failed = [f"process {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message is not None]
    if failed:
        raise RuntimeError("; ".join(failed)) from failure
    return result, [result for result, _ in outcomes]


def own_share(items: list) -> list:
    """
    This process's share of `items`; all shares have the same length, so that processes call the model equally often.

    The last items are repeated where they do not divide; [`merge_shares`] drops the repeats.
    """
    state = PartialState()
    padding = -len(items) % state.num_processes
    return (items + items[-1:] * padding)[state.process_index :: state.num_processes]


def merge_shares(share: list, count: int) -> list:
    """The first `count` results, in the order of the items that [`own_share`] dealt out."""
    shares = run_together(lambda: share)[1]
    return [result for row in zip(*shares, strict=True) for result in row][:count]


def largest(number: int) -> int:
    """The largest of the numbers that the processes give: how they agree on something that one of them knows."""
    state = PartialState()
    if state.num_processes == 1:
        return number
    return gather(torch.tensor([number], device=state.device)).max().item()
