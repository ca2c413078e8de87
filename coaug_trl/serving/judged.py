"""Queries of a demo whose relevant documents are known."""

import json
from dataclasses import dataclass
from pathlib import Path

import ir_measures

from ..data.collection import Collection
from ..utils.errors import InputError
from ..utils.files import atomic_open, write_jsonl
from .index import SearchIndex


MAX_QUERY = 500  # characters
EXAMPLES = 6
QUERIES_FILE, QRELS_FILE = "queries.jsonl", "qrels.trec"


@dataclass(frozen=True)
class JudgedQueries:
    """
    Queries whose relevant documents are known.

    Args:
        queries: Texts by query id.
        qrels: Grades by query id and document id, of the same queries.
    """

    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @classmethod
    def load(cls, collection: str, split: str, index: SearchIndex) -> "JudgedQueries":
        """
        Reads those of a collection's split.

        Raises `InputError`: There is no such collection or split, or it is not the collection that is indexed.
        """
        loaded = Collection.load(collection, split, stream=True)
        theirs = loaded.name, len(loaded.corpus)
        ours = index.manifest["collection"], index.manifest["num_documents"]
        if theirs != ours:
            raise InputError(
                f"{index.name} is an index of {ours[0]} ({ours[1]:,} documents), and the judged queries are of "
                f"{theirs[0]} ({theirs[1]:,} documents); give the collection that was indexed."
            )
        return cls({query_id: loaded.queries[query_id] for query_id in loaded.qrels}, loaded.qrels)

    @classmethod
    def read(cls, folder: str | Path) -> "JudgedQueries | None":
        """
        Reads what [`save`] wrote; `None` if there is nothing.

        Raises `InputError`: A file is damaged.
        """
        path, qrels = Path(folder) / QUERIES_FILE, {}
        if not path.is_file():
            return None
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            queries = {row["_id"]: row["text"] for row in rows}
            for qrel in ir_measures.read_trec_qrels(str(path.with_name(QRELS_FILE))):
                qrels.setdefault(qrel.query_id, {})[qrel.doc_id] = qrel.relevance
            return cls({query_id: queries[query_id] for query_id in qrels}, qrels)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} or {QRELS_FILE} beside it is damaged ({error!r}); write both again.") from None

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `queries.jsonl` and `qrels.trec` into a folder; returns their paths."""
        folder = Path(folder)
        write_jsonl(folder / QUERIES_FILE, ({"_id": id_, "text": text} for id_, text in self.queries.items()))
        with atomic_open(folder / QRELS_FILE) as file:
            for query_id, judgments in self.qrels.items():
                file.writelines(f"{query_id} 0 {id_} {grade}\n" for id_, grade in judgments.items())
        return [folder / QUERIES_FILE, folder / QRELS_FILE]

    def grades(self, query: str) -> dict[str, int]:
        """The grades of a query, by document id; none if it is not a judged one. How it is spaced does not matter."""
        words = query.split()
        return next((self.qrels[id_] for id_, text in self.queries.items() if text.split() == words), {})

    def examples(self) -> list[str]:
        """Some queries that have a relevant document."""
        texts = (self.queries[id_].strip() for id_, judgments in self.qrels.items() if any(judgments.values()))
        return list(dict.fromkeys(text for text in texts if 0 < len(text) <= MAX_QUERY))[:EXAMPLES]
