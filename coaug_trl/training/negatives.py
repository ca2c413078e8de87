"""Hard negatives: documents nobody judged for a query that the retriever ranks high for it without augmentation."""

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..data.collection import Collection
from ..data.groups import CompositeGroups
from ..policy.settings import package_versions
from ..retrieval import Retriever
from ..retrieval.base import retrieve
from ..utils.distributed import run_together
from ..utils.errors import InputError
from ..utils.files import atomic_open, read_json
from .config import CoAugConfig


logger = logging.getLogger(__name__)

HARD_NEGATIVES_FILE = "hard_negatives.json"
SEARCH_CHUNK = 256  # queries searched at a time, between two steps of the progress bar


def mine_hard_negatives(
    collection: Collection, retriever: Retriever, ranks: list[int], cache_path: str | Path
) -> dict[str, list[str]]:
    """
    Finds hard negatives for every query with a relevant document.

    The first process indexes the corpus as it is and searches it, on a copy of the retriever, whose own statistics and
    index stay. The other processes wait for it, up to the time limit of their collective operations (`ddp_timeout`
    seconds). The result is kept in a file, which is read as long as retriever, ranks and collection are the same.

    Args:
        collection: Corpus, queries and judgments.
        retriever: Ranks the documents.
        ranks: First and last rank to take documents from, counted from 1 over all documents, judged ones too.
        cache_path: JSON file where the result is kept.

    Returns: document ids by query id, best first, the same on every process. Documents judged for the query are left
        out, whatever the grade, and so is one with the id of the query, which is the query itself where queries are
        documents of the corpus. A query that finds too little has an empty list.

    Raises `RuntimeError`: On the other processes, if the first one failed.

    Source: [RocketQA](https://huggingface.co/papers/2010.08191), for relevant documents without a judgment among the
    best ranks.
    """
    try:
        _, found = run_together(_read_or_mine, collection, retriever, ranks, Path(cache_path))
    except RuntimeError as error:  # where it happened, the error itself says more
        raise (error.__cause__ or error) from None
    return found[0]


def _read_or_mine(
    collection: Collection, retriever: Retriever, ranks: list[int], path: Path
) -> dict[str, list[str]] | None:
    if not PartialState().is_main_process:
        return None
    key = {
        "retriever": retriever.config,
        "ranks": list(ranks),
        "collection": _fingerprint(collection),
        "versions": package_versions(),
    }
    hard_negatives = _read(path, key)
    if hard_negatives is None:
        hard_negatives = _mine(collection, retriever, *ranks)
        with atomic_open(path) as file:  # not indented: that would be a line for each document
            file.write(json.dumps({"key": key, "hard_negatives": hard_negatives}, ensure_ascii=False) + "\n")
    counts = [len(document_ids) for document_ids in hard_negatives.values()]
    logger.info(
        f"hard negatives from ranks {ranks[0]} to {ranks[1]}: {sum(counts) / max(1, len(counts)):.1f} a query, "
        f"{counts.count(0):,} of {len(counts):,} queries have none ({path})"
    )
    return hard_negatives


def _read(path: Path, key: dict[str, Any]) -> dict[str, list[str]] | None:
    """The hard negatives in the file; `None` if it is not there, is damaged or has another key."""
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        changed = [name for name in key if content["key"][name] != key[name]]
        hard_negatives = content["hard_negatives"]
    except (InputError, KeyError, TypeError):
        logger.warning(f"{path} is damaged: hard negatives are mined again.")
        return None
    if changed:
        logger.info(f"{path} is of other {' and '.join(changed)}: hard negatives are mined again.")
        return None
    return hard_negatives


def _mine(collection: Collection, retriever: Retriever, first: int, last: int) -> dict[str, list[str]]:
    retriever = copy.copy(retriever)
    retriever.index(list(collection.corpus.values()))
    query_ids = collection.queries_with_relevant
    hard_negatives = {}
    with tqdm(total=len(query_ids), desc="Mining hard negatives", delay=2, leave=False) as progress:
        for start in range(0, len(query_ids), SEARCH_CHUNK):
            queries = {id_: collection.queries[id_] for id_ in query_ids[start : start + SEARCH_CHUNK]}
            for query_id, hits in retrieve(retriever, queries, last).items():
                hard_negatives[query_id] = [
                    document_id
                    for document_id in list(hits)[first - 1 :]
                    if document_id not in collection.qrels[query_id] and document_id != query_id
                ]
            progress.update(len(queries))
    return hard_negatives


def _fingerprint(collection: Collection) -> str:
    """Of documents, queries and judgments, as far as they decide what is mined."""
    digest = hashlib.sha256()
    for document in tqdm(collection.corpus.values(), desc="Comparing the corpus", delay=2, leave=False):
        digest.update(json.dumps([document.id, document.title, document.text]).encode())
    for query_id in collection.queries_with_relevant:
        row = [query_id, collection.queries[query_id], list(collection.qrels[query_id])]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def make_groups(collection: Collection, retriever: Retriever, args: CoAugConfig) -> CompositeGroups:
    """The composite groups of a run, with its hard negatives, which are mined once and kept in `output_dir`."""
    hard_negatives = None
    if args.num_hard_negatives:
        path = Path(args.output_dir) / HARD_NEGATIVES_FILE
        hard_negatives = mine_hard_negatives(collection, retriever, args.hard_negative_ranks, path)
    return CompositeGroups(
        collection,
        num_queries=args.queries_per_group,
        group_size=args.group_size,
        num_relevant=args.num_relevant,
        groups_per_batch=args.groups_per_batch,
        seed=args.seed,
        num_hard_negatives=args.num_hard_negatives,
        hard_negatives=hard_negatives,
    )
