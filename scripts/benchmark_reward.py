"""
Times the joint reward of one generation batch of the paper, from composed texts to rewards, three ways:

    python scripts/benchmark_reward.py

1. plain Python: BM25 pair by pair over dictionaries, and 512 sampled rankings by Python's sort;
2. `BM25Retriever.score` and `sampled_ndcg_rewards`;
3. `BM25Retriever.score` and `exact_ndcg_rewards`.

The batch is 32 groups x 16 texts x 5 rollouts: 32 queries and 480 documents (5 in each group relevant to its query),
each with 5 answers, every query ranked against every document. Texts are generated: words follow Zipf's law, and the
texts of a topic share words. Fitting the BM25 statistics is left out, since a training step uses those it has.

With `--step_seconds 60` it also prints the share of a training step that takes 60 s in all.
"""

import argparse
import math
import os
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np

from coaug_trl.data.document import Document
from coaug_trl.policy.prompts import PromptSet
from coaug_trl.retrieval import BM25Retriever
from coaug_trl.rewards.ndcg import exact_ndcg_rewards, sampled_ndcg_rewards


NUM_GROUPS, NUM_RELEVANT, NUM_IRRELEVANT, NUM_ROLLOUTS = 32, 5, 10, 5
NUM_DOCUMENTS = NUM_GROUPS * (NUM_RELEVANT + NUM_IRRELEVANT)
QUERY_WORDS, DOCUMENT_WORDS, ANSWER_WORDS = 10, 200, 40
VOCABULARY_SIZE, TOPIC_SIZE, TOPIC_SHARE = 20_000, 40, 0.08
K, NUM_SAMPLES, RELEVANT_WEIGHT = 10, 512, 10.0
# How much of the plain Python work is timed; the rest is extrapolated.
LOOP_QUERIES, LOOP_SAMPLES = 16, 16


def make_batch(seed: int) -> tuple[list[Document], list[str], list[Document], np.ndarray]:
    """Original documents, composed query rollouts, composed document rollouts and the relevance of (query, document)."""
    generator = np.random.default_rng(seed)
    probabilities = 1.0 / np.arange(1, VOCABULARY_SIZE + 1)
    probabilities /= probabilities.sum()
    topics = generator.integers(100, VOCABULARY_SIZE, size=(NUM_DOCUMENTS, TOPIC_SIZE))
    prompt_set = PromptSet.default("sparse")

    def write(num_words: int, topic: int) -> str:
        common = generator.choice(VOCABULARY_SIZE, size=num_words, p=probabilities)
        special = generator.choice(topics[topic], size=num_words)
        return " ".join(f"w{word}" for word in np.where(generator.random(num_words) < TOPIC_SHARE, special, common))

    queries, originals, documents = [], [], []
    relevance = np.zeros((NUM_GROUPS, NUM_DOCUMENTS))
    for group in range(NUM_GROUPS):
        query = write(QUERY_WORDS, group)
        queries += [prompt_set.compose_query(query, write(ANSWER_WORDS, group)) for _ in range(NUM_ROLLOUTS)]
    for j in range(NUM_DOCUMENTS):
        # Documents 0..159 belong to the topics of the queries, the others each to a topic of its own.
        topic = j % NUM_GROUPS if j < NUM_GROUPS * NUM_RELEVANT else j
        if topic < NUM_GROUPS:
            relevance[topic, j] = 1.0
        original = Document(f"d{j}", "", write(DOCUMENT_WORDS, topic))
        originals.append(original)
        documents += [prompt_set.compose_document(original, write(ANSWER_WORDS, topic)) for _ in range(NUM_ROLLOUTS)]
    return originals, queries, documents, relevance


def score_by_loops(queries: list[str], documents: list[Document], originals: list[Document]) -> tuple[list, float]:
    """BM25 (k1 1.2, b 0.75) pair by pair; returns the scores of the first queries, and seconds scaled to all."""
    frequencies = Counter(word for document in originals for word in set(document.text.split()))
    average_length = sum(len(document.text.split()) for document in originals) / len(originals)

    start = time.perf_counter()
    document_counts = [Counter(document.text.split()) for document in documents]
    lengths = [counts.total() for counts in document_counts]
    counting = time.perf_counter() - start

    start = time.perf_counter()
    scores = []
    for query in queries[:LOOP_QUERIES]:
        query_counts = Counter(query.split())
        idf = {}
        for word in query_counts:
            frequency = frequencies.get(word, 1)
            idf[word] = math.log1p((len(originals) - frequency + 0.5) / (frequency + 0.5))
        row = []
        for counts, length in zip(document_counts, lengths, strict=True):
            norm = 1.2 * (0.25 + 0.75 * length / average_length)
            score = 0.0
            for word, times in query_counts.items():
                if word in counts:
                    score += times * idf[word] * counts[word] / (counts[word] + norm)
            row.append(score if score > 0 else -math.inf)
        scores.append(row)
    pairs = time.perf_counter() - start
    return scores, counting + pairs * len(queries) / LOOP_QUERIES


def sample_by_loops(scores: list[list[float]], relevance: np.ndarray) -> float:
    """Seconds of the sampled reward by a Python sort of each drawn ranking, scaled to all draws."""
    generator = np.random.default_rng(0)
    relevant = [set(np.flatnonzero(gains).tolist()) for gains in relevance]
    ideal = sum(1.0 / math.log2(rank + 1) for rank in range(1, NUM_RELEVANT + 1))
    start = time.perf_counter()
    query_rewards = [0.0] * len(scores)
    document_rewards = [0.0] * (NUM_DOCUMENTS * NUM_ROLLOUTS)
    for _ in range(LOOP_SAMPLES):
        draw = generator.integers(NUM_ROLLOUTS, size=NUM_DOCUMENTS).tolist()
        columns = [NUM_ROLLOUTS * j + b for j, b in enumerate(draw)]
        for i, row in enumerate(scores):
            drawn = [row[column] for column in columns]
            ranking = sorted(range(NUM_DOCUMENTS), key=drawn.__getitem__, reverse=True)[:K]
            own = relevant[i // NUM_ROLLOUTS]
            ndcg = sum(1.0 / math.log2(rank + 1) for rank, j in enumerate(ranking, start=1) if j in own) / ideal
            query_rewards[i] += ndcg
            for j, column in enumerate(columns):
                document_rewards[column] += ndcg * (1.0 + RELEVANT_WEIGHT if j in own else 1.0)
    return (time.perf_counter() - start) * NUM_SAMPLES / LOOP_SAMPLES


def median_seconds(function, repeats: int) -> tuple[object, float]:
    """The function's result and the median of its run times."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, float(np.median(seconds))


def cpu_name() -> str:
    """Name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours; the median counts (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated texts (default: 0)")
    parser.add_argument(
        "--step_seconds", type=float, help="seconds of a whole training step, to print the share of it"
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.step_seconds is not None and args.step_seconds <= 0:
        parser.error("--step_seconds must be positive")

    originals, queries, documents, relevance = make_batch(args.seed)
    retriever = BM25Retriever()
    retriever.fit(originals)
    print(f"machine: {os.cpu_count()} cores, {cpu_name()}, numpy {np.__version__}")
    print(f"batch: {len(queries)} query rollouts x {NUM_DOCUMENTS} documents x {NUM_ROLLOUTS} rollouts, NDCG@{K}")

    scores, scoring = median_seconds(lambda: retriever.score(queries, documents), args.repeats)
    by_query = scores.reshape(NUM_GROUPS, NUM_ROLLOUTS, NUM_DOCUMENTS, NUM_ROLLOUTS)
    exact, exact_seconds = median_seconds(
        lambda: exact_ndcg_rewards(by_query, relevance, K, RELEVANT_WEIGHT), args.repeats
    )
    sampled, sampled_seconds = median_seconds(
        lambda: sampled_ndcg_rewards(by_query, relevance, K, NUM_SAMPLES, RELEVANT_WEIGHT), args.repeats
    )
    loop_scores, loop_scoring = score_by_loops(queries, documents, originals)
    loop_seconds = sample_by_loops(scores.tolist(), relevance)
    np.testing.assert_allclose(loop_scores, scores[:LOOP_QUERIES], rtol=1e-9)

    ways = {
        "plain Python, sampled": (loop_scoring, loop_seconds),
        "coaug_trl, sampled": (scoring, sampled_seconds),
        "coaug_trl, exact": (scoring, exact_seconds),
    }
    slowest = sum(ways["plain Python, sampled"])
    print(f"\n{'seconds':24}{'scoring':>10}{'rewards':>10}{'total':>10}{'faster':>10}")
    for name, parts in ways.items():
        print(f"{name:24}{parts[0]:10.3f}{parts[1]:10.3f}{sum(parts):10.3f}{slowest / sum(parts):9.1f}x")
    print(
        f"Plain Python was timed on {LOOP_QUERIES} of {len(queries)} query rollouts (scoring, which gave the same "
        f"scores)\nand on {LOOP_SAMPLES} of {NUM_SAMPLES} draws (rewards), then scaled up; ours is the median of "
        f"{args.repeats} complete runs."
    )
    print(
        f"mean query reward {exact[0].mean():.4f}; largest error of {NUM_SAMPLES} samples: "
        f"{np.abs(sampled[0] - exact[0]).max():.4f} (queries), {np.abs(sampled[1] - exact[1]).max():.4f} (documents)"
    )
    if args.step_seconds is not None:
        print(f"share of a training step of {args.step_seconds:g} s:")
        for name, parts in ways.items():
            print(f"  {name:24}{100 * sum(parts) / args.step_seconds:8.2f} %")


if __name__ == "__main__":
    main()
