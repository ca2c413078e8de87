"""The `coaug` command."""

import argparse
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import __version__
from .errors import InputError, TrainingStopped


# Everything heavier is imported by the command that needs it, so that --help answers at once.
if TYPE_CHECKING:
    from ir_measures import Measure

    from .augment import AugmentedCollection
    from .compare import Comparison, Table
    from .data import Collection
    from .policy import GenerationSettings
    from .retrieval import Retriever
    from .search import Timing


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a `coaug` command.

    Args:
        arguments (`list[str]`, *optional*):
            Command line; defaults to that of the process.

    Returns:
        `int`: exit code: 0, 1 for training that stopped itself, 2 for bad input, 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:  # its options are those of three dataclasses, which TRL's parser reads
        from .train import main as train

        return run_command(lambda: train(arguments[1:]), resumes=True)
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others and not hasattr(options, "recipe_arguments"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.recipe_arguments = others  # fields of a recipe, for TRL's parser
    return run_command(lambda: options.run(options), resumes=options.run in (_augment, _baselines))


def run_command(command: Callable[[], None], resumes: bool = False) -> int:
    """Runs a command; bad input and interruption end in one line on standard error rather than a traceback."""
    try:
        command()
    except InputError as error:
        # libraries put line breaks into the messages that ours quote
        print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.filename is None and not full:  # not about a file the user named
            raise
        print(f"error: {error.filename or 'a file could not be written'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except TrainingStopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:  # all processes stop together, and one of them speaks
            print(stop, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = ": the same command goes on from what has been saved, if anything has" * resumes
        print(f"interrupted{more}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coaug", description="Teach a language model to augment queries and documents, and search with it."
    )
    parser.add_argument("--version", action="version", version=f"coaug {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    commands.add_parser("train", help="train a policy; see coaug train --help", add_help=False)

    augment = commands.add_parser(
        "augment",
        help="augment queries, documents or both with a policy",
        description="Augments the judged queries of a split, all documents, or both. The same command goes on after an "
        "interruption, and generates only for texts that are new or have changed. Under accelerate launch "
        "(scripts/augment.py) each process augments its share, on its own GPU; all must see the folder DIR.",
    )
    augment.add_argument("--model", required=True, help="policy or any causal language model: a folder or a Hub id")
    augment.add_argument("--revision", help="revision of the model on the Hub")
    _add_collection(augment, "test")
    augment.add_argument(
        "--side", choices=["query", "document", "both"], help="default: what the policy was trained on, else both"
    )
    augment.add_argument("--output", required=True, metavar="DIR", help="folder of the augmentations")
    augment.add_argument("--retriever", choices=["bm25", "dense"], default="bm25", help=_UNTRAINED.format("bm25"))
    augment.add_argument("--prompt_set", metavar="FILE", help=_UNTRAINED.format("the package's"))
    augment.add_argument("--max_new_tokens", type=int, help=_UNTRAINED.format("512"))
    augment.add_argument("--repetition_penalty", type=float, help=_UNTRAINED.format("1.2"))
    augment.add_argument(
        "--engine", choices=["vllm", "transformers"], help="what generates; default: vllm where installed"
    )
    augment.add_argument(
        "--server", metavar="URL", help="server with the OpenAI protocol that generates instead, such as vllm serve M"
    )
    augment.add_argument(
        "--server_concurrency", type=int, default=64, metavar="N", help="requests to the server at once; default: 64"
    )
    augment.add_argument(
        "--batch_size", type=int, default=32, help="texts generated for at once by transformers; default: 32"
    )
    augment.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights, for vllm and transformers; default: as they are saved",
    )
    augment.add_argument(
        "--gpu_memory_utilization", type=float, metavar="SHARE", help="of the GPU's memory, for vllm; default: 0.9"
    )
    augment.add_argument(
        "--retry_incomplete",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="TIMES",
        help="try incomplete answers again, by sampling, so often in all; without a number once",
    )
    augment.add_argument(
        "--dry_run", action="store_true", help="estimate tokens, time and disk from a sample, and write nothing"
    )
    augment.set_defaults(run=_augment)

    index = commands.add_parser("index", help="index a collection, with or without augmentations, to search it")
    _add_collection(index, None)
    _add_retriever(index)
    index.add_argument("--augmentations", metavar="DIR", help="folder made by coaug augment; default: none")
    index.add_argument("--output", required=True, metavar="DIR", help="folder of the index")
    index.set_defaults(run=_index)

    search = commands.add_parser("search", help="search an index, with or without a policy that augments the queries")
    search.add_argument("--index", required=True, metavar="DIR", help="folder made by coaug index")
    search.add_argument("--model", help="policy that augments the queries: a folder or a Hub id; default: none")
    search.add_argument("--k", type=int, default=10, help="hits for a query; default: 10")
    search.add_argument("--json", action="store_true", help="print a JSON object for each query")
    search.add_argument(
        "--timing", action="store_true", help="search for one query at a time, and print how long its parts take"
    )
    search.add_argument("queries", nargs="+", metavar="QUERY", help="text to search for")
    search.set_defaults(run=_search)

    evaluate = commands.add_parser("evaluate", help="retrieve and measure, with or without augmentations")
    _add_collection(evaluate, "test")
    _add_retriever(evaluate)
    evaluate.add_argument("--augmentations", metavar="DIR", help="folder made by coaug augment; default: none")
    evaluate.add_argument("--side", choices=["query", "document", "both"], default="both", help="side to augment")
    _add_run(evaluate)
    evaluate.add_argument("--output", required=True, metavar="DIR", help="folder of the evaluation")
    evaluate.set_defaults(run=_evaluate)

    baselines = commands.add_parser(
        "baselines",
        help="evaluate and compare the field's expansion methods with one model",
        description="Evaluates expansion methods with one language model, and RM3, on the same collection with the "
        "same retriever, and tests them against each other. Systems: none, untrained-query, untrained-document, "
        "untrained-both (the policy's prompts, else the package's), query2doc, hyde (dense only), pseudo-document, "
        "doc2query, rm3 (BM25 only), trained (with --policy). The same command goes on after an interruption.",
    )
    _add_collection(baselines, "test")
    baselines.add_argument("--model", help="language model of all prompts: a folder or a Hub id")
    baselines.add_argument("--revision", help="revision of the model on the Hub")
    baselines.add_argument("--policy", metavar="RUN", help="folder of a trained policy, the system trained")
    baselines.add_argument("--only", nargs="+", default=[], metavar="NAME", help="systems to run; default: all")
    _add_retriever(baselines)
    baselines.add_argument("--max_new_tokens", type=int, help="longest answer of the model, in tokens; default: 512")
    baselines.add_argument("--repetition_penalty", type=float, help="of the model; default: 1.2")
    baselines.add_argument("--batch_size", type=int, default=32, help="texts generated for at once; default: 32")
    _add_run(baselines)
    baselines.add_argument("--output", required=True, metavar="DIR", help="folder of augmentations and evaluations")
    _add_format(baselines)
    baselines.set_defaults(run=_baselines)

    compare = commands.add_parser("compare", help="test evaluations against each other, pair by pair")
    compare.add_argument("folders", nargs="+", metavar="RUN_DIR", help="evaluation folders, the baseline first")
    compare.add_argument(
        "--measures", nargs="+", metavar="MEASURE", help="such as nDCG@10; default: those in all folders"
    )
    _add_format(compare)
    compare.set_defaults(run=_compare)

    _add_analyze(commands.add_parser("analyze", help="the analyses of the paper: words, advantages, sampled rewards"))
    return parser


_UNTRAINED = "for a model that was not trained with coaug; default: {}"


def _add_collection(parser: argparse.ArgumentParser, split: str | None) -> None:
    parser.add_argument(
        "--collection", required=True, help="BEIR folder, Hub id, irds:NAME for ir_datasets, or vocabulary-gap"
    )
    default = split or "the first, since every split has the same documents"
    parser.add_argument("--split", default=split, help=f"split whose queries are meant; default: {default}")


def _add_retriever(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--retriever", choices=["bm25", "dense"], default="bm25", help="default: bm25")
    parser.add_argument("--fields", choices=["flat", "best"], help="BM25: title and text as one field or two")
    parser.add_argument("--k1", type=float, help="BM25; default: 1.2")
    parser.add_argument("--b", type=float, help="BM25; default: 0.75")
    parser.add_argument("--language", help="BM25: Snowball stemmer; default: english")
    parser.add_argument("--encoder", help="dense: sentence-transformers model; default: BAAI/bge-base-en-v1.5")
    parser.add_argument("--embedding_cache", metavar="DIR", help="dense: where embeddings are kept; default: nowhere")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=int, default=1000, help="depth of the run; default: 1000")
    parser.add_argument(
        "--measures",
        nargs="+",
        metavar="MEASURE",
        help="any of ir-measures, such as P(rel=2)@5; default: nDCG@10 nDCG@100 R@100 RR@10 AP",
    )
    parser.add_argument(
        "--ignore_identical_ids",
        action="store_true",
        help="leave out the document with the id of the query, where queries are documents: ArguAna, Quora",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=["table", "markdown", "latex"], default="table", help="of the tables; default: table"
    )


def _sides(side: str) -> tuple[str, ...]:
    return ("query", "document") if side == "both" else (side,)


def _augment(options: argparse.Namespace) -> None:
    from .augment import MANIFEST, Augmenter, describe_side
    from .data import Collection
    from .engines import best_engine, num_processes, process_index
    from .policy import PolicySettings
    from .prompts import PromptSet

    if not 0 <= options.retry_incomplete <= 1000:
        raise InputError(f"--retry_incomplete is {options.retry_incomplete}; use 0 to 1000.")
    if options.server and options.engine:
        raise InputError("--server and --engine are both given, and only one of them can generate; leave one out.")
    main = process_index() == 0
    collection = Collection.load(options.collection, options.split, stream=True)
    if main:
        print(collection.summary())
    trained = PolicySettings.load(options.model) if Path(options.model).is_dir() else None
    prompt_set = PromptSet.load(options.prompt_set) if options.prompt_set else None
    generation = _generation(options)
    if trained is None:
        prompt_set = prompt_set or PromptSet.default("dense" if options.retriever == "dense" else "sparse")
    augmenter = Augmenter.from_pretrained(
        options.model,
        prompt_set,
        generation,
        batch_size=options.batch_size,
        revision=options.revision,
        engine=options.engine or best_engine(),
        server=options.server,
        server_concurrency=options.server_concurrency,
        dtype=options.dtype,
        gpu_memory_utilization=options.gpu_memory_utilization,
    )
    sides = _sides(options.side) if options.side else augmenter.settings.sides
    if options.dry_run:
        for side in sides if main else ():
            print(f"{side}: {augmenter.estimate(collection, options.output, side, options.retry_incomplete)}")
        return
    manifest = augmenter.augment_collection(collection, options.output, sides, options.retry_incomplete)
    if not main:
        return
    for side, counts in manifest["sides"].items():
        print(describe_side(side, counts))
    shares = f" by process 1 of {num_processes()}" * (num_processes() > 1)
    for side, throughput in augmenter.throughput.items():
        print(f"{side}{shares}: {throughput}")
    print(f"{Path(options.output) / MANIFEST}")


def _generation(options: argparse.Namespace) -> "GenerationSettings | None":
    """The generation settings given for an untrained model, if any."""
    from .policy import GenerationSettings

    given = {
        name: getattr(options, name)
        for name in ("max_new_tokens", "repetition_penalty")
        if getattr(options, name) is not None
    }
    return GenerationSettings(**given) if given else None


def _index(options: argparse.Namespace) -> None:
    from .data import Collection
    from .data.loaders import open_source
    from .search import SearchIndex, refuse_other_content

    refuse_other_content(options.output)  # rather now than after the work
    split = options.split or open_source(options.collection).splits[0]
    collection = Collection.load(options.collection, split)
    print(collection.summary())
    augmented, retriever = _augmented_and_retriever(options, collection, ("document",))
    SearchIndex.build(collection, augmented, retriever, options.output)
    print(
        f"{len(collection.corpus):,} documents indexed, {'with' if augmented else 'without'} augmentations; "
        f"{options.output}"
    )


def _search(options: argparse.Namespace) -> None:
    from .retrieval.base import check_depth

    for query in options.queries:
        if not query.strip():
            raise InputError("A query is empty; write what to search for.")
        try:
            query.encode()
        except UnicodeEncodeError:  # how Python reads arguments that are not UTF-8
            raise InputError(f"The query {query!r} is not UTF-8; check the encoding of the terminal.") from None
    check_depth(options.k)
    from .search import SearchIndex

    start = time.perf_counter()
    index = SearchIndex.load(options.index)
    augmenter = index.augmenter(options.model) if options.model else None
    if options.timing:
        index.search(options.queries[:1], options.k, augmenter)  # the first one loads what the others find loaded
        loading = time.perf_counter() - start
        results, timings = index.search_timed(options.queries, options.k, augmenter)
    else:
        results, timings = index.search(options.queries, options.k, augmenter), None
    for place, result in enumerate(results):
        if options.json:
            seconds = {"seconds": timings[place]._asdict() | {"total": timings[place].total}} if timings else {}
            print(json.dumps(result._asdict() | seconds, ensure_ascii=False))
        else:
            _print_hits(*result)
    if timings:
        _print_timings(loading, timings, sys.stderr if options.json else sys.stdout)


def _print_timings(loading: float, timings: list["Timing"], file: TextIO) -> None:
    from statistics import median

    import numpy as np

    print(f"loaded in {loading:.2f} s, a first query included; then, for one query at a time:", file=file)
    print(f"{'ms':>8}{'augment':>10}{'search':>10}{'total':>10}", file=file)
    parts = [[1000 * part for part in (*timing, timing.total)] for timing in timings]
    rows = {"query": parts[0]}
    if len(parts) > 1:
        rows = {
            "median": [median(column) for column in zip(*parts, strict=True)],
            "p95": np.percentile(parts, 95, axis=0),
        }
    for name, row in rows.items():
        print(f"{name:>8}" + "".join(f"{value:>10.1f}" for value in row), file=file)


def _print_hits(query: str, answer: str | None, rows: list[dict[str, Any]]) -> None:
    print(query)
    if answer is not None:
        print(f"  + {' '.join(answer.split())}" if answer else "  (nothing added)")
    if not rows:
        print("  nothing found")
    width = max((len(row["_id"]) for row in rows), default=0)
    for row in rows:
        line = f"{row['rank']:>4}  {row['score']:>8.4f}  {row['_id']:<{width}}  "
        columns = max(shutil.get_terminal_size().columns - len(line), 20)
        shown = " ".join(f"{row['title']} | {row['text']}".split()).strip("| ")
        print(line + (shown if len(shown) <= columns else f"{shown[: columns - 1]}…"))
    print()


def _evaluate(options: argparse.Namespace) -> None:
    from .data import Collection
    from .evaluation import (
        MEASURES,
        compose,
        evaluation_manifest,
        judged_texts,
        parse_measures,
        retrieve,
        save_evaluation,
    )
    from .retrieval.base import check_depth

    measures = parse_measures(options.measures or MEASURES)
    check_depth(options.k)
    collection = Collection.load(options.collection, options.split)
    print(collection.summary())
    augmented, retriever = _augmented_and_retriever(options, collection, _sides(options.side))
    queries, documents = compose(collection, augmented, retriever)
    retriever.index(documents)
    run = retrieve(retriever, queries, options.k, options.ignore_identical_ids)
    manifest = evaluation_manifest(
        collection, augmented, retriever.config, queries, documents, options.k, options.ignore_identical_ids
    )
    texts = judged_texts(collection, augmented.answers if augmented else None)
    metrics = save_evaluation(options.output, run, collection.qrels, manifest, measures.values(), texts)
    _note_depth(measures, options.k, collection)
    _print_means(options.output, run)
    print(
        f"over {metrics['num_queries']:,} judged queries, of which {metrics['num_queries_without_hits']:,} found "
        f"nothing and count 0; {options.output}"
    )


def _note_depth(measures: dict["Measure", str], k: int, collection: "Collection") -> None:
    too_deep = [
        name
        for measure, name in measures.items()
        if k < measure.params.get("cutoff", 0) and k < len(collection.corpus)
    ]
    if too_deep:
        print(f"note: {', '.join(too_deep)} would need more than the {k:,} hits of --k", file=sys.stderr)


def _print_means(folder: str, run: dict[str, dict[str, float]]) -> None:
    """Prints the means of an evaluation, and those that leave out queries without hits where there are any."""
    from statistics import fmean

    from .evaluation import load_evaluation

    evaluation = load_evaluation(folder)
    with_hits = [values for query_id, values in evaluation.per_query.items() if run.get(query_id)]
    width = max(map(len, evaluation.measures))
    for name in evaluation.measures:
        line = f"{name:>{width}}  {evaluation.metrics[name]:.4f}"
        if 0 < len(with_hits) < len(evaluation.per_query):
            mean = fmean(values[name] for values in with_hits)
            line += f"   ({mean:.4f} over the {len(with_hits):,} queries with hits, as BEIR averages)"
        print(line)


def _augmented_and_retriever(
    options: argparse.Namespace, collection: "Collection", sides: tuple[str, ...]
) -> tuple["AugmentedCollection | None", "Retriever"]:
    """What `index` and `evaluate` work with, refused where it does not belong together."""
    from .augment import AugmentedCollection

    augmented, trained_with = None, {}
    if options.augmentations:
        augmented = AugmentedCollection.load(options.augmentations, sides)
        trained_with = augmented.manifest["retriever"]
    retriever = _retriever(options, trained_with, f"{options.augmentations} was made by a policy")
    if augmented and augmented.prompt_set.kind != retriever.kind:
        raise InputError(
            f"{options.augmentations} was made with prompts for {augmented.prompt_set.kind} retrievers, and the "
            f"retriever is {retriever.kind}."
        )
    if augmented and augmented.manifest["collection"] != collection.name:
        raise InputError(
            f"{options.augmentations} belongs to the collection {augmented.manifest['collection']}, not to "
            f"{collection.name}."
        )
    return augmented, retriever


def _retriever(options: argparse.Namespace, trained_with: dict[str, Any], policy: str) -> "Retriever":
    """The retriever of the options; refused where it is not the one that the policy was trained with."""
    from .retrieval import make_retriever

    given = {
        name: getattr(options, option)
        for name, option in (*((name, name) for name in ("fields", "k1", "b", "language")), ("model", "encoder"))
        if getattr(options, option) is not None
    }
    # What the policy was trained for is the default, and nothing else is accepted.
    settings = {"retriever": options.retriever} | trained_with | given
    if trained_with and settings != trained_with:
        raise InputError(
            f"{policy} trained for {trained_with}, not for {settings}; "
            "leave the retriever's settings out, or augment with an untrained model."
        )
    if settings.pop("retriever") != options.retriever:
        raise InputError(
            f"{policy} trained for {trained_with}, and the retriever is {options.retriever}; use the one it was "
            "trained for."
        )
    if options.embedding_cache:
        settings["cache_dir"] = options.embedding_cache
    return make_retriever(options.retriever, **settings)


def _baselines(options: argparse.Namespace) -> None:
    from .baselines import COMPARISON_FILE, choose_systems, run_baselines
    from .data import Collection
    from .evaluation import MEASURES, parse_measures
    from .policy import PolicySettings
    from .retrieval.base import check_depth

    measures = parse_measures(options.measures or MEASURES)
    check_depth(options.k)
    generation = _generation(options)
    trained = PolicySettings.load(options.policy) if options.policy and Path(options.policy).is_dir() else None
    retriever = _retriever(options, trained.retriever if trained else {}, f"{options.policy} is a policy")
    systems = choose_systems(retriever, options.model, options.policy, options.only)
    collection = Collection.load(options.collection, options.split)
    print(collection.summary())
    comparison = run_baselines(
        systems,
        collection,
        retriever,
        options.output,
        options.model,
        options.policy,
        generation,
        options.batch_size,
        options.revision,
        options.k,
        options.ignore_identical_ids,
        measures.values(),
    )
    _note_depth(measures, options.k, collection)
    if comparison:
        _print_notes(comparison)
        print(f"\n{comparison.render_summary(options.format)}\n")
        print(f"all pairs, measures and examples: {Path(options.output) / COMPARISON_FILE}")


def _compare(options: argparse.Namespace) -> None:
    from .compare import compare_folders

    comparison = compare_folders(options.folders, options.measures)
    _print_notes(comparison)
    print(comparison.render(options.format))


def _print_notes(comparison: "Comparison") -> None:
    for note in comparison.notes:
        print(f"note: {note}", file=sys.stderr)


# coaug analyze


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    analyses = parser.add_subparsers(title="analyses", required=True, metavar="ANALYSIS")

    alignment = analyses.add_parser(
        "alignment",
        help="cross-entropy H(Q,D) of the words of queries and documents",
        description="Cross-entropy H(Q,D) of the words of the judged queries relative to those of all documents, in "
        "nats a word, with and without augmentations. Words are those BM25 reads: lower case, no stop words, stemmed. "
        "The paper (Table 3) does not state base, smoothing and tokenizer, so its values cannot be compared with these.",
    )
    _add_collection(alignment, "test")
    alignment.add_argument(
        "--augmentations", nargs="+", required=True, metavar="DIR", help="folders made by coaug augment"
    )
    alignment.add_argument(
        "--smoothing", type=float, default=1.0, help="added to the documents' count of each word; default: 1"
    )
    alignment.add_argument("--language", default="english", help="Snowball stemmer; default: english")
    alignment.add_argument("--json", action="store_true", help="print a JSON object")
    alignment.set_defaults(run=_analyze_alignment)

    advantages = analyses.add_parser(
        "advantages",
        usage="coaug analyze advantages [-h] [--threshold STD] [--json] "
        "(--run RUN_DIR | --config RECIPE [--field value ...])",
        help="what each normalisation does to the rewards of a text's rollouts",
        description="Shares of texts whose rollouts get their variance amplified, or advantages of one sign, under "
        "three normalisations of the joint reward (the paper's Table 7): from the completions a run logged, or from "
        "one generation batch of a recipe, without training.",
        allow_abbrev=False,
    )
    source = advantages.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", dest="run_dir", metavar="RUN_DIR", help="run trained with log_completions")
    source.add_argument("--config", metavar="RECIPE", help="recipe of coaug train; its fields may follow")
    advantages.add_argument(
        "--threshold", type=float, default=0.02, metavar="STD", help="of a small standard deviation; default: 0.02"
    )
    advantages.add_argument("--json", action="store_true", help="print a JSON object")
    advantages.set_defaults(run=_analyze_advantages, recipe_arguments=[])

    reward = analyses.add_parser(
        "reward",
        help="error, variance and time of the sampled reward",
        description="Error, variance and time of the sampled reward against the exact one, on generated scores "
        "(the paper's section 3.3).",
    )
    reward.add_argument(
        "--pools", type=int, nargs="+", default=[15, 100, 480, 1000], help="documents; default: 15 100 480 1000"
    )
    reward.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[16, 64, 256, 512, 1024, 4096],
        help="draws of the sampled reward; default: 16 64 256 512 1024 4096",
    )
    reward.add_argument("--repeats", type=int, default=10, help="estimates with different draws; default: 10")
    reward.add_argument("--seed", type=int, default=0, help="seed of scores and draws; default: 0")
    reward.add_argument("--output", metavar="DIR", help="folder for reward_study.json and reward_study.png")
    reward.set_defaults(run=_analyze_reward)


def _analyze_alignment(options: argparse.Namespace) -> None:
    from .analysis import alignment_table, measure_alignment
    from .data import Collection

    collection = Collection.load(options.collection, options.split)
    rows = measure_alignment(collection, options.augmentations, options.smoothing, options.language)
    settings = {
        "collection": collection.name,
        "split": collection.split,
        "unit": "nats",
        "smoothing": options.smoothing,
        "language": options.language,
    }
    title = (
        f"{collection.name} ({collection.split}): H(Q,D) in nats a word, {options.smoothing:g} added to the documents' "
        f"count of each word; words as BM25 reads them ({options.language}); unseen: query words in no document"
    )
    _print_analysis(options.json, settings, rows, alignment_table(rows, title))


def _analyze_advantages(options: argparse.Namespace) -> None:
    from .analysis import anomalies_table, generate_rewards, measure_anomalies, read_rewards

    if options.config is None:
        if options.recipe_arguments:
            raise InputError(f"{options.recipe_arguments[0]}: fields of a recipe go with --config, not with --run.")
        batches = read_rewards(options.run_dir)
    else:
        batches = [generate_rewards(["--config", options.config, *options.recipe_arguments])]
    rows = measure_anomalies(batches, options.threshold)
    settings = {
        "source": options.run_dir or options.config,
        "num_generation_batches": len(batches),
        "num_rollouts": len(next(iter(batches[0].values()))),
        "threshold": options.threshold,
    }
    title = (
        f"{settings['source']}: {len(batches):,} generation batch{'es' if len(batches) > 1 else ''}, "
        f"{settings['num_rollouts']} rollouts a text; small: a standard deviation below {options.threshold:g}, of the "
        "rewards before and the advantages after; amplified variance: small before less small after"
    )
    _print_analysis(options.json, settings, rows, anomalies_table(rows, title))


def _print_analysis(as_json: bool, settings: dict[str, Any], rows: list[Any], table: "Table") -> None:
    from dataclasses import asdict

    if as_json:
        print(json.dumps(settings | {"rows": [asdict(row) for row in rows]}, indent=2, ensure_ascii=False))
    else:
        print(table)


def _analyze_reward(options: argparse.Namespace) -> None:
    from .analysis import errors_table, import_figure, save_study, study_rewards

    if options.output:  # rather now than after the work
        import_figure()
        Path(options.output).mkdir(parents=True, exist_ok=True)
    rows = study_rewards(options.pools, options.samples, options.repeats, options.seed)
    title = (
        f"Sampled against exact reward (NDCG@10), 5 rollouts a text, {options.repeats} repeats: mean and largest "
        "absolute error, variance of an estimate, median seconds for the pool"
    )
    print(errors_table(rows, title))
    if options.output:
        save_study(rows, {"repeats": options.repeats, "seed": options.seed}, options.output)
        print(f"{Path(options.output) / 'reward_study.json'}, {Path(options.output) / 'reward_study.png'}")


if __name__ == "__main__":
    sys.exit(main())
