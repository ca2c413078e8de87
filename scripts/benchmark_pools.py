"""
Time and memory of the joint reward with the batch pool and with the corpus pool, in one run.

On a generated collection, in a fresh process:
python scripts/benchmark_pools.py --documents 1000000

On a BEIR folder that is there, in this process:
python scripts/benchmark_pools.py --folder data/nfcorpus

The batch is the paper's, 32 groups of 16 texts with 5 rollouts, whose answers are words of the collection drawn at
random. Generation, which takes most of a training step, is not part of it.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmark_collection import write_collection
from transformers import TrainerState

from coaug_trl import BM25Retriever, CoAugConfig, Collection, PromptSet
from coaug_trl.data.groups import CompositeGroups
from coaug_trl.rewards.joint import JointReward
from coaug_trl.rewards.pool import Corpus


NUM_ROLLOUTS = 5
ANSWER_WORDS = 40


def make_batch(collection: Collection, batch: int, seed: int) -> dict[str, list]:
    """The columns of a generation batch, as TRL passes them to a reward function."""
    groups = CompositeGroups(collection, group_size=16, num_relevant=5, groups_per_batch=32, seed=seed)
    draw = random.Random(f"{seed} {batch}")
    words = [word for document_id in groups.document_ids[:500] for word in collection.corpus[document_id].text.split()]
    rows = [
        (group, *text)
        for group in (groups[position] for position in range(32 * batch, 32 * batch + 32))
        for text in group.rows("both")
        for _ in range(NUM_ROLLOUTS)
    ]
    completions = [f"<answer>{' '.join(draw.choices(words, k=ANSWER_WORDS))}</answer>" for _ in rows]
    group, text_type, text_id = map(list, zip(*rows, strict=True))
    return {"completions": completions, "group": group, "text_type": text_type, "text_id": text_id}


def peak_memory() -> float:
    # Linux counts kilobytes.
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2)


def measure(folder: Path, repeats: int, seed: int) -> dict[str, float]:
    """Seconds of both pools, batch by batch in turns, and the memory that the process has used at most."""
    collection = Collection.load(folder)
    documents = list(collection.corpus.values())
    retriever = BM25Retriever()
    retriever.fit(documents)
    before = peak_memory()
    start = time.perf_counter()
    corpus = Corpus(documents, retriever, seed)
    encoded = time.perf_counter() - start

    def measure_batch(batch: int, **settings) -> float:
        args = CoAugConfig("unused", use_cpu=True, seed=seed, **settings)
        used = corpus if args.candidate_pool == "corpus" else None
        reward = JointReward(collection, retriever, PromptSet.default("sparse"), args, used)
        columns = make_batch(collection, batch, seed)
        start = time.perf_counter()
        reward(**columns, trainer_state=TrainerState(global_step=batch), log_extra=lambda *column: None)
        return time.perf_counter() - start

    seconds = {"batch": [], "corpus": []}
    for batch in range(repeats + 1):
        for pool, measured in seconds.items():
            measured.append(measure_batch(batch, candidate_pool=pool))
    # By themselves, since each batch changes the statistics that the next one is scored with.
    running = [
        measure_batch(batch, candidate_pool="corpus", bm25_statistics="running") for batch in range(repeats + 1)
    ]
    # The first batch also prepares the corpus for the statistics, once for as long as they stay.
    first = seconds["corpus"][0]
    medians = {pool: median(measured[1:]) for pool, measured in seconds.items()}
    return {
        "documents": len(documents),
        "seconds_to_encode_the_corpus": round(encoded, 2),
        "seconds_of_the_first_batch": round(first, 2),
        "seconds_batch_pool": round(medians["batch"], 3),
        "seconds_corpus_pool": round(medians["corpus"], 3),
        "ratio": round(medians["corpus"] / medians["batch"], 2),
        "seconds_corpus_pool_running_statistics": round(median(running[1:]), 3),
        "peak_memory_gb_before": before,
        "peak_memory_gb": peak_memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents to generate")
    parser.add_argument("--repeats", type=int, default=5, help="batches measured; the median counts (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated texts (default: 0)")
    parser.add_argument("--folder", type=Path, help="measure this BEIR folder instead of a generated one")
    args = parser.parse_args()
    if args.folder is not None:
        print(json.dumps(measure(args.folder, args.repeats, args.seed), indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_collection(Path(folder), args.documents, args.seed)
        # A process of its own, so that generating does not count.
        options = ["--repeats", str(args.repeats), "--seed", str(args.seed)]
        subprocess.run([sys.executable, __file__, "--folder", folder, *options], check=True)


if __name__ == "__main__":
    main()
