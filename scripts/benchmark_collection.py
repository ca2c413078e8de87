"""
Time and memory to load a large collection and to draw the first generation batch of composite groups.

Generates a BEIR folder and measures in a fresh process:
python scripts/benchmark_collection.py --documents 1000000

Measures a folder that is there, in this process:
python scripts/benchmark_collection.py --folder data/nfcorpus
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from coaug_trl.data.collection import Collection
from coaug_trl.data.groups import CompositeGroups
from coaug_trl.utils.files import atomic_open, write_jsonl


NUM_QUERIES = 10_000
RELEVANT_PER_QUERY = 5
WORDS_PER_DOCUMENT = 60
VOCABULARY_SIZE = 50_000


def write_collection(folder: Path, num_documents: int, seed: int) -> None:
    """Writes a BEIR folder of random words, whose frequencies fall as those of a language do."""
    generator = np.random.default_rng(seed)
    words = np.array([f"word{index}" for index in range(VOCABULARY_SIZE)])

    def random_text(num_words: int) -> str:
        # The logarithm of a rank is uniform: Zipf's law.
        return " ".join(words[(VOCABULARY_SIZE ** generator.random(num_words)).astype(int) - 1])

    documents = (
        {"_id": f"D{index}", "title": random_text(6), "text": random_text(WORDS_PER_DOCUMENT)}
        for index in range(num_documents)
    )
    write_jsonl(folder / "corpus.jsonl", documents)
    write_jsonl(
        folder / "queries.jsonl", ({"_id": f"Q{index}", "text": random_text(6)} for index in range(NUM_QUERIES))
    )
    with atomic_open(folder / "qrels" / "train.tsv") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for query in range(NUM_QUERIES):
            for document in generator.choice(num_documents, RELEVANT_PER_QUERY, replace=False, shuffle=False):
                file.write(f"Q{query}\tD{document}\t1\n")


def measure(folder: Path) -> dict[str, float]:
    """Loads, draws one generation batch, and returns seconds and peak memory of this process."""
    start = time.perf_counter()
    collection = Collection.load(folder)
    loaded = time.perf_counter()
    groups_per_batch = 32
    groups = CompositeGroups(
        collection, num_queries=1, group_size=16, num_relevant=5, groups_per_batch=groups_per_batch, seed=0
    )
    batch = [groups[position] for position in range(groups_per_batch)]
    drawn = time.perf_counter()
    return {
        "documents": len(collection.corpus),
        "groups": len(batch),
        "seconds_to_load": round(loaded - start, 2),
        "seconds_to_first_batch": round(drawn - loaded, 2),
        # Linux counts kilobytes.
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents to generate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated collection")
    parser.add_argument("--folder", type=Path, help="measure this BEIR folder instead of a generated one")
    args = parser.parse_args()
    if args.folder is not None:
        print(json.dumps(measure(args.folder), indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_collection(Path(folder), args.documents, args.seed)
        # A process of its own, so that generating does not count.
        subprocess.run([sys.executable, __file__, "--folder", folder], check=True)


if __name__ == "__main__":
    main()
