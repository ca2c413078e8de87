"""
Makes a collection from two CSV files: documents, and which of them answer which queries.

python scripts/make_collection.py --documents docs.csv --judgments judgments.csv --output my_collection

Documents have the columns `id` and `text`, and may have `title`. Judgments have `query` and `document_id`, a row a pair,
and may have `relevance` (a whole number, 0 for not relevant; 1 where the column is missing) and `query_id` (where it is
missing, equal queries are one). Other columns are left out. The queries are split at random into train, dev and test.
"""

import argparse
import csv
import os
import random
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from coaug_trl import Collection, InputError
from coaug_trl.cli.main import run_command
from coaug_trl.utils.files import atomic_open, write_jsonl


SPLITS = ("train", "dev", "test")


def read_csv(path: Path, required: tuple[str, ...], unit: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV file with a header, each with its place; quoted fields may hold commas and line breaks."""
    csv.field_size_limit(2**31 - 1)  # its default is shorter than some documents
    line = 1
    try:
        # As utf-8-sig, since spreadsheets write a byte order mark before the first column's name.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in required if name not in header]
            if missing:
                _refuse_other_separator(path, header)
                raise InputError(
                    f"{path}, line 1: the column {missing[0]!r} is missing: the header has {', '.join(header) or 'none'}, "
                    f"and {', '.join(required)} with commas between them are needed"
                )
            if len(set(header)) < len(header):
                raise InputError(f"{path}, line 1: a column is there twice in {', '.join(header)}: rename one")
            line = reader.line_num + 1
            for values in tqdm(reader, desc=f"Reading {unit}", unit=f" {unit}", delay=2, leave=False):
                place = f"{path}, line {line}"
                line = reader.line_num + 1
                if not any(value.strip() for value in values):
                    continue
                if len(values) != len(header):
                    raise InputError(
                        f"{place}: {len(values)} fields, but the header has {len(header)}: put fields with commas, "
                        "quotes or line breaks in double quotes"
                    )
                yield place, dict(zip(header, values, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {_undecodable_line(path)}: not UTF-8 ({error.reason}): save the file as UTF-8 (in Excel: CSV UTF-8)"
        ) from None
    except csv.Error as error:
        raise InputError(
            f"{path}, line {line}: not CSV ({error}): a double quote within a quoted field is written twice"
        ) from None


def _refuse_other_separator(path: Path, header: list[str]) -> None:
    """What spreadsheets of many countries write is not separated by commas."""
    for separator in (";", "\t", "|"):
        if any(separator in name for name in header):
            raise InputError(
                f"{path}, line 1: the separator seems to be {separator!r}: save the file with commas (in Excel: CSV UTF-8)"
            )


def _undecodable_line(path: Path) -> int:
    """The first line that is not UTF-8; a text file is decoded in blocks, so that its error does not tell."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return number


def read_documents(path: Path, ids: set[str]) -> Iterator[dict[str, str]]:
    """Rows of corpus.jsonl; their ids are added to `ids`."""
    for place, row in read_csv(path, ("id", "text"), "documents"):
        document_id = read_id(place, row["id"], "id")
        if document_id in ids:
            raise InputError(f"{place}: the document id {document_id!r} is already taken: ids must be unique")
        ids.add(document_id)
        yield {"_id": document_id, "title": row.get("title", ""), "text": row["text"]}
    if not ids:
        raise InputError(f"{path} has no documents: write one a row below the header")


def read_judgments(path: Path, document_ids: set[str]) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Query texts by query id, and graded relevance by query id and document id."""
    queries, qrels, ids_of = {}, {}, {}
    for place, row in read_csv(path, ("query", "document_id"), "judgments"):
        text = row["query"].strip()
        if not text:
            raise InputError(f"{place}: the query is empty: write its text, in every row of it")
        if "query_id" in row:
            query_id = read_id(place, row["query_id"], "query_id")
        else:
            query_id = ids_of.setdefault(text, f"q{len(ids_of) + 1}")
        if queries.setdefault(query_id, text) != text:
            raise InputError(
                f"{place}: the query {query_id!r} is {text!r} here and {queries[query_id]!r} before: keep one text"
            )
        document_id = row["document_id"].strip()
        if document_id not in document_ids:
            raise InputError(
                f"{place}: the document {document_id!r} is not among the documents: add it or remove the row"
            )
        relevance = row.get("relevance", "1").strip()
        if not re.fullmatch("[0-9]{1,9}", relevance):
            raise InputError(f"{place}: the relevance is {relevance!r}: write a whole number, 0 for not relevant")
        if qrels.setdefault(query_id, {}).setdefault(document_id, int(relevance)) != int(relevance):
            raise InputError(
                f"{place}: query {query_id!r} and document {document_id!r} are judged {relevance} here and "
                f"{qrels[query_id][document_id]} before: keep one of the two"
            )
    return queries, qrels


def read_id(place: str, value: str, column: str) -> str:
    value = value.strip()
    if value.split() != [value]:
        raise InputError(f"{place}: `{column}` is {value!r}: give an id without blanks, which TREC files cannot hold")
    return value


def split_queries(
    qrels: dict[str, dict[str, int]], dev_share: float, test_share: float, seed: int, path: Path
) -> dict[str, list[str]]:
    """
    Query ids of each split, drawn at random, at least one a split. Queries without a relevant document, which measure
    nothing, go to train, where they are left out and counted.
    """
    relevant = sorted(query_id for query_id, judged in qrels.items() if any(judged.values()))
    if len(relevant) < len(SPLITS):
        raise InputError(
            f"{path}: {len(relevant)} queries have a relevant document, and train, dev and test need one each: judge more"
        )
    random.Random(seed).shuffle(relevant)
    num_dev, num_test = (max(1, round(share * len(relevant))) for share in (dev_share, test_share))
    if num_dev + num_test >= len(relevant):
        raise InputError(
            f"dev_share {dev_share:g} and test_share {test_share:g} leave no query to train on; lower them"
        )
    held_out = {"dev": relevant[:num_dev], "test": relevant[num_dev : num_dev + num_test]}
    elsewhere = {query_id for ids in held_out.values() for query_id in ids}
    # In the order of the file, which is easier to read.
    train = [query_id for query_id in qrels if query_id not in elsewhere]
    return {"train": train} | {
        split: [query_id for query_id in qrels if query_id in set(ids)] for split, ids in held_out.items()
    }


def make_collection(options: argparse.Namespace) -> None:
    for name in ("dev_share", "test_share"):
        if not 0 < getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name):g}; use a share of the queries, such as 0.2")
    output = options.output
    if output.exists():
        raise InputError(
            f"{output} is there already; choose another folder, delete it, or, where documents alone have changed, write "
            "them to its corpus.jsonl, so that the queries stay split as they are"
        )
    next(
        read_csv(options.judgments, ("query", "document_id"), "judgments"), None
    )  # refused now, not after the documents
    # Under another name until it is whole.
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        document_ids: set[str] = set()
        write_jsonl(temporary / "corpus.jsonl", read_documents(options.documents, document_ids))
        queries, qrels = read_judgments(options.judgments, document_ids)
        splits = split_queries(qrels, options.dev_share, options.test_share, options.seed, options.judgments)
        write_jsonl(temporary / "queries.jsonl", ({"_id": id_, "text": text} for id_, text in queries.items()))
        for split, query_ids in splits.items():
            write_qrels(temporary / "qrels" / f"{split}.tsv", {id_: qrels[id_] for id_ in query_ids})
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for split in SPLITS:
        print(Collection.load(output, split).summary())
    print(output)


def write_qrels(path: Path, qrels: dict[str, dict[str, Any]]) -> None:
    with atomic_open(path) as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query_id, judged in qrels.items():
            file.writelines(f"{query_id}\t{document_id}\t{score}\n" for document_id, score in judged.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, required=True, metavar="CSV", help="documents: id, text, title")
    parser.add_argument(
        "--judgments", type=Path, required=True, metavar="CSV", help="query, document_id, relevance, query_id"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the collection")
    parser.add_argument("--dev_share", type=float, default=0.2, help="of the queries, for dev; default: 0.2")
    parser.add_argument("--test_share", type=float, default=0.2, help="of the queries, for test; default: 0.2")
    parser.add_argument("--seed", type=int, default=42, help="of the split; default: 42")
    options = parser.parse_args(arguments)
    return run_command(lambda: make_collection(options))


if __name__ == "__main__":
    sys.exit(main())
