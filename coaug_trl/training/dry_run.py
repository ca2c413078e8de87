"""What a run would do and need, without loading a model: what `coaug train --dry_run` prints."""

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from transformers import AutoConfig, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from ..data.collection import Collection
from ..data.document import document_text
from ..data.groups import CompositeGroups, Group
from ..policy.prompts import PromptSet
from ..retrieval import Retriever
from ..utils.errors import InputError
from ..utils.terminal import say
from .config import CoAugConfig
from .memory import (
    GIB,
    Architecture,
    Run,
    empty_model,
    engine_memory,
    estimate_memory,
    least_gpu,
    levers,
    peak_memory,
    read_architecture,
    training_flops,
)
from .trainer import check_prompt_set, corpus_documents, refuse_vanishing_updates


if TYPE_CHECKING:
    from .recipe import CoAugScriptArguments

# The longest texts whose prompts are counted to find the longest prompt.
LONGEST_TEXTS = 64
# What the time of training is given for, about 40 % of what an A100 can do.
TFLOPS = 120


def print_plan(
    script_args: "CoAugScriptArguments",
    training_args: CoAugConfig,
    model_args: ModelConfig,
    train_collection: Collection,
    eval_collection: Collection | None,
    retriever: Retriever,
    prompt_set: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """
    Prints what a run would do and need, having built everything but the model.

    Args:
        script_args: What is trained on; `gpu_memory_gib` is the memory the run should fit into.
        training_args: Configuration.
        model_args: The model, of which the configuration is read and nothing else.
        train_collection, eval_collection, retriever, prompt_set, tokenizer:
            As [`~coaug_trl.training.recipe.make_parts`] makes them.

    Raises `InputError`: What the run would refuse, too, or the model has no configuration.
    """
    check_prompt_set(prompt_set, retriever, training_args)
    architecture, dtype = model_architecture(training_args, model_args)
    groups = print_batches(training_args, train_collection, eval_collection)
    retriever.fit(list(train_collection.corpus.values()))
    say(f"retriever {retriever.config}, prompt set {prompt_set.hash} ({prompt_set.kind})")
    if training_args.candidate_pool == "corpus":
        num_documents = len(corpus_documents(train_collection, retriever, prompt_set, training_args))
        source = training_args.augmentations or "the collection, not augmented"
        say(f"every query competes with {num_documents:,} documents; texts outside the batch: {source}")
    print_prompts(groups[0], training_args, train_collection, prompt_set, tokenizer)
    run = Run(
        training_args,
        prompt_tokens=longest_prompt(training_args.augment, train_collection, prompt_set, tokenizer),
        weight_bytes=dtype.itemsize,
        quantized=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
        sharding=launched_sharding(training_args),
        num_processes=training_args.world_size,
        encoder=encoder_bytes(retriever),
    )
    check_run(run)
    say(f"\n{model_summary(model_args, architecture)}")
    print_tokens(training_args, architecture, run, steps_per_epoch(groups, training_args))
    print_memory(architecture, run, gpu_bytes(script_args.gpu_memory_gib))


def steps_per_epoch(groups: CompositeGroups, training_args: CoAugConfig) -> int:
    """Optimizer steps of an epoch."""
    batches = groups.groups_per_epoch // training_args.groups_per_batch
    return batches * training_args.updates_per_batch * training_args.num_iterations


def print_batches(
    training_args: CoAugConfig, train_collection: Collection, eval_collection: Collection | None
) -> CompositeGroups:
    """Prints the collections and the batch arithmetic, and returns the groups, without hard negatives."""
    groups = CompositeGroups(
        train_collection,
        training_args.queries_per_group,
        training_args.group_size,
        training_args.num_relevant,
        training_args.groups_per_batch,
        training_args.seed,
    )
    say(train_collection.summary())
    if eval_collection is not None:
        say(eval_collection.summary())
    say(training_args.batch_summary)
    batches = groups.groups_per_epoch // training_args.groups_per_batch
    say(
        f"1 epoch = {batches:,} generation batches = {steps_per_epoch(groups, training_args):,} optimizer steps; "
        f"{groups.num_filled:,} queries come twice to fill the last batch"
    )
    say(
        f"1 optimizer step on each of {training_args.world_size} processes = "
        f"{training_args.gradient_accumulation_steps:,} × {training_args.per_device_train_batch_size} completions"
    )
    if training_args.num_hard_negatives:
        first, last = training_args.hard_negative_ranks
        say(
            f"hard negatives: up to {training_args.num_hard_negatives} a group, from ranks {first} to {last}; mined when "
            "training starts, and not in the group below"
        )
    return groups


def print_prompts(
    group: Group,
    training_args: CoAugConfig,
    collection: Collection,
    prompt_set: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Prints the first prompts of a group."""
    if training_args.augment != "document":
        query = collection.queries[group.queries[0]]
        say(f"first query prompt: {prompt_set.prompt('query', query, tokenizer)}")
    if training_args.augment != "query":
        documents, num_cut = prompt_set.truncate(
            [document_text(collection.corpus[document_id]) for document_id in group.documents], tokenizer
        )
        say(
            f"first group: {len(documents)} document prompts, {num_cut} of them cut to "
            f"{prompt_set.max_document_tokens} tokens"
        )


def model_architecture(training_args: CoAugConfig, model_args: ModelConfig) -> tuple[Architecture, torch.dtype]:
    """
    Sizes of the model and its adapter and the type its weights are loaded with, from its configuration alone.

    Raises `InputError`: There is no configuration of a causal language model, the adapter does not fit the model, or
        the run would train on nothing.
    """
    name = model_args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
        model = empty_model(config, training_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: no configuration of a causal language model could be read from there; give a folder with its "
            f"config.json, or a Hub id that can be reached: {error}"
        ) from None
    architecture = read_architecture(model)
    dtype = (config.dtype or torch.float32) if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    trained_dtype = dtype
    if model_args.use_peft:
        try:
            model = get_peft_model(model, get_peft_config(model_args), low_cpu_mem_usage=True)
        except ValueError as error:  # no module of this name
            raise InputError(f"lora_target_modules do not fit {name}: {error}") from None
        architecture = replace(architecture, trainable=model.get_nb_trainable_parameters()[0], adapter=True)
        # peft makes adapters float32, and TRL those of quantized models bfloat16.
        trained_dtype = torch.bfloat16 if model_args.load_in_4bit or model_args.load_in_8bit else torch.float32
    if trained_dtype == torch.bfloat16 and training_args.deepspeed_plugin is None:  # which trains float32 copies
        refuse_vanishing_updates(training_args)
    return architecture, dtype


def launched_sharding(training_args: CoAugConfig) -> str:
    """How `accelerate launch`, or the configuration itself, divides the model over processes."""
    if training_args.deepspeed_plugin is not None and training_args.deepspeed_plugin.zero_stage:
        return f"zero{training_args.deepspeed_plugin.zero_stage}"
    if training_args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp2"
    return "ddp" if training_args.world_size > 1 else "none"


def longest_prompt(
    augment: str, collection: Collection, prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Tokens of the longest prompt, as far as the longest texts tell."""
    prompts = []
    if augment != "document":
        queries = sorted((collection.queries[query_id] for query_id in collection.qrels), key=len)
        prompts += [prompt_set.prompt("query", query, tokenizer) for query in queries[-LONGEST_TEXTS:]]
    if augment != "query":
        documents = sorted(map(document_text, collection.corpus.values()), key=len)
        cut = prompt_set.truncate(documents[-LONGEST_TEXTS:], tokenizer)[0]
        prompts += [prompt_set.prompt("document", document, tokenizer) for document in cut]
    if tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts
        ]
    return max(len(ids) for ids in tokenizer(prompts, add_special_tokens=not tokenizer.chat_template).input_ids)


def check_run(run: Run) -> None:
    """Raises an `InputError` if vLLM has no room for the longest prompt and its completion, or no head can be made."""
    most = run.args.vllm_max_model_length
    if run.generation == "colocate" and most is not None and run.length > most:
        raise InputError(
            f"vllm_max_model_length is {most:,}, but the longest prompt has {run.prompt_tokens:,} tokens and "
            f"max_completion_length is {run.args.max_completion_length:,}; use at least {run.length}."
        )
    if run.penalizes and run.sharding == "zero3":
        raise InputError("penalize_log_probs is True under ZeRO-3; use ZeRO-2, FSDP2 or DDP, or set it to False.")


def encoder_bytes(retriever: Retriever) -> int:
    """Bytes of a dense retriever's encoder and of what it computes for a batch; 0 for others."""
    if retriever.kind != "dense":
        return 0
    encoder = retriever.encoder
    weights = sum(parameter.nbytes for parameter in encoder.parameters())
    tokens = retriever.batch_size * (encoder.max_seq_length or 512)
    # float32: a hidden layer four times as wide before and after its activation, and six vectors of the usual width.
    return weights + tokens * encoder.get_embedding_dimension() * (2 * 4 + 6) * 4


def gpu_bytes(gpu_memory_gib: float | None) -> int | None:
    """Bytes of the GPU to fit on: the one asked for, else the one that is there."""
    if gpu_memory_gib is not None:
        return int(gpu_memory_gib * GIB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def model_summary(model_args: ModelConfig, architecture: Architecture) -> str:
    """The model and how much of it is trained, in one line."""
    share = architecture.trainable / architecture.parameters
    how = "all trained"
    if architecture.adapter:
        how = f"and {architecture.trainable:,} of an adapter, which are trained ({share:.2%})"
    return f"model {model_args.model_name_or_path}: {architecture.parameters:,} parameters, {how}"


def print_tokens(training_args: CoAugConfig, architecture: Architecture, run: Run, steps: int) -> None:
    """Prints completions, tokens and computation of an optimizer step."""
    rows = training_args.gradient_accumulation_steps * run.batch_size
    completions = rows * run.num_processes
    seconds = training_flops(architecture, run, rows) / (TFLOPS * 1e12)
    say(
        f"1 optimizer step = {completions:,} completions, at most {completions * run.args.max_completion_length:,} tokens, and "
        f"{completions * run.length:,} with prompts ({run.prompt_tokens:,} the longest)\n"
        f"training, without generation, at {TFLOPS} TFLOP/s a GPU: at most {seconds:,.1f} s an optimizer step, "
        f"{seconds * steps / 3600:,.1f} h an epoch"
    )


def print_memory(architecture: Architecture, run: Run, gpu: int | None) -> None:
    """
    Prints an estimate of memory by part, and whether it fits.

    Args:
        architecture: Sizes of the model.
        run: Settings.
        gpu: Bytes of the GPU it should fit on.
    """
    where = {
        "none": "for one process without sharding (more are counted if the dry run is launched as the run)",
        "ddp": f"for each of {run.num_processes} processes, which do not share weights",
    }.get(run.sharding, f"for each of {run.num_processes} processes under {run.sharding}")
    say(f"memory, estimated, {where}:")
    for part in estimate_memory(architecture, run):
        when = {"always": "", "generation": " (while generating)", "training": " (in an update)"}[part.phase]
        say(f"  {part.name:<20} {part.size / GIB:7.2f} GiB  {part.note}{when}")
    engine = engine_memory(architecture, run) / GIB
    if run.generation == "colocate":
        part = run.args.vllm_gpu_memory_utilization
        size = f"{part * gpu / GIB:7.2f} GiB" if gpu else " " * 11
        note = f"{part:g} of the GPU; needs {engine:.1f} GiB for weights and the KV cache of one sequence"
        say(f"  {'vLLM':<20} {size}  {note}{' (asleep in updates)' if run.args.vllm_enable_sleep_mode else ''}")
    elif run.generation == "server":
        note = f"on other GPUs, where the server needs {engine:.1f} GiB at least"
        say(f"  {'vLLM':<20} {0:7.2f} GiB  {note}")
    least = least_gpu(architecture, run)
    peak = f"{peak_memory(architecture, run, gpu) / GIB:.1f} GiB"
    peak += " without vLLM" if run.generation == "colocate" and gpu is None else ""
    smallest = "none, vLLM gets all of it or nothing" if math.isinf(least) else f"{math.ceil(least / GIB)} GiB"
    say(f"peak: {peak}; the smallest GPU it fits on: {smallest}")
    if gpu is None:
        say("--gpu_memory_gib N says whether it fits on a GPU of N GiB, and what needs less if not")
    elif least <= gpu:
        say(f"fits on a GPU of {gpu / GIB:g} GiB")
    else:
        say(f"does not fit on a GPU of {gpu / GIB:g} GiB. What needs less memory; try each by another dry run:")
        for line in levers(architecture, run):
            say(f"  {line}")
