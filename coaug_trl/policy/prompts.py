"""What the model is asked, what is taken from its answer, and how text and answer become one."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..utils.errors import InputError
from ..utils.files import atomic_open


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.document import Document

PROMPT_SET_FILE = "prompt_set.yaml"
# How an answer joins its text; the first of each is the default.
QUERY_RULES = ("append", "replace")
DOCUMENT_RULES = (None, "append", "prepend")
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def extract_answer(completion: str) -> str:
    """
    The text of the last complete `<answer>…</answer>` of a completion, stripped; empty if there is none.

    An answer that is opened again before it is closed counts from the last opening. There is no reward for the format
    (arXiv 2506.18670, appendix B.1): a completion without an answer leaves the text as it was.
    """
    answers = _ANSWER.findall(completion)
    return answers[-1].strip() if answers else ""


def answer_so_far(completion: str) -> str:
    """
    What can be shown of the answer of a completion that is still being written: the text after the last `<answer>`,
    without the beginning of a tag or of a character.
    """
    answer, closed, _ = completion.rpartition("<answer>")[2].partition("</answer>")
    if "<answer>" not in completion:
        return ""
    place = answer.rfind("<")
    if not closed and place >= 0 and any(tag.startswith(answer[place:]) for tag in ("<answer>", "</answer>")):
        answer = answer[:place]
    return answer.rstrip("\ufffd").strip()


def has_answer(completion: str) -> bool:
    """Whether a completion holds a complete `<answer>…</answer>`, be it empty."""
    return _ANSWER.search(completion) is not None


@dataclass(frozen=True)
class PromptSet:
    """
    The instructions for both text types and one kind of retriever, and how an answer joins its text.

    Training, augmentation, evaluation and search use the same prompt set; it is saved with every checkpoint and its
    hash stands in every manifest.

    Args:
        kind (`str`):
            `"sparse"` (the answer is a list of keywords, appended) or `"dense"` (the answer is prose, put before a
            document).
        query (`str` or `None`):
            System prompt for queries; `None` in a prompt set for documents only.
        document (`str` or `None`):
            System prompt for documents; `None` in a prompt set for queries only.
        query_repeats (`int`, *optional*, defaults to `1`):
            How often the original query stands before its augmentation, to weigh it as Query2doc and MuGI do.
        max_document_tokens (`int`, *optional*, defaults to `1024`):
            Documents longer than this are cut before the model reads them. The retriever indexes them whole.
        query_rule (`str`, *optional*, defaults to `"append"`):
            `"append"`: the answer follows the query. `"replace"`: the answer is searched for in place of the query,
            as HyDE does; a query without an answer stays as it is.
        document_rule (`str`, *optional*):
            `"append"` or `"prepend"`: where the answer stands in a document. Defaults to what `kind` says.

    Raises:
        `InputError`: A field has a value that cannot work.
    """

    kind: str
    query: str | None
    document: str | None
    query_repeats: int = 1
    max_document_tokens: int = 1024
    query_rule: str = "append"
    document_rule: str | None = None

    def __post_init__(self):
        if self.kind not in ("sparse", "dense"):
            raise InputError(f"Prompt set: kind is {self.kind!r}; use 'sparse' or 'dense'.")
        if self.query is None and self.document is None:
            raise InputError("Prompt set: query and document are both null; write a system prompt for one or both.")
        for name in ("query", "document"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise InputError(
                    f"Prompt set: {name} is {value!r}; write a system prompt for {name} texts, or null for none."
                )
        for name in ("query_repeats", "max_document_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"Prompt set: {name} is {value!r}; use a positive whole number, such as 1.")
        for name, rules in (("query_rule", QUERY_RULES), ("document_rule", DOCUMENT_RULES)):
            value = getattr(self, name)
            if value not in rules:
                choices = " or ".join(rule for rule in rules if rule)
                raise InputError(f"Prompt set: {name} is {value!r}; use {choices}, or leave it out.")

    @classmethod
    def default(cls, kind: str = "sparse") -> "PromptSet":
        """The prompt set of this package for a kind of retriever, `"sparse"` or `"dense"`."""
        if kind not in ("sparse", "dense"):
            raise InputError(f"There is no prompt set for {kind!r} retrievers; use 'sparse' or 'dense'.")
        return cls.load(resources.files(__package__) / "prompt_sets" / f"{kind}.yaml")

    @classmethod
    def load(cls, path: str | Path) -> "PromptSet":
        """
        Reads a prompt set from a YAML file, or from a checkpoint folder that holds one.

        Raises:
            `InputError`: The file is missing, is not a YAML mapping, or has unknown, missing or impossible fields.
        """
        if isinstance(path, str):
            path = Path(path)
        if path.is_dir():
            path = path / PROMPT_SET_FILE
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: there is no such prompt set.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a YAML file: {error}") from None
        names = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or not set(content) <= set(names):
            unknown = sorted(map(str, set(content) - set(names))) if isinstance(content, dict) else content
            raise InputError(f"{path}: unknown content {unknown!r}; a prompt set has the fields {', '.join(names)}.")
        missing = {"kind", "query", "document"} - set(content)
        if missing:
            raise InputError(
                f"{path}: {', '.join(sorted(missing))} is missing; a side without a prompt is written as null."
            )
        try:
            return cls(**content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Writes the prompt set into a folder, as `prompt_set.yaml`."""
        with atomic_open(Path(folder) / PROMPT_SET_FILE) as file:
            yaml.safe_dump(asdict(self), file, sort_keys=False, allow_unicode=True)

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the content."""
        content = asdict(self)
        # Policies saved before there were rules refer to hashes without them.
        for name, rules in (("query_rule", QUERY_RULES), ("document_rule", DOCUMENT_RULES)):
            if content[name] == rules[0]:
                del content[name]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "PromptSet") -> list[str]:
        """Names of the fields in which two prompt sets differ."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that have a prompt: `"query"`, `"document"` or both."""
        return tuple(side for side in ("query", "document") if getattr(self, side) is not None)

    def check_kind(self, kind: str, owner: str) -> None:
        """Raises an `InputError` if the prompts, which `owner` has, are not for this kind of retriever."""
        if self.kind != kind:
            raise InputError(f"{owner} has prompts for {self.kind} retrievers, and the retriever is {kind}.")

    def check_sides(self, sides: Iterable[str]) -> None:
        """
        Refuses sides without a prompt.

        Raises:
            `InputError`: `sides` has one that is not in [`sides`].
        """
        for side in sides:
            if side not in self.sides:
                raise InputError(
                    f"The prompt set {self.hash} has no prompt for {side} texts, only for {self.sides[0]} texts; "
                    f"augment the {self.sides[0]} side only, or write a prompt for the other."
                )

    def prompt(self, side: str, text: str, tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, str]] | str:
        """
        The prompt for one text, in a form TRL takes.

        Args:
            side (`str`):
                `"query"` or `"document"`.
            text (`str`):
                The text to augment.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Decides the form.

        Returns:
            `list[dict[str, str]]` or `str`: messages for a tokenizer with a chat template, else plain text.

        Raises:
            `InputError`: The prompt set has no prompt for this side.
        """
        self.check_sides([side])
        system = self.query if side == "query" else self.document
        if tokenizer.chat_template:
            return [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return f"{system}\n\n{text}\n\n"

    def truncate(self, texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[str], int]:
        """
        Cuts documents to `max_document_tokens`, at a token's end.

        Returns:
            `tuple[list[str], int]`: the texts, and how many of them were cut.
        """
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        cut = [
            text if len(offsets) <= self.max_document_tokens else text[: offsets[self.max_document_tokens - 1][1]]
            for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)
        ]
        return cut, sum(len(offsets) > self.max_document_tokens for offsets in encoded["offset_mapping"])

    def compose_query(self, query: str, answer: str) -> str:
        """
        The text that is searched: the query, `query_repeats` times, and the answer on a new line; or, with the rule
        `"replace"`, the answer alone.
        """
        if not answer:
            return query
        if self.query_rule == "replace":
            return answer
        return "\n".join([query] * self.query_repeats + [answer])

    def compose_document(self, document: "Document", answer: str, field: str = "text") -> "Document":
        """
        The document that is indexed: sparse: field, newline, answer; dense: answer, newline, field; or as
        `document_rule` says.

        Args:
            document ([`~coaug_trl.Document`]):
                The original.
            answer (`str`):
                What is added; nothing if empty.
            field (`str`, *optional*, defaults to `"text"`):
                Field the answer joins, the retriever's `answer_field`.

        Returns:
            [`~coaug_trl.Document`]: with the same id.
        """
        if not answer:
            return document
        original = getattr(document, field)
        rule = self.document_rule or ("append" if self.kind == "sparse" else "prepend")
        parts = (original, answer) if rule == "append" else (answer, original)
        return replace(document, **{field: "\n".join(part for part in parts if part)})
