"""
What vLLM's CPU backend needs to take weights from a trainer, and to live in one process with numba. No GPU backend does.
"""

import sys

import torch
from vllm.model_executor.layers import utils
from vllm.triton_utils import dispatcher


packed, rebind = utils.dispatch_cpu_unquantized_gemm, dispatcher._rebind_kernels


def keep_plain(layer: torch.nn.Module, remove_weight: bool) -> None:
    """
    Keeps the weights of linear layers as they are.

    The backend packs them into a format of its own and leaves empty tensors, so that the weights a trainer sends either
    raise or, for tied embeddings, go nowhere and the engine goes on with the old ones.
    """
    if layer.weight.ndim == 2:
        layer.cpu_linear = torch.nn.functional.linear
    else:
        packed(layer, remove_weight)


def rebind_without_llvmlite(overrides: list) -> None:
    """Looks for kernels in all modules but llvmlite, one of whose objects answers to every name."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
    try:
        rebind(overrides)
    finally:
        sys.modules.update(hidden)


def register() -> None:
    utils.dispatch_cpu_unquantized_gemm = keep_plain
    dispatcher._rebind_kernels = rebind_without_llvmlite
