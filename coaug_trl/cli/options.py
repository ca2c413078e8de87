"""Options that several commands share, and what these commands make of them."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..utils.errors import InputError
from ..utils.terminal import note


# Everything heavier is imported by the function that needs it, so that `coaug --help` answers at once.
if TYPE_CHECKING:
    from ir_measures import Measure

    from ..augmentation.folder import AugmentedCollection
    from ..data.collection import Collection
    from ..policy.settings import GenerationSettings, PolicySettings
    from ..retrieval import Retriever


def add_collection(parser: argparse.ArgumentParser, split: str | None = "test") -> None:
    parser.add_argument(
        "--collection", required=True, help="BEIR folder, Hub id, irds:NAME for ir_datasets, or vocabulary-gap"
    )
    default = split or "the first, since every split has the same documents"
    parser.add_argument("--split", default=split, help=f"split whose queries are meant; default: {default}")


def add_retriever(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--retriever", choices=["bm25", "dense"], default="bm25", help="default: bm25")
    parser.add_argument("--fields", choices=["flat", "best"], help="BM25: title and text as one field or two")
    parser.add_argument("--k1", type=float, help="BM25; default: 1.2")
    parser.add_argument("--b", type=float, help="BM25; default: 0.75")
    parser.add_argument("--language", help="BM25: Snowball stemmer; default: english")
    parser.add_argument("--encoder", help="dense: sentence-transformers model; default: BAAI/bge-base-en-v1.5")
    parser.add_argument("--embedding_cache", metavar="DIR", help="dense: where embeddings are kept; default: nowhere")


def add_augmentations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--augmentations", metavar="DIR", help="made by coaug augment: a folder or a Hub id; default: none"
    )


def add_run(parser: argparse.ArgumentParser) -> None:
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


def add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=["table", "markdown", "latex"], default="table", help="of the tables; default: table"
    )


def add_output(parser: argparse.ArgumentParser, as_json: str = "print the result as a JSON object") -> None:
    parser.add_argument("--quiet", action="store_true", help="print the result alone: no progress, no comments")
    parser.add_argument("--json", action="store_true", help=as_json)


def sides(side: str) -> tuple[str, ...]:
    """The sides that `--side` means."""
    return ("query", "document") if side == "both" else (side,)


def generation_settings(options: argparse.Namespace) -> "GenerationSettings | None":
    """The generation settings given for an untrained model, if any."""
    from ..policy.settings import GenerationSettings

    return GenerationSettings(options.max_new_tokens) if options.max_new_tokens is not None else None


def augmented_and_retriever(
    options: argparse.Namespace, collection: "Collection", sides: tuple[str, ...]
) -> tuple["AugmentedCollection | None", "Retriever"]:
    """What `index` and `evaluate` work with, refused where it does not belong together."""
    from ..augmentation.folder import AugmentedCollection

    if not options.augmentations:
        return None, chosen_retriever(options, None, "")
    augmented = AugmentedCollection.load(options.augmentations, sides)
    retriever = chosen_retriever(options, augmented.settings, f"{options.augmentations} was made by a policy")
    augmented.prompt_set.check_kind(retriever.kind, options.augmentations)
    if augmented.manifest["collection"] != collection.name:
        raise InputError(
            f"{options.augmentations} belongs to the collection {augmented.manifest['collection']}, not to "
            f"{collection.name}."
        )
    return augmented, retriever


def chosen_retriever(options: argparse.Namespace, trained: "PolicySettings | None", policy: str) -> "Retriever":
    """The retriever of the options; refused where it is not the one that the policy was trained with."""
    from ..retrieval import make_retriever

    given = {name: vars(options)[name] for name in ("fields", "k1", "b", "language")} | {"model": options.encoder}
    given = {name: value for name, value in given.items() if value is not None}
    # What the policy was trained for is the default, and nothing else is accepted, but for where its encoder lies.
    trained_with = trained.retriever if trained else {}
    settings = trained_with | {"retriever": options.retriever} | given
    if trained:
        trained.refuse_mismatch(
            f"{policy} trained for {trained_with}",
            ("the policy", "these options"),
            "leave the retriever's settings out, use the --retriever it was trained for, or augment with an untrained "
            "model",
            retriever=settings,
        )
    del settings["retriever"]
    if options.embedding_cache:
        settings["cache_dir"] = options.embedding_cache
    return make_retriever(options.retriever, **settings)


def note_depth(measures: dict["Measure", str], k: int, collection: "Collection") -> None:
    """Notes which measures look deeper than the run goes."""
    too_deep = [
        name
        for measure, name in measures.items()
        if k < measure.params.get("cutoff", 0) and k < len(collection.corpus)
    ]
    if too_deep:
        note(f"{', '.join(too_deep)} would need more than the {k:,} hits of --k")


def note_all(texts: Iterable[str]) -> None:
    for text in texts:
        note(text)
