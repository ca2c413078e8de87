"""
Memory that a training run needs on each GPU, estimated from the model's configuration and the run's settings alone.

Everything here is arithmetic on sizes: nothing is loaded and no GPU is asked. Counts of parameters, gradients and
optimizer states are exact. Activations are those that autograd keeps of a Llama-like layer (RMSNorm, fused attention,
gated MLP), which holds for Llama, Qwen and their relatives within a few percent; what allocators and kernels take
beside them is a flat guess.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


GIB = 2**30
# CUDA context, kernels' workspaces and what the allocator cannot use again: a guess.
OVERHEAD = int(1.5 * GIB)
# What vLLM takes beside weights and cache: the activations of 4,096 tokens, sampling. A guess too.
ENGINE_OVERHEAD = int(1.5 * GIB)
# Where the search for a GPU that is large enough ends, in GiB.
LARGEST_GPU = 1 << 16
# Tiles of logits of TRL's fused LM head (trl/kernels/chunked_logprob.py): so many tokens by so many words.
LOGIT_TILE = (4096, 32768)
# The head that applies the repetition penalty has the logits of so many tokens at a time, in three float32 copies.
PENALIZED_TOKENS = 512
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
    """
    Sizes of a causal language model.

    Args:
        parameters (`int`):
            Its parameters, tied ones counted once, without adapters.
        trainable (`int`):
            Those trained: all, or the adapter's.
        embedding (`int`):
            Those of the LM head, which are those of the input embedding where the two are tied.
        layer (`int`):
            Those of the largest layer.
        linear (`int`):
            Those of the layers' linear modules, which quantization makes small.
        linear_widths (`int`):
            Inputs and outputs of these modules together: what a LoRA adapter has of parameters for each unit of rank.
        num_layers (`int`):
            Layers.
        hidden_size (`int`):
            Width of the residual stream.
        intermediate_size (`int`):
            Width of the MLP.
        attention_size (`int`):
            Width of all heads together.
        key_value_size (`int`):
            Width of all heads of keys, which is that of values.
        vocab_size (`int`):
            Rows of the embedding.
        query_key_norm (`bool`):
            Whether queries and keys are normalised, as in Qwen3.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether an adapter is trained and the rest is not.
    """

    parameters: int
    trainable: int
    embedding: int
    layer: int
    linear: int
    linear_widths: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    attention_size: int
    key_value_size: int
    vocab_size: int
    query_key_norm: bool
    adapter: bool = False

    def with_lora(self, rank: int = 16) -> "Architecture":
        """The same model with a LoRA adapter of this rank on all linear modules but the LM head."""
        return replace(self, trainable=rank * self.linear_widths, adapter=True)


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    The causal language model that a configuration describes, on the meta device: shapes without weights.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Configuration.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the model may run code of its own.

    Returns:
        [`~transformers.PreTrainedModel`]: the model.

    Raises:
        `ValueError`: transformers knows no causal language model with this configuration.
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
    """
    What decides the memory of a run besides the sizes of its model. Numbers of rows and tokens are those of one process.

    Args:
        batch_size (`int`):
            Completions in a forward pass.
        prompt_tokens (`int`):
            Tokens of the longest prompt.
        completion_tokens (`int`):
            Tokens of the longest completion.
        rows (`int`):
            Completions of a generation batch.
        groups (`int`):
            Groups of a generation batch, over all processes.
        weight_bytes (`int`, *optional*, defaults to `4`):
            Bytes a weight is loaded with.
        adapter_bytes (`int`, *optional*, defaults to `4`):
            Bytes a weight of an adapter has.
        quantized (`int`, *optional*):
            4 or 8 for a base model quantized to so many bits.
        mixed_precision (`bool`, *optional*, defaults to `True`):
            Whether 16-bit copies are computed with.
        checkpointing (`bool`, *optional*, defaults to `True`):
            Whether activations are computed again in the backward pass.
        sharding (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"ddp"`, `"fsdp2"`, `"zero1"`, `"zero2"` or `"zero3"`.
        num_processes (`int`, *optional*, defaults to `1`):
            Processes, one a GPU.
        optimizer_state (`float`, *optional*, defaults to `2`):
            Size of the optimizer's state as a multiple of the trained weights: AdamW has two moments.
        reference (`bool`, *optional*, defaults to `False`):
            Whether a copy of the model is kept for a KL term.
        penalize_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the log-probabilities apply the repetition penalty.
        generation (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"` or `"server"` for vLLM, `"transformers"` for `generate`.
        prefill_tokens (`int`, *optional*):
            Tokens of the prompts that `generate` reads at a time; defaults to all.
        engine_share (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that vLLM takes in colocate mode.
        engine_length (`int`, *optional*):
            Longest sequence vLLM makes room for; defaults to prompt and completion.
        engine_sleeps (`bool`, *optional*, defaults to `False`):
            Whether vLLM gives its memory back while the model is trained.
        tensor_parallel (`int`, *optional*, defaults to `1`):
            GPUs that share the weights of one vLLM engine.
        encoder (`int`, *optional*, defaults to `0`):
            Bytes of the encoder of a dense retriever.
    """

    batch_size: int
    prompt_tokens: int
    completion_tokens: int
    rows: int
    groups: int
    weight_bytes: int = 4
    adapter_bytes: int = 4
    quantized: int | None = None
    mixed_precision: bool = True
    checkpointing: bool = True
    sharding: str = "none"
    num_processes: int = 1
    optimizer_state: float = 2
    reference: bool = False
    penalize_log_probs: bool = False
    generation: str = "colocate"
    prefill_tokens: int | None = None
    engine_share: float = 0.3
    engine_length: int | None = None
    engine_sleeps: bool = False
    tensor_parallel: int = 1
    encoder: int = 0

    @property
    def length(self) -> int:
        """Tokens of a row: all are padded to the longest."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def compute_bytes(self) -> int:
        """Bytes of what matrices are multiplied in."""
        return 2 if self.mixed_precision or self.quantized else self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of the residual stream, which has the type of the weights as they are computed with."""
        return self.weight_bytes if self.sharding in ("none", "ddp") else self.compute_bytes

    def shards(self, what: str) -> int:
        """Over how many processes `what` is divided: `"weights"`, `"gradients"` or `"optimizer"`."""
        return self.num_processes if what in _DIVIDED.get(self.sharding, ()) else 1


@dataclass(frozen=True)
class Part:
    """
    One part of the memory of a process.

    Args:
        name (`str`):
            What it is.
        size (`int`):
            Bytes.
        phase (`str`):
            When it is there: `"always"`, while completions are made (`"generation"`) or in an update (`"training"`).
        note (`str`, *optional*, defaults to `""`):
            How it was reckoned.
    """

    name: str
    size: int
    phase: str
    note: str = ""


def estimate_memory(architecture: Architecture, run: Run) -> list[Part]:
    """
    Memory of one process, by part, without vLLM's in colocate mode (see [`engine_memory`]).

    Args:
        architecture ([`Architecture`]):
            Sizes of the model.
        run ([`Run`]):
            Settings.

    Returns:
        `list[Part]`: the parts. The peak is what is always there and the larger of the two phases.
    """
    parts = [*_states(architecture, run), *_generation(architecture, run), *_update(architecture, run)]
    if run.encoder:
        parts.append(Part("encoder", run.encoder, "always", "weights as loaded, activations of a batch"))
    parts.append(Part("overhead", OVERHEAD, "always", "CUDA context, workspaces, fragments: a guess"))
    return [part for part in parts if part.size]


def peak_memory(architecture: Architecture, run: Run, gpu: int | None = None) -> int:
    """
    The most memory a process needs at once, in bytes.

    Args:
        architecture ([`Architecture`]):
            Sizes of the model.
        run ([`Run`]):
            Settings.
        gpu (`int`, *optional*):
            Bytes of a GPU, of which vLLM takes its share in colocate mode; without it vLLM is left out.

    Returns:
        `int`: bytes.
    """
    by_phase = {"always": 0, "generation": 0, "training": 0}
    for part in estimate_memory(architecture, run):
        by_phase[part.phase] += part.size
    if gpu is not None and run.generation == "colocate":
        by_phase["generation" if run.engine_sleeps else "always"] += int(run.engine_share * gpu)
    return by_phase["always"] + max(by_phase["generation"], by_phase["training"])


def fits(architecture: Architecture, run: Run, gpu: int) -> bool:
    """Whether a run fits on a GPU of `gpu` bytes, and the engine into the share of it that it is given."""
    return engine_starts(architecture, run, gpu) and peak_memory(architecture, run, gpu) <= gpu


def engine_starts(architecture: Architecture, run: Run, gpu: int) -> bool:
    """Whether vLLM has enough of the training GPU, where it is there."""
    return run.generation != "colocate" or run.engine_share * gpu >= engine_memory(architecture, run)


def smallest_gpu(architecture: Architecture, run: Run) -> int | None:
    """The least memory of a GPU on which a run fits, in whole GiB; `None` if vLLM's share leaves too little of any."""
    low, high = 1, 1
    while not fits(architecture, run, high * GIB):
        low, high = high, 2 * high
        if high > LARGEST_GPU:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(architecture, run, middle * GIB) else (middle + 1, high)
    return high


def engine_memory(architecture: Architecture, run: Run) -> int:
    """The least bytes vLLM works with on a GPU: 16-bit weights, the cache of one sequence, and some room."""
    cache = cache_bytes(architecture, 2) * (run.engine_length or run.length)
    return (2 * architecture.parameters + cache) // run.tensor_parallel + ENGINE_OVERHEAD


def cache_bytes(architecture: Architecture, element_bytes: int) -> int:
    """Bytes of keys and values of one token."""
    return 2 * architecture.num_layers * architecture.key_value_size * element_bytes


def _states(architecture: Architecture, run: Run) -> Iterator[Part]:
    """Weights, gradients and optimizer state."""
    adapter = architecture.trainable if architecture.adapter else 0
    weight_bytes, trained_bytes = run.weight_bytes, run.adapter_bytes if adapter else run.weight_bytes
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
    if run.reference and not adapter:
        yield Part("reference model", base // shards, "always", "for the KL term" + _over(shards))

    trained, shards = architecture.trainable, run.shards("gradients")
    note = f"{trained:,} in {8 * trained_bytes} bits"
    yield Part("gradients", trained * trained_bytes // shards, "training", note + _over(shards))
    if run.sharding == "ddp":
        yield Part("gradient buckets", trained * trained_bytes, "always", "DDP's copy for the exchange")
    state_bytes = run.optimizer_state * (4 if deepspeed else trained_bytes)
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
    tokens = min(run.prefill_tokens or run.prompt_tokens, run.prompt_tokens)
    note = f"one layer's activations of {run.rows:,} prompts, {tokens:,} tokens at a time"
    yield Part("prompts read", run.rows * tokens * widths, "generation", note)
    logits = 4 * 4 * run.rows * architecture.vocab_size
    yield Part("logits of generation", logits, "generation", "of the last token, in four float32 copies")


def _update(architecture: Architecture, run: Run) -> Iterator[Part]:
    """What a forward and backward pass needs besides weights and gradients."""
    layer = activation_bytes(architecture, run)
    tokens = run.batch_size * run.length
    if run.checkpointing:
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
    if architecture.adapter:  # frozen weights need no inputs kept, their adapters do
        hidden, attention = (18, 10) if half else (16, 16)
    else:
        attention = 4 * run.compute_bytes
        hidden = 24 if not half else 26 if run.stream_bytes == 4 else 16
    size = hidden * architecture.hidden_size + attention * architecture.attention_size
    size += 4 * run.compute_bytes * architecture.intermediate_size
    if architecture.query_key_norm:
        size += (4 + run.compute_bytes) * (architecture.attention_size + architecture.key_value_size)
    return size


def _logits(architecture: Architecture, run: Run) -> Part:
    tokens = run.batch_size * run.completion_tokens  # only completions are scored
    if run.penalize_log_probs:
        logits = 3 * 4 * min(tokens, PENALIZED_TOKENS) * architecture.vocab_size
        note = f"{PENALIZED_TOKENS} tokens at a time, in three float32 copies; never all of them"
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
    factor = 4 + 2 * (not architecture.adapter) + 2 * run.checkpointing
    return factor * rows * run.length * architecture.parameters


@dataclass(frozen=True)
class Change:
    """
    A change of settings that lowers memory.

    Args:
        text (`str`):
            What to set.
        architecture ([`Architecture`]):
            The model with it.
        run ([`Run`]):
            The settings with it.
        more_gpus (`bool`, *optional*, defaults to `False`):
            Whether it takes more GPUs.
    """

    text: str
    architecture: Architecture
    run: Run
    more_gpus: bool = False

    def peak(self, gpu: int) -> int:
        """[`peak_memory`] with it."""
        return peak_memory(self.architecture, self.run, gpu)

    def fits(self, gpu: int) -> bool:
        """[`fits`] with it."""
        return fits(self.architecture, self.run, gpu)


def ways_to_fit(architecture: Architecture, run: Run, gpu: int) -> list[Change]:
    """
    Changes that lower the memory of a run, those that save most first.

    Args:
        architecture ([`Architecture`]):
            Sizes of the model.
        run ([`Run`]):
            Settings, which do not fit.
        gpu (`int`):
            Bytes of the GPU they should fit on.

    Returns:
        `list[Change]`: each change by itself that saves more than one percent of the GPU's memory, makes the run fit or
        lets vLLM start.
    """
    before = peak_memory(architecture, run, gpu)
    starts = engine_starts(architecture, run, gpu)
    changes = [
        change
        for change in _changes(architecture, run, gpu)
        if before - change.peak(gpu) > gpu / 100
        or change.fits(gpu)
        or (engine_starts(change.architecture, change.run, gpu) and not starts)
    ]
    return sorted(changes, key=lambda change: change.peak(gpu))


def combine_ways_to_fit(architecture: Architecture, run: Run, gpu: int) -> list[Change] | None:
    """
    Changes that together make a run fit: each time the one that saves most, and at last the mildest that is enough.
    Those that take more GPUs come only where no other is left.

    Returns:
        `list[Change]`: the changes, the last with model and settings after all of them; `None` if they are not enough.
    """
    chosen = []
    while not fits(architecture, run, gpu):
        changes = ways_to_fit(architecture, run, gpu)
        changes = [change for change in changes if not change.more_gpus] or changes
        if not changes:
            return None
        change = next((change for change in reversed(changes) if change.fits(gpu)), changes[0])
        architecture, run = change.architecture, change.run
        setting = change.text.split(":")[0]
        chosen = [each for each in chosen if each.text.split(":")[0] != setting]
        if run.generation != "colocate":  # the share of an engine on this GPU matters no more
            chosen = [each for each in chosen if not each.text.startswith("vllm_gpu") and "sleep" not in each.text]
        chosen.append(change)
    return chosen


def _changes(architecture: Architecture, run: Run, gpu: int) -> Iterator[Change]:
    if run.batch_size > 1:
        smaller = next(size for size in range(run.batch_size // 2, 0, -1) if run.batch_size % size == 0)
        yield Change(f"per_device_train_batch_size: {smaller}", architecture, replace(run, batch_size=smaller))
    if not run.checkpointing:
        yield Change("gradient_checkpointing: true", architecture, replace(run, checkpointing=True))
    shorter = run.completion_tokens // 2
    if shorter >= 64:
        yield Change(f"max_completion_length: {shorter}", architecture, replace(run, completion_tokens=shorter))
    if not architecture.adapter:
        changed = replace(run, weight_bytes=2, reference=False)
        text = "use_peft: true with dtype: bfloat16 and learning_rate: 2e-5 (LoRA)"
        yield Change(text, architecture.with_lora(), changed)
    elif not run.quantized:
        changed, more = replace(run, quantized=4, adapter_bytes=2), ""
        if (
            run.generation != "transformers"
        ):  # TRL cannot hand quantized weights to vLLM, and generate wants small batches
            rows, groups = run.rows * run.num_processes // run.groups, run.num_processes
            changed = replace(changed, generation="transformers", rows=rows, groups=groups)
            more = f" with use_vllm: false and groups_per_batch: {groups}"
        yield Change(f"load_in_4bit: true{more} (QLoRA)", architecture, changed)
    if run.sharding in ("none", "ddp") and not run.quantized:  # quantized weights cannot be sharded
        processes = max(8, run.num_processes)
        rows = -(-run.rows * run.num_processes // processes)
        for sharding in ("fsdp2", "zero3"):
            changed = replace(run, sharding=sharding, num_processes=processes, rows=rows)
            text = f"--config_file recipes/accelerate_configs/{sharding}.yaml, {processes} GPUs"
            yield Change(text, architecture, changed, more_gpus=True)
    if run.generation == "transformers":
        if (run.prefill_tokens or run.prompt_tokens) > PREFILL_CHUNK:
            changed = replace(run, prefill_tokens=PREFILL_CHUNK)
            yield Change(f"generation_kwargs: {{prefill_chunk_size: {PREFILL_CHUNK}}}", architecture, changed)
        if run.groups >= 2 * run.num_processes:
            changed = replace(run, rows=run.rows // 2, groups=run.groups // 2)
            yield Change(f"groups_per_batch: {changed.groups}", architecture, changed)
        if not run.quantized:
            yield Change("use_vllm: true", architecture, replace(run, generation="colocate"))
    if run.generation == "colocate":
        yield Change(
            "vllm_mode: server, on another GPU", architecture, replace(run, generation="server"), more_gpus=True
        )
        if not run.engine_sleeps:
            yield Change("vllm_enable_sleep_mode: true", architecture, replace(run, engine_sleeps=True))
        share = -(-engine_memory(architecture, run) * 100 // gpu) / 100  # in whole percent, upwards
        if share < 1 and share != run.engine_share:
            text = f"vllm_gpu_memory_utilization: {share:.2f} (what vLLM needs, {{}})"
            text = text.format("slower" if share < run.engine_share else "to start at all")
            yield Change(text, architecture, replace(run, engine_share=share))
