"""
Memory that a training run needs on each GPU, estimated from the model's configuration and the run's settings alone.

Everything here is arithmetic on sizes: nothing is loaded and no GPU is asked. Counts of parameters, gradients and
optimizer states are exact. Activations are those that autograd keeps of a Llama-like layer (RMSNorm, fused attention,
gated MLP), which holds for Llama, Qwen and their relatives within a few percent; what allocators and kernels take
beside them is a flat guess.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .config import CoAugConfig


GIB = 2**30
# CUDA context, kernels' workspaces and what the allocator cannot use again: a guess.
OVERHEAD = int(1.5 * GIB)
# What vLLM takes beside weights and cache: the activations of 4,096 tokens, sampling. A guess too.
ENGINE_OVERHEAD = int(1.5 * GIB)
# Tiles of logits of TRL's fused LM head (trl/kernels/chunked_logprob.py): so many tokens by so many words.
LOGIT_TILE = (4096, 32768)
# The head that applies the repetition penalty has the logits of so many tokens at a time. Its backward pass, which
# computes them again, needs so many float32 copies.
PENALIZED_TOKENS = 512
PENALIZED_COPIES = 6
# Gradients that ZeRO exchanges at once: DeepSpeed's default for reduce_bucket_size, which accelerate leaves as it is.
ZERO_BUCKET = 500_000_000
# Tokens of a prompt that are read at a time where memory is scarce.
PREFILL_CHUNK = 128
# Bits a weight in memory, with the scales of its block of 64: float32 in nf4 and fp4, and none in 8 bits.
QUANTIZED_BITS = {4: 4.5, 8: 8.0}
# What each way of sharding divides over the processes.
_DIVIDED = {
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
    "fsdp2": ("optimizer", "gradients", "weights"),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a causal language model: numbers of parameters, and widths of what flows through its layers."""

    parameters: int  # tied ones counted once, without adapters
    trainable: int  # all, or the adapter's
    embedding: int  # of the LM head, which are those of the input embedding where the two are tied
    layer: int  # of the largest layer
    linear: int  # of the layers' linear modules, which quantization makes small
    linear_widths: int  # inputs and outputs of these together: parameters of a LoRA adapter for each unit of rank
    num_layers: int
    hidden_size: int  # of the residual stream
    intermediate_size: int  # of the MLP
    attention_size: int  # of all heads together
    key_value_size: int  # of all heads of keys, which is that of values
    vocab_size: int
    query_key_norm: bool  # whether queries and keys are normalised, as in Qwen3
    adapter: bool = False  # whether an adapter is trained and the rest is not


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    The causal language model that a configuration describes, on the meta device: shapes without weights. Raises a
    `ValueError` where transformers knows none.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def read_architecture(model: PreTrainedModel) -> Architecture:
    """Sizes of a causal language model, which may be empty and has no adapter."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    layers = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = count_parameters(model)
    return Architecture(
        parameters=parameters,
        trainable=parameters,
        embedding=head.weight.numel(),
        layer=max(count_parameters(layer) for layer in layers),
        linear=sum(module.weight.numel() for module in linear),
        linear_widths=sum(module.in_features + module.out_features for module in linear),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        attention_size=config.num_attention_heads * head_dim,
        key_value_size=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
        vocab_size=head.weight.shape[0],
        query_key_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
    )


def count_parameters(module: torch.nn.Module) -> int:
    """Parameters of a module, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Run:
    """What decides the memory of a run besides the sizes of its model."""

    args: CoAugConfig
    prompt_tokens: int  # of the longest prompt
    weight_bytes: int = 4  # a weight is loaded with
    quantized: int | None = None  # bits of a quantized base model, 4 or 8
    sharding: str = "none"  # or "ddp", "fsdp2", "zero1", "zero2", "zero3"
    num_processes: int = 1  # each with one GPU
    encoder: int = 0  # bytes of a dense retriever's

    @property
    def batch_size(self) -> int:
        """Completions in a forward pass."""
        return self.args.per_device_train_batch_size

    @property
    def rows(self) -> int:
        """Completions of a generation batch that a process makes."""
        groups = -(-self.args.groups_per_batch // self.num_processes)
        return groups * self.args.rows_per_group * self.args.num_generations

    @property
    def length(self) -> int:
        """Tokens of a row: all are padded to the longest."""
        return self.prompt_tokens + self.args.max_completion_length

    @property
    def mixed_precision(self) -> bool:
        """Whether 16-bit copies are computed with."""
        return bool(self.args.bf16 or self.args.fp16)

    @property
    def compute_bytes(self) -> int:
        """Bytes of what matrices are multiplied in."""
        return 2 if self.mixed_precision or self.quantized else self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of the residual stream, which has the type of the weights as they are computed with."""
        return self.weight_bytes if self.sharding in ("none", "ddp") else self.compute_bytes

    @property
    def generation(self) -> str:
        """`"colocate"` or `"server"` for vLLM, `"transformers"` for `generate`."""
        return self.args.vllm_mode if self.args.use_vllm else "transformers"

    @property
    def penalizes(self) -> bool:
        """Whether log-probabilities apply the repetition penalty, as [`~coaug_trl.training.sampler_head`] does."""
        return self.args.penalize_log_probs and self.args.repetition_penalty != 1.0

    @property
    def prefill_tokens(self) -> int:
        """Tokens of each prompt that `generate` reads at a time."""
        chunk = (self.args.generation_kwargs or {}).get("prefill_chunk_size")
        return min(chunk or self.prompt_tokens, self.prompt_tokens)

    def shards(self, what: str) -> int:
        """Over how many processes `what` is divided: `"weights"`, `"gradients"` or `"optimizer"`."""
        return self.num_processes if what in _DIVIDED.get(self.sharding, ()) else 1


@dataclass(frozen=True)
class Part:
    """One part of the memory of a process."""

    name: str
    size: int  # bytes
    phase: str  # when it is there: "always", while completions are made ("generation") or in an update ("training")
    note: str = ""  # how it was reckoned


def estimate_memory(architecture: Architecture, run: Run) -> list[Part]:
    """
    Memory of one process, by part, without vLLM's in colocate mode (see [`engine_memory`]). The peak is what is always
    there and the larger of the two phases.
    """
    parts = [*_states(architecture, run), *_generation(architecture, run), *_update(architecture, run)]
    if run.encoder:
        parts.append(Part("encoder", run.encoder, "always", "weights as loaded, activations of a batch"))
    parts.append(Part("overhead", OVERHEAD, "always", "CUDA context, workspaces, fragments: a guess"))
    return [part for part in parts if part.size]


def peak_memory(architecture: Architecture, run: Run, gpu: int | None = None) -> int:
    """
    The most bytes a process needs at once, with vLLM's share of a GPU of `gpu` bytes in colocate mode; without `gpu`,
    vLLM is left out.
    """
    generation, training = _phases(architecture, run)
    if gpu is not None and run.generation == "colocate":
        engine = int(run.args.vllm_gpu_memory_utilization * gpu)
        generation += engine
        training += 0 if run.args.vllm_enable_sleep_mode else engine
    return max(generation, training)


def least_gpu(architecture: Architecture, run: Run) -> float:
    """The least bytes of a GPU on which a run fits, and vLLM into its share; infinite if that leaves too little of any."""
    generation, training = _phases(architecture, run)
    if run.generation != "colocate":
        return max(generation, training)
    share = run.args.vllm_gpu_memory_utilization
    if not 0 < share < 1:
        return math.inf
    beside = generation / (1 - share) if run.args.vllm_enable_sleep_mode else max(generation, training) / (1 - share)
    return max(training, beside, engine_memory(architecture, run) / share)


def _phases(architecture: Architecture, run: Run) -> tuple[int, int]:
    """Bytes while completions are made and in an update, without vLLM in colocate mode."""
    parts = estimate_memory(architecture, run)
    return tuple(
        sum(part.size for part in parts if part.phase in ("always", phase)) for phase in ("generation", "training")
    )


def engine_memory(architecture: Architecture, run: Run) -> int:
    """The least bytes vLLM works with on a GPU: 16-bit weights, the cache of one sequence, and some room."""
    cache = cache_bytes(architecture, 2) * (run.args.vllm_max_model_length or run.length)
    return (2 * architecture.parameters + cache) // run.args.vllm_tensor_parallel_size + ENGINE_OVERHEAD


def cache_bytes(architecture: Architecture, element_bytes: int) -> int:
    """Bytes of keys and values of one token."""
    return 2 * architecture.num_layers * architecture.key_value_size * element_bytes


def _states(architecture: Architecture, run: Run) -> Iterator[Part]:
    """Weights, gradients and optimizer state."""
    adapter = architecture.trainable if architecture.adapter else 0
    weight_bytes = trained_bytes = run.weight_bytes
    if adapter:  # peft makes adapters float32, and TRL those of quantized models bfloat16
        trained_bytes = 2 if run.quantized else 4
    deepspeed = run.sharding.startswith("zero")
    if deepspeed and run.mixed_precision:  # 16-bit weights and gradients, float32 weights with the optimizer
        weight_bytes = trained_bytes = 2
    elif run.sharding == "fsdp2" and run.mixed_precision:  # accelerate makes what is trained float32
        trained_bytes = 4
        weight_bytes = weight_bytes if adapter else 4
    note = f"{architecture.parameters:,} parameters in {8 * weight_bytes} bits"
    base = architecture.parameters * weight_bytes
    if run.quantized:
        rest = architecture.parameters - architecture.linear
        base = int(architecture.linear * QUANTIZED_BITS[run.quantized] / 8) + rest * weight_bytes
        note = f"{architecture.linear:,} parameters in {run.quantized} bits, {rest:,} in {8 * weight_bytes}"
    if adapter:
        note += f", {adapter:,} of the adapter in {8 * trained_bytes}"
    shards = run.shards("weights")
    yield Part("weights", (base + adapter * trained_bytes) // shards, "always", note + _over(shards))
    if run.args.beta and not adapter:
        yield Part("reference model", base // shards, "always", "for the KL term" + _over(shards))

    trained, shards = architecture.trainable, run.shards("gradients")
    note = f"{trained:,} in {8 * trained_bytes} bits"
    yield Part("gradients", trained * trained_bytes // shards, "training", note + _over(shards))
    if run.sharding == "ddp":
        yield Part("gradient buckets", trained * trained_bytes, "always", "DDP's copy for the exchange")
    elif deepspeed:
        yield Part("gradient buckets", ZERO_BUCKET * trained_bytes, "always", f"ZeRO's, of {ZERO_BUCKET:,} gradients")
    moments = 0.5 if "8bit" in run.args.optim else 2  # AdamW has two, each of the size of the weights or of 8 bits
    state_bytes = moments * (4 if deepspeed else trained_bytes)
    note = f"{state_bytes:.3g} bytes a trained parameter"
    if deepspeed and run.mixed_precision:
        state_bytes += 4
        note = f"{state_bytes:.3g} bytes a trained parameter, float32 weights among them"
    shards = run.shards("optimizer")
    yield Part("optimizer", int(trained * state_bytes) // shards, "always", note + _over(shards))
    if run.shards("weights") > 1:
        # Two layers and their gradients, and the head from its forward to its backward pass; TRL's own copy of it.
        gathered = 2 * architecture.layer * 2 * run.compute_bytes + architecture.embedding * (run.compute_bytes + 4)
        yield Part("gathered weights", gathered, "training", "two layers with gradients, and the LM head")


def _over(shards: int) -> str:
    return f", over {shards} processes" if shards > 1 else ""


def _generation(architecture: Architecture, run: Run) -> Iterator[Part]:
    """What `generate` needs. It makes all completions of a process at once."""
    if run.generation != "transformers":
        return
    cache = run.rows * run.length * cache_bytes(architecture, run.stream_bytes)
    note = f"generate makes all {run.rows:,} completions of {run.length:,} tokens at once"
    yield Part("KV cache", cache, "generation", note)
    widths = 3 * architecture.intermediate_size * run.compute_bytes
    widths += 2 * architecture.hidden_size * (run.stream_bytes + run.compute_bytes)
    note = f"one layer's activations of {run.rows:,} prompts, {run.prefill_tokens:,} tokens at a time"
    yield Part("prompts read", run.rows * run.prefill_tokens * widths, "generation", note)
    logits = 4 * 4 * run.rows * architecture.vocab_size
    yield Part("logits of generation", logits, "generation", "of the last token, in four float32 copies")


def _update(architecture: Architecture, run: Run) -> Iterator[Part]:
    """What a forward and backward pass needs besides weights and gradients."""
    layer = activation_bytes(architecture, run)
    tokens = run.batch_size * run.length
    if run.args.gradient_checkpointing:
        kept = architecture.num_layers * architecture.hidden_size * run.stream_bytes
        note = f"{run.batch_size} × {run.length:,} tokens: inputs of the layers, and one layer computed again"
        yield Part("activations", tokens * (kept + layer), "training", note)
    else:
        note = f"{run.batch_size} × {run.length:,} tokens: all layers, as gradient_checkpointing is off"
        yield Part("activations", tokens * architecture.num_layers * layer, "training", note)
    trained_in_float32 = run.weight_bytes == 4 and not architecture.adapter
    if trained_in_float32 and run.mixed_precision and run.sharding in ("none", "ddp"):
        yield Part("16-bit copies", 2 * architecture.parameters, "training", "autocast's, of the float32 weights")
    yield _logits(architecture, run)


def activation_bytes(architecture: Architecture, run: Run) -> int:
    """Bytes autograd keeps of one layer for one token without gradient checkpointing."""
    half = run.compute_bytes == 2
    # Each of the two norms: its input in float32, and where its weight is trained, what that multiplies.
    norm = 4 if architecture.adapter else 4 + run.stream_bytes
    # Inputs of query, key, value, gate and up: converted to 16 bits for each of them or its adapter, or, where there is
    # nothing to convert, the outputs of the two norms.
    copies = 5 if half and (architecture.adapter or run.stream_bytes == 4) else 2
    size = (2 * norm + copies * run.compute_bytes) * architecture.hidden_size
    # Query, key, value and output of attention, and a copy of the last for an adapter.
    size += (5 if half and architecture.adapter else 4) * run.compute_bytes * architecture.attention_size
    # Gate, its activation, up, and the product that goes into down.
    size += 4 * run.compute_bytes * architecture.intermediate_size
    if architecture.query_key_norm:
        # The input of each norm in float32, and as it is multiplied by the norm's weight or goes on.
        size += (4 + run.compute_bytes) * (architecture.attention_size + architecture.key_value_size)
    return size


def _logits(architecture: Architecture, run: Run) -> Part:
    tokens = run.batch_size * run.args.max_completion_length  # only completions are scored
    if run.penalizes:
        logits = PENALIZED_COPIES * 4 * min(tokens, PENALIZED_TOKENS) * architecture.vocab_size
        note = f"{PENALIZED_TOKENS} tokens at a time, in {PENALIZED_COPIES} float32 copies; never all of them"
    else:
        rows, words = min(tokens, LOGIT_TILE[0]), min(architecture.vocab_size, LOGIT_TILE[1])
        logits = (rows + architecture.hidden_size) * words * run.compute_bytes
        note = f"a tile of {rows:,} tokens × {words:,} words; never all of them"
    gradients = tokens * architecture.hidden_size * (4 + run.stream_bytes)
    if not architecture.adapter:
        gradients += 4 * architecture.embedding
        note += "; float32 gradients of head and hidden states"
    return Part("logits", logits + gradients, "training", note)


def training_flops(architecture: Architecture, run: Run, rows: int) -> float:
    """
    Floating point operations of forward and backward passes over `rows` completions, without attention's own, which
    are few at these lengths.
    """
    # 2 a weight and token forward, 2 for the gradient of inputs, 2 for that of weights, 2 to compute again.
    factor = 4 + 2 * (not architecture.adapter) + 2 * run.args.gradient_checkpointing
    return factor * rows * run.length * architecture.parameters


def levers(architecture: Architecture, run: Run) -> list[str]:
    """What to set so that a run needs less memory, a line each, the cheapest first."""
    args = run.args
    colocate, transformers = run.generation == "colocate", run.generation == "transformers"
    unshared = run.sharding in ("none", "ddp") and not run.quantized  # quantized weights cannot be sharded
    lines = {
        "gradient_checkpointing: true": not args.gradient_checkpointing,
        "a lower per_device_train_batch_size; the generation batch stays as it is": run.batch_size > 1,
        "a lower max_completion_length": True,
        "vllm_enable_sleep_mode: true": colocate and not args.vllm_enable_sleep_mode,
        "a vllm_gpu_memory_utilization that gives vLLM what it needs, and no more": colocate,
        "vllm_mode: server, on another GPU": colocate,
        "use_vllm: true, or a lower groups_per_batch": transformers and not run.quantized,
        f"generation_kwargs: {{prefill_chunk_size: {PREFILL_CHUNK}}}": transformers
        and run.prefill_tokens > PREFILL_CHUNK,
        "use_peft: true with dtype: bfloat16 and learning_rate: 2e-5 (LoRA)": not architecture.adapter,
        "load_in_4bit: true with use_vllm: false (QLoRA)": architecture.adapter and not run.quantized,
        "--config_file recipes/accelerate_configs/fsdp2.yaml, on several GPUs": unshared,
    }
    return [line for line, applies in lines.items() if applies]
