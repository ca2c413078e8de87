"""Generation with vLLM, one engine a process and GPU."""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...policy.settings import GenerationSettings
from ...utils.errors import InputError
from ...utils.files import read_json
from .base import Completion, Completions, Prompts, num_processes


# Texts in the vLLM engine at once, its own default for a large GPU.
VLLM_WIDTH = 256


# vLLM


class VLLMEngine:
    """
    Generates with vLLM, in this process and on one GPU: that of the process where a launcher started several.

    Args:
        model_name_or_path: Folder or Hub id of a model, or folder of a LoRA adapter.
        tokenizer: Its tokenizer.
        longest_prompt: Tokens of the longest prompt.
        generation: Its `max_new_tokens` are added to the longest prompt.
        dtype: Type of the weights; `"auto"` is the one they are saved in.
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
            content = read_json(adapter)
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
                self.llm = LLM(
                    base,
                    tokenizer=model_name_or_path,
                    dtype=self.dtype,
                    max_model_len=min(allowed, longest_prompt + generation.max_new_tokens),
                    max_num_seqs=self.width,
                    # on a CPU the processes share its memory
                    gpu_memory_utilization=0.9 if torch.cuda.is_available() else 0.2 / num_processes(),
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
