"""`coaug evaluate`."""

import argparse

from ..utils.terminal import say, show
from .options import (
    add_augmentations,
    add_collection,
    add_output,
    add_retriever,
    add_run,
    augmented_and_retriever,
    note_depth,
    sides,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="retrieve and measure, with or without augmentations")
    add_collection(parser)
    add_retriever(parser)
    add_augmentations(parser)
    parser.add_argument("--side", choices=["query", "document", "both"], default="both", help="side to augment")
    add_run(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the evaluation")
    add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..augmentation.folder import compose
    from ..data.collection import Collection
    from ..evaluation.folder import evaluation_manifest, judged_texts, save_evaluation
    from ..evaluation.measures import MEASURES, parse_measures
    from ..retrieval.base import check_depth, retrieve

    measures = parse_measures(options.measures or MEASURES)
    check_depth(options.k)
    collection = Collection.load(options.collection, options.split)
    say(collection.summary())
    augmented, retriever = augmented_and_retriever(options, collection, sides(options.side))
    queries, documents = compose(collection, augmented, retriever)
    retriever.index(documents)
    run = retrieve(retriever, queries, options.k, options.ignore_identical_ids)
    manifest = evaluation_manifest(
        collection, augmented, retriever.config, queries, documents, options.k, options.ignore_identical_ids
    )
    texts = judged_texts(collection, augmented.answers if augmented else None)
    metrics = save_evaluation(options.output, run, collection.qrels, manifest, measures.values(), texts)
    note_depth(measures, options.k, collection)
    show(
        metrics | {"folder": options.output},
        f"{_means(options.output, run)}\n"
        f"over {metrics['num_queries']:,} judged queries, of which {metrics['num_queries_without_hits']:,} found "
        f"nothing and count 0; {options.output}",
    )


def _means(folder: str, run: dict[str, dict[str, float]]) -> str:
    """The means of an evaluation, and those that leave out queries without hits where there are any."""
    from statistics import fmean

    from ..evaluation.folder import load_evaluation

    evaluation = load_evaluation(folder)
    with_hits = [values for query_id, values in evaluation.per_query.items() if run.get(query_id)]
    width = max(map(len, evaluation.measures))
    lines = []
    for name in evaluation.measures:
        line = f"{name:>{width}}  {evaluation.metrics[name]:.4f}"
        if 0 < len(with_hits) < len(evaluation.per_query):
            mean = fmean(values[name] for values in with_hits)
            line += f"   ({mean:.4f} over the {len(with_hits):,} queries with hits, as BEIR averages)"
        lines.append(line)
    return "\n".join(lines)
