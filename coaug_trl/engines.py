"""
What generates: a model by transformers or by vLLM in this process, or a server.

Each engine has the method `complete(prompts, generation, temperature=0.0, seed=0)`. It takes pairs of a tag and the
token ids of a prompt, from an iterator that it reads only as far as it needs, and yields pairs of the tag and a
[`Completion`], in the order they are finished. Its `width` is how many texts it works on at once. Prompts are token ids
so that every engine reads what training read.
"""

import asyncio
import importlib.util
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from .errors import InputError
from .policy import GenerationSettings
from .terminal import note


ENGINES = ("vllm", "transformers")
# Batches of like length are made within as many texts: enough for little padding, few enough for little memory.
TEXTS_SORTED_TOGETHER = 4096
# Texts leave a batch, and others join it, when this share of it has ended.
LEAVING_SHARE = 1 / 8
# Texts in the vLLM engine at once, its own default for a large GPU.
VLLM_WIDTH = 256
# vLLM reserves memory for the longest prompt it may get; many models allow far longer ones than this.
LONGEST_PROMPT = 8192
# Waits between attempts at a server double from the first to the longest: two minutes in all.
SERVER_ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 10, 0.5, 30.0
SERVER_TIMEOUT, CONNECT_TIMEOUT, TIMEOUTS = 600.0, 10.0, 2


class Completion(NamedTuple):
    """
    What a model wrote.

    Args:
        text (`str`):
            Without special tokens.
        num_tokens (`int`):
            Its length in tokens.
    """

    text: str
    num_tokens: int


Prompts = Iterable[tuple[Any, list[int]]]
Completions = Iterator[tuple[Any, Completion]]


def process_index() -> int:
    """Index of this process among those that a launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """How many processes a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def best_engine() -> str:
    """`"vllm"` where it is installed, else `"transformers"`."""
    spec = importlib.util.find_spec("vllm")
    return "vllm" if spec is not None and spec.origin is not None else "transformers"


# transformers


class TransformersEngine:
    """
    Generates with a model of transformers, in batches of like length.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts generated for at once.
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.width = batch_size
        self.dtype = str(model.dtype).removeprefix("torch.")
        ends = model.generation_config.eos_token_id
        self._ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        dtype: str = "auto",
        **kwargs,
    ) -> "TransformersEngine":
        """Loads a model, or an adapter with its base model, onto this process's GPU where there is one."""
        try:
            model = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=dtype, **kwargs)
        except (OSError, ValueError) as error:  # ValueError: a folder without a model, or with an unknown one
            raise InputError(f"{model_name_or_path}: no model could be loaded from there: {error}") from None
        if torch.cuda.is_available():
            model = model.to(f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}")
        return cls(model, tokenizer, batch_size)

    @torch.inference_mode()
    def complete(
        self, prompts: Prompts, generation: GenerationSettings, temperature: float = 0.0, seed: int = 0
    ) -> Completions:
        """As the module says. Texts that have ended leave the batch, and others take their places."""
        if temperature > 0:
            torch.manual_seed(seed)
        self._set_up(generation, temperature)
        prompts = iter(prompts)
        while window := list(itertools.islice(prompts, max(self.width, TEXTS_SORTED_TOGETHER))):
            # The longest first, so that what does not fit into memory fails at once.
            window.sort(key=lambda prompt: len(prompt[1]), reverse=True)
            yield from self._complete_window(window, generation.max_new_tokens)

    @torch.inference_mode()
    def stream(self, prompt: list[int], generation: GenerationSettings) -> Iterator[str]:
        """
        Writes greedily for one prompt, for someone who reads along.

        Args:
            prompt (`list[int]`):
                Token ids.
            generation ([`~coaug_trl.policy.GenerationSettings`]):
                As for [`complete`].

        Returns:
            `Iterator[str]`: what has been written, after every token; the last one is the text that [`complete`] gives.
            A model with a recurrent state, which cannot go on from where it was, writes all at once.
        """
        self._set_up(generation, temperature=0.0)
        batch = self._start([(None, prompt)])
        while True:
            (tokens,) = batch.written()
            end = self._end(tokens)
            yield self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
            if end or len(tokens) == generation.max_new_tokens:
                return
            self._generate(batch, 1 if batch.cache is not None else generation.max_new_tokens)

    def _set_up(self, generation: GenerationSettings, temperature: float) -> None:
        # All sampling settings are given, since the model's own generation_config may hold others.
        self._settings = dict(
            do_sample=temperature > 0,
            num_beams=1,
            temperature=temperature or None,
            top_p=None,
            top_k=None,
            repetition_penalty=generation.repetition_penalty,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            cache_implementation=None,
            return_dict_in_generate=False,
        )

    def _end(self, tokens: list[int]) -> int | None:
        """How many tokens a text has if it has ended."""
        return next((place for place, token in enumerate(tokens, start=1) if token in self._ends), None)

    def _complete_window(self, window: list[tuple[Any, list[int]]], max_new_tokens: int) -> Completions:
        batch, first = None, 0
        while batch or first < len(window):
            places = self.width - len(batch.tags) if batch else self.width
            if first < len(window) and (not batch or batch.can_grow and places >= self.width * LEAVING_SHARE):
                new = self._start(window[first : first + places])
                batch, first = batch.join(new) if batch else new, first + places
            else:
                self._go_on(batch, max_new_tokens)
            staying = []
            for row, tokens in enumerate(batch.written()):
                end = self._end(tokens)
                if end or len(tokens) == max_new_tokens:
                    text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
                    yield batch.tags[row], Completion(text, end or max_new_tokens)
                else:
                    staying.append(row)
            if len(staying) < len(batch.tags):
                batch = batch.keep(staying) if staying else None

    def _start(self, prompts: list[tuple[Any, list[int]]]) -> "_Batch":
        """Reads prompts, and writes their first token."""
        tags, ids = zip(*prompts, strict=True)
        inputs = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt", padding_side="left")
        inputs = inputs.to(self.model.device)
        # A recurrent state cannot be kept for some texts of a batch only.
        cache = None if getattr(self.model, "_is_stateful", False) else DynamicCache(config=self.model.config)
        batch = _Batch(list(tags), inputs["input_ids"], inputs["attention_mask"], cache, [0] * len(tags))
        if cache is not None:
            self._generate(batch, 1)
        return batch

    def _go_on(self, batch: "_Batch", max_new_tokens: int) -> None:
        """Writes until a share of the texts has ended, or one of them has reached its longest length."""
        share = 1.0 if batch.cache is None else LEAVING_SHARE
        ended = _SomeEnded(self._ends, share)
        self._generate(batch, max_new_tokens - max(batch.lengths), stopping_criteria=StoppingCriteriaList([ended]))

    def _generate(self, batch: "_Batch", max_new_tokens: int, **kwargs) -> None:
        # Older versions of transformers penalise what stands in the padding: nothing that the prompt does not hold.
        first = batch.ids.gather(1, batch.mask.int().argmax(dim=1, keepdim=True))
        batch.ids = torch.where(batch.mask.bool(), batch.ids, first)
        output = self.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            past_key_values=batch.cache,
            max_new_tokens=max_new_tokens,
            **self._settings,
            **kwargs,
        )
        count = output.shape[1] - batch.ids.shape[1]
        batch.lengths = [length + count for length in batch.lengths]
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.tags), count)], dim=1)
        batch.ids = output


@dataclass
class _Batch:
    """
    Texts that are being written, padded on the left.

    Args:
        tags (`list`):
            A tag of each text.
        ids (`torch.Tensor` of shape `(texts, length)`):
            Prompts and what has been written.
        mask (`torch.Tensor`, same shape):
            0 for padding.
        cache ([`~transformers.DynamicCache`] or `None`):
            Of all tokens but the last.
        lengths (`list[int]`):
            How many tokens of each text have been written.
    """

    tags: list[Any]
    ids: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache | None
    lengths: list[int]

    @property
    def can_grow(self) -> bool:
        """Whether texts of other lengths can join: not where layers keep the last tokens only, or a state."""
        return self.cache is not None and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def written(self) -> list[list[int]]:
        """The tokens written for each text, with the padding after its end."""
        longest = max(self.lengths)
        rows = self.ids[:, self.ids.shape[1] - longest :].tolist()
        return [row[longest - length :] for row, length in zip(rows, self.lengths, strict=True)]

    def keep(self, rows: list[int]) -> "_Batch":
        """The texts of some rows, without the padding that all of them have."""
        index = torch.tensor(rows, device=self.ids.device)
        mask = self.mask[index]
        padding = int(mask.any(dim=0).int().argmax()) if self.can_grow else 0
        if self.cache is not None:
            self.cache.batch_select_indices(index)
        if padding:
            _change_cache(self.cache, lambda states: states[:, :, padding:])
        lengths = [self.lengths[row] for row in rows]
        return _Batch(
            [self.tags[row] for row in rows], self.ids[index, padding:], mask[:, padding:], self.cache, lengths
        )

    def join(self, other: "_Batch") -> "_Batch":
        """The texts of both."""
        length = max(self.ids.shape[1], other.ids.shape[1])
        for batch in (self, other):
            padding = length - batch.ids.shape[1]
            batch.ids, batch.mask = F.pad(batch.ids, (padding, 0)), F.pad(batch.mask, (padding, 0))
            if padding:
                _change_cache(batch.cache, lambda states, padding=padding: F.pad(states, (0, 0, padding, 0)))
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            ours.keys = torch.cat([ours.keys, theirs.keys])
            ours.values = torch.cat([ours.values, theirs.values])
        ids, mask = torch.cat([self.ids, other.ids]), torch.cat([self.mask, other.mask])
        return _Batch(self.tags + other.tags, ids, mask, self.cache, self.lengths + other.lengths)


def _change_cache(cache: DynamicCache, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes keys and values of all layers, of shape `(texts, heads, length, size)`."""
    for layer in cache.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)


class _SomeEnded(StoppingCriteria):
    """Stops all texts when a share of them has ended."""

    def __init__(self, ends: list[int], share: float):
        self.ends, self.share = torch.tensor(ends, dtype=torch.long), share
        self.ended: torch.Tensor | bool = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        self.ended = self.ended | torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
        return (self.ended.float().mean() >= self.share).expand(len(input_ids))


# vLLM


class VLLMEngine:
    """
    Generates with vLLM, in this process and on one GPU: that of the process where a launcher started several.

    Args:
        model_name_or_path (`str`):
            Folder or Hub id of a model, or folder of a LoRA adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        longest_prompt (`int`):
            Tokens of the longest prompt.
        generation ([`~coaug_trl.policy.GenerationSettings`]):
            Its `max_new_tokens` are added to the longest prompt.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights; `"auto"` is the one they are saved in.
        gpu_memory_utilization (`float`, *optional*):
            Share of the GPU's memory that vLLM takes; defaults to 0.9, on a CPU to 0.2 of the memory shared among the
            processes.
        **kwargs:
            `revision` and `trust_remote_code`.
    """

    name = "vllm"
    width = VLLM_WIDTH

    def __init__(
        self,
        model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        longest_prompt: int,
        generation: GenerationSettings,
        dtype: str = "auto",
        gpu_memory_utilization: float | None = None,
        **kwargs,
    ):
        _choose_gpu()
        # The engine in a process of its own would live on, with its memory, when this one is killed.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from transformers import AutoConfig

        self.tokenizer = tokenizer
        self._adapter, settings = None, {}
        base = model_name_or_path
        adapter = Path(model_name_or_path) / "adapter_config.json"
        if adapter.is_file():
            content = json.loads(adapter.read_text(encoding="utf-8"))
            base = content["base_model_name_or_path"]
            settings = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(content["r"])}
        try:
            config = AutoConfig.from_pretrained(base, **kwargs)
            self.dtype = _saved_dtype(config) if dtype == "auto" else dtype
            allowed = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
            with _without_launcher():
                from vllm import LLM
                from vllm.lora.request import LoRARequest

                if adapter.is_file():
                    self._adapter = LoRARequest("policy", 1, str(Path(model_name_or_path).resolve()))
                if gpu_memory_utilization is None:
                    gpu_memory_utilization = 0.9 if torch.cuda.is_available() else 0.2 / num_processes()
                self.llm = LLM(
                    base,
                    tokenizer=model_name_or_path,
                    dtype=self.dtype,
                    max_model_len=min(allowed, longest_prompt + generation.max_new_tokens),
                    max_num_seqs=self.width,
                    gpu_memory_utilization=gpu_memory_utilization,
                    **settings,
                    **kwargs,
                )
        # what vLLM raises for models it does not know, and where memory or a library is missing
        except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError, AssertionError) as error:
            hint = " An adapter can be merged into its base model by merge_and_unload() of peft." * adapter.is_file()
            raise InputError(
                f"{model_name_or_path}: vLLM cannot load it ({type(error).__name__}: {error}); use the engine "
                f"transformers.{hint}"
            ) from error
        self._ids = map(str, itertools.count())

    def complete(
        self, prompts: Prompts, generation: GenerationSettings, temperature: float = 0.0, seed: int = 0
    ) -> Completions:
        """As the module says."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            seed=seed if temperature > 0 else None,
            repetition_penalty=generation.repetition_penalty,
            max_tokens=generation.max_new_tokens,
            detokenize=False,  # by the tokenizer, as for the other engines
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # The engine is fed as texts leave it, rather than by LLM.generate, which waits for the slowest of its texts.
        engine, prompts, running = self.llm.llm_engine, iter(prompts), {}
        try:
            while True:
                for tag, ids in itertools.islice(prompts, self.width - len(running)):
                    number = next(self._ids)
                    try:
                        engine.add_request(number, {"prompt_token_ids": ids}, params, lora_request=self._adapter)
                    except ValueError as error:
                        raise InputError(f"A prompt of {len(ids):,} tokens is refused by vLLM: {error}") from None
                    running[number] = tag
                if not running:
                    return
                for output in engine.step():
                    if output.finished:
                        tokens = output.outputs[0].token_ids
                        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                        yield running.pop(output.request_id), Completion(text, len(tokens))
        finally:
            if running:
                engine.abort_request(list(running))


def _choose_gpu() -> None:
    """Leaves this process the one GPU that is its own, which vLLM takes as the first; before CUDA is asked anything."""
    if num_processes() > 1 and "LOCAL_RANK" in os.environ:
        local_rank = int(os.environ["LOCAL_RANK"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(local_rank)] * (local_rank + 1)
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank % len(devices)]


@contextmanager
def _without_launcher() -> Iterator[None]:
    """Hides what a launcher says of several processes: each engine is alone, and would wait for the others."""
    names = [
        name
        for name in os.environ
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        or name.startswith(("GROUP_", "ROLE_", "TORCHELASTIC_"))
    ]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _lora_rank(rank: int) -> int:
    """The smallest limit that vLLM takes for adapters of a rank."""
    return next((limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= rank), rank)


def _saved_dtype(config: Any) -> str:
    return str(config.get_text_config().dtype or torch.float32).removeprefix("torch.")


# Server


class ServerEngine:
    """
    Generates with a server that speaks the OpenAI protocol for completions and takes token ids, such as `vllm serve`.

    A request that fails by connection, overload or a fault of the server is repeated, after waits that double.

    Args:
        url (`str`):
            Of the server, with or without `/v1`. `OPENAI_API_KEY` of the environment is its key, if it needs one.
        model (`str`):
            Name the server has the model under; another one is taken where the server has no other.
        concurrency (`int`, *optional*, defaults to `64`):
            Requests at once.

    Raises:
        `InputError`: No server answers, it does not have the model, it refuses a request, or it stays down.
    """

    name = "server"
    dtype = "of the server"

    def __init__(self, url: str, model: str, concurrency: int = 64):
        import httpx

        if concurrency < 1:
            raise InputError(f"The concurrency is {concurrency}; use at least 1, such as 64.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.width = concurrency
        try:
            response = httpx.get(f"{self.url}/v1/models", headers=self._headers(), timeout=30)
            response.raise_for_status()
            served = [entry["id"] for entry in response.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{url}: no server with the OpenAI protocol answers there ({error}); start one, such as vllm serve "
                f"{model}, and give its address, such as http://localhost:8000."
            ) from None
        if model not in served and len(served) != 1:
            raise InputError(
                f"{url} serves {', '.join(served) or 'no model'}, and the model is {model}; let the server call it by "
                "this name (vLLM: --served-model-name, for an adapter --lora-modules)."
            )
        self.model = model if model in served else served[0]
        if self.model != model and process_index() == 0:
            note(f"{url} serves {self.model}, which is taken to be {model}")

    def complete(
        self, prompts: Prompts, generation: GenerationSettings, temperature: float = 0.0, seed: int = 0
    ) -> Completions:
        """As the module says."""
        import httpx

        request = {
            "model": self.model,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": generation.max_new_tokens,
            "repetition_penalty": generation.repetition_penalty,
        }
        limits = httpx.Limits(max_connections=self.width, max_keepalive_connections=self.width)
        client = httpx.AsyncClient(
            headers=self._headers(), timeout=httpx.Timeout(SERVER_TIMEOUT, connect=CONNECT_TIMEOUT), limits=limits
        )
        prompts, running = iter(prompts), {}
        with asyncio.Runner() as runner:  # at the end, or when interrupted, it cancels what is running
            try:
                while True:
                    for tag, ids in itertools.islice(prompts, self.width - len(running)):
                        running[runner.get_loop().create_task(self._post(client, request | {"prompt": ids}))] = tag
                    if not running:
                        return
                    finished = runner.run(_finished(running, asyncio.FIRST_COMPLETED))
                    if any(task.exception() for task in finished):
                        finished = runner.run(_finished(running, asyncio.ALL_COMPLETED))
                    # Those that have failed last: what the others brought is not lost.
                    for task in sorted(finished, key=lambda task: task.exception() is not None):
                        yield running.pop(task), task.result()
            finally:
                runner.run(_close(client, running))

    async def _post(self, client: Any, request: dict[str, Any]) -> Completion:
        import httpx

        timeouts = 0
        for attempt in range(SERVER_ATTEMPTS):
            if attempt:
                wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # so that not all ask again at once
            try:
                response = await client.post(f"{self.url}/v1/completions", json=request)
            except httpx.TransportError as error:
                fault = f"{type(error).__name__}: {error}".removesuffix(": ")
                timeouts += isinstance(error, httpx.ReadTimeout)
                if timeouts == TIMEOUTS:
                    break
                continue
            if response.status_code in (408, 429) or response.status_code >= 500:
                fault = f"status {response.status_code}"
                continue
            try:
                response.raise_for_status()
                content = response.json()
                text, num_tokens = content["choices"][0]["text"], content["usage"]["completion_tokens"]
                if not isinstance(text, str):
                    raise TypeError
                return Completion(text, num_tokens)
            except (httpx.HTTPStatusError, ValueError, KeyError, IndexError, TypeError):
                raise InputError(
                    f"{self.url} refuses a prompt of {len(request['prompt']):,} tokens, or answers what is not a "
                    f"completion: status {response.status_code}, {response.text[:500]}"
                ) from None
        raise InputError(
            f"{self.url} stays down ({fault}, after {attempt + 1} attempts); what has been generated is saved, and "
            "the same command goes on when the server is back."
        )

    @staticmethod
    def _headers() -> dict[str, str]:
        key = os.environ.get("OPENAI_API_KEY")
        return {"Authorization": f"Bearer {key}"} if key else {}


async def _finished(tasks: Iterable[asyncio.Task], when: str) -> set[asyncio.Task]:
    finished, _ = await asyncio.wait(tasks, return_when=when)
    return finished


async def _close(client: Any, tasks: Iterable[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
