"""The trainer: TRL's GRPO on composite groups, with the joint reward."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import CommitInfo, upload_folder
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl import GRPOTrainer

from ..augmentation.folder import AugmentedCollection
from ..data.collection import Collection
from ..data.document import Document
from ..data.groups import TEXT_TYPES, Group, GroupCollator, GroupSampler
from ..policy.download import CARD_FILE, CURVES_FILE, RUN_FILES
from ..policy.prompts import PromptSet
from ..policy.settings import GenerationSettings, PolicySettings
from ..retrieval import Retriever
from ..rewards.joint import JointReward
from ..rewards.pool import Corpus
from ..rewards.together import fail_together
from ..utils.errors import InputError
from ..utils.files import write_json
from .advantages import log_generation_batch, logged_rewards, normalize_advantages
from .callbacks import CollapseGuard, FiniteGuard, RatioAlarm, StopOnSignal
from .checkpoints import check_checkpoint, load_state, save_state, writing_checkpoint
from .config import CoAugConfig
from .dev_evaluator import DevEvaluator
from .negatives import make_groups
from .prompts import make_rows
from .record import TRAINING_FILE, describe_training
from .sampler_head import add_sampler_head


logger = logging.getLogger(__name__)


class CoAugTrainer(GRPOTrainer):
    """
    Trainer for query–document co-augmentation, from [Harnessing the Power of Reinforcement Learning for
    Language-Model-Based Information Retriever via Query-Document Co-Augmentation](https://huggingface.co/papers/2506.18670).

    What changes with respect to [`trl.GRPOTrainer`]: the sampler yields composite groups, the first reward function is
    the joint reward, advantages are normalised per text and scaled by text type, and evaluation augments the dev
    collection greedily and retrieves. Generation, loss, weight syncing and distribution are inherited unchanged.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The policy, as in [`trl.GRPOTrainer`].
        args ([`~coaug_trl.CoAugConfig`]):
            Configuration.
        train_collection ([`~coaug_trl.Collection`]):
            Collection whose split is trained on.
        retriever ([`~coaug_trl.retrieval.Retriever`]):
            Its scores are the reward. Fitted here on the collection's documents.
        prompt_set ([`~coaug_trl.PromptSet`], *optional*):
            Prompts and composition; defaults to the package's for the retriever's kind.
        eval_collection ([`~coaug_trl.Collection`], *optional*):
            Collection whose split is evaluated during training: the dev split, never the test split.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Further TRL reward functions, after the joint reward; `args.reward_weights` weighs all of them. They
            receive the columns `group`, `text_type` and `text_id`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train instead of the whole model.
        card_writer (`Callable`, *optional*):
            Writes the model card: takes the trainer, a name and tags. Defaults to TRL's own card; `coaug train` gives
            [`~coaug_trl.publishing.upload.write_run_card`].
        **kwargs:
            Further arguments of [`trl.GRPOTrainer`], such as `quantization_config` or `optimizers`.

    Raises:
        `InputError`: Prompt set and retriever do not match, or the settings would train on nothing.
    """

    _tag_names = ["trl", "coaug"]
    _name = "CoAug"
    _paper = {
        "title": "Harnessing the Power of Reinforcement Learning for Language-Model-Based Information Retriever via "
        "Query-Document Co-Augmentation",
        "id": "2506.18670",
    }

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: CoAugConfig,
        train_collection: Collection,
        retriever: Retriever,
        prompt_set: PromptSet | None = None,
        eval_collection: Collection | None = None,
        reward_funcs: Callable | list[Callable] = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any | None = None,
        card_writer: "Callable[[CoAugTrainer, str | None, list[str]], None] | None" = None,
        **kwargs,
    ):
        prompt_set = prompt_set or PromptSet.default(retriever.kind)
        check_prompt_set(prompt_set, retriever, args)
        check_best_metric(retriever, args)
        self.train_collection = train_collection
        self.eval_collection = eval_collection
        self.retriever = retriever
        self.prompt_set = prompt_set
        self.card_writer = card_writer
        self._cut_said = set()
        groups = make_groups(train_collection, retriever, args)
        retriever.fit(list(train_collection.corpus.values()))
        # The settings are saved whenever the model is, which the base class may do while it is constructed.
        generation = GenerationSettings(args.max_completion_length, args.repetition_penalty)
        self.settings = PolicySettings(prompt_set, generation, retriever.config, args.augment)
        self.training = describe_training(args, train_collection, eval_collection, model, _device_name(args))
        corpus = None
        if args.candidate_pool == "corpus":
            corpus = Corpus(corpus_documents(train_collection, retriever, prompt_set, args), retriever, args.seed)
        if callable(reward_funcs) or isinstance(reward_funcs, str):
            reward_funcs = [reward_funcs]
        joint_reward = JointReward(train_collection, retriever, prompt_set, args, corpus)
        super().__init__(
            model=model,
            reward_funcs=[joint_reward, *map(fail_together, reward_funcs)],
            args=args,
            train_dataset=Dataset.from_dict({"query_id": groups.query_ids}),
            eval_dataset=Dataset.from_dict({"query_id": list(eval_collection.qrels)}) if eval_collection else None,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        self._refuse_vanishing_updates()
        self._penalize_log_probs()
        # GRPOTrainer accepts nothing but a `datasets.Dataset`. Groups are drawn rather than stored, so they take its
        # place once it is constructed.
        self.train_dataset = groups
        self._completions_per_group = args.rows_per_group * args.num_generations
        self.data_collator = GroupCollator(self._completions_per_group)
        self.evaluator = DevEvaluator(self)
        for callback in (FiniteGuard(self), CollapseGuard(self._metrics["train"]), RatioAlarm(), StopOnSignal()):
            if args.collapse_guard or not isinstance(callback, CollapseGuard):
                self.add_callback(callback)
        self._announce()

    def _announce(self):
        groups = self.train_dataset
        self.say(self.train_collection.summary())
        self.say(self.args.batch_summary)
        if groups.num_filled:
            self.say(
                f"1 epoch = {groups.groups_per_epoch // groups.groups_per_batch} generation batches; its last one is "
                f"filled with {groups.num_filled} queries from the epoch's start"
            )

    def say(self, message: str) -> None:
        """Logs a line, once for all processes."""
        if self.accelerator.is_main_process:
            logger.info(message)

    def say_cut(self, num_cut: int, where: str) -> None:
        """Says how many documents were cut, once for each place: the same ones are cut again and again."""
        if num_cut and where not in self._cut_said:
            self._cut_said.add(where)
            self.say(f"{num_cut} documents of {where} were cut to {self.prompt_set.max_document_tokens} tokens")

    def _refuse_vanishing_updates(self):
        low_precision = any(
            parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in self.model.parameters()
        )
        if low_precision and not self.is_deepspeed_enabled:  # which trains float32 copies
            refuse_vanishing_updates(self.args)

    def _penalize_log_probs(self):
        if not self.args.penalize_log_probs or self.args.repetition_penalty == 1.0:
            return
        if is_deepspeed_zero3_enabled():
            raise InputError(
                "penalize_log_probs is True under ZeRO-3, whose sharded LM head cannot be read twice in a step; use "
                "ZeRO-2, FSDP2 or DDP, or set penalize_log_probs to False."
            )
        for model in (self.model, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)  # DeepSpeed has wrapped the reference by now
                model = model.get_base_model() if is_peft_model(model) else model
                add_sampler_head(model, self.temperature, self.repetition_penalty)

    # The eight hooks. CONTRIBUTING says what each is for.

    def _get_train_sampler(self, dataset: Any | None = None) -> GroupSampler:
        groups = self.train_dataset
        repeat_count = self.args.steps_per_generation * self.num_iterations
        batches_per_epoch = groups.groups_per_epoch // groups.groups_per_batch
        steps_per_epoch = batches_per_epoch * repeat_count // self.args.gradient_accumulation_steps
        return GroupSampler(
            groups,
            self._completions_per_group,
            repeat_count,
            current_epoch=lambda: self.state.global_step // steps_per_epoch,
            has_ended=lambda: 0 < self.state.max_steps <= self.state.global_step,
        )

    def _generate_and_score_completions(self, inputs: list[Group]) -> dict[str, torch.Tensor | Any]:
        rows, num_cut = make_rows(
            inputs, self.train_collection, self.prompt_set, self._tokenizer, self.args.augment, self.num_generations
        )
        output = super()._generate_and_score_completions(rows)
        if self.args.advantage_normalization == "batch":  # the others are TRL's `scale_rewards`
            advantages = normalize_advantages(logged_rewards(self), self.num_generations, "batch")
            output["advantages"] = advantages.view(-1, len(rows))[self.accelerator.process_index]
        scales = dict(zip(TEXT_TYPES, self.args.text_type_scales, strict=True))
        row_scales = torch.tensor([scales[row["text_type"]] for row in rows], device=output["advantages"].device)
        output["advantages"] = output["advantages"] * row_scales
        log_generation_batch(self, rows, output, num_cut)
        return output

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluates by [`~coaug_trl.training.dev_evaluator.DevEvaluator`], in place of TRL's loop over completions."""
        self.model.eval()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator.evaluate().items()}
        num_queries = len(self.eval_collection.qrels)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_queries)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        self.settings.save(folder)
        write_json(folder / TRAINING_FILE, self.training)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial=trial))
        with writing_checkpoint(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self) as folder:
            save_state(folder, self)
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            check_checkpoint(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(Path(checkpoint), self)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the card of the run as it is now into `output_dir`: by `card_writer`, or TRL's own without one."""
        if self.card_writer is None:
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero():
            self.card_writer(self, model_name, [tags] if isinstance(tags, str) else tags or [])

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Saves the policy and pushes it with its card, as [`~transformers.Trainer.push_to_hub`] does, but only the files
        of a policy: the base class would push all of `output_dir`, with a pickle of the arguments. `coaug push` adds
        the evaluations.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.save_state()
        self.create_model_card(model_name=self.hub_model_id, **kwargs)
        return upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            revision=revision or self.args.hub_revision,
            allow_patterns=[*RUN_FILES, CARD_FILE, CURVES_FILE],
        )


def _device_name(args: CoAugConfig) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() and not args.use_cpu else "cpu"


def refuse_vanishing_updates(args: CoAugConfig) -> None:
    """Raises an `InputError` if updates of bfloat16 parameters would round to nothing."""
    if args.learning_rate < 1e-5:
        raise InputError(
            f"learning_rate is {args.learning_rate} and the trained parameters are bfloat16: nearly all updates would "
            "round to nothing. Load the model in float32 (dtype: float32; bf16: true still computes in bfloat16), or "
            "set learning_rate to at least 1e-5."
        )


def check_prompt_set(prompt_set: PromptSet, retriever: Retriever, args: CoAugConfig) -> None:
    """Raises an `InputError` if the prompts are not for this retriever, or not for the sides that are trained."""
    if prompt_set.kind != retriever.kind:
        raise InputError(
            f"The prompt set is for {prompt_set.kind} retrievers and the retriever is {retriever.kind}; use "
            f"PromptSet.default({retriever.kind!r}) or one of your own of that kind."
        )
    prompt_set.check_sides(("query", "document") if args.augment == "both" else (args.augment,))


def check_best_metric(retriever: Retriever, args: CoAugConfig) -> None:
    """Raises an `InputError` if the best checkpoint is to be told by what this retriever has no measure of."""
    if retriever.kind != "sparse" and (args.metric_for_best_model or "").endswith("_reward_statistics"):
        raise InputError(
            f"metric_for_best_model is {args.metric_for_best_model!r}, which is measured with BM25 alone; use "
            f"eval_nDCG@{args.ndcg_k}, or leave it out."
        )


def corpus_documents(
    collection: Collection, retriever: Retriever, prompt_set: PromptSet, args: CoAugConfig
) -> list[Document]:
    """
    All documents as they are ranked outside the batch with `candidate_pool="corpus"`.

    Raises `InputError`: `args.augmentations` holds no augmentations of documents, or those of other settings.
    """
    if args.augmentations is None:
        if args.augment != "query" and PartialState().is_main_process:
            logger.warning(
                'candidate_pool is "corpus" without augmentations: documents outside the batch have their original '
                "text, so documents of the batch are rewarded for any terms that lift them above those. Run coaug "
                "augment --side document with the untrained policy and give its folder as augmentations."
            )
        return list(collection.corpus.values())
    augmented = AugmentedCollection.load(args.augmentations, ["document"])
    augmented.check(collection, prompt_set, retriever.config)
    return augmented.documents(collection, retriever.answer_field)
