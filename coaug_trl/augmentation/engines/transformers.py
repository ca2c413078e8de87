"""Generation with transformers, in batches that are kept full."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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

from ...policy.settings import GenerationSettings
from ...utils.errors import InputError
from .base import Completion, Completions, Prompts


# Batches of like length are made within as many texts: enough for little padding, few enough for little memory.
TEXTS_SORTED_TOGETHER = 4096
# Texts leave a batch, and others join it, when this share of it has ended.
LEAVING_SHARE = 1 / 8


class TransformersEngine:
    """
    Generates with a model of transformers, in batches of like length.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        batch_size: Texts generated for at once.
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
            prompt: Token ids.
            generation: As for [`complete`].

        Returns: what has been written, after every token; the last one is the text that [`complete`] gives. A model
            with a recurrent state, which cannot go on from where it was, writes all at once.
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
        tags: A tag of each text.
        ids, of shape `(texts, length)`: Prompts and what has been written.
        mask: 0 for padding.
        cache: Of all tokens but the last.
        lengths: How many tokens of each text have been written.
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
