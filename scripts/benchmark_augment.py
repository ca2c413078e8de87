"""
Texts per second of `Augmenter` against a plain loop over `model.generate`, with the same model, prompts and batch size:

    python scripts/benchmark_augment.py
    python scripts/benchmark_augment.py --model Qwen/Qwen2.5-0.5B-Instruct --collection data/nfcorpus

The plain loop takes the texts in the order of the corpus, in batches padded to their longest text, each of which ends
with its longest answer. Both must write the same. Without a model, one with random weights is made, and texts of random
words whose lengths are distributed log-normally, as those of documents are (median 60 words, from 5 to 600). Its weights
are such that it ends its answers now and then, as a trained one does. The quartiles of both lengths are printed.
The ratio of CPU time is steadier than that of wall-clock time on a machine that has other work. Where vLLM is installed it
takes part, after its start.

    python scripts/benchmark_augment.py --memory

measures instead the largest resident memory of augmenting collections of 10,000, 100,000 and 1,000,000 documents, each in
a process of its own. There a stand-in takes the place of the model, which answers at once with the last words it reads:
what is measured is everything else, from reading the corpus to writing the files.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from coaug_trl import Augmenter, Collection, PromptSet
from coaug_trl.augmentation.engines.base import Completion, best_engine
from coaug_trl.augmentation.engines.vllm import VLLMEngine
from coaug_trl.augmentation.folder import side_texts
from coaug_trl.policy.settings import GenerationSettings, PolicySettings


PROMPT_SET = PromptSet("sparse", "Write keywords for the query.", "Write keywords for the document.")
VOCABULARY_SIZE = 2000
# An answer of the random model ends after one token in so many.
MEAN_ANSWER = 40
# Short texts, since a million of them are tokenized; they are read one at a time.
WORDS_WHERE_MEMORY_IS_MEASURED = 30


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of random words, of log-normal lengths."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(np.exp(draw.normal(np.log(60), 1.0, count)), 5, 600).astype(int)
    return [" ".join(f"w{word}" for word in draw.integers(0, 300, length)) for length in lengths]


def make_model(folder: Path) -> Path:
    """A model with random weights, 4 layers of 256."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(random_texts(100), VOCABULARY_SIZE, show_progress=False)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        # One direction of the embeddings says that an answer ends after this token; else it would hardly ever end.
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings[:, -1], head[:, -1], head[tokenizer.eos_token_id] = 0.0, 0.0, 0.0
        embeddings[::MEAN_ANSWER, -1] = 50 * embeddings.std()
        head[tokenizer.eos_token_id, -1] = 10 * head.std()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def plain_loop(
    model, tokenizer, prompts: list[list[int]], batch_size: int, generation: GenerationSettings
) -> list[str]:
    """Completions as a loop over `generate` makes them."""
    completions = []
    for first in range(0, len(prompts), batch_size):
        batch = {"input_ids": prompts[first : first + batch_size]}
        inputs = tokenizer.pad(batch, return_tensors="pt", padding_side="left").to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=generation.max_new_tokens,
            repetition_penalty=generation.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
        )
        completions += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions


def engine_completions(engine, prompts: list[list[int]], generation: GenerationSettings) -> list[Completion]:
    """Completions of an engine, in the order of the prompts."""
    completions = dict(engine.complete(enumerate(prompts), generation))
    return [completions[place] for place in range(len(prompts))]


def quartiles(values: list[int]) -> list[int]:
    return np.percentile(values, [0, 25, 50, 75, 100]).astype(int).tolist()


def measure_speed(arguments: argparse.Namespace) -> None:
    generation = GenerationSettings(arguments.max_new_tokens, 1.2)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or str(make_model(Path(folder)))
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        model = model.to("cuda") if torch.cuda.is_available() else model
        augmenter = Augmenter(model, tokenizer, PolicySettings(PROMPT_SET, generation), arguments.batch_size)
        if arguments.collection:
            collection = Collection.load(arguments.collection, "test")
            texts = [text for _, text in side_texts(collection, "document")]
            texts = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))[: arguments.texts]]
        else:
            texts = random_texts(arguments.texts)
        prompts = [ids for _, ids in augmenter.prompts("document", enumerate(texts))]
        systems = {
            "plain loop": lambda: plain_loop(model, tokenizer, prompts, arguments.batch_size, generation),
            "Augmenter": lambda: engine_completions(augmenter.engine, prompts, generation),
        }
        if best_engine() == "vllm":
            engine = VLLMEngine(path, tokenizer, max(map(len, prompts)), generation)
            list(engine.complete(enumerate(prompts[:8]), generation))  # the first call compiles
            systems["Augmenter, vLLM"] = lambda: engine_completions(engine, prompts, generation)
        seconds = {name: [] for name in systems}
        cpu_seconds = {name: [] for name in systems}
        completions = {}
        for _ in range(arguments.repeats):
            for name, run in systems.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                completions[name] = run()
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    ours = completions["Augmenter"]
    rows = []
    for name in systems:
        median, cpu = statistics.median(seconds[name]), statistics.median(cpu_seconds[name])
        texts_of = [getattr(completion, "text", completion) for completion in completions[name]]
        rows.append(
            {
                "system": name,
                "texts_per_second": round(len(prompts) / median, 2),
                "ratio": round(statistics.median(seconds["plain loop"]) / median, 2),
                "cpu_ratio": round(statistics.median(cpu_seconds["plain loop"]) / cpu, 2),
                "same_as_plain": sum(a == b for a, b in zip(texts_of, completions["plain loop"], strict=True)),
            }
        )
    report = {
        "model": arguments.model or "random weights, 4 layers of 256",
        "collection": arguments.collection or "random words",
        "texts": len(prompts),
        "batch_size": arguments.batch_size,
        "max_new_tokens": arguments.max_new_tokens,
        "prompt_tokens_quartiles": quartiles([len(ids) for ids in prompts]),
        "answer_tokens_quartiles": quartiles([completion.num_tokens for completion in ours]),
        "systems": rows,
    }
    print(f"{'':18}{'texts/s':>10}{'ratio':>8}{'CPU ratio':>11}{'same answers':>14}")
    for row in rows:
        same = f"{row['same_as_plain']}/{len(prompts)}"
        print(
            f"{row['system']:18}{row['texts_per_second']:>10.2f}{row['ratio']:>8.2f}{row['cpu_ratio']:>11.2f}{same:>14}"
        )
    print_report(report)
    if rows[1]["same_as_plain"] < len(prompts):
        sys.exit("the answers differ")


# Memory


class StandIn:
    """In the place of a model: answers at once, with the last words it reads."""

    name, dtype, width = "stand-in", "none", 32

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def complete(self, prompts, generation, temperature=0.0, seed=0):
        for tag, ids in prompts:
            yield tag, Completion(f"<answer>{self.tokenizer.decode(ids[-40:])}</answer>", 40)


def measure_memory(arguments: argparse.Namespace) -> None:
    """A process for each size, since the largest memory of a process never falls."""
    rows = []
    print(f"{'documents':>10}{'corpus':>12}{'seconds':>10}{'largest memory':>16}")
    for size in arguments.documents:
        command = [sys.executable, __file__, "--memory", "--worker", "--documents", str(size)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{size:>10,}{row['corpus_mib']:>8,} MiB{row['seconds']:>10,}{row['largest_mib']:>12,} MiB"
            f"   (before augmenting {row['before_mib']:,} MiB)",
            flush=True,
        )
    print_report({"memory": rows})


def memory_worker(num_documents: int) -> None:
    def largest() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated"
        (path / "qrels").mkdir(parents=True)
        some = [" ".join(text.split()[:WORDS_WHERE_MEMORY_IS_MEASURED]) for text in random_texts(1000)]
        with open(path / "corpus.jsonl", "w", encoding="utf-8") as file:
            for number in range(num_documents):
                row = {"_id": f"D{number}", "title": f"Number {number}", "text": some[number % len(some)]}
                file.write(json.dumps(row) + "\n")
        (path / "queries.jsonl").write_text('{"_id": "Q", "text": "w1"}\n')
        (path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nQ\tD0\t1\n")
        tokenizer = Qwen2Tokenizer().train_new_from_iterator(some[:100], VOCABULARY_SIZE, show_progress=False)
        tokenizer("a text", return_offsets_mapping=True)
        before, start = largest(), time.perf_counter()
        collection = Collection.load(path, "test", stream=True)
        settings = PolicySettings(PROMPT_SET, GenerationSettings(64))
        augmenter = Augmenter(StandIn(tokenizer), tokenizer, settings, name="stand-in")
        manifest = augmenter.augment_collection(collection, Path(folder) / "augmented", ["document"])
        assert manifest["sides"]["document"]["texts"] == num_documents
        row = {
            "documents": num_documents,
            "corpus_mib": (path / "corpus.jsonl").stat().st_size // 2**20,
            "seconds": round(time.perf_counter() - start),
            "before_mib": before,
            "largest_mib": largest(),
        }
    print(json.dumps(row))


def print_report(report: dict) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    machine = f"{platform.machine()}, {device}, {torch.get_num_threads()} threads"
    print(json.dumps({"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__} | report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id; default: random weights")
    parser.add_argument("--collection", help="whose documents are augmented; default: random words")
    parser.add_argument("--texts", type=int, default=256, help="how many of them (default: 256)")
    parser.add_argument("--batch_size", type=int, default=32, help="texts at once (default: 32)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the median counts (default: 1)")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument(
        "--documents",
        type=int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000],
        help="sizes for --memory (default: 10000 100000 1000000)",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        memory_worker(arguments.documents[0])
    elif arguments.memory:
        measure_memory(arguments)
    else:
        measure_speed(arguments)


if __name__ == "__main__":
    main()
