"""Augment many texts with a policy, and keep the answers in a folder that search and evaluation read."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .data import Collection, Document
from .errors import InputError
from .files import write_json, write_jsonl
from .policy import GenerationSettings, PolicySettings, package_versions
from .prompts import PromptSet, document_text, extract_answer, has_answer


MANIFEST = "manifest.json"
SIDES = ("query", "document")
FILES = {"query": "queries.jsonl", "document": "documents.jsonl"}
# What must agree for answers to be used together: resuming, and queries beside documents.
_IDENTITY = ("model", "revision", "prompt_hash", "generation", "collection")
# What is written of a text: its answer, and beside it, which text this is the answer to.
_ANSWER_KEYS = ("_id", "augmentation", "complete")
_TEXT_KEYS = ("_id", "text_hash", "truncated")


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


class Augmenter:
    """
    Augments texts greedily, with the prompts and generation settings the policy was trained with.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        settings ([`~coaug_trl.policy.PolicySettings`]):
            Prompt set and generation settings.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts generated for at once.
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
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PolicySettings,
        batch_size: int = 32,
        name: str | None = None,
        revision: str | None = None,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; use at least 1, such as 32.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        self.batch_size = batch_size
        self.name = name or model.name_or_path
        self.revision = revision
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        prompt_set: PromptSet | None = None,
        generation: GenerationSettings | None = None,
        batch_size: int = 32,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Augmenter":
        """
        Loads a policy.

        Args:
            model_name_or_path (`str`):
                A folder or Hub id: a policy trained here, which brings its settings, or any causal language model.
            prompt_set ([`~coaug_trl.PromptSet`], *optional*):
                Prompts for a model that was not trained here; defaults to the package's for sparse retrievers.
            generation ([`~coaug_trl.policy.GenerationSettings`], *optional*):
                Generation settings for a model that was not trained here.
            batch_size (`int`, *optional*, defaults to `32`):
                Texts generated for at once.
            revision (`str`, *optional*):
                Revision on the Hub.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether a model may run code of its own.

        Raises:
            `InputError`: There is no such model, or the settings differ from those it was trained with.
        """
        settings = _settings_for(model_name_or_path, prompt_set, generation)
        kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, padding_side="left", **kwargs)
            model = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype="auto", **kwargs)
        except (OSError, ValueError) as error:  # ValueError: a folder without a model, or with an unknown one
            raise InputError(f"{model_name_or_path}: no model could be loaded from there: {error}") from None
        if torch.cuda.is_available():
            model = model.to("cuda")
        fingerprint = _folder_hash(model_name_or_path) if Path(model_name_or_path).is_dir() else None
        revision = fingerprint or getattr(model.config, "_commit_hash", None) or revision
        return cls(model, tokenizer, settings, batch_size, name=str(model_name_or_path), revision=revision)

    def generate(self, side: str, texts: list[str]) -> list[Augmentation]:
        """
        Augments texts, in batches as they come.

        Args:
            side (`str`):
                `"query"` or `"document"`.
            texts (`list[str]`):
                The texts; of a document see [`~coaug_trl.prompts.document_text`].

        Returns:
            `list[Augmentation]`: one for each text.
        """
        prompt_set, tokenizer = self.settings.prompt_set, self.tokenizer
        augmentations = []
        for first in range(0, len(texts), self.batch_size):
            batch = texts[first : first + self.batch_size]
            read = prompt_set.truncate(batch, tokenizer)[0] if side == "document" else batch
            completions = self._complete([prompt_set.prompt(side, text, tokenizer) for text in read])
            augmentations += [
                Augmentation(extract_answer(completion), has_answer(completion), truncated=cut != text)
                for completion, text, cut in zip(completions, batch, read, strict=True)
            ]
        return augmentations

    @torch.inference_mode()
    def _complete(self, prompts: list[list[dict[str, str]] | str]) -> list[str]:
        tokenizer = self.tokenizer
        if tokenizer.chat_template:
            prompts = [
                tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts
            ]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        else:
            inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        inputs = inputs.to(self.model.device)
        # All sampling settings are given, since the model's own generation_config may hold others.
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=self.settings.generation.max_new_tokens,
            repetition_penalty=self.settings.generation.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
        )
        return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def augment_collection(self, collection: Collection, output_dir: str | Path, sides: Iterable[str] = SIDES) -> dict:
        """
        Augments a collection's judged queries, its documents, or both, into a folder.

        What is done is written down batch by batch. Called again after an interruption, it goes on where it stopped;
        called again when all is done, it generates only for texts that are new or have changed. Queries of several
        splits may share a folder.

        Args:
            collection ([`~coaug_trl.Collection`]):
                Where the texts come from; of the queries, those judged in its split.
            output_dir (`str` or `Path`):
                The folder: `queries.jsonl`, `documents.jsonl`, `prompt_set.yaml`, `manifest.json`; which text an
                answer belongs to is kept in `queries.texts.jsonl` and `documents.texts.jsonl`.
            sides (`Iterable[str]`, *optional*, defaults to `("query", "document")`):
                `"query"`, `"document"` or both.

        Returns:
            `dict`: the manifest.

        Raises:
            `InputError`: The prompt set has no prompt for one of the sides, or the folder holds augmentations of
                another model, prompt set or collection, or a damaged file.
        """
        output_dir, sides = Path(output_dir), tuple(sides)
        self.settings.prompt_set.check_sides(sides)
        manifest = {
            "model": self.name,
            "revision": self.revision,
            "prompt_hash": self.settings.prompt_set.hash,
            "generation": asdict(self.settings.generation),
            "retriever": self.settings.retriever,
            "collection": collection.name,
            "versions": package_versions(),
            "sides": {},
        }
        previous = read_manifest(output_dir)
        if previous is not None:
            _refuse_mixture(output_dir, previous, manifest)
            manifest["sides"] = previous["sides"]
        self.settings.prompt_set.save(output_dir)
        write_json(output_dir / MANIFEST, manifest)
        for side in sides:
            splits = manifest["sides"].get(side, {}).get("splits", [])
            manifest["sides"][side] = self._augment_side(side, side_texts(collection, side), output_dir)
            if side == "query":
                manifest["sides"][side]["splits"] = sorted({*splits, collection.split})
            write_json(output_dir / MANIFEST, manifest)
        return manifest

    def _augment_side(self, side: str, texts: dict[str, str], output_dir: Path) -> dict[str, Any]:
        path = output_dir / FILES[side]
        texts_path, partial = path.with_suffix(".texts.jsonl"), path.with_suffix(".partial.jsonl")
        text_hash = {id_: hashlib.sha256(text.encode()).hexdigest()[:16] for id_, text in texts.items()}
        _drop_torn_line(partial)
        answered = {row["_id"]: row for row in _read_rows(texts_path, _TEXT_KEYS)}
        done = {row["_id"]: answered[row["_id"]] | row for row in _read_rows(path) if row["_id"] in answered}
        done |= {row["_id"]: row for row in _read_rows(partial, _ANSWER_KEYS + _TEXT_KEYS)}
        # Texts of like length make batches with little padding.
        todo = sorted(
            (id_ for id_ in texts if id_ not in done or done[id_]["text_hash"] != text_hash[id_]),
            key=lambda id_: len(texts[id_]),
        )
        with (
            open(partial, "a", encoding="utf-8") as file,
            tqdm(total=len(texts), initial=len(texts) - len(todo), desc=f"Augmenting {FILES[side][:-6]}") as progress,
        ):
            for first in range(0, len(todo), self.batch_size):
                ids = todo[first : first + self.batch_size]
                for id_, augmentation in zip(ids, self.generate(side, [texts[id_] for id_ in ids]), strict=True):
                    done[id_] = {
                        "_id": id_,
                        "augmentation": augmentation.answer,
                        "complete": augmentation.complete,
                        "text_hash": text_hash[id_],
                        "truncated": augmentation.truncated,
                    }
                    file.write(json.dumps(done[id_], ensure_ascii=False) + "\n")
                file.flush()
                progress.update(len(ids))
        # Queries of other splits stay; a document that has left the corpus goes.
        others = [row for id_, row in done.items() if id_ not in texts] if side == "query" else []
        rows = [done[id_] for id_ in texts] + others
        write_jsonl(texts_path, ({key: row[key] for key in _TEXT_KEYS} for row in rows))
        write_jsonl(path, ({key: row[key] for key in _ANSWER_KEYS} for row in rows))
        partial.unlink()
        return {
            "texts": len(rows),
            "empty": sum(not row["augmentation"] for row in rows),
            "incomplete": sum(not row["complete"] for row in rows),
            "truncated": sum(row["truncated"] for row in rows),
        }


@dataclass(frozen=True)
class AugmentedCollection:
    """
    Augmentations read from a folder, and the texts they make.

    Args:
        prompt_set ([`~coaug_trl.PromptSet`]):
            Composes texts and answers.
        manifest (`dict`):
            Where the answers come from.
        answers (`dict[str, dict[str, str]]`):
            By side, answers by id; a side that was not augmented is absent.
    """

    prompt_set: PromptSet
    manifest: dict[str, Any]
    answers: dict[str, dict[str, str]] = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path, sides: Iterable[str] = SIDES) -> "AugmentedCollection":
        """
        Reads a folder of augmentations.

        Raises:
            `InputError`: The folder holds no finished augmentations of any of `sides`, has begun one and not finished
                it, or a file is damaged or was changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(
                f"{folder}: no augmentations there ({MANIFEST} is missing); make them with coaug augment."
            )
        answers = {}
        for side in sides:
            path = folder / FILES[side]
            if path.is_file():
                answers[side] = {row["_id"]: row["augmentation"] for row in _read_rows(path)}
            elif path.with_suffix(".partial.jsonl").is_file():
                raise InputError(f"{path} was begun but not finished; run coaug augment again to go on.")
        if not answers:
            wanted = " or ".join(FILES[side] for side in sides)
            raise InputError(f"{folder}: there is no {wanted} yet; make them with coaug augment.")
        prompt_set = PromptSet.load(folder)
        if prompt_set.hash != manifest["prompt_hash"]:
            raise InputError(
                f"{folder}: the prompt set has the hash {prompt_set.hash}, but the augmentations were made with "
                f"{manifest['prompt_hash']}; restore its file, or augment again into another folder."
            )
        return cls(prompt_set, manifest, answers)

    def check(self, collection: Collection, prompt_set: PromptSet, retriever: dict[str, Any]) -> None:
        """Raises an `InputError` if training with these could not have made such augmentations."""
        differences = {
            "collection": (self.manifest["collection"], collection.name),
            "prompt set": (self.manifest["prompt_hash"], prompt_set.hash),
            "retriever": (self.manifest["retriever"] or retriever, retriever),  # an untrained policy names none
        }
        for what, (theirs, ours) in differences.items():
            if theirs != ours:
                raise InputError(
                    f"The augmentations were made for the {what} {theirs}, and training is for {ours}; augment the "
                    "documents with a policy of the same settings."
                )

    def queries(self, collection: Collection) -> dict[str, str]:
        """Texts to search for the judged queries, by id."""
        answers = self._checked("query", collection.qrels)
        return {
            id_: self.prompt_set.compose_query(collection.queries[id_], answers.get(id_, ""))
            for id_ in collection.qrels
        }

    def documents(self, collection: Collection, field: str = "text") -> list[Document]:
        """Documents to index; `field` is the retriever's `answer_field`."""
        answers = self._checked("document", collection.corpus)
        return [
            self.prompt_set.compose_document(document, answers.get(id_, ""), field)
            for id_, document in collection.corpus.items()
        ]

    def _checked(self, side: str, ids: Iterable[str]) -> dict[str, str]:
        answers = self.answers.get(side)
        if answers is None:
            return {}
        missing = [id_ for id_ in ids if id_ not in answers]
        if missing:
            raise InputError(
                f"The augmentations of {self.manifest['collection']} lack {len(missing)} {FILES[side][:-6]}, such as "
                f"{missing[0]!r}; augment this split with coaug augment --side {side}."
            )
        return answers


def side_texts(collection: Collection, side: str) -> dict[str, str]:
    """The texts of one side as the model reads them, by id: all documents, or the judged queries."""
    if side == "query":
        return {id_: collection.queries[id_] for id_ in collection.qrels}
    return {id_: document_text(document) for id_, document in collection.corpus.items()}


def describe_side(side: str, counts: dict[str, Any]) -> str:
    """A line on one side of a manifest."""
    return (
        f"{side}: {counts['texts']:,} texts, {counts['empty']:,} left as they were, {counts['incomplete']:,} answers "
        f"incomplete, {counts['truncated']:,} texts cut"
    )


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a folder, `None` if there is none; an `InputError` if it is not one of augmentations."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore it, or augment again into another folder.") from None
    if not isinstance(manifest, dict) or not manifest.keys() >= {*_IDENTITY, "retriever", "sides"}:
        raise InputError(f"{path}: not the manifest of augmentations; choose another folder.")
    return manifest


def _settings_for(
    model_name_or_path: str, prompt_set: PromptSet | None, generation: GenerationSettings | None
) -> PolicySettings:
    trained = PolicySettings.load(model_name_or_path) if Path(model_name_or_path).is_dir() else None
    if trained is None:
        return PolicySettings(prompt_set or PromptSet.default("sparse"), generation or GenerationSettings())
    if prompt_set is not None and prompt_set.hash != trained.prompt_set.hash:
        raise InputError(
            f"{model_name_or_path} was trained with the prompt set {trained.prompt_set.hash}, not {prompt_set.hash}; "
            "leave the prompt set out to use its own."
        )
    if generation is not None and generation != trained.generation:
        raise InputError(
            f"{model_name_or_path} is used with {trained.generation}, not {generation}; leave the generation settings "
            "out to use its own."
        )
    return trained


def _refuse_mixture(folder: Path, previous: dict[str, Any], manifest: dict[str, Any]) -> None:
    for key in _IDENTITY:
        if previous.get(key) != manifest[key]:
            raise InputError(
                f"{folder} holds augmentations with {key} {previous.get(key)!r}, and these would have "
                f"{manifest[key]!r}; choose another folder, or delete this one."
            )


def _read_rows(path: Path, keys: Iterable[str] = _ANSWER_KEYS) -> Iterator[dict[str, Any]]:
    """The rows of a file of this module; none if there is no such file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row["_id"], str) or not isinstance(row.get("augmentation", ""), str):
                    raise TypeError
                row = {key: row[key] for key in keys}
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}: not a row of {', '.join(keys)}; mend or delete it and run coaug augment "
                    "again."
                ) from None
            yield row


def _drop_torn_line(path: Path) -> None:
    """Cuts what follows the last line break, the rest of a write that was interrupted."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def _folder_hash(folder: str | Path) -> str:
    """First 16 hexadecimal digits of a SHA-256 over the weights of a model folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
