"""Examples of what two systems made of a query and of a document relevant to it, with the words both share marked."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import ir_measures
from tqdm.auto import tqdm

from ..retrieval.analyzer import Analyzer
from ..utils.errors import InputError
from ..utils.tables import Cell, Piece, Table, describe_marks
from .folder import TEXTS_FILE


# Words of a text and of its augmentation.
LENGTHS = 40, 60


class Side(NamedTuple):
    """A query or a document as one system has it."""

    text: list[Piece]
    augmentation: list[Piece]


class Example(NamedTuple):
    """
    A query whose value changed, with the relevant document whose part in the DCG changed most in the same direction.

    Args:
        query_id: Id of the query.
        values: Value of the first system and of the last.
        document_id: Id of the document.
        ranks: Its rank for the first system and for the last, from 1; `None` where it was not found.
        sides: Query and document, for the first system and for the last.
    """

    query_id: str
    values: tuple[float, float]
    document_id: str
    ranks: tuple[int | None, int | None]
    sides: list[tuple[Side, Side]]


def stems(analyzer: Analyzer, text: str) -> set[str]:
    """The terms of a text."""
    (terms,) = analyzer.terms([text])
    return set(terms)


def mark(
    analyzer: Analyzer, text: str, terms: Mapping[str, set[str]], words: int | None = None, letters: int | None = None
) -> list[Piece]:
    """
    Marks words of a text.

    Args:
        analyzer: Says what the same word is.
        text: The text, shown as it is.
        terms: Mark to the terms that get it; the first mark counts.
        words: Cuts a longer text to as many words, where most are marked.
        letters: Cuts what is left after as many.

    Returns: the text in pieces, each marked word one of them, with an ellipsis where it was cut.
    """
    found = list(re.finditer(analyzer.word, text))
    of_words = analyzer.terms([word.group() for word in found]) if found else []
    marks = [next((name for name, own in terms.items() if not own.isdisjoint(each)), "") for each in of_words]
    start, end = 0, len(text)
    if words is not None and len(found) > words:
        first = _densest(marks, words)
        start, end = found[first].start() if first else 0, found[first + words - 1].end()
    if letters is not None:
        end = min(end, start + letters)
    pieces, place = [Piece("… " * (start > 0))], start
    for word, name in zip(found, marks, strict=True):
        if name and start <= word.start() and word.end() <= end:
            pieces += [Piece(text[place : word.start()]), Piece(word.group(), name)]
            place = word.end()
    pieces += [Piece(text[place:end] + " …" * (end < len(text)))]
    return [piece for piece in pieces if piece.text]


def _densest(marks: list[str], length: int) -> int:
    """Where to begin so that most words are marked: at the first word, or else in the middle of the best places."""
    marked = [0, *accumulate(map(bool, marks))]
    counts = [marked[first + length] - marked[first] for first in range(len(marks) - length + 1)]
    most = max(counts)
    best = [first for first, count in enumerate(counts) if count == most]
    return best[len(best) // 2] if best[0] else 0


def read_examples(
    folders: Sequence[str | Path], changes: Iterable[tuple[str, float, float]], languages: Sequence[str]
) -> list[Example]:
    """
    Reads examples from the evaluation folders of two systems.

    Args:
        folders: Those of the first system and of the last, with `texts.jsonl`.
        changes: Query id, value of the first system and value of the last.
        languages: Language of each system's BM25 analyzer, which says what the same word is.

    Returns: one a query, in the order given, where both folders have its text and that of a document relevant to it.

    Raises `InputError`: a file is damaged.
    """
    changes = list(changes)
    query_ids = {query_id for query_id, _, _ in changes}
    folders = [Path(folder) for folder in folders]
    relevant = read_relevant(folders[0] / "qrels.trec", query_ids)
    ranks = [read_ranks(folder / "run.trec", query_ids) for folder in folders]
    wanted = {("query", query_id) for query_id in query_ids}
    wanted |= {("document", document_id) for grades in relevant.values() for document_id in grades}
    texts = [read_texts(folder / TEXTS_FILE, wanted) for folder in folders]
    analyzers = [Analyzer(language) for language in languages]

    examples = []
    for query_id, *values in changes:
        documents = [
            document_id
            for document_id in relevant.get(query_id, {})
            if all(("document", document_id) in table for table in texts)
        ]
        if not documents or not all(("query", query_id) in table for table in texts):
            continue
        direction = math.copysign(1, values[1] - values[0])
        first, last = (table.get(query_id, {}) for table in ranks)
        document_id = max(
            documents,
            key=lambda id_: (
                direction * relevant[query_id][id_] * (_discount(last.get(id_)) - _discount(first.get(id_)))
            ),
        )
        sides = [
            _mark_shared(analyzer, table["query", query_id], table["document", document_id])
            for analyzer, table in zip(analyzers, texts, strict=True)
        ]
        examples.append(
            Example(query_id, tuple(values), document_id, (first.get(document_id), last.get(document_id)), sides)
        )
    return examples


def _discount(rank: int | None) -> float:
    return 1 / math.log2(rank + 1) if rank else 0.0


def _mark_shared(analyzer: Analyzer, *texts: tuple[str, str]) -> tuple[Side, ...]:
    shared = {"shared": set.intersection(*(stems(analyzer, "\n".join(text)) for text in texts))}
    return tuple(
        Side(*(mark(analyzer, _beginning(text, n), shared) for text, n in zip(both, LENGTHS, strict=True)))
        for both in texts
    )


def _beginning(text: str, length: int) -> str:
    """The first words, without the control characters of a document, which would steer the terminal that shows it."""
    words = re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()
    return " ".join(words[:length]) + " …" * (len(words) > length)


def example_tables(
    measure: str, names: tuple[str, str], examples: Iterable[Example], format: str
) -> Iterator[Table | str]:
    """
    Sets examples as tables, with a line before them.

    Args:
        measure: What their values are.
        names: The two systems.
        examples: As [`read_examples`] gives them.
        format: As in [`~coaug_trl.utils.tables.write`], which takes what this gives.
    """
    yield (
        f"{measure}: what the first system and the last made of these queries and of a relevant document; words that "
        f"query and document share are {describe_marks(format)}"
    )
    for example in examples:
        first, last = example.values
        ranks = ["not found" if rank is None else f"rank {rank}" for rank in example.ranks]
        title = (
            f"Query {example.query_id}: {first:.4f} to {last:.4f}; document {example.document_id}: "
            f"{' to '.join(ranks) if ranks[0] != ranks[1] else ranks[0]}"
        )
        same = example.sides[0] == example.sides[1]  # the systems differ in the retriever, not in the texts
        rows = [
            [name if type_ == "query" else "", type_, Cell(side.text), Cell(side.augmentation)]
            for name, sides in zip(["both"] if same else names, example.sides, strict=False)
            for type_, side in zip(("query", "document"), sides, strict=True)
        ]
        yield Table(title, ["system", "", "text", "added"], rows, prose=2)


def read_relevant(path: str | Path, query_ids: set[str]) -> dict[str, dict[str, int]]:
    """The grades above 0 in a TREC file of judgments: query id to document id to grade, of these queries only."""
    relevant = {}
    for qrel in _read_trec(path, ir_measures.read_trec_qrels):
        if qrel.query_id in query_ids and qrel.relevance > 0:
            relevant.setdefault(qrel.query_id, {})[qrel.doc_id] = qrel.relevance
    return relevant


def read_ranks(path: str | Path, query_ids: set[str]) -> dict[str, dict[str, int]]:
    """Ranks in a run file that lists the best first: query id to document id to rank, of these queries only."""
    ranks = {}
    for hit in _read_trec(path, ir_measures.read_trec_run):
        if hit.query_id in query_ids:
            ranked = ranks.setdefault(hit.query_id, {})
            ranked[hit.doc_id] = len(ranked) + 1
    return ranks


def _read_trec(path: str | Path, read) -> Iterable[ir_measures.Qrel | ir_measures.ScoredDoc]:
    with open(path, encoding="utf-8") as file:
        try:
            yield from tqdm(read(file), desc=f"Reading {Path(path).name}", delay=2, leave=False)
        except ValueError as error:
            raise InputError(f"{path}: not a TREC file ({error}); evaluate again.") from None


def read_texts(path: str | Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """Text and augmentation, by (`"query"` or `"document"`, id), of those wanted."""
    texts = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                type_, text_id, *both = (row[name] for name in ("type", "_id", "text", "augmentation"))
                if not all(isinstance(value, str) for value in (type_, text_id, *both)):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}: not a row of _id, type, text and augmentation; evaluate again."
                ) from None
            if (type_, text_id) in wanted:
                texts[type_, text_id] = tuple(both)
    return texts
