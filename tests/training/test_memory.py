"""Estimates of memory against tensors that are really there."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from coaug_trl import CoAugConfig
from coaug_trl.training import memory, sampler_head
from coaug_trl.training.memory import (
    GIB,
    Run,
    activation_bytes,
    cache_bytes,
    empty_model,
    engine_memory,
    estimate_memory,
    least_gpu,
    levers,
    peak_memory,
    read_architecture,
)


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "max_position_embeddings": 128,
}
TINY = {
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "head_dim": 16},
}
# Architectures as their configurations on the Hub have them, and the parameters their model cards state, in 10^9.
PUBLISHED = {
    "Qwen2.5-0.5B": (("qwen2", 896, 4864, 24, 14, 2, 151936, True), 0.49),
    "Qwen2.5-1.5B": (("qwen2", 1536, 8960, 28, 12, 2, 151936, True), 1.54),
    "Qwen2.5-3B": (("qwen2", 2048, 11008, 36, 16, 2, 151936, True), 3.09),
    "Qwen2.5-7B": (("qwen2", 3584, 18944, 28, 28, 4, 152064, False), 7.61),
}
ARGS = CoAugConfig(
    "unused",
    use_cpu=True,
    bf16=False,
    report_to="none",
    groups_per_batch=4,
    group_size=6,
    num_generations=2,
    per_device_train_batch_size=2,
    updates_per_batch=1,
    max_completion_length=11,
    use_vllm=True,
    vllm_mode="colocate",
)
RUN = Run(ARGS, prompt_tokens=9)


def with_settings(run, **settings):
    """The same run with other settings."""
    args = copy.copy(run.args)
    for name, value in settings.items():
        setattr(args, name, value)
    return replace(run, args=args)


def with_lora(architecture, rank=16):
    """The same model with a LoRA adapter on all linear modules but the LM head."""
    return replace(architecture, trainable=rank * architecture.linear_widths, adapter=True)


def engine_starts(architecture, run, gpu):
    """Whether vLLM has enough of the training GPU, where it is there."""
    share = run.args.vllm_gpu_memory_utilization
    return run.generation != "colocate" or share * gpu >= engine_memory(architecture, run)


MIXED = with_settings(RUN, bf16=True)


def tiny_config(name):
    fields = {**SIZES, **TINY[name]}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@pytest.fixture(params=TINY)
def config(request):
    return tiny_config(request.param)


def published(name):
    model_type, hidden, intermediate, layers, heads, key_value_heads, words, tied = PUBLISHED[name][0]
    return AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=words,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="module")
def large():
    return sizes_of(published("Qwen2.5-7B"))


def sizes_of(config):
    return read_architecture(empty_model(config))


def lora(model, rank=4):
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def sizes(architecture, run) -> dict[str, int]:
    return {part.name: part.size for part in estimate_memory(architecture, run)}


# Counts


def test_parameters_are_those_of_the_model_that_is_built(config):
    model, architecture = AutoModelForCausalLM.from_config(config), sizes_of(config)
    assert architecture == read_architecture(model)
    assert architecture.parameters == architecture.trainable == sum(p.numel() for p in model.parameters())
    assert architecture.embedding == model.lm_head.weight.numel()
    assert architecture.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert architecture.query_key_norm == (config.model_type == "qwen3")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_model_card(name):
    assert round(sizes_of(published(name)).parameters / 1e9, 2) == pytest.approx(PUBLISHED[name][1], abs=0.01)


@pytest.mark.parametrize("rank", [1, 8])
def test_parameters_of_an_adapter_are_those_of_peft(config, rank):
    model = lora(AutoModelForCausalLM.from_config(config), rank)
    assert with_lora(sizes_of(config), rank).trainable == model.get_nb_trainable_parameters()[0]


def test_a_configuration_of_no_language_model_is_refused():
    with pytest.raises(ValueError):
        sizes_of(AutoConfig.for_model("vit"))


# Weights, gradients, optimizer


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_after_a_step(config, adapter, dtype):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    architecture = sizes_of(config)
    run = replace(RUN, weight_bytes=dtype.itemsize)
    if adapter:
        model, architecture = lora(model), with_lora(architecture, 4)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    found = sizes(architecture, run)
    assert found["weights"] == nbytes(model.parameters())
    assert found["gradients"] == nbytes(p.grad for p in model.parameters() if p.grad is not None)
    # beside a step counter of 4 bytes each
    states = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert found["optimizer"] == nbytes(states)


def test_a_reference_model_is_a_copy_of_the_weights_but_not_for_adapters(config):
    architecture, run = sizes_of(config), with_settings(RUN, beta=0.1)
    found = sizes(architecture, run)
    assert found["reference model"] == found["weights"]
    assert "reference model" not in sizes(with_lora(architecture, 4), run)


@pytest.mark.parametrize(
    ("sharding", "divided"),
    [
        ("fsdp2", {"weights", "gradients", "optimizer"}),
        ("zero3", {"weights", "gradients", "optimizer"}),
        ("zero2", {"gradients", "optimizer"}),
        ("zero1", {"optimizer"}),
        ("ddp", set()),
    ],
)
def test_sharding_divides_what_it_divides(large, sharding, divided):
    run = replace(MIXED, sharding=sharding)
    one, eight = (sizes(large, replace(run, num_processes=processes)) for processes in (1, 8))
    for name in ("weights", "gradients", "optimizer"):
        assert eight[name] == (one[name] // 8 if name in divided else one[name])
    trained = one["weights"] + one["gradients"] + one["optimizer"]
    assert trained == 16 * large.parameters  # mixed precision trains float32 copies, however they are kept


def test_quantization_shrinks_linear_weights_alone(large):
    adapter = with_lora(large)
    run = replace(MIXED, weight_bytes=2)
    saved = sizes(adapter, run)["weights"] - sizes(adapter, replace(run, quantized=4))["weights"]
    # TRL makes adapters of quantized models bfloat16.
    assert saved == pytest.approx(large.linear * (16 - 4.5) / 8 + 2 * adapter.trainable, rel=1e-6)
    assert large.parameters - large.linear > 2 * large.embedding  # the untied embeddings, biases and norms


# Activations, caches, logits


def kept_by_autograd(model, batch_size, length, autocast) -> int:
    """Bytes that a forward pass through the layers keeps for the backward pass, besides weights and their copies."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    tensors, found = [], {}

    def keep(tensor):
        tensors.append(tensor)  # while it lives, no other takes its place
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tuple(tensor.shape) not in shapes:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, SIZES["vocab_size"], (batch_size, length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        base.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(found.values())


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3", "llama"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "adapter"),
    [
        (torch.float32, True, False),
        (torch.float32, False, False),
        (torch.bfloat16, True, False),
        (torch.bfloat16, True, True),
        (torch.float32, True, True),
        (torch.float32, False, True),
    ],
)
def test_activations_of_a_layer_are_what_autograd_keeps(name, dtype, autocast, adapter):
    batch_size, length = 3, 70
    kept = []
    for layers in (2, 3):
        config = tiny_config(name)
        config.num_hidden_layers = layers
        if config.model_type == "qwen2":
            config.layer_types = config.layer_types[:layers]
        for field, value in (("hidden_size", 128), ("intermediate_size", 384)):
            setattr(config, field, value)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        kept.append(kept_by_autograd(lora(model, 1) if adapter else model, batch_size, length, autocast))
    architecture = sizes_of(config)
    run = replace(MIXED if autocast else RUN, weight_bytes=dtype.itemsize)
    estimate = activation_bytes(with_lora(architecture, 1) if adapter else architecture, run)
    assert estimate == pytest.approx((kept[1] - kept[0]) / (batch_size * length), rel=0.05)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(large):
    run = MIXED
    layer = activation_bytes(large, run)
    tokens = run.batch_size * 20
    assert sizes(large, with_settings(run, gradient_checkpointing=False))["activations"] == tokens * 28 * layer
    assert sizes(large, run)["activations"] == tokens * (28 * 3584 * 4 + layer)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_cache_of_generation_is_that_of_a_forward_pass(config, dtype, autocast):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    run = with_settings(replace(RUN, weight_bytes=dtype.itemsize), use_vllm=False, bf16=autocast)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = model(torch.ones(run.rows, run.length, dtype=torch.long), use_cache=True).past_key_values
    kept = nbytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert sizes(sizes_of(config), run)["KV cache"] == kept
    assert cache_bytes(sizes_of(config), run.weight_bytes) * run.rows * run.length == kept


def test_logits_are_reckoned_in_the_tiles_they_are_made_in():
    assert memory.LOGIT_TILE == (chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    assert memory.PENALIZED_TOKENS == sampler_head.TOKENS_AT_ONCE


def test_the_penalized_head_needs_as_many_copies_as_are_counted():
    tokens, words, hidden = 64, 5000, 8
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (tokens, 30), generator=generator)
    weight = torch.randn(words, hidden, generator=generator, requires_grad=True)
    states = torch.randn(tokens, hidden, generator=generator, requires_grad=True)
    arguments = (states, weight, None, ids[:, 0], ids, torch.ones_like(ids, dtype=torch.bool), 1.2, 1.2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        log_probs, entropy = checkpoint(sampler_head._penalized, *arguments, use_reentrant=False)
        (log_probs.sum() + entropy.sum()).backward()
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    there = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        there += event.nbytes()
        peak = max(peak, there)
    assert peak / (4 * tokens * words) == pytest.approx(memory.PENALIZED_COPIES, rel=0.05)


@pytest.mark.parametrize("penalize", [False, True])
def test_logits_do_not_grow_as_the_vocabulary_times_the_tokens(large, penalize):
    run = with_settings(MIXED, max_completion_length=1024, penalize_log_probs=penalize)
    adapter = with_lora(large)
    small, big = (sizes(adapter, with_settings(run, per_device_train_batch_size=rows))["logits"] for rows in (4, 64))
    hidden_states = 60 * 1024 * 3584 * (4 + run.stream_bytes)
    assert big - small == hidden_states
    assert big < 64 * 1024 * large.vocab_size * 2 / 5


# What fits


def settings(**changed):
    """A run of a usual size."""
    defaults = {"per_device_train_batch_size": 8, "max_completion_length": 1000}
    return with_settings(replace(MIXED, weight_bytes=2, prompt_tokens=1000), **{**defaults, **changed})


@given(
    generation=st.sampled_from(["colocate", "asleep", "server", "transformers"]),
    share=st.floats(0.01, 0.99),
    batch_size=st.integers(1, 64),
    groups=st.sampled_from([1, 8, 64]),
    adapter=st.booleans(),
)
def test_the_least_gpu_is_the_least_on_which_everything_fits(large, generation, share, batch_size, groups, adapter):
    architecture = with_lora(large) if adapter else large
    run = settings(
        per_device_train_batch_size=batch_size,
        groups_per_batch=groups,
        use_vllm=generation != "transformers",
        vllm_mode="server" if generation == "server" else "colocate",
        vllm_enable_sleep_mode=generation == "asleep",
        vllm_gpu_memory_utilization=share,
    )

    def fits(gpu):
        return peak_memory(architecture, run, gpu) <= gpu and engine_starts(architecture, run, gpu)

    least = least_gpu(architecture, run)
    assert fits(math.ceil(least * 1.0001)) and not fits(int(least * 0.9999))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_gpu_is_large_enough_where_the_engine_gets_all_or_nothing(large, share):
    assert math.isinf(least_gpu(large, settings(vllm_gpu_memory_utilization=share)))
    assert least_gpu(large, settings(vllm_gpu_memory_utilization=share, vllm_mode="server")) < 1000 * GIB


def test_the_engine_takes_its_share_and_has_to_have_enough(large):
    run, adapter = replace(MIXED, weight_bytes=2), with_lora(large)
    asleep, awake = (
        peak_memory(adapter, with_settings(run, vllm_enable_sleep_mode=sleeps), 80 * GIB) for sleeps in (True, False)
    )
    server = peak_memory(adapter, with_settings(run, vllm_mode="server"), 80 * GIB)
    assert awake == server + int(0.3 * 80 * GIB)
    assert server < asleep < awake
    assert engine_memory(adapter, run) > 2 * large.parameters
    # 10 GiB do not hold the weights
    assert not engine_starts(adapter, with_settings(run, vllm_gpu_memory_utilization=0.1), 100 * GIB)
    assert engine_starts(adapter, run, 100 * GIB)


def test_zero_exchanges_gradients_in_buckets(large):
    plain, zero2 = (sizes(large, replace(MIXED, sharding=sharding, num_processes=8)) for sharding in ("ddp", "zero2"))
    assert plain["gradient buckets"] == 4 * large.parameters
    assert zero2["gradient buckets"] == 2 * 5e8  # DeepSpeed's default, of 16-bit gradients


@pytest.mark.parametrize("adapter", [False, True])
def test_a_lever_is_named_only_where_it_is_not_pulled(large, adapter):
    architecture = with_lora(large) if adapter else large
    run = settings(gradient_checkpointing=False, use_vllm=True, vllm_mode="colocate")
    lines = "\n".join(levers(architecture, run))
    assert ("use_peft" in lines, "load_in_4bit" in lines) == (not adapter, adapter)
    assert "gradient_checkpointing: true" in lines and "vllm_mode: server" in lines and "fsdp2.yaml" in lines
    pulled = replace(with_settings(run, gradient_checkpointing=True, use_vllm=False), sharding="fsdp2", quantized=4)
    lines = "\n".join(levers(architecture, pulled))
    assert not any(name in lines for name in ("gradient_checkpointing", "vllm", "load_in_4bit", "fsdp2"))
