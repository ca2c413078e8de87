"""Log-probabilities of the distribution that completions were sampled from: with the repetition penalty in force."""

import functools
import types

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from ..utils.errors import InputError


# Logits exist for so many tokens at a time: 300 MB in float32 for a vocabulary of 150,000.
TOKENS_AT_ONCE = 512
# Names under which configurations scale or cap logits, which this head does not do.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)


def add_sampler_head(model: PreTrainedModel, temperature: float, repetition_penalty: float) -> None:
    """
    Replaces the fused LM head of [`trl.trainer.utils.add_fused_lm_head`] by one that penalises repetitions.

    A sampler divides the logits of tokens seen before, in the prompt or the completion, by the repetition penalty if
    they are positive and multiplies them by it if they are negative (CTRL, arXiv 1909.05858, section 4.1), and then
    divides all by the temperature. TRL's head only divides by the temperature, so that its log-probabilities are not
    those that vLLM reports, and the update is not on-policy. With this head both are the same. Padding is no part of the
    prompt, as for vLLM and for `generate` of recent transformers (5.17 still counts it).

    Logits are never there for more than `TOKENS_AT_ONCE` tokens, also in the backward pass, which computes them again.

    Args:
        model: Causal language model with TRL's fused LM head; not its PEFT wrapper.
        temperature: Temperature of the sampler.
        repetition_penalty: Repetition penalty of the sampler.

    Raises `InputError`: The model scales or caps its logits, or is a mixture of experts with a balancing loss.
    """
    config = model.config.get_text_config()
    unsupported = [name for name in _LOGIT_TRANSFORMS if getattr(config, name, None) not in (None, 1.0)]
    unsupported += ["output_router_logits"] * bool(getattr(config, "output_router_logits", False))
    if unsupported:
        raise InputError(
            f"penalize_log_probs is True, but {config.model_type} models with {', '.join(unsupported)} are not "
            "supported; set penalize_log_probs to False."
        )
    fused_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            return fused_forward(*args, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        head = self.get_output_embeddings()
        weight, bias = (
            parameter.full_tensor() if isinstance(parameter, DTensor) else parameter  # sharded by FSDP2
            for parameter in (head.weight, head.bias)
        )
        # a model that is split over several devices may end on another one than its head
        tensors = (hidden, kwargs["input_ids"], kwargs["attention_mask"], labels[:, 1:])
        hidden, input_ids, valid, labels = (tensor.to(weight.device) for tensor in tensors)
        log_probs, entropy = _log_probs(
            hidden, weight, bias, input_ids, valid, labels, temperature, repetition_penalty
        )
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)

    model.forward = types.MethodType(forward, model)


def _log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_ids: torch.Tensor,
    valid: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    penalty: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of labels and entropies, of shape `(batch, length - 1)`, 0 where the label is -100.

    `hidden` has shape `(batch, length - 1, hidden size)`, `input_ids` and `valid` `(batch, length)`, `labels`
    `(batch, length - 1)`.
    """
    tokens, first = _first_places(input_ids, valid)
    rows, places = torch.nonzero(labels != -100, as_tuple=True)
    log_probs, entropies = [], []
    for row, place in zip(rows.split(TOKENS_AT_ONCE), places.split(TOKENS_AT_ONCE), strict=True):
        # The label at `place` is the token after it, for which all tokens up to `place` have been seen.
        arguments = (hidden[row, place], weight, bias, labels[row, place], tokens[row], first[row] <= place[:, None])
        log_prob, entropy = checkpoint(_penalized, *arguments, temperature, penalty, use_reentrant=False)
        log_probs.append(log_prob)
        entropies.append(entropy)
    if not log_probs:  # still a part of the graph: the gradient of every process is waited for
        nothing = hidden[:, :, 0].float() * 0.0
        return nothing, nothing
    zeros = torch.zeros(labels.shape, device=hidden.device)
    return tuple(zeros.index_put((rows, places), torch.cat(values)) for values in (log_probs, entropies))


def _penalized(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    tokens: torch.Tensor,
    seen: torch.Tensor,
    temperature: float,
    penalty: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `labels` and entropies, of shape `(tokens,)`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Cast here, each time, so that the gradients of all calls add up in the precision of the weights; autocast would cast
    # once, and add them up in its own.
    with torch.autocast(device, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).float()
    with torch.no_grad():
        repeated = torch.where(logits.gather(1, tokens) < 0, penalty, 1 / penalty)
        factors = torch.ones_like(logits).scatter_(1, tokens, torch.where(seen, repeated, 1.0)).div_(temperature)
    logits = logits * factors
    log_z = logits.logsumexp(dim=1)
    log_prob = logits.gather(1, labels[:, None]).squeeze(1) - log_z
    entropy = log_z - ((logits - log_z[:, None]).exp() * logits).sum(dim=1)
    return log_prob, entropy


def _first_places(input_ids: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens of each row and where each stands first, of shape `(batch, length)`.

    A token that stands in several places is there as often, with the same first place; one that is not valid has a
    place after the row.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device).expand_as(input_ids).masked_fill(valid == 0, length)
    # The first of equal tokens comes first in a stable order; its place is handed on to the others.
    tokens, order = input_ids.sort(dim=1, stable=True)
    places = places.gather(1, order)
    starts = torch.ones_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    run = starts.cumsum(dim=1) - 1
    first = torch.full_like(tokens, length).scatter_reduce_(1, run, places, "amin")
    return tokens, first.gather(1, run)
