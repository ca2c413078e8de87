"""`coaug baselines`."""

import argparse
from pathlib import Path

from ..utils.terminal import say, show
from .options import (
    add_collection,
    add_format,
    add_output,
    add_retriever,
    add_run,
    chosen_retriever,
    generation_settings,
    note_all,
    note_depth,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "baselines",
        help="evaluate and compare the field's expansion methods with one model",
        description="Evaluates expansion methods with one language model, and RM3, on the same collection with the "
        "same retriever, and tests them against each other. Systems: none, untrained-query, untrained-document, "
        "untrained-both (the policy's prompts, else the package's), query2doc, hyde (dense only), pseudo-document, "
        "doc2query, rm3 (BM25 only), trained (with --policy). The same command goes on after an interruption.",
    )
    add_collection(parser)
    parser.add_argument("--model", help="language model of all prompts: a folder or a Hub id")
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument("--policy", metavar="RUN", help="trained policy, the system trained: a folder or a Hub id")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="systems to run; default: all")
    add_retriever(parser)
    parser.add_argument("--max_new_tokens", type=int, help="longest answer of the model, in tokens; default: 512")
    parser.add_argument("--batch_size", type=int, default=32, help="texts generated for at once; default: 32")
    add_run(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of augmentations and evaluations")
    add_format(parser)
    add_output(parser)
    parser.set_defaults(run=run, resumes=True)


def run(options: argparse.Namespace) -> None:
    from ..data.collection import Collection
    from ..evaluation.baselines import COMPARISON_FILE, Models, choose_systems, run_baselines
    from ..evaluation.measures import MEASURES, parse_measures
    from ..policy.download import policy_folder
    from ..policy.settings import PolicySettings
    from ..retrieval.base import check_depth

    measures = parse_measures(options.measures or MEASURES)
    check_depth(options.k)
    generation = generation_settings(options)
    trained = PolicySettings.load(policy_folder(options.policy)) if options.policy else None
    retriever = chosen_retriever(options, trained, f"{options.policy} is a policy")
    systems = choose_systems(retriever, options.model, options.policy, options.only)
    collection = Collection.load(options.collection, options.split)
    say(collection.summary())
    comparison = run_baselines(
        systems,
        collection,
        retriever,
        options.output,
        Models(options.model, options.policy, generation, options.batch_size, options.revision),
        options.k,
        options.ignore_identical_ids,
        measures.values(),
    )
    note_depth(measures, options.k, collection)
    if comparison:
        note_all(comparison.notes)
        show(comparison.content(), f"\n{comparison.render_summary(options.format)}\n")
        say(f"all pairs, measures and examples: {Path(options.output) / COMPARISON_FILE}")
