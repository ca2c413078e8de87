"""The `coaug` command."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a `coaug` command.

    Args:
        arguments (`list[str]`, *optional*):
            Command line; defaults to that of the process.

    Returns:
        `int`: exit code: 0, 2 for bad input, 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:  # its options are those of three dataclasses, which TRL's parser reads
        from .train import main as train

        return run_command(lambda: train(arguments[1:]))
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.run(options))


def run_command(command: Callable[[], None]) -> int:
    """Runs a command; bad input and interruption end in one line on standard error rather than a traceback."""
    try:
        command()
    except InputError as error:
        # libraries put line breaks into the messages that ours quote
        print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # not about a file the user named
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what has been saved", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coaug", description="Teach a language model to augment queries and documents, and search with it."
    )
    parser.add_argument("--version", action="version", version=f"coaug {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    commands.add_parser("train", help="train a policy; see coaug train --help", add_help=False)

    augment = commands.add_parser("augment", help="augment queries, documents or both with a policy")
    augment.add_argument("--model", required=True, help="policy or any causal language model: a folder or a Hub id")
    augment.add_argument("--revision", help="revision of the model on the Hub")
    _add_collection(augment, "test")
    augment.add_argument("--side", choices=["query", "document", "both"], default="both", help="default: both")
    augment.add_argument("--output", required=True, metavar="DIR", help="folder of the augmentations")
    augment.add_argument("--retriever", choices=["bm25", "dense"], default="bm25", help=_UNTRAINED.format("bm25"))
    augment.add_argument("--prompt_set", metavar="FILE", help=_UNTRAINED.format("the package's"))
    augment.add_argument("--max_new_tokens", type=int, help=_UNTRAINED.format("512"))
    augment.add_argument("--repetition_penalty", type=float, help=_UNTRAINED.format("1.2"))
    augment.add_argument("--batch_size", type=int, default=32, help="texts generated for at once; default: 32")
    augment.set_defaults(run=_augment)

    evaluate = commands.add_parser("evaluate", help="retrieve and measure, with or without augmentations")
    _add_collection(evaluate, "test")
    evaluate.add_argument("--retriever", choices=["bm25"], default="bm25", help="default: bm25")
    _add_bm25(evaluate)
    evaluate.add_argument("--augmentations", metavar="DIR", help="folder made by coaug augment; default: none")
    evaluate.add_argument("--side", choices=["query", "document", "both"], default="both", help="side to augment")
    evaluate.add_argument("--k", type=int, default=1000, help="depth of the run; default: 1000")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="folder of the evaluation")
    evaluate.set_defaults(run=_evaluate)
    return parser


_UNTRAINED = "for a model that was not trained with coaug; default: {}"


def _add_collection(parser: argparse.ArgumentParser, split: str) -> None:
    parser.add_argument(
        "--collection", required=True, help="BEIR folder, Hub id, irds:NAME for ir_datasets, or vocabulary-gap"
    )
    parser.add_argument("--split", default=split, help=f"split whose queries are meant; default: {split}")


def _add_bm25(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fields", choices=["flat", "best"], help="title and text as one field or two; default: flat")
    parser.add_argument("--k1", type=float, help="default: 1.2")
    parser.add_argument("--b", type=float, help="default: 0.75")
    parser.add_argument("--language", help="Snowball stemmer; default: english")


def _sides(side: str) -> tuple[str, ...]:
    return ("query", "document") if side == "both" else (side,)


def _augment(options: argparse.Namespace) -> None:
    from .augment import MANIFEST, Augmenter
    from .data import Collection
    from .policy import GenerationSettings, PolicySettings
    from .prompts import PromptSet

    collection = Collection.load(options.collection, options.split)
    print(collection.summary())
    trained = PolicySettings.load(options.model) if Path(options.model).is_dir() else None
    prompt_set = PromptSet.load(options.prompt_set) if options.prompt_set else None
    given = {
        name: getattr(options, name)
        for name in ("max_new_tokens", "repetition_penalty")
        if getattr(options, name) is not None
    }
    generation = GenerationSettings(**given) if given else None
    if trained is None:
        prompt_set = prompt_set or PromptSet.default("dense" if options.retriever == "dense" else "sparse")
    augmenter = Augmenter.from_pretrained(
        options.model, prompt_set, generation, batch_size=options.batch_size, revision=options.revision
    )
    manifest = augmenter.augment_collection(collection, options.output, _sides(options.side))
    for side, counts in manifest["sides"].items():
        print(
            f"{side}: {counts['texts']:,} texts, {counts['empty']:,} left as they were, "
            f"{counts['incomplete']:,} answers incomplete, {counts['truncated']:,} texts cut"
        )
    print(f"{Path(options.output) / MANIFEST}")


def _evaluate(options: argparse.Namespace) -> None:
    from .augment import AugmentedCollection
    from .data import Collection
    from .evaluation import save_evaluation
    from .policy import package_versions
    from .retrieval import BM25Retriever

    collection = Collection.load(options.collection, options.split)
    print(collection.summary())
    given = {
        name: getattr(options, name)
        for name in ("fields", "k1", "b", "language")
        if getattr(options, name) is not None
    }
    augmented, trained_with = None, {}
    if options.augmentations:
        augmented = AugmentedCollection.load(options.augmentations, _sides(options.side))
        trained_with = augmented.manifest["retriever"]
    # What the policy was trained for is the default, and nothing else is accepted.
    settings = {"retriever": options.retriever} | trained_with | given
    if trained_with and settings != trained_with:
        raise InputError(
            f"{options.augmentations} was made by a policy trained for {trained_with}, not for {settings}; "
            "leave the retriever's settings out, or augment with an untrained model."
        )
    if settings.pop("retriever") != options.retriever:
        raise InputError(
            f"{options.augmentations} was made by a policy trained for {trained_with}, and the retriever is "
            f"{options.retriever}; use the one it was trained for."
        )
    retriever = BM25Retriever(**settings)
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
    if augmented:
        queries = augmented.queries(collection)
        documents = augmented.documents(collection, retriever.answer_field)
    else:
        queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
        documents = list(collection.corpus.values())
    retriever.index(documents)
    hits = retriever.search(list(queries.values()), options.k)
    run = {query_id: dict(found) for query_id, found in zip(queries, hits, strict=True)}
    manifest = {
        "collection": collection.name,
        "split": collection.split,
        "retriever": retriever.config,
        "depth": options.k,
        "augmentations": augmented.manifest if augmented else None,
        "augmented_sides": sorted(augmented.answers) if augmented else [],
        "versions": package_versions(),
    }
    metrics = save_evaluation(options.output, run, collection.qrels, manifest)
    for name, value in metrics.items():
        if isinstance(value, float):
            print(f"{name:>8}  {value:.4f}")
    print(
        f"over {metrics['num_queries']:,} judged queries, of which {metrics['num_queries_without_hits']:,} found "
        f"nothing and count 0; {options.output}"
    )


if __name__ == "__main__":
    sys.exit(main())
