"""What [`~coaug_trl.CoAugConfig`] refuses: values that cannot work, and those that would train on nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.trainer_utils import HubStrategy


Config = Any  # [`~coaug_trl.CoAugConfig`], which checks these rules itself
CHOICES = {
    "augment": ("both", "query", "document"),
    "candidate_pool": ("group", "batch", "corpus"),
    "bm25_statistics": ("running", "refreshed", "original"),
    "reward_estimator": ("exact", "sampled"),
    "advantage_normalization": ("center", "group", "batch"),
    "vllm_mode": ("server", "colocate"),
}
COUNTS = (
    "queries_per_group",
    "num_relevant",
    "groups_per_batch",
    "updates_per_batch",
    "per_device_train_batch_size",
    "max_completion_length",
    "ndcg_k",
)


class Rule(NamedTuple):
    """When a configuration breaks the rule, and what it is told: the field, its value, and what to set instead."""

    broken: Callable[[Config], bool]
    message: Callable[[Config], str]


def _count(name: str) -> Rule:
    return Rule(lambda c: getattr(c, name) < 1, lambda c: f"{name} is {getattr(c, name)}; use at least 1.")


def _choice(name: str) -> Rule:
    return Rule(
        lambda c: getattr(c, name) not in CHOICES[name],
        lambda c: f"{name} is {getattr(c, name)!r}; use one of {', '.join(CHOICES[name])}.",
    )


def _least_group(c: Config) -> int:
    return c.queries_per_group * (1 + c.num_relevant)


def _places(c: Config) -> int:
    return c.group_size - _least_group(c)


def _ranks_are_wrong(c: Config) -> bool:
    ranks = c.hard_negative_ranks
    return len(ranks) != 2 or not all(isinstance(rank, int) for rank in ranks) or not 1 <= ranks[0] <= ranks[1]


def _best_is_not_measured(c: Config) -> bool:
    measured = (f"nDCG@{c.ndcg_k}", f"nDCG@{c.ndcg_k}_reward_statistics")
    return c.metric_for_best_model is not None and c.metric_for_best_model.removeprefix("eval_") not in measured


def _largest_trained_scale(c: Config) -> float:
    scales = {"both": slice(None), "query": slice(1), "document": slice(1, None)}[c.augment]
    return max(c.text_type_scales[scales])


def _correction(c: Config) -> str:
    processors = c.processors_of_sampler_alone
    active = ", ".join(f"{name}={getattr(c, name)}" for name in processors)
    more = ", or penalize_log_probs to True." if "repetition_penalty" in processors else "."
    return (
        f"vllm_importance_sampling_correction is True with {active}: vLLM's log-probabilities include it, the "
        "trainer's do not, and the correction would scale almost every sequence's loss to 0. Set "
        f"vllm_importance_sampling_correction to False{more}"
    )


RULES = (
    *map(_count, COUNTS),
    *map(_choice, CHOICES),
    Rule(
        lambda c: _places(c) < 0,
        lambda c: (
            f"group_size is {c.group_size}, too small for queries_per_group={c.queries_per_group} with "
            f"num_relevant={c.num_relevant}; use at least {_least_group(c)}."
        ),
    ),
    Rule(
        lambda c: not 0 <= c.num_hard_negatives <= _places(c),
        lambda c: (
            f"num_hard_negatives is {c.num_hard_negatives}, but group_size={c.group_size} leaves room for "
            f"{_places(c)} beside queries_per_group={c.queries_per_group} and num_relevant={c.num_relevant}; use "
            f"{f'0 to {_places(c)}' if _places(c) else 'a larger group_size, or 0'}."
        ),
    ),
    Rule(
        _ranks_are_wrong,
        lambda c: (
            f"hard_negative_ranks is {c.hard_negative_ranks}; use a first and a last rank, counted from 1, such "
            "as 10 100."
        ),
    ),
    Rule(
        lambda c: HubStrategy(c.hub_strategy) is not HubStrategy.END,
        lambda c: (
            f"hub_strategy is {HubStrategy(c.hub_strategy).value!r}, which would push while training, with the optimizer's state, "
            "a pickle; set hub_strategy to 'end', and push a checkpoint by coaug push."
        ),
    ),
    Rule(
        lambda c: c.augmentations is not None and (c.candidate_pool != "corpus" or c.augment == "query"),
        lambda c: (
            f"augmentations is {c.augmentations!r} with candidate_pool={c.candidate_pool!r} and "
            f"augment={c.augment!r}: it is for documents outside the batch, where documents are augmented; leave it out, or "
            "set candidate_pool to 'corpus' and augment to 'both' or 'document'."
        ),
    ),
    Rule(
        lambda c: c.bm25_statistics == "running" and c.candidate_pool == "group",
        lambda c: (
            "bm25_statistics is 'running' with candidate_pool='group', where no process has the documents of the "
            "whole batch; set candidate_pool to 'batch' or 'corpus', or bm25_statistics to 'original' or 'refreshed'."
        ),
    ),
    Rule(
        lambda c: c.reward_estimator == "sampled" and c.num_reward_samples < 1,
        lambda c: f"num_reward_samples is {c.num_reward_samples}; use at least 1, such as 512.",
    ),
    Rule(
        lambda c: c.relevant_weight < 0,
        lambda c: f"relevant_weight is {c.relevant_weight}; use 0 or more, such as 10.",
    ),
    Rule(
        lambda c: c.eval_corpus_size is not None and c.eval_corpus_size < 1,
        lambda c: f"eval_corpus_size is {c.eval_corpus_size}; use at least 1, or leave it out for all.",
    ),
    Rule(
        _best_is_not_measured,
        lambda c: (
            f"metric_for_best_model is {c.metric_for_best_model!r}, but evaluations measure eval_nDCG@{c.ndcg_k} "
            f"(ndcg_k is {c.ndcg_k}); use that, or leave it out."
        ),
    ),
    Rule(
        lambda c: len(c.text_type_scales) != 3 or min(c.text_type_scales) < 0,
        lambda c: (
            f"text_type_scales is {c.text_type_scales}; use three factors of 0 or more, for queries, relevant and "
            "irrelevant documents, such as 1.0 0.2 0.1."
        ),
    ),
    Rule(
        lambda c: c.num_generations is None or c.num_generations < 2,
        lambda c: (
            f"num_generations is {c.num_generations}: a single rollout is its own baseline, so every advantage is "
            "0; use at least 2, such as 5."
        ),
    ),
    Rule(
        lambda c: c.num_generations_eval != 1,
        lambda c: f"num_generations_eval is {c.num_generations_eval}; dev evaluation is greedy, use 1.",
    ),
    Rule(
        lambda c: _largest_trained_scale(c) == 0,
        lambda c: (
            f"text_type_scales is {c.text_type_scales} with augment={c.augment!r}: every advantage would be 0; use "
            "a positive factor for a side that is trained, such as 1.0 0.2 0.1."
        ),
    ),
    Rule(
        lambda c: (
            c.scale_rewards not in ("none", False, c.derived_scale_rewards)
            or c.multi_objective_aggregation != "sum_then_normalize"
        ),
        lambda c: (
            f"scale_rewards is {c.scale_rewards!r} and multi_objective_aggregation is "
            f"{c.multi_objective_aggregation!r}, but both follow from advantage_normalization. Leave both out and set "
            "advantage_normalization to 'center', 'group' or 'batch'."
        ),
    ),
    Rule(
        lambda c: c.use_vllm and c.vllm_importance_sampling_correction and bool(c.processors_of_sampler_alone),
        _correction,
    ),
    Rule(
        lambda c: c.penalize_log_probs and c.cast_lm_head_to_fp32,
        lambda c: (
            "cast_lm_head_to_fp32 is True with penalize_log_probs, whose LM head computes as the rest of the "
            "model; set one of them to False."
        ),
    ),
    Rule(
        lambda c: (c.use_transformers_continuous_batching or c.use_transformers_paged) and c.repetition_penalty != 1.0,
        lambda c: (
            f"repetition_penalty is {c.repetition_penalty} with use_transformers_continuous_batching, which "
            "silently drops it. Set repetition_penalty to 1.0, or use vLLM or plain generation."
        ),
    ),
    Rule(
        lambda c: c.learning_rate == 0,
        lambda c: "learning_rate is 0: no weight would change; use a positive one, such as 1e-6.",
    ),
    Rule(
        lambda c: not c.temperature > 0,
        lambda c: (
            f"temperature is {c.temperature}: all rollouts of a text would be the same and every advantage 0; use "
            "a positive one, such as 1.2."
        ),
    ),
)


def check_rules(config: Config) -> None:
    """Raises a `ValueError` with the message of the first rule that a configuration breaks."""
    for rule in RULES:
        if rule.broken(config):
            raise ValueError(rule.message(config))
