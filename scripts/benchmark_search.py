"""
Queries per second of `BM25Retriever.search` and of bm25s called directly, on the same saved index, in the same run:

    python scripts/benchmark_search.py
    python scripts/benchmark_search.py --documents 3600 --collection data/nfcorpus

bm25s is used as its users do: it loads the index into memory, analyses the queries with the same settings, and
retrieves with as many threads. Ours is loaded memory-mapped, as `coaug search` does. Both analyse all queries at once,
which counts. bm25s returns arrays of ids and scores, ours lists of pairs, which is what takes most of its time where a
thousand hits of a small corpus are asked for. The generated corpora are random words whose frequencies fall as those of
a language do, 60 and more to a document. Queries come as they are, and augmented: composed with the words of five other
queries as the answer.

The two take turns, each as often as `--repeats` says, and the medians count, since a machine is seldom quiet. Their
scores must agree. One thread is one core: both are bound to it. A million documents take some minutes and 5 GB.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from tqdm.auto import tqdm

from coaug_trl.data.collection import Collection
from coaug_trl.data.document import Document
from coaug_trl.policy.prompts import PromptSet
from coaug_trl.retrieval import BM25Retriever
from coaug_trl.retrieval.analyzer import ENGLISH_WORD


TITLE_WORDS, TEXT_WORDS, QUERY_WORDS = 6, 60, 6
VOCABULARY_SIZE = 500_000
ANSWER_QUERIES = 5
# Queries of a generated corpus: fewer for large ones, where each takes longer.
MOST_QUERIES, LEAST_QUERIES, DOCUMENTS_TIMES_QUERIES = 2000, 50, 50_000_000


def make_corpus(num_documents: int, seed: int) -> tuple[list[Document], list[str]]:
    """Documents and queries of random words."""
    generator = np.random.default_rng(seed)
    words = np.array([f"word{index}x" for index in range(VOCABULARY_SIZE)])

    def random_text(num_words: int) -> str:
        # The logarithm of a rank is uniform: Zipf's law.
        return " ".join(words[(VOCABULARY_SIZE ** generator.random(num_words)).astype(int) - 1])

    documents = [
        Document(f"D{index}", random_text(TITLE_WORDS), random_text(TEXT_WORDS))
        for index in tqdm(range(num_documents), desc="Writing documents", delay=2, leave=False)
    ]
    num_queries = min(MOST_QUERIES, max(LEAST_QUERIES, DOCUMENTS_TIMES_QUERIES // num_documents))
    return documents, [random_text(QUERY_WORDS) for _ in range(num_queries)]


def augment(queries: list[str]) -> list[str]:
    """The queries, composed with the words of those that follow as a model's answer."""
    prompt_set = PromptSet.default("sparse")
    following = queries[1:] + queries
    return [
        prompt_set.compose_query(query, " ".join(following[place : place + ANSWER_QUERIES]))
        for place, query in enumerate(queries)
    ]


def search_directly(
    field_index: bm25s.BM25, document_ids: np.ndarray, queries: list[str], k: int, num_threads: int
) -> np.ndarray:
    """Scores of the best `k`, shape (queries, k), by bm25s alone, which gives their document ids, too."""
    tokens = bm25s.tokenize(
        queries,
        token_pattern=ENGLISH_WORD,
        stopwords=bm25s.stopwords.STOPWORDS_EN,
        stemmer=Stemmer.Stemmer("porter"),
        show_progress=False,
    )
    # It calls 0 threads what is done without any.
    num_threads = num_threads if num_threads > 1 else 0
    return field_index.retrieve(tokens, corpus=document_ids, k=k, n_threads=num_threads, show_progress=False).scores


def timed(function) -> tuple[object, float]:
    """The function's result and its seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def compare(folder: Path, queries: list[str], k: int, num_threads: int, repeats: int) -> tuple[float, float]:
    """Median seconds of bm25s and of ours; refuses scores that differ."""
    field_index = bm25s.BM25.load(folder / "field_0", show_progress=False)
    document_ids = np.array(json.loads((folder / "document_ids.json").read_text(encoding="utf-8")), dtype=object)
    retriever = BM25Retriever.load(folder)
    directly, ours = [], []
    for _ in range(repeats):
        scores, seconds = timed(lambda: search_directly(field_index, document_ids, queries, k, num_threads))
        directly.append(seconds)
        hits, seconds = timed(lambda: retriever.search(queries, k))
        ours.append(seconds)
    # bm25s fills up with documents that score zero.
    found = [[score for _, score in row] + [0.0] * (k - len(row)) for row in hits]
    np.testing.assert_allclose(found, scores, rtol=1e-9)
    return float(np.median(directly)), float(np.median(ours))


def measure(name: str, documents: list[Document], queries: list[str], ks: list[int], repeats: int) -> list[float]:
    """Prints a row for each kind of query, number of threads and k, and returns the ratios."""
    num_documents, ratios = len(documents), []
    with tempfile.TemporaryDirectory() as folder:
        retriever = BM25Retriever()
        retriever.index(documents)
        retriever.save(folder)
        del retriever
        documents.clear()  # so that they take no memory while the index is searched
        cores = os.sched_getaffinity(0)
        for kind, texts in (("plain", queries), ("augmented", augment(queries))):
            for allowed in ({min(cores)}, cores) if len(cores) > 1 else (cores,):
                # The threads that a thread starts are bound as it is.
                os.sched_setaffinity(0, allowed)
                for k in ks:
                    k = min(k, num_documents)
                    directly, ours = compare(Path(folder), texts, k, len(allowed), repeats)
                    ratios.append(directly / ours)
                    print(
                        f"{name:12}{num_documents:>10,}{kind:>11}{len(allowed):>9}{k:>6}"
                        f"{len(texts) / directly:>12,.0f}{len(texts) / ours:>12,.0f}{ratios[-1]:>8.2f}",
                        flush=True,
                    )
            os.sched_setaffinity(0, cores)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--documents",
        type=int,
        nargs="*",
        default=[3600, 60_000, 1_000_000],
        help="sizes of the generated corpora (default: 3600 60000 1000000)",
    )
    parser.add_argument("--collection", help="collection to measure too: a BEIR folder, a Hub id or irds:NAME")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100, 1000], help="hits (default: 10 100 1000)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the median counts (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated texts (default: 0)")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if min([*args.documents, *args.k]) < 1:
        parser.error("--documents and --k must be at least 1")

    selection = "jax" if bm25s.selection.JAX_IS_AVAILABLE else "numpy"
    print(f"bm25s {bm25s.__version__}, backend {bm25s.BM25().backend}, selection by {selection}")
    print(
        f"{'queries/s':12}{'documents':>10}{'queries':>11}{'threads':>9}{'k':>6}{'bm25s':>12}{'ours':>12}{'ratio':>8}"
    )
    ratios = []
    if args.collection:
        collection = Collection.load(args.collection, "test")
        documents, queries = list(collection.corpus.values()), list(collection.queries.values())
        ratios += measure(collection.name, documents, queries, args.k, args.repeats)
    for num_documents in args.documents:
        ratios += measure("generated", *make_corpus(num_documents, args.seed), args.k, args.repeats)
    if ratios:
        print(f"lowest ratio: {min(ratios):.2f}; ours is meant to reach 0.9 of bm25s everywhere")


if __name__ == "__main__":
    main()
