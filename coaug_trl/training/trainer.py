"""The trainer: TRL's GRPO on composite groups, with the joint reward."""

import copy
import json
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import CommitInfo, run_as_future
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress
from trl import GRPOTrainer

from ..augmentation.folder import AugmentedCollection
from ..data.collection import Collection
from ..data.document import Document, document_text
from ..data.groups import TEXT_TYPES, CompositeGroups, Group, GroupCollator, GroupSampler
from ..evaluation.measures import evaluate_run
from ..policy.download import CARD_FILE, explained
from ..policy.prompts import PromptSet, extract_answer
from ..policy.settings import GenerationSettings, PolicySettings
from ..publishing.publish import describe_run, prepare_run
from ..publishing.record import RunRecord
from ..publishing.upload import check_access, check_private, push
from ..retrieval import Retriever
from ..retrieval.base import retrieve
from ..rewards.joint import JointReward
from ..rewards.pool import Corpus
from ..rewards.together import fail_together
from ..utils.distributed import merge_shares, own_share
from ..utils.errors import InputError
from ..utils.files import write_json
from ..utils.terminal import is_json
from .advantages import normalize_advantages
from .callbacks import (
    RATIO,
    CollapseGuard,
    RatioAlarm,
    StopOnSignal,
    mean_sequence_ratio,
    refuse_not_finite_gradient,
    refuse_not_finite_loss,
    refuse_not_finite_weights,
)
from .checkpoints import (
    STATE_FILE,
    begin_checkpoint,
    check_checkpoint,
    finish_checkpoint,
    last_whole_checkpoint,
    load_rollouts,
    save_rollouts,
    saving,
)
from .config import CoAugConfig
from .negatives import HARD_NEGATIVES_FILE, mine_hard_negatives
from .record import TRAINING_FILE, describe_training
from .sampler_head import add_sampler_head
from .trackers import tame_trackio, tracking


logger = logging.getLogger(__name__)
EVAL_DEPTH = 100


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
        **kwargs,
    ):
        prompt_set = prompt_set or PromptSet.default(retriever.kind)
        check_prompt_set(prompt_set, retriever, args)
        check_best_metric(retriever, args)
        self.train_collection = train_collection
        self.eval_collection = eval_collection
        self.retriever = retriever
        self.prompt_set = prompt_set
        self._cut_said = set()
        hard_negatives = None
        if args.num_hard_negatives:
            hard_negatives = mine_hard_negatives(
                train_collection, retriever, args.hard_negative_ranks, Path(args.output_dir) / HARD_NEGATIVES_FILE
            )
        groups = CompositeGroups(
            train_collection,
            num_queries=args.queries_per_group,
            group_size=args.group_size,
            num_relevant=args.num_relevant,
            groups_per_batch=args.groups_per_batch,
            seed=args.seed,
            num_hard_negatives=args.num_hard_negatives,
            hard_negatives=hard_negatives,
        )
        retriever.fit(list(train_collection.corpus.values()))
        # The settings are saved whenever the model is, which the base class may do while it is constructed.
        self.settings = PolicySettings(
            prompt_set,
            GenerationSettings(args.max_completion_length, args.repetition_penalty),
            retriever.config,
            args.augment,
        )
        base_model = model if isinstance(model, str) else model.name_or_path
        device = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.use_cpu else "cpu"
        self._training = describe_training(args, train_collection, eval_collection, base_model, device)
        corpus = None
        if args.candidate_pool == "corpus":
            corpus = Corpus(corpus_documents(train_collection, retriever, prompt_set, args), retriever, args.seed)
        if callable(reward_funcs) or isinstance(reward_funcs, str):
            reward_funcs = [reward_funcs]
        super().__init__(
            model=model,
            reward_funcs=[
                JointReward(train_collection, retriever, prompt_set, args, corpus),
                *map(fail_together, reward_funcs),
            ],
            args=args,
            train_dataset=Dataset.from_dict({"query_id": groups.query_ids}),
            eval_dataset=Dataset.from_dict({"query_id": list(eval_collection.qrels)}) if eval_collection else None,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
            **kwargs,
        )
        self._refuse_vanishing_updates()
        if args.penalize_log_probs and args.repetition_penalty != 1.0:
            self._penalize_log_probs()
        # GRPOTrainer accepts nothing but a `datasets.Dataset`. Groups are drawn rather than stored, so they take its
        # place once it is constructed.
        self.train_dataset = groups
        self._completions_per_group = args.rows_per_group * args.num_generations
        self.data_collator = GroupCollator(self._completions_per_group)
        tame_trackio(self.callback_handler.callbacks)
        self._stop_on_signal = StopOnSignal()
        for callback in (CollapseGuard(args, self._metrics["train"]), RatioAlarm(), self._stop_on_signal):
            self.add_callback(callback)
        self._say(train_collection.summary())
        self._say(args.batch_summary)
        if groups.num_filled:
            self._say(
                f"1 epoch = {groups.groups_per_epoch // args.groups_per_batch} generation batches; its last one is "
                f"filled with {groups.num_filled} queries from the epoch's start"
            )

    def _say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(message)

    def _refuse_vanishing_updates(self):
        low_precision = any(
            parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in self.model.parameters()
        )
        if low_precision and not self.is_deepspeed_enabled:  # which trains float32 copies
            refuse_vanishing_updates(self.args)

    def _penalize_log_probs(self):
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

    # Groups in, rows out

    def _get_train_sampler(self, dataset: Any | None = None) -> GroupSampler:
        groups = self.train_dataset
        repeat_count = self.args.steps_per_generation * self.num_iterations
        batches_per_epoch = groups.groups_per_epoch // groups.groups_per_batch
        steps_per_epoch = batches_per_epoch * repeat_count // self.args.gradient_accumulation_steps
        return GroupSampler(
            groups, self._completions_per_group, repeat_count, lambda: self.state.global_step // steps_per_epoch
        )

    def _rows(self, groups: list[Group]) -> tuple[list[dict[str, Any]], int]:
        """
        One row a completion, as TRL expects it: a prompt, and columns for the reward functions; and how many documents
        were cut.
        """
        rows = [
            {"group": group, "text_type": text_type, "text_id": text_id}
            for group in groups
            for text_type, text_id in group.rows(self.args.augment)
        ]
        corpus, queries = self.train_collection.corpus, self.train_collection.queries
        sides = ["query" if row["text_type"] == "query" else "document" for row in rows]
        texts = [
            queries[row["text_id"]] if side == "query" else document_text(corpus[row["text_id"]])
            for row, side in zip(rows, sides, strict=True)
        ]
        prompts, num_cut = self._prompts(sides, texts)
        for row, prompt in zip(rows, prompts, strict=True):
            row["prompt"] = prompt
        return [row for row in rows for _ in range(self.num_generations)], num_cut

    def _prompts(self, sides: list[str], texts: list[str]) -> tuple[list[Any], int]:
        """Prompts, and how many documents were cut for them."""
        tokenizer = self._tokenizer
        texts = list(texts)
        num_cut = 0
        places = [place for place, side in enumerate(sides) if side == "document"]
        if places:
            cut, num_cut = self.prompt_set.truncate([texts[place] for place in places], tokenizer)
            for place, text in zip(places, cut, strict=True):
                texts[place] = text
        prompts = [self.prompt_set.prompt(side, text, tokenizer) for side, text in zip(sides, texts, strict=True)]
        return prompts, num_cut

    # Rewards and advantages

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[Group]) -> dict[str, torch.Tensor | Any]:
        refuse_not_finite_weights(self.model, self.state, self.args.output_dir)
        rows, num_cut = self._rows(inputs)
        output = super()._generate_and_score_completions(rows)
        # What the joint reward logged of this generation batch, gathered over processes in their order.
        columns = self._logs["extra"]
        rewards = (self._rewards_per_func * self.reward_weights.to(self._rewards_per_func.device)).nansum(dim=1)
        advantages = normalize_advantages(rewards, self.num_generations, self.args.advantage_normalization)
        scales = dict(zip(TEXT_TYPES, self.args.text_type_scales, strict=True))
        advantages = advantages * torch.tensor(
            [scales[text_type] for text_type in columns["text_type"]], device=advantages.device
        )
        num_local = len(output["advantages"])
        first = self.accelerator.process_index * num_local
        output["advantages"] = advantages[first : first + num_local]
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(advantages.tolist())
        self._log_text_types(rewards, advantages, self._clipped(output), columns)
        num_cut = self.accelerator.gather(torch.tensor([num_cut], device=advantages.device)).sum().item()
        self._metrics["train"]["documents_cut"].append(num_cut)
        self._log_cut(num_cut, "a generation batch")
        ratio = mean_sequence_ratio(output)
        if ratio is not None and not self.args.processors_of_sampler_alone:
            self._metrics["train"][RATIO].append(self.accelerator.gather(ratio).mean().item())
        return output

    def _log_cut(self, num_cut: int, where: str):
        if num_cut and where not in self._cut_said:  # the same documents are cut again and again
            self._cut_said.add(where)
            self._say(f"{num_cut} documents of {where} were cut to {self.prompt_set.max_document_tokens} tokens")

    def _clipped(self, output: dict[str, torch.Tensor]) -> torch.Tensor:
        """Whether each completion of the generation batch, over all processes, reached the longest length."""
        lengths = output["completion_mask"].sum(dim=1)
        last = output["completion_ids"].gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
        # TRL masks truncated completions whole if asked to
        return self.accelerator.gather((lengths == 0) | ~torch.isin(last, ends))

    def _log_text_types(
        self, rewards: torch.Tensor, advantages: torch.Tensor, clipped: torch.Tensor, columns: dict[str, Any]
    ):
        metrics = self._metrics["train"]
        spread = rewards.view(-1, self.num_generations)
        no_spread = (spread.amax(dim=1) - spread.amin(dim=1) < 1e-8).repeat_interleave(self.num_generations)
        words = torch.tensor([float(len(answer.split())) for answer in columns["answer"]], device=rewards.device)
        types = list(columns["text_type"])
        for text_type in TEXT_TYPES:
            chosen = torch.tensor([each == text_type for each in types], device=rewards.device)
            if not chosen.any():
                continue
            metrics[f"{text_type}/reward"].append(rewards[chosen].mean().item())
            metrics[f"{text_type}/advantage_std"].append(advantages[chosen].std().item())
            metrics[f"{text_type}/zero_spread_share"].append(no_spread[chosen].float().mean().item())
            metrics[f"{text_type}/answer_rate"].append((words[chosen] > 0).float().mean().item())
            metrics[f"{text_type}/answer_words"].append(words[chosen].mean().item())
            spoken = [
                word
                for answer, each in zip(columns["answer"], types, strict=True)
                if each == text_type
                for word in answer.lower().split()
            ]
            metrics[f"{text_type}/distinct_words"].append(len(set(spoken)) / max(len(spoken), 1))
            metrics[f"{text_type}/clipped_ratio"].append(clipped[chosen].float().mean().item())

    # Trackers

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with tracking(self):
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Trackio would keep thousands of prompts a step among the curves, and its page would load them all. They are in
        # the files of `log_completions`.
        trackers = self.args.report_to
        self.args.report_to = [name for name in trackers if name != "trackio"]
        try:
            with self._printing():
                super().log(logs, start_time)
        finally:
            self.args.report_to = trackers

    @contextmanager
    def _printing(self):
        """Keeps TRL's table of completions, which is there even with none to print, from where it does not belong."""
        none = self.num_completions_to_print == 0 and not self.args.disable_tqdm  # which prints what is logged
        with open(os.devnull, "w") as nowhere:
            file = sys.stderr if is_json() else nowhere if none else sys.stdout
            with redirect_stdout(file):
                yield

    # Guards

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = output[0].detach()  # the last ones before the loss are the policy's
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        refuse_not_finite_loss(
            loss.detach(), self._log_probs, inputs, self._tokenizer, self.state, self.args.output_dir
        )
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.mixed_precision != "fp16":  # which skips such a step, and takes a smaller scale
            refuse_not_finite_gradient(norm, self.state, self.args.output_dir, self.is_deepspeed_enabled)
        return norm

    # Evaluation on the dev collection

    @contextmanager
    def _greedy_generation(self):
        """TRL's own generation, but greedy: the settings a trained policy is used with."""
        if self.use_vllm:
            sampling = {
                name: getattr(self.vllm_generation, name) for name in ("temperature", "top_p", "top_k", "min_p")
            }
            for name, value in {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": None}.items():
                setattr(self.vllm_generation, name, value)
            try:
                yield
            finally:
                for name, value in sampling.items():
                    setattr(self.vllm_generation, name, value)
        else:
            sampling, sampling_kwargs = self.generation_config, self.generation_kwargs
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
            self.generation_kwargs = {**sampling_kwargs, **greedy}
            self.generation_config = type(sampling)(**self.generation_kwargs, disable_compile=True)
            try:
                yield
            finally:
                self.generation_config, self.generation_kwargs = sampling, sampling_kwargs

    def augment_greedily(self, side: str, texts: list[str]) -> list[str]:
        """
        Answers of the current policy, generated as after training, shared among processes.

        Args:
            side (`str`):
                `"query"` or `"document"`.
            texts (`list[str]`):
                The same texts on every process.

        Returns:
            `list[str]`: one answer a text, empty where there was none.
        """
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        prompts, num_cut = self._prompts([side] * len(texts), [texts[index] for index in by_length])
        self._log_cut(num_cut, "the dev collection")
        prompts = own_share(prompts)
        answers = []
        batch_size = self.args.per_device_eval_batch_size
        with tracking(self), self._greedy_generation():
            for first in tqdm(
                range(0, len(prompts), batch_size),
                desc=f"Augmenting {len(texts)} {'queries' if side == 'query' else 'documents'}",
                disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
                leave=False,
            ):
                prompt_ids, images, fields = self._tokenize_prompts(prompts[first : first + batch_size])
                completion_ids, _ = self._generate_single_turn(prompt_ids, images, fields, num_generations=1)
                completions = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
                answers += [extract_answer(completion) for completion in completions]
        merged = merge_shares(answers, len(texts))
        in_order = [""] * len(texts)
        for index, answer in zip(by_length, merged, strict=True):
            in_order[index] = answer
        return in_order

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        Augments the dev collection greedily, retrieves, and measures over every judged query.

        Logs `eval_nDCG@k` from an index of the augmented corpus, as deployment builds it, and
        `eval_nDCG@k_reward_statistics` with the statistics the reward used until now.
        """
        self.model.eval()
        collection = self.eval_collection
        queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
        documents = self._eval_documents()
        if self.args.augment != "document":
            answers = self.augment_greedily("query", list(queries.values()))
            queries = {
                query_id: self.prompt_set.compose_query(query, answer)
                for (query_id, query), answer in zip(queries.items(), answers, strict=True)
            }
        if self.args.augment != "query":
            answers = self.augment_greedily("document", [document_text(document) for document in documents])
            documents = [
                self.prompt_set.compose_document(document, answer, self.retriever.answer_field)
                for document, answer in zip(documents, answers, strict=True)
            ]
        deployed = copy.copy(self.retriever)
        deployed.index(documents)
        measure, depth = f"nDCG@{self.args.ndcg_k}", max(EVAL_DEPTH, self.args.ndcg_k)
        ignore = self.args.ignore_identical_ids
        runs = {measure: retrieve(deployed, queries, depth, ignore)}
        if self.retriever.kind == "sparse":  # dense scores take no statistics from the corpus
            ranked = self.retriever.rank(list(queries.values()), documents, depth + ignore)
            runs[f"{measure}_reward_statistics"] = {
                query_id: {id_: score for id_, score in hits if not (ignore and id_ == query_id)}
                for query_id, hits in zip(queries, ranked, strict=True)
            }
            # Statistics of another corpus would say nothing of the words of this one.
            refresh = self.args.refresh_statistics and not self.args.running_statistics
            if refresh and collection.name == self.train_collection.name:
                self.retriever.load_state(deployed.state())

        metrics = {
            f"{metric_key_prefix}_{name}": evaluate_run(collection.qrels, run, (measure,))[0][measure]
            for name, run in runs.items()
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(queries))

    def _eval_documents(self) -> list[Document]:
        collection, size = self.eval_collection, self.args.eval_corpus_size
        if size is None or size >= len(collection.corpus):
            return list(collection.corpus.values())
        judged = {document_id for grades in collection.qrels.values() for document_id in grades}
        others = [document_id for document_id in collection.corpus if document_id not in judged]
        generator = torch.Generator().manual_seed(self.args.seed)
        drawn = torch.randperm(len(others), generator=generator)[: max(0, size - len(judged))].tolist()
        kept = judged | {others[index] for index in drawn}
        return [document for document_id, document in collection.corpus.items() if document_id in kept]

    # Saving and resuming

    def train(self, resume_from_checkpoint: "str | bool | None" = None, *args, **kwargs):
        """
        Trains, as [`trl.GRPOTrainer`] does, and survives what interrupts it.

        Ctrl-C and SIGTERM let the running step end, save a checkpoint and leave by `SystemExit`; see
        [`~coaug_trl.training.callbacks.StopOnSignal`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to go on from; `True` for the last whole one in `output_dir`.
            *args, **kwargs:
                Further arguments of [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: as the base class.

        Raises:
            `InputError`: The checkpoint is not whole.
            `TrainingStopped`: The run has gone wrong.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir} has no whole checkpoint; leave resume_from_checkpoint out.")
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        with self._stop_on_signal.watching():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: the base class would train on
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        self.settings.save(folder)
        write_json(folder / TRAINING_FILE, self._training)

    def _save_checkpoint(self, model, trial):
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # The base class would delete older checkpoints while this one may still lack files of other processes.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with saving(folder, run_dir):
                folder.mkdir(parents=True, exist_ok=True)
                if self.args.should_save:
                    begin_checkpoint(folder)
                self.accelerator.wait_for_everyone()
                self._save_own_state(folder)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    finish_checkpoint(folder, resumable=not self.args.save_only_model)
        finally:
            self.args.save_total_limit = limit
        if self.args.push_to_hub:
            self._push_checkpoint(folder)
        if self.args.should_save and not self._is_pushing():  # which reads from an older checkpoint
            rotate_checkpoints(run_dir, limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _is_pushing(self) -> bool:
        pushing = getattr(self, "push_in_progress", None)
        return pushing is not None and not pushing.is_done()

    def _finish_current_push(self) -> None:
        waited = self._is_pushing()
        super()._finish_current_push()
        if waited and self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(self._get_output_dir(trial=None), limit, best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not yet, and not so: the base class would push it before it is marked as whole, and pickles with it."""

    def _push_checkpoint(self, folder: Path) -> None:
        """
        Pushes a checkpoint as a policy while training goes on, unless the one before is still on its way; a Hub that fails
        does not end a training.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._is_pushing() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = self.push_in_progress.jobs if self._is_pushing() else []
        jobs.append(run_as_future(self._try_push, folder, message))
        self.push_in_progress = PushInProgress(jobs)

    def _try_push(self, folder: Path, message: str) -> None:
        try:
            push(
                prepare_run(folder, self.hub_model_id),
                self.hub_model_id,
                private=self.args.hub_private_repo,
                revision=self.args.hub_revision,
                commit_message=message,
                token=self.args.hub_token,
            )
        except (InputError, OSError) as error:
            logger.warning(f"{folder} was not pushed: {error}")

    def _save_own_state(self, folder: Path) -> None:
        step = self._step % (self.args.steps_per_generation * self.num_iterations)
        if step:
            save_rollouts(self._buffered_inputs, self._rollouts_path(folder))
        if self.args.should_save:
            state = {"step": step, "batch": self._batch_arithmetic(), "retriever_state": self.retriever.state()}
            write_json(folder / STATE_FILE, state)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / STATE_FILE).is_file():
            state = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
            self.retriever.load_state(state["retriever_state"])
            self._step = state["step"]
            if self._step:
                if state["batch"] != self._batch_arithmetic():
                    raise InputError(
                        f"{checkpoint} was saved within a generation batch of {state['batch']}, which cannot go on as "
                        f"one of {self._batch_arithmetic()}. Resume with the same settings and number of processes, "
                        "or from a checkpoint at the end of a generation batch."
                    )
                self._buffered_inputs = load_rollouts(self._rollouts_path(Path(checkpoint)), self.accelerator.device)

    def _batch_arithmetic(self) -> dict[str, int]:
        names = ("world_size", "generation_batch_size", "steps_per_generation", "num_iterations")
        return {name: getattr(self.args, name) for name in names}

    def _rollouts_path(self, folder: Path) -> Path:
        return folder / f"rollouts_{self.accelerator.process_index}.safetensors"

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        check_access(token)
        with explained(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(token, private)
            if private and self.is_world_process_zero():  # a repository that was there stays as public as it is
                check_private(self.hub_model_id, token=token)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Writes the card of the run as it is now into `output_dir`, beside its curves.

        Args:
            model_name (`str`, *optional*):
                The model's name, where it is not that of `hub_model_id`.
            dataset_name (`str`, *optional*):
                Not used: the collection is known.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        record = RunRecord(folder, self.settings, self._training, self.state.log_history, [])
        name = self.hub_model_id or self.args.hub_model_id or model_name or folder.absolute().name
        card, pictures = describe_run(record, name, [tags] if isinstance(tags, str) else tags or [])
        card.save(folder / CARD_FILE)
        for picture, content in pictures.items():
            (folder / picture).write_bytes(content)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        tags: str | list[str] | None = None,
    ) -> CommitInfo | Future | None:
        """
        Saves the policy and pushes what `coaug push` would push, to `args.hub_model_id`.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                As git shows it.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait for the upload.
            token (`str`, *optional*):
                Defaults to `args.hub_token`, or that of `hf auth login`.
            revision (`str`, *optional*):
                Branch; defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether others may not see it; defaults to `args.hub_private_repo`.
            tags (`str` or `list[str]`, *optional*):
                Further tags of the card.

        Returns:
            `CommitInfo`, or a `Future` of it if it does not wait; `None` on all processes but the first.

        Raises:
            `InputError`: As [`~coaug_trl.publishing.upload.push`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.save_state()
        upload = prepare_run(
            self.args.output_dir, self.hub_model_id, tags=[tags] if isinstance(tags, str) else tags or []
        )
        given = {
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
            "token": token,
        }
        if blocking:
            return push(upload, self.hub_model_id, **given)
        return run_as_future(push, upload, self.hub_model_id, **given)


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

    Raises:
        `InputError`: `args.augmentations` holds no augmentations of documents, or those of other settings.
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
