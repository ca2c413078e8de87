"""Configuration of [`~coaug_trl.CoAugTrainer`]: `GRPOConfig` and the fields of co-augmentation."""

import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Literal

from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from .rules import check_rules


@dataclass
class CoAugConfig(GRPOConfig):
    r"""
    Configuration class for the [`CoAugTrainer`].

    This class includes only the parameters that are specific to co-augmentation, and the defaults of [`trl.GRPOConfig`]
    that differ. The defaults are those of arXiv 2506.18670, appendix B.1, but for `candidate_pool`,
    `reward_estimator` and `relevant_weight`.

    Batch arithmetic: a generation batch has `groups_per_batch` groups of `group_size` texts (fewer with
    `augment="query"` or `"document"`), `num_generations` rollouts each, and is trained on in `updates_per_batch`
    optimizer steps. `generation_batch_size`, `steps_per_generation` and `gradient_accumulation_steps` follow from
    these, `per_device_train_batch_size` and the number of processes; giving them too is an error.

    Parameters:
        queries_per_group (`int`, *optional*, defaults to `1`):
            Queries in a composite group.
        group_size (`int`, *optional*, defaults to `16`):
            Texts in a composite group, queries and documents together.
        num_relevant (`int`, *optional*, defaults to `5`):
            At most so many relevant documents per query in a group; the rest of the group is irrelevant documents.
        num_hard_negatives (`int`, *optional*, defaults to `0`):
            At most so many irrelevant documents of a group are hard negatives: documents that nobody judged for its
            queries and that the retriever ranks high for them without augmentation. They are mined when training
            starts and kept in `hard_negatives.json` in `output_dir`. The others are drawn from the whole corpus.
        hard_negative_ranks (`list[int]`, *optional*, defaults to `[10, 100]`):
            First and last rank from which hard negatives are taken, counted from 1. The best ranks are left out because
            many of their documents are relevant and only not judged; a policy would be trained to rank those lower.
        groups_per_batch (`int`, *optional*, defaults to `32`):
            Composite groups in a generation batch, over all processes.
        updates_per_batch (`int`, *optional*, defaults to `4`):
            Optimizer steps on a generation batch.
        augment (`str`, *optional*, defaults to `"both"`):
            Which side is augmented and trained: `"both"`, `"query"` or `"document"`. The other side's texts stay as
            they are.
        candidate_pool (`str`, *optional*, defaults to `"batch"`):
            What a query is ranked against for its reward: `"group"`, its own group's documents (the paper's text);
            `"batch"`, every document of the generation batch (the published code); or `"corpus"`, every document
            there is, those outside the batch with the text they have in `augmentations`.
        augmentations (`str`, *optional*):
            Folder of `coaug augment --side document`, made by the untrained policy or an earlier round of training:
            the texts of documents outside the batch with `candidate_pool="corpus"`. Without it they keep their
            original text, which rewards rollouts for having more terms than those.
        reward_estimator (`str`, *optional*, defaults to `"exact"`):
            `"exact"` for the expected NDCG over all draws of document rollouts, or `"sampled"` for the paper's average
            over `num_reward_samples` draws.
        num_reward_samples (`int`, *optional*, defaults to `512`):
            Draws of the sampled estimator.
        relevant_weight (`float`, *optional*, defaults to `10.0`):
            A query weighs `1 + relevant_weight * relevance` in the reward of a document.
        ndcg_k (`int`, *optional*, defaults to `10`):
            Cut-off of the NDCG that is the reward, and of the one logged in evaluation.
        advantage_normalization (`str`, *optional*, defaults to `"center"`):
            `"center"` subtracts the mean of a text's own rollouts (the paper). For ablation `"group"` also divides by
            their standard deviation (GRPO), and `"batch"` standardizes over the generation batch (REINFORCE++).
        text_type_scales (`list[float]`, *optional*, defaults to `[1.0, 0.2, 0.1]`):
            Factors of the advantages of queries, relevant documents and irrelevant documents, applied last.
        ignore_identical_ids (`bool`, *optional*, defaults to `False`):
            Whether a query does not compete with the document that has its id, in rewards and dev evaluations, for
            collections whose queries are documents of the corpus, such as ArguAna and Quora.
        bm25_statistics (`str`, *optional*, defaults to `"running"`, `"original"` where `candidate_pool` is `"group"`):
            BM25's statistics in the reward. `"running"`: they follow the corpus as it is augmented, by a running
            estimate from the rollouts of every batch. `"refreshed"`: each dev evaluation replaces them by those of the
            corpus as augmented then. `"original"`: they stay those of the original corpus (the published code).
        penalize_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the trainer's log-probabilities are those of the sampler's own distribution, with the repetition
            penalty applied to tokens seen before, rather than of the temperature alone. The update is then truly
            on-policy, and `vllm_importance_sampling_correction` may stay on.
        eval_corpus_size (`int`, *optional*):
            Dev evaluation ranks so many documents, those judged for a dev query and a seeded draw of others, instead
            of the full corpus.
        collapse_guard (`bool`, *optional*, defaults to `True`):
            Whether training stops when the policy has collapsed: when one of four measures has been below its threshold
            for 50 optimizer steps. See [`~coaug_trl.training.callbacks.CollapseGuard`].

    > Defaults of GRPOConfig that differ: `num_generations=5`, `temperature=1.2`, `repetition_penalty=1.2`,
    > `scale_rewards="none"` (advantages are normalised here), `vllm_importance_sampling_correction=False`,
    > `num_generations_eval=1` (dev evaluation is greedy), `bf16` only on a GPU that supports it,
    > `metric_for_best_model` is `eval_nDCG@` of `ndcg_k` where the best checkpoint is asked for, `project="coaug"`,
    > `run_name` is the last part of `output_dir`, `hub_strategy="end"`, and `trackio_static_space_id=False`, so that curves stay on this
    > machine when the model is pushed.

    Raises:
        `ValueError`: A field has a value that cannot work, or that would train on nothing. The message names the
        field, the value and a legal one.
    """

    num_generations: int | None = field(
        default=5, metadata={"help": "Rollouts of each text. Their mean reward is the baseline of each."}
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Dev evaluation is greedy, with one augmentation a text; leave it at 1."}
    )
    temperature: float = field(default=1.2, metadata={"help": "Sampling temperature of the rollouts."})
    repetition_penalty: float = field(
        default=1.2,
        metadata={"help": "Penalty on tokens that stand in the prompt or the completion; 1.0 is none. Kept in use."},
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "Leave it at 'end': a run is pushed when it has ended; see coaug push."}
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "Leave it at 'none'; use advantage_normalization and text_type_scales."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "TRL's correction for the difference between vLLM's and the trainer's log-probabilities. Off, "
            "because with a repetition penalty it takes the penalty for such a difference and trains on nothing."
        },
    )
    project: str = field(default="coaug", metadata={"help": "Project of the run in Trackio."})
    trackio_static_space_id: str | None | Literal[False] = field(
        default=False, metadata={"help": "Space that gets the curves when the model is pushed; default: none does."}
    )
    queries_per_group: int = field(default=1, metadata={"help": "Queries in a composite group."})
    group_size: int = field(default=16, metadata={"help": "Texts in a composite group, queries and documents."})
    num_relevant: int = field(default=5, metadata={"help": "At most so many relevant documents per query in a group."})
    num_hard_negatives: int = field(
        default=0,
        metadata={
            "help": "At most so many irrelevant documents of a group are unjudged ones that rank high; 0 is none."
        },
    )
    hard_negative_ranks: list[int] = field(
        default_factory=lambda: [10, 100],
        metadata={
            "help": "First and last rank, from 1, of hard negatives in the search without augmentation. Those ranked "
            "best are often relevant though nobody judged them, so they are left out."
        },
    )
    groups_per_batch: int = field(default=32, metadata={"help": "Groups in a generation batch, over all processes."})
    updates_per_batch: int = field(default=4, metadata={"help": "Optimizer steps on a generation batch."})
    augment: str = field(
        default="both",
        metadata={"help": "Side that is augmented and trained.", "choices": ["both", "query", "document"]},
    )
    candidate_pool: str = field(
        default="batch",
        metadata={
            "help": "Documents a query is ranked against: its own group's, the generation batch's, or all.",
            "choices": ["group", "batch", "corpus"],
        },
    )
    augmentations: str | None = field(
        default=None,
        metadata={"help": "Folder of coaug augment: texts of documents outside the batch, for candidate_pool corpus."},
    )
    reward_estimator: str = field(
        default="exact",
        metadata={"help": "Expected NDCG over all draws, or over a sample.", "choices": ["exact", "sampled"]},
    )
    num_reward_samples: int = field(default=512, metadata={"help": "Draws of the sampled estimator."})
    relevant_weight: float = field(
        default=10.0, metadata={"help": "A query weighs 1 + relevant_weight * relevance in a document's reward."}
    )
    ndcg_k: int = field(default=10, metadata={"help": "Cut-off of the NDCG that is the reward."})
    advantage_normalization: str = field(
        default="center",
        metadata={
            "help": "Advantages: centred per text, or standardized per text or over the batch, for ablation.",
            "choices": ["center", "group", "batch"],
        },
    )
    text_type_scales: list[float] = field(
        default_factory=lambda: [1.0, 0.2, 0.1],
        metadata={"help": "Factors of the advantages of queries, relevant documents and irrelevant documents."},
    )
    ignore_identical_ids: bool = field(
        default=False,
        metadata={"help": "Leave out the document with the id of the query, where queries are documents."},
    )
    bm25_statistics: str | None = field(
        default=None,
        metadata={
            "help": "BM25's statistics in the reward: a running estimate from the rollouts, replaced at dev evaluations, "
            "or those of the original corpus. Default: running, original where candidate_pool is group.",
            "choices": ["running", "refreshed", "original"],
        },
    )
    penalize_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Whether the trainer's log-probabilities apply the repetition penalty, as the sampler does."
        },
    )
    eval_corpus_size: int | None = field(
        default=None, metadata={"help": "Documents ranked in dev evaluation, judged ones always kept; default: all."}
    )
    collapse_guard: bool = field(
        default=True, metadata={"help": "Whether training stops when the policy has collapsed."}
    )
    # The names that bm25_statistics has replaced.
    refresh_statistics: InitVar[bool | None] = None
    running_statistics: InitVar[bool | None] = None

    def __post_init__(self, refresh_statistics: bool | None, running_statistics: bool | None):
        for name, value in (("refresh_statistics", refresh_statistics), ("running_statistics", running_statistics)):
            if value is not None:
                raise ValueError(f"{name} is now bm25_statistics; set it to 'running', 'refreshed' or 'original'.")
        if self.bm25_statistics is None:
            self.bm25_statistics = "original" if self.candidate_pool == "group" else "running"
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
        check_rules(self)
        self.scale_rewards = self.derived_scale_rewards
        self._derive_batches(num_processes)
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = f"eval_nDCG@{self.ndcg_k}"
        if self.bf16 is None:  # GRPOConfig would take it for granted, and not construct where there is no such GPU
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
        if self.run_name is None:  # a run that goes on is found by its name
            self.run_name = Path(self.output_dir).resolve().name
        if self.world_size != num_processes:
            raise ValueError(
                f"{num_processes} processes were launched, but each would train alone: there is no GPU for them and "
                f"use_cpu is {self.use_cpu}; set use_cpu to true."
            )

    @property
    def rows_per_group(self) -> int:
        """Texts of a group that are generated for."""
        return {
            "both": self.group_size,
            "query": self.queries_per_group,
            "document": self.group_size - self.queries_per_group,
        }[self.augment]

    @property
    def batch_summary(self) -> str:
        """The batch arithmetic in one line."""
        return (
            f"1 generation batch = {self.groups_per_batch} groups × {self.rows_per_group} texts × "
            f"{self.num_generations} rollouts = {self.generation_batch_size:,} completions, "
            f"{self.updates_per_batch} optimizer step{'s' if self.updates_per_batch > 1 else ''}"
        )

    @property
    def derived_scale_rewards(self) -> str:
        """TRL's name of `advantage_normalization`; that of the batch is not TRL's, and made after it."""
        return "group" if self.advantage_normalization == "group" else "none"

    @property
    def processors_of_sampler_alone(self) -> list[str]:
        """Settings that vLLM's log-probabilities include and the trainer's do not."""
        active = {
            "repetition_penalty": self.repetition_penalty != 1.0 and not self.penalize_log_probs,
            "top_p": self.top_p < 1.0,
            "top_k": self.top_k > 0,
            "min_p": bool(self.min_p),
        }
        return [name for name, on in active.items() if on]

    def _derive_batches(self, num_processes: int):
        if self.groups_per_batch % num_processes:
            raise ValueError(
                f"groups_per_batch is {self.groups_per_batch}, which {num_processes} processes cannot share evenly; "
                f"use {_nearest_multiple(self.groups_per_batch, num_processes)}."
            )
        completions = self.groups_per_batch * self.rows_per_group * self.num_generations
        per_process = completions // num_processes
        if per_process % self.updates_per_batch:
            legal = _nearest_divisors(per_process, self.updates_per_batch)
            raise ValueError(
                f"updates_per_batch is {self.updates_per_batch}, which does not divide the {per_process:,} completions "
                f"that each process has of a generation batch; use {legal}."
            )
        per_update = per_process // self.updates_per_batch
        if per_update % self.per_device_train_batch_size:
            legal = _nearest_divisors(per_update, self.per_device_train_batch_size)
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}, which does not divide the "
                f"{per_update:,} completions that each process has in an optimizer step ({self.groups_per_batch} "
                f"groups × {self.rows_per_group} texts × {self.num_generations} rollouts / {self.updates_per_batch} "
                f"updates / {num_processes} processes); use {legal}."
            )
        accumulation = per_update // self.per_device_train_batch_size
        # A value equal to the derived one is let through: it comes back when a saved configuration is read again.
        for name, derived, unset in (
            ("generation_batch_size", completions, None),
            ("steps_per_generation", self.updates_per_batch * accumulation, None),
            ("gradient_accumulation_steps", accumulation, 1),
        ):
            if getattr(self, name) not in (derived, unset):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but it follows from groups_per_batch, updates_per_batch, "
                    f"per_device_train_batch_size and {num_processes} processes, which give {derived}; leave it out."
                )
        self.generation_batch_size = completions
        self.steps_per_generation = None  # GRPOConfig takes one of the two and derives the other
        self.gradient_accumulation_steps = accumulation


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in divisors if divisor < wanted]
    above = [divisor for divisor in divisors if divisor > wanted]
    return " or ".join(str(divisor) for divisor in below[-1:] + above[:1])


def _nearest_multiple(number: int, factor: int) -> str:
    below = number // factor * factor
    return " or ".join(str(multiple) for multiple in (below, below + factor) if multiple)
