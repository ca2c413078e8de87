"""Augment many texts with a policy, and keep the answers in a folder that search and evaluation read."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.collection import Collection
from ..policy.download import policy_folder
from ..policy.fingerprint import fingerprint
from ..policy.prompts import PromptSet, answer_so_far, extract_answer, has_answer
from ..policy.settings import GenerationSettings, PolicySettings, package_versions
from ..utils.errors import InputError
from ..utils.files import write_json, write_jsonl
from ..utils.terminal import describe_seconds
from .engines.base import ENGINES, Completion, num_processes, process_index
from .engines.server import ServerEngine
from .engines.transformers import TransformersEngine
from .engines.vllm import VLLMEngine
from .folder import FILES, IDENTITY, MANIFEST, SIDES, read_manifest, read_rows, side_texts
from .shards import AnswerStore


# A shard is written when it has so many answers, or is so old: what a killed process loses.
SHARD_TEXTS, SHARD_SECONDS = 256, 60
# Texts whose prompts are made at once.
# vLLM reserves memory for the longest prompt it may get; many models allow far longer ones than this.
LONGEST_PROMPT = 8192
PROMPTS_TOGETHER = 64
# How an incomplete answer is tried again: greedily it would come out the same.
RETRY_TEMPERATURE = 0.7
SECONDS_BETWEEN_LOOKS = 2
# Of a dry run: texts that are tokenized.
SAMPLED_PROMPTS = 1000


@dataclass(frozen=True, slots=True)
class Augmentation:
    """
    What a policy adds to one text.

    Args:
        answer (`str`):
            The text of its answer, which may be empty.
        complete (`bool`):
            Whether the completion held a whole `<answer>…</answer>`.
        truncated (`bool`, *optional*, defaults to `False`):
            Whether the text was cut before the policy read it.
    """

    answer: str
    complete: bool
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Throughput:
    """
    What one call generated.

    Args:
        texts (`int`):
            Texts augmented.
        tokens (`int`):
            Tokens generated.
        seconds (`float`):
            Wall-clock time of it.
    """

    texts: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        speed = f" ({self.texts / self.seconds:,.1f} texts/s, {self.tokens / self.seconds:,.0f} tokens/s)"
        return (
            f"{self.texts:,} texts augmented in {describe_seconds(self.seconds)}, {self.tokens:,} tokens generated"
            f"{speed * (self.texts > 0)}"
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """
    What augmenting one side would take.

    Args:
        texts (`int`):
            Texts of the side.
        to_do (`int`):
            Different ones among them that have no answer yet.
        prompt_tokens (`int`):
            Tokens of their prompts: the mean of `sampled_prompts` of them, times `to_do`.
        sampled_prompts (`int`):
            As said.
        most_tokens (`int`):
            Tokens generated if every answer were as long as it may be.
        sample (`Throughput`):
            What was measured of the model, on some of the texts.
        bytes (`int`):
            Size of the answers on disk.
    """

    texts: int
    to_do: int
    prompt_tokens: int
    sampled_prompts: int
    most_tokens: int
    sample: Throughput
    bytes: int

    def __str__(self) -> str:
        lines = [f"{self.texts:,} texts, {self.to_do:,} to augment (different ones without an answer yet)"]
        if self.to_do:
            sample, processes = self.sample, num_processes()
            tokens = round(self.to_do * sample.tokens / sample.texts)
            seconds = self.to_do * sample.seconds / sample.texts / processes
            lines += [
                f"  prompts    about {self.prompt_tokens:,} tokens, from {self.sampled_prompts:,} of the texts",
                f"  answers    {self.to_do:,} to {self.most_tokens:,} tokens; about {tokens:,}, from {sample.texts:,} "
                "of the texts",
                f"  time       about {describe_seconds(seconds)} on {processes} process{'es' * (processes > 1)}: "
                f"{sample.texts:,} texts took {describe_seconds(sample.seconds)}",
                f"  disk       about {self.bytes / 2**20:,.1f} MiB",
            ]
        return "\n".join(lines)


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
        self.engine = model if hasattr(model, "complete") else TransformersEngine(model, tokenizer, batch_size)
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
        server_concurrency: int = 64,
        dtype: str = "auto",
        gpu_memory_utilization: float | None = None,
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
            server_concurrency (`int`, *optional*, defaults to `64`):
                Requests to the server at once.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Type of the weights, such as `"bfloat16"`; `"auto"` is the one they are saved in.
            gpu_memory_utilization (`float`, *optional*):
                Share of the GPU's memory for vLLM; see [`~coaug_trl.augmentation.engines.vllm.VLLMEngine`].

        Raises:
            `InputError`: There is no such model, the settings differ from those it was trained with, or the engine
                cannot be started.
        """
        _check_batch_size(batch_size)
        source = policy_folder(model_name_or_path, revision)
        settings = _settings_for(model_name_or_path, PolicySettings.load(source), prompt_set, generation)
        if source != model_name_or_path:
            revision = None  # the folder is that of the revision
        kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        except (OSError, ValueError) as error:  # ValueError: a folder without a model, or with an unknown one
            raise InputError(f"{model_name_or_path}: no model could be loaded from there: {error}") from None
        _prepare(tokenizer)
        if server is not None:
            model = ServerEngine(server, model_name_or_path, server_concurrency)
        elif engine == "vllm":
            longest = max(LONGEST_PROMPT, settings.prompt_set.max_document_tokens) + _prompt_tokens(
                settings, tokenizer
            )
            memory = {"gpu_memory_utilization": gpu_memory_utilization}
            model = VLLMEngine(source, tokenizer, longest, settings.generation, dtype=dtype, **memory, **kwargs)
        elif engine == "transformers":
            model = TransformersEngine.load(source, tokenizer, batch_size, dtype=dtype, **kwargs)
        else:
            raise InputError(f"There is no engine {engine!r}; use {' or '.join(ENGINES)}.")
        revision = fingerprint(source, revision)
        return cls(
            model, tokenizer, settings, batch_size, name=os.path.normpath(model_name_or_path), revision=revision
        )

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
        answered = self._augment(side, enumerate(texts))
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
        ((_, prompt),) = self._prompts(side, [(None, text)])
        with contextlib.closing(self.engine.stream(prompt, self.settings.generation)) as completions:
            for completion in completions:
                yield answer_so_far(completion)
        yield extract_answer(completion)

    def _augment(
        self, side: str, texts: Iterable[tuple[Any, str]], temperature: float = 0.0, seed: int = 0
    ) -> Iterator[tuple[Any, Augmentation, Completion]]:
        """Augments texts, each with a tag, as they come; yields them as they are finished."""
        completions = self.engine.complete(self._prompts(side, texts), self.settings.generation, temperature, seed)
        with contextlib.closing(completions):
            for (tag, truncated), completion in completions:
                answer, complete = extract_answer(completion.text), has_answer(completion.text)
                yield tag, Augmentation(answer, complete, truncated), completion

    def _prompts(self, side: str, texts: Iterable[tuple[Any, str]]) -> Iterator[tuple[tuple[Any, bool], list[int]]]:
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
        for side in sides:
            store = AnswerStore(_shards_folder(output_dir, side))
            store.folder.mkdir(parents=True, exist_ok=True)  # this side is begun
            store.refresh()
            keys = self._keys(collection, side)
            self._generate_missing(collection, side, keys, store, retry_incomplete)
            if not main:
                continue
            _wait_for_others(keys, store, retry_incomplete)
            splits = manifest["sides"].get(side, {}).get("splits", [])
            counts = self._write_answers(collection, side, keys, store, output_dir / FILES[side])
            if math.isfinite(store.tokens):
                counts["cost"] = {"tokens": int(store.tokens), "seconds": round(store.seconds, 1)}
            if side == "query":
                counts["splits"] = sorted({*splits, collection.split})
            # another command may have finished the other side meanwhile
            manifest["sides"] = (read_manifest(output_dir) or manifest)["sides"] | {side: counts}
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
        store = AnswerStore(_shards_folder(Path(output_dir), side))
        store.refresh()
        keys = self._keys(collection, side)
        places = _first_places(keys, store.unfinished(keys, retry_incomplete))
        draw = np.random.default_rng(0)
        sampled = np.zeros(len(keys), bool)
        sampled[draw.choice(places, min(len(places), SAMPLED_PROMPTS), replace=False)] = True
        texts = list(itertools.compress(side_texts(collection, side), sampled))
        draw.shuffle(texts)
        lengths = [len(ids) for _, ids in self._prompts(side, texts)]
        texts = texts[: self.engine.width]
        list(self._augment(side, texts[:1]))  # the first call of a model takes longer
        start, tokens, size = time.perf_counter(), 0, 0
        for id_, augmentation, completion in self._augment(side, texts):
            tokens += completion.num_tokens
            row = _answer_row(id_, {"augmentation": augmentation.answer, "complete": augmentation.complete})
            # in a shard, with its key, and in the file that is read
            size += 2 * len(json.dumps(row, ensure_ascii=False).encode()) + 50
        return Estimate(
            texts=len(keys),
            to_do=len(places),
            prompt_tokens=round(len(places) * sum(lengths) / max(len(lengths), 1)),
            sampled_prompts=len(lengths),
            most_tokens=len(places) * self.settings.generation.max_new_tokens,
            sample=Throughput(len(texts), tokens, time.perf_counter() - start),
            bytes=round(len(places) * size / max(len(texts), 1)),
        )

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

    def _keys(self, collection: Collection, side: str) -> np.ndarray:
        """The key of each text, in the collection's order."""
        texts = tqdm(
            side_texts(collection, side), desc=f"Reading {FILES[side][:-6]}", unit=" texts", delay=2, leave=False
        )
        return np.fromiter((int(self._key(text), 16) for _, text in texts), np.uint64)

    def _key(self, text: str) -> str:
        """16 hexadecimal digits for a text and all that decides its answer."""
        return hashlib.sha256(self._made_with + text.encode()).hexdigest()[:16]

    def _generate_missing(
        self, collection: Collection, side: str, keys: np.ndarray, store: AnswerStore, retry_incomplete: int
    ) -> None:
        """Generates what is missing of this process's share, and writes it into the store shard by shard."""
        # A share is decided by the text alone, so that processes need not ask each other, and equal texts meet.
        own = keys % np.uint64(num_processes()) == process_index()
        num_texts = num_tokens = 0
        start = time.perf_counter()
        for attempt in range(retry_incomplete + 1):
            places = _first_places(keys, own & store.unfinished(keys, attempt))
            if not len(places):
                continue
            to_do = np.zeros(len(keys), bool)
            to_do[places] = True
            texts = ((self._key(text), text) for _, text in itertools.compress(side_texts(collection, side), to_do))
            shares = f" (process 1 of {num_processes()})" if num_processes() > 1 else ""
            with tqdm(
                total=len(keys) if num_processes() == 1 and not attempt else len(places),
                initial=len(keys) - len(places) if num_processes() == 1 and not attempt else 0,
                desc=f"{'Trying again' if attempt else 'Augmenting'} {FILES[side][:-6]}{shares}",
                unit=" texts",
                disable=process_index() > 0,
            ) as progress:
                count, tokens = self._record(side, texts, attempt, store, progress)
            num_texts, num_tokens = num_texts + count, num_tokens + tokens
            store.refresh()
        self.throughput[side] = Throughput(num_texts, num_tokens, time.perf_counter() - start)
        if store.unfinished(keys[own], retry_incomplete).any():
            raise InputError(
                f"{collection.name} has changed while it was augmented; run the same command again, which generates "
                "for the changed texts only."
            )

    def _record(
        self, side: str, texts: Iterator[tuple[str, str]], attempt: int, store: AnswerStore, progress: tqdm
    ) -> tuple[int, int]:
        """Generates for texts with their keys, and writes shards; returns how many texts and tokens that were."""
        num_texts = num_tokens = 0
        rows = []
        since = last = time.monotonic()
        temperature = RETRY_TEMPERATURE if attempt else 0.0
        try:
            for key, augmentation, completion in self._augment(side, texts, temperature, seed=attempt):
                rows.append(
                    {
                        "key": key,
                        "augmentation": augmentation.answer,
                        "complete": augmentation.complete,
                        "truncated": augmentation.truncated,
                        "attempt": attempt,
                        "tokens": completion.num_tokens,
                        "seconds": round(time.monotonic() - last, 4),
                    }
                )
                last = time.monotonic()
                num_texts, num_tokens = num_texts + 1, num_tokens + completion.num_tokens
                progress.set_postfix_str(f"{num_tokens:,} tokens generated", refresh=False)
                progress.update()
                if len(rows) >= SHARD_TEXTS or time.monotonic() - since > SHARD_SECONDS:
                    store.add(rows)
                    rows, since = [], time.monotonic()
        finally:  # an interruption, or a server that stays down, loses nothing that is finished
            if rows:
                store.add(rows)
        return num_texts, num_tokens

    def _write_answers(
        self, collection: Collection, side: str, keys: np.ndarray, store: AnswerStore, path: Path
    ) -> dict[str, Any]:
        """Writes the file of one side from the store, and counts."""
        counts = {"texts": 0, "empty": 0, "incomplete": 0, "truncated": 0}
        retried = {"texts": 0, "repaired": 0, "temperature": RETRY_TEMPERATURE}

        def count(row: dict[str, Any]) -> dict[str, Any]:
            counts["texts"] += 1
            counts["empty"] += not row["augmentation"]
            counts["incomplete"] += not row["complete"]
            counts["truncated"] += row.get("truncated", False)
            if row.get("attempt", 0):
                retried["texts"] += 1
                retried["repaired"] += row["complete"]
            return row

        def rows() -> Iterator[dict[str, Any]]:
            texts = tqdm(
                side_texts(collection, side), f"Writing {path.name}", len(keys), unit=" texts", delay=2, leave=False
            )
            written = set()
            for row, key, place in itertools.zip_longest(texts, keys, store.find(keys)):
                if row is None or key is None or int(self._key(row[1]), 16) != key:
                    raise InputError(f"{collection.name} has changed while it was augmented; run the command again.")
                id_ = row[0]
                if side == "query":
                    written.add(id_)
                yield _answer_row(id_, count(store.row(place)))
            if side == "query":  # those of other splits stay; a document that has left the corpus goes
                yield from (count(row) for row in others if row["_id"] not in written)

        others = list(read_rows(path)) if side == "query" else []
        write_jsonl(path, rows())
        return counts | ({"retried": retried} if retried["texts"] else {})


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; use at least 1, such as 32.")


def _prepare(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _prompt_tokens(settings: PolicySettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt around a text, and some more where text and prompt meet."""
    prompt_set = settings.prompt_set
    return max(len(tokenizer(getattr(prompt_set, side))["input_ids"]) for side in prompt_set.sides) + 64


def _shards_folder(output_dir: Path, side: str) -> Path:
    return (output_dir / FILES[side]).with_suffix(".shards")


def _first_places(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each of the wanted keys stands first."""
    places = np.flatnonzero(wanted)
    return np.sort(places[np.unique(keys[places], return_index=True)[1]])


def _wait_for_others(keys: np.ndarray, store: AnswerStore, retry_incomplete: int) -> None:
    """Waits until the other processes have written their shares; if one fails, the launcher ends this one, too."""
    if num_processes() == 1:
        return
    with tqdm(desc="Waiting for the other processes", unit=" texts", delay=2, leave=False) as progress:
        while missing := int(store.unfinished(keys, retry_incomplete).sum()):
            progress.set_postfix_str(f"{missing:,} texts missing")
            time.sleep(SECONDS_BETWEEN_LOOKS)
            store.refresh()


def _answer_row(id_: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"_id": id_, "augmentation": row["augmentation"], "complete": row["complete"]}


def _settings_for(
    model_name_or_path: str,
    trained: PolicySettings | None,
    prompt_set: PromptSet | None,
    generation: GenerationSettings | None,
) -> PolicySettings:
    if trained is None:
        return PolicySettings(prompt_set or PromptSet.default("sparse"), generation or GenerationSettings())
    if prompt_set is not None and prompt_set.hash != trained.prompt_set.hash:
        differences = ", ".join(trained.prompt_set.differences(prompt_set))
        raise InputError(
            f"{model_name_or_path} was trained with the prompt set {trained.prompt_set.hash}, not {prompt_set.hash}; "
            f"they differ in {differences}; leave the prompt set out to use its own."
        )
    if generation is not None and generation != trained.generation:
        raise InputError(
            f"{model_name_or_path} is used with {trained.generation}, not {generation}; leave the generation settings "
            "out to use its own."
        )
    return trained


def _refuse_mixture(folder: Path, previous: dict[str, Any], manifest: dict[str, Any]) -> None:
    for key in IDENTITY if manifest["revision"] else ("model", *IDENTITY):
        if previous.get(key) != manifest[key]:
            raise InputError(
                f"{folder} holds augmentations with {key} {previous.get(key)!r}, and these would have "
                f"{manifest[key]!r}; choose another folder, or delete this one."
            )
