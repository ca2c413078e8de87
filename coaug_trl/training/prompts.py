"""Prompts of texts, and the rows of a generation batch."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.collection import Collection
from ..data.document import document_text
from ..data.groups import Group
from ..policy.prompts import PromptSet


def make_prompts(
    sides: list[str], texts: list[str], prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Any], int]:
    """
    Prompts of texts, documents cut to the prompt set's longest.

    Args:
        sides: `"query"` or `"document"`, for each text.
        texts: The texts.
        prompt_set: Its prompts.
        tokenizer: Counts tokens, and decides the form of a prompt.

    Returns: a prompt for each text, and how many documents were cut.
    """
    texts = list(texts)
    num_cut = 0
    places = [place for place, side in enumerate(sides) if side == "document"]
    if places:
        cut, num_cut = prompt_set.truncate([texts[place] for place in places], tokenizer)
        for place, text in zip(places, cut, strict=True):
            texts[place] = text
    return [prompt_set.prompt(side, text, tokenizer) for side, text in zip(sides, texts, strict=True)], num_cut


def make_rows(
    groups: list[Group],
    collection: Collection,
    prompt_set: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    augment: str,
    num_generations: int,
) -> tuple[list[dict[str, Any]], int]:
    """
    The rows of groups as TRL expects them: one for each completion, the rollouts of a text together.

    Args:
        groups: Groups of a process.
        collection: Has their texts.
        prompt_set: Its prompts.
        tokenizer: As in [`make_prompts`].
        augment: `"both"`, `"query"` or `"document"`: the side that has rows.
        num_generations: Rollouts of a text.

    Returns: rows with `prompt`, `group`, `text_type` and `text_id`, and how many documents were cut.
    """
    rows = [
        {"group": group, "text_type": text_type, "text_id": text_id}
        for group in groups
        for text_type, text_id in group.rows(augment)
    ]
    sides = ["query" if row["text_type"] == "query" else "document" for row in rows]
    texts = [
        collection.queries[row["text_id"]] if side == "query" else document_text(collection.corpus[row["text_id"]])
        for row, side in zip(rows, sides, strict=True)
    ]
    prompts, num_cut = make_prompts(sides, texts, prompt_set, tokenizer)
    for row, prompt in zip(rows, prompts, strict=True):
        row["prompt"] = prompt
    return [row for row in rows for _ in range(num_generations)], num_cut
