"""Where collections come from. A source only reads; [`Collection`] checks what it reads, the same for all of them."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..utils.errors import InputError


if TYPE_CHECKING:
    import datasets


ACCEPTED = (
    "a BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv), a Hub id (ORG/NAME, with ORG/NAME-qrels beside it), "
    "irds:NAME for ir_datasets, or vocabulary-gap"
)

# Where a row stands, for error messages, and its fields `_id`, `text` and, for documents, `title`.
Row = tuple[str, dict[str, Any]]


class Judgment(NamedTuple):
    """One line of relevance judgments. The relevance is as read: not yet known to be a number."""

    place: str
    query_id: str
    document_id: str
    relevance: str


class Source(Protocol):
    """What every source offers. `queries_per_split` says that `queries` depends on the split."""

    name: str
    splits: tuple[str, ...]
    queries_per_split: bool

    def documents(self) -> Iterator[Row]: ...

    def queries(self, split: str) -> Iterator[Row]: ...

    def judgments(self, split: str) -> Iterator[Judgment]: ...


def open_source(name_or_path: str) -> Source:
    """
    Tells what a collection's name or path means.

    Args:
        name_or_path: As in [`Collection.load`].

    Returns: The source, opened as far as needed to know its splits.

    Raises `InputError`: If there is no such collection.
    """
    if name_or_path == "vocabulary-gap":
        return VocabularyGap()
    if name_or_path.startswith("irds:"):
        return IrDataset(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return BeirFolder(path)
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name_or_path):
        return HubRepository(name_or_path)
    fault = "is not a folder" if path.exists() else "does not exist"
    raise InputError(f"{name_or_path} {fault}: a collection is {ACCEPTED}")


class BeirFolder:
    """A folder in the layout of BEIR. Of a file that is there both plain and as `.gz`, the plain one is read."""

    queries_per_split = False

    def __init__(self, folder: Path):
        self.name = folder.resolve().name
        self._folder = folder
        self._corpus = self._find("corpus.jsonl")
        self._queries = self._find("queries.jsonl")
        qrels = folder / "qrels"
        names = [path.name.removesuffix(".gz") for path in chain(qrels.glob("*.tsv"), qrels.glob("*.tsv.gz"))]
        self.splits = tuple(sorted({name.removesuffix(".tsv") for name in names}))
        if not self.splits:
            raise InputError(f"{qrels} holds no SPLIT.tsv: put the relevance judgments there, a file a split")

    def documents(self) -> Iterator[Row]:
        return _read_jsonl(self._corpus)

    def queries(self, split: str) -> Iterator[Row]:
        return _read_jsonl(self._queries)

    def judgments(self, split: str) -> Iterator[Judgment]:
        return _read_qrels_tsv(self._find(f"qrels/{split}.tsv"))

    def _find(self, name: str) -> Path:
        for path in (self._folder / name, self._folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise InputError(f"{self._folder / name} is missing, and so is {name}.gz: a collection is {ACCEPTED}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    place = None
    for place, line in _read_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place}: not JSON ({error}): write one JSON object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{place}: JSON, but not an object: write one JSON object a line")
        yield place, row
    if place is None:
        raise InputError(f"{path} is empty: write one JSON object a line")


def _read_qrels_tsv(path: Path) -> Iterator[Judgment]:
    expected = "query-id, corpus-id and score, with a tab between them"
    for position, (place, line) in enumerate(_read_lines(path)):
        columns = line.rstrip("\r\n").split("\t")
        if len(line.split()) == 4 and len(columns) != 3:
            raise InputError(f"{place}: four columns, as in TREC qrels: leave out the second; BEIR has {expected}")
        if len(columns) != 3:
            raise InputError(f"{place}: wrong number of columns, {len(columns)}: there must be three, {expected}")
        if position > 0:
            yield Judgment(place, *columns)
        elif _is_number(columns[2]):
            raise InputError(f"{place}: the header is missing: let the first line be {expected}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its place."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            # As bytes, so that only a newline ends a line, and one that is not UTF-8 is known by its number.
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: not UTF-8 ({error}): convert the file to UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}, after line {number}: damaged gzip file ({error}): fetch or compress it anew"
        ) from error


class HubRepository:
    """A dataset of the Hub laid out as `BeIR/NAME`: configs `corpus` and `queries`, judgments in `BeIR/NAME-qrels`."""

    queries_per_split = False

    def __init__(self, name: str):
        import datasets

        self.name = name
        # Left to guess, `datasets` reads the id 007 as the number 7.
        columns = datasets.Features(dict.fromkeys(["query-id", "corpus-id", "score"], datasets.Value("string")))
        qrels = self._load_dataset(f"{name}-qrels", features=columns)
        # `datasets` calls the split of a file dev.tsv "validation"; BEIR and its users call it dev.
        self._qrels = {"dev" if split == "validation" else split: dataset for split, dataset in qrels.items()}
        self.splits = tuple(self._qrels)

    def documents(self) -> Iterator[Row]:
        return self._read("corpus")

    def queries(self, split: str) -> Iterator[Row]:
        return self._read("queries")

    def judgments(self, split: str) -> Iterator[Judgment]:
        for number, row in enumerate(_iterate(self._qrels[split], ["query-id", "corpus-id", "score"])):
            query_id, document_id, score = map(str, row.values())
            yield Judgment(
                f"{self.name}-qrels, split {split}, row {number}", query_id, document_id, _not_negative(score)
            )

    def _read(self, config: str) -> Iterator[Row]:
        # In the layout of BEIR a config has one split, of the same name.
        dataset = self._load_dataset(self.name, config, split=config)
        columns = [name for name in ("_id", "title", "text") if name in dataset.column_names]
        for number, row in enumerate(_iterate(dataset, columns)):
            # Where all ids are numbers, many exports store them as such.
            if isinstance(row.get("_id"), int):
                row["_id"] = str(row["_id"])
            yield f"{self.name}, config {config}, row {number}", row

    def _load_dataset(self, *args: str, **kwargs: Any) -> Any:
        import datasets

        # OSError covers what the Hub and the network answer: not found, gated, offline, not reached. ValueError is an
        # unknown config or split, RuntimeError a dataset that is a script.
        try:
            return datasets.load_dataset(*args, **kwargs)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            # Of a file that cannot be read as told, only the cause says why.
            generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
            raise InputError(
                f"cannot load {', '.join(args)} from the Hub: {error.__cause__ if generating else error}. "
                f"There is no folder {self.name} here either: a collection is {ACCEPTED}"
            ) from error


def _iterate(dataset: "datasets.Dataset", columns: list[str]) -> Iterator[dict[str, Any]]:
    # Batches, because `datasets` takes several times as long to hand over single rows.
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _not_negative(relevance: str) -> str:
    # TREC-COVID has two judgments of -1, which its user cannot mend: no more relevant than 0.
    return "0" if re.fullmatch("-[0-9]+", relevance) else relevance


class IrDataset:
    """
    A dataset of ir_datasets, which keeps each split under a name of its own.

    `irds:NAME` has the splits LAST for which `NAME/LAST` has judgments. If `NAME` itself has judgments, they are a
    split too, called by the last part of `NAME`: the only one of `irds:beir/nfcorpus/test` is `test`.
    """

    def __init__(self, name: str):
        try:
            import ir_datasets
        except ModuleNotFoundError as error:
            raise InputError(f'{name} needs ir_datasets: pip install ".[irds]"') from error

        self.name = name
        base = name.removeprefix("irds:")
        try:
            self._base = ir_datasets.load(base)
        except KeyError as error:
            raise InputError(f"ir_datasets knows no {base!r}: see https://ir-datasets.com for the names") from error
        names = [other for other in ir_datasets.registry if other.rpartition("/")[0] == base]
        self._datasets = {other.rpartition("/")[2]: ir_datasets.load(other) for other in names}
        self._datasets.setdefault(base.rpartition("/")[2], self._base)
        self._datasets = {split: dataset for split, dataset in self._datasets.items() if dataset.has_qrels()}
        self.splits = tuple(self._datasets)
        if not self.splits:
            raise InputError(f"{name} has no relevance judgments: see https://ir-datasets.com for a name with qrels")
        self.queries_per_split = not self._base.has_queries()

    def documents(self) -> Iterator[Row]:
        for number, document in enumerate(self._download(self._base.docs_iter)):
            # Without a field of its own the text is all fields together, the title among them.
            title = getattr(document, "title", None) if "text" in document._fields else None
            row = {"_id": document.doc_id, "title": title, "text": _text(document)}
            yield f"{self.name}, document {number}", row

    def queries(self, split: str) -> Iterator[Row]:
        dataset = self._datasets[split] if self.queries_per_split else self._base
        for number, query in enumerate(self._download(dataset.queries_iter)):
            yield f"{self.name}, query {number}", {"_id": query.query_id, "text": _text(query)}

    def judgments(self, split: str) -> Iterator[Judgment]:
        for number, qrel in enumerate(self._download(self._datasets[split].qrels_iter)):
            place = f"{self.name}, split {split}, judgment {number}"
            yield Judgment(place, qrel.query_id, qrel.doc_id, _not_negative(str(qrel.relevance)))

    def _download(self, iterate: Any) -> Iterator[Any]:
        # RuntimeError is what ir_datasets raises when all the addresses of a file have failed.
        try:
            yield from iterate()
        except (OSError, RuntimeError) as error:
            raise InputError(f"ir_datasets cannot read {self.name}: {error}") from error


def _text(record: Any) -> str:
    return record.text if "text" in record._fields else record.default_text()


class VocabularyGap:
    """The generated collection, always the same."""

    name = "vocabulary-gap"
    queries_per_split = False

    def __init__(self):
        from .vocabulary_gap import generate

        self._corpus, self._queries, self._qrels = generate()
        self.splits = tuple(self._qrels)

    def documents(self) -> Iterator[Row]:
        for document in self._corpus.values():
            yield self.name, {"_id": document.id, "title": document.title, "text": document.text}

    def queries(self, split: str) -> Iterator[Row]:
        for query_id, text in self._queries.items():
            yield self.name, {"_id": query_id, "text": text}

    def judgments(self, split: str) -> Iterator[Judgment]:
        for query_id, judged in self._qrels[split].items():
            for document_id, relevance in judged.items():
                yield Judgment(self.name, query_id, document_id, str(relevance))
