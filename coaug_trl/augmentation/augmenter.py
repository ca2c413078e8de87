"""Augment many texts with a policy, and keep the answers in a folder that search and evaluation read."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.collection import Collection
from ..policy.download import policy_folder
from ..policy.fingerprint import fingerprint
from ..policy.prompts import PromptSet, answer_so_far, extract_answer, has_answer
from ..policy.settings import GenerationSettings, PolicySettings, package_versions
from ..utils.errors import InputError
from ..utils.files import write_json
from .engines.base import ENGINES, Completion, process_index
from .engines.server import ServerEngine
from .engines.transformers import TransformersEngine
from .engines.vllm import VLLMEngine
from .estimate import Estimate, estimate_side
from .folder import FILES, IDENTITY, MANIFEST, SIDES, read_manifest
from .side import AnsweredSide, Throughput


# vLLM reserves memory for the longest prompt it may get; many models allow far longer ones than this.
LONGEST_PROMPT = 8192
PROMPTS_TOGETHER = 64  # texts whose prompts are made at once


@dataclass(frozen=True, slots=True)
class Augmentation:
    """
    What a policy adds to one text.

    Args:
        answer: The text of its answer, which may be empty.
        complete: Whether the completion held a whole `<answer>…</answer>`.
        truncated: Whether the text was cut before the policy read it.
    """

    answer: str
    complete: bool
    truncated: bool = False


class Augmenter:
    """
    Augments texts greedily, with the prompts and generation settings the policy was trained with.

    Args:
        model ([`~transformers.PreTrainedModel`] or an engine):
            The policy, or one of [`~coaug_trl.augmentation.engines.base`] that generates with it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        settings ([`~coaug_trl.policy.settings.PolicySettings`]):
            Prompt set and generation settings.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts generated for at once by transformers.
        name (`str`, *optional*):
            What the manifest calls the model; defaults to where it was loaded from.
        revision (`str`, *optional*):
            Revision of the model, for the manifest.

    Raises:
        `InputError`: `batch_size` is less than 1.

    Example:

    ```python
    >>> augmenter = Augmenter.from_pretrained("runs/nfcorpus")
    >>> augmenter.generate("query", ["Do statins cause breast cancer?"])[0].answer
    'cholesterol-lowering drugs, HMG-CoA reductase inhibitors, breast carcinoma risk'
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | TransformersEngine | VLLMEngine | ServerEngine,
        tokenizer: PreTrainedTokenizerBase,
        settings: PolicySettings,
        batch_size: int = 32,
        name: str | None = None,
        revision: str | None = None,
    ):
        _check_batch_size(batch_size)
        _prepare(tokenizer)
        own = isinstance(model, torch.nn.Module)
        self.engine = TransformersEngine(model, tokenizer, batch_size) if own else model
        self.tokenizer = tokenizer
        self.settings = settings
        self.name = name or model.name_or_path
        self.revision = revision
        self.throughput: dict[str, Throughput] = {}
        made_with = (revision or self.name, settings.prompt_set.hash, asdict(settings.generation))
        self._made_with = json.dumps(made_with).encode()

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        prompt_set: PromptSet | None = None,
        generation: GenerationSettings | None = None,
        batch_size: int = 32,
        revision: str | None = None,
        trust_remote_code: bool = False,
        engine: str = "transformers",
        server: str | None = None,
        dtype: str = "auto",
    ) -> "Augmenter":
        """
        Loads a policy.

        Args:
            model_name_or_path (`str`):
                A folder or Hub id: a trained policy, which brings its settings, or any causal language model. Both may
                be LoRA adapters.
            prompt_set ([`~coaug_trl.PromptSet`], *optional*):
                Prompts for a model that was not trained here; defaults to the package's for sparse retrievers.
            generation ([`~coaug_trl.policy.settings.GenerationSettings`], *optional*):
                Generation settings for a model that was not trained here.
            batch_size (`int`, *optional*, defaults to `32`):
                Texts generated for at once by transformers.
            revision (`str`, *optional*):
                Revision on the Hub.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether a model may run code of its own.
            engine (`str`, *optional*, defaults to `"transformers"`):
                What generates in this process: `"transformers"` or `"vllm"`.
            server (`str`, *optional*):
                Address of a server that generates instead; then only tokenizer and settings are loaded here.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Type of the weights, such as `"bfloat16"`; `"auto"` is the one they are saved in.

        Raises:
            `InputError`: There is no such model, the settings differ from those it was trained with, or the engine
                cannot be started.
        """
        _check_batch_size(batch_size)
        source = policy_folder(model_name_or_path, revision)
        settings = _settings_for(model_name_or_path, PolicySettings.load(source), prompt_set, generation)
        if source != model_name_or_path:
            revision = None  # the folder is that of the revision
        tokenizer = _load_tokenizer(model_name_or_path, source, revision, trust_remote_code)
        if server is not None:
            model = ServerEngine(server, model_name_or_path)
        else:
            kwargs = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
            model = _load_engine(engine, source, tokenizer, settings, batch_size, kwargs)
        name, revision = os.path.normpath(model_name_or_path), fingerprint(source, revision)
        return cls(model, tokenizer, settings, batch_size, name, revision)

    def generate(self, side: str, texts: list[str]) -> list[Augmentation]:
        """
        Augments texts.

        Args:
            side (`str`):
                `"query"` or `"document"`.
            texts (`list[str]`):
                The texts; of a document see [`~coaug_trl.data.document.document_text`].

        Returns:
            `list[Augmentation]`: one for each text.
        """
        answered = self.augment(side, enumerate(texts))
        augmentations = {place: augmentation for place, augmentation, _ in answered}
        return [augmentations[place] for place in range(len(texts))]

    def stream(self, side: str, text: str) -> Iterator[str]:
        """
        Augments one text for someone who reads along; with transformers only.

        Args:
            side (`str`):
                As in [`generate`].
            text (`str`):
                Likewise.

        Returns:
            `Iterator[str]`: the answer as far as it is written, after every token; the last one is the answer that
            [`generate`] gives, which is empty if it was not completed.
        """
        ((_, prompt),) = self.prompts(side, [(None, text)])
        with contextlib.closing(self.engine.stream(prompt, self.settings.generation)) as completions:
            for completion in completions:
                yield answer_so_far(completion)
        yield extract_answer(completion)

    def augment(
        self, side: str, texts: Iterable[tuple[Any, str]], temperature: float = 0.0, seed: int = 0
    ) -> Iterator[tuple[Any, Augmentation, Completion]]:
        """Augments texts, each with a tag, as they come; yields them as they are finished."""
        completions = self.engine.complete(self.prompts(side, texts), self.settings.generation, temperature, seed)
        with contextlib.closing(completions):
            for (tag, truncated), completion in completions:
                answer, complete = extract_answer(completion.text), has_answer(completion.text)
                yield tag, Augmentation(answer, complete, truncated), completion

    def prompts(self, side: str, texts: Iterable[tuple[Any, str]]) -> Iterator[tuple[tuple[Any, bool], list[int]]]:
        """Token ids of the prompts, with the tag of each text and whether it was cut."""
        prompt_set, tokenizer, texts = self.settings.prompt_set, self.tokenizer, iter(texts)
        while chunk := list(itertools.islice(texts, PROMPTS_TOGETHER)):
            tags, whole = zip(*chunk, strict=True)
            read = prompt_set.truncate(list(whole), tokenizer)[0] if side == "document" else whole
            prompts = [prompt_set.prompt(side, text, tokenizer) for text in read]
            if tokenizer.chat_template:
                prompts = [
                    tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
                    for prompt in prompts
                ]
            ids = tokenizer(prompts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
            for tag, prompt, text, cut in zip(tags, ids, whole, read, strict=True):
                yield (tag, cut != text), prompt

    def augment_collection(
        self,
        collection: Collection,
        output_dir: str | Path,
        sides: Iterable[str] = SIDES,
        retry_incomplete: int = 0,
    ) -> dict | None:
        """
        Augments a collection's judged queries, its documents, or both, into a folder.

        What is done is written down in shards. Called again after an interruption, it goes on where it stopped; called
        again when all is done, it generates only for texts that are new or have changed. Queries of several splits may
        share a folder. Where a launcher has started several processes, each augments its share, wherever the others
        run: the folder, which all must see, is all they have in common, so that another number of them may go on later.

        Args:
            collection ([`~coaug_trl.Collection`]):
                Where the texts come from; of the queries, those judged in its split.
            output_dir (`str` or `Path`):
                The folder: `queries.jsonl`, `documents.jsonl`, `prompt_set.yaml`, `manifest.json`; the shards are kept
                in `queries.shards` and `documents.shards`.
            sides (`Iterable[str]`, *optional*, defaults to `("query", "document")`):
                `"query"`, `"document"` or both.
            retry_incomplete (`int`, *optional*, defaults to `0`):
                How often an incomplete answer is tried again, since it was first generated: by sampling at temperature
                0.7, with the number of the attempt as the seed. Complete answers stay greedy.

        Returns:
            `dict` or `None`: the manifest; `None` on all processes but the first, which finishes the files.

        Raises:
            `InputError`: The prompt set has no prompt for one of the sides, the folder holds augmentations of another
                model, prompt set or collection, or a damaged file, or the collection changes meanwhile.
        """
        output_dir, sides, main = Path(output_dir), tuple(sides), process_index() == 0
        manifest = self._begin(collection, output_dir, sides)
        if main:
            self.settings.prompt_set.save(output_dir)
            write_json(output_dir / MANIFEST, manifest)
        for name in sides:
            side = AnsweredSide(collection, name, output_dir, self._made_with)
            self.throughput[name] = side.generate_missing(self.augment, retry_incomplete)
            if main:
                side.wait_for_others(retry_incomplete)
                counts = side.write_answers(manifest["sides"].get(name, {}).get("splits", []))
                # another command may have finished the other side meanwhile
                manifest["sides"] = (read_manifest(output_dir) or manifest)["sides"] | {name: counts}
                write_json(output_dir / MANIFEST, manifest)
        return manifest if main else None

    def estimate(
        self, collection: Collection, output_dir: str | Path, side: str, retry_incomplete: int = 0
    ) -> Estimate:
        """
        What augmenting one side into a folder would take. Writes nothing; the model generates for some of the texts.

        Args:
            collection ([`~coaug_trl.Collection`]):
                As in [`augment_collection`].
            output_dir (`str` or `Path`):
                Likewise.
            side (`str`):
                `"query"` or `"document"`.
            retry_incomplete (`int`, *optional*, defaults to `0`):
                As in [`augment_collection`].

        Returns:
            [`Estimate`]: the estimate.

        Raises:
            `InputError`: As in [`augment_collection`].
        """
        self._begin(collection, Path(output_dir), (side,))
        answered = AnsweredSide(collection, side, Path(output_dir), self._made_with)
        most_tokens = self.settings.generation.max_new_tokens
        return estimate_side(answered, retry_incomplete, self.prompts, self.augment, self.engine.width, most_tokens)

    def _begin(self, collection: Collection, output_dir: Path, sides: tuple[str, ...]) -> dict[str, Any]:
        """The manifest that work on a folder begins with; refuses a folder whose answers are of another making."""
        self.settings.prompt_set.check_sides(sides)
        manifest = {
            "model": self.name,
            "model_is_folder": Path(self.name).is_dir(),
            "revision": self.revision,
            "prompt_hash": self.settings.prompt_set.hash,
            "generation": asdict(self.settings.generation),
            "retriever": self.settings.retriever,
            "collection": collection.name,
            "engines": [f"{self.engine.name}, {self.engine.dtype}"],
            "versions": package_versions(),
            "sides": {},
        }
        previous = read_manifest(output_dir)
        if previous is not None:
            _refuse_mixture(output_dir, previous, manifest)
            manifest["model"], manifest["sides"] = previous["model"], previous["sides"]
            manifest["model_is_folder"] = previous.get("model_is_folder", Path(previous["model"]).is_dir())
            manifest["engines"] = sorted({*previous.get("engines", []), *manifest["engines"]})
        for side in sides:
            for suffix in (".texts.jsonl", ".partial.jsonl"):
                path = (output_dir / FILES[side]).with_suffix(suffix)
                if path.is_file():
                    raise InputError(
                        f"{output_dir} was made by an earlier version, as {path.name} shows, and can be read but not "
                        "added to; choose another folder, or delete this one."
                    )
        return manifest


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; use at least 1, such as 32.")


def _prepare(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _load_tokenizer(name: str, source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # ValueError: a folder without a model, or with an unknown one
        raise InputError(f"{name}: no model could be loaded from there: {error}") from None
    _prepare(tokenizer)
    return tokenizer


def _load_engine(
    engine: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: PolicySettings,
    batch_size: int,
    kwargs: dict[str, Any],
) -> TransformersEngine | VLLMEngine:
    if engine == "transformers":
        return TransformersEngine.load(source, tokenizer, batch_size, **kwargs)
    if engine == "vllm":
        text_tokens = max(LONGEST_PROMPT, settings.prompt_set.max_document_tokens)
        longest = text_tokens + _prompt_tokens(settings, tokenizer)
        return VLLMEngine(source, tokenizer, longest, settings.generation, **kwargs)
    raise InputError(f"There is no engine {engine!r}; use {' or '.join(ENGINES)}.")


def _prompt_tokens(settings: PolicySettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt around a text, and some more where text and prompt meet."""
    prompt_set = settings.prompt_set
    return max(len(tokenizer(getattr(prompt_set, side))["input_ids"]) for side in prompt_set.sides) + 64


def _settings_for(
    model_name_or_path: str,
    trained: PolicySettings | None,
    prompt_set: PromptSet | None,
    generation: GenerationSettings | None,
) -> PolicySettings:
    if trained is None:
        return PolicySettings(prompt_set or PromptSet.default("sparse"), generation or GenerationSettings())
    labels = ("the policy", "this call")
    if prompt_set is not None:
        said = f"{model_name_or_path} was trained with the prompt set {trained.prompt_set.hash}, not this one"
        trained.refuse_mismatch(said, labels, "leave the prompt set out to use its own", prompt_set=prompt_set)
    if generation is not None:
        said = f"{model_name_or_path} is used with {trained.generation}, not {generation}"
        advice = "leave the generation settings out to use its own"
        trained.refuse_mismatch(said, labels, advice, generation=asdict(generation))
    return trained


def _refuse_mixture(folder: Path, previous: dict[str, Any], manifest: dict[str, Any]) -> None:
    for key in IDENTITY if manifest["revision"] else ("model", *IDENTITY):
        if previous.get(key) != manifest[key]:
            raise InputError(
                f"{folder} holds augmentations with {key} {previous.get(key)!r}, and these would have "
                f"{manifest[key]!r}; choose another folder, or delete this one."
            )
