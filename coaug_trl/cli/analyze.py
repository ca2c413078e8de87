"""`coaug analyze alignment`, `advantages` and `reward`."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import InputError
from ..utils.terminal import say, show
from .options import add_collection, add_output


if TYPE_CHECKING:
    from ..utils.tables import Table


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("analyze", help="the analyses of the paper: words, advantages, sampled rewards")
    analyses = parser.add_subparsers(title="analyses", required=True, metavar="ANALYSIS")
    _add_alignment(analyses)
    _add_advantages(analyses)
    _add_reward(analyses)


def _add_alignment(analyses: argparse._SubParsersAction) -> None:
    parser = analyses.add_parser(
        "alignment",
        help="cross-entropy H(Q,D) of the words of queries and documents",
        description="Cross-entropy H(Q,D) of the words of the judged queries relative to those of all documents, in "
        "nats a word, with and without augmentations. Words are those BM25 reads: lower case, no stop words, stemmed. "
        "The paper (Table 3) does not state base, smoothing and tokenizer, so its values cannot be compared with these.",
    )
    add_collection(parser)
    parser.add_argument(
        "--augmentations", nargs="+", required=True, metavar="DIR", help="folders made by coaug augment"
    )
    parser.add_argument("--language", default="english", help="Snowball stemmer; default: english")
    add_output(parser)
    parser.set_defaults(run=alignment)


def _add_advantages(analyses: argparse._SubParsersAction) -> None:
    parser = analyses.add_parser(
        "advantages",
        usage="coaug analyze advantages [-h] [--threshold STD] [--json] "
        "(--run RUN_DIR | --config RECIPE [--field value ...])",
        help="what each normalisation does to the rewards of a text's rollouts",
        description="Shares of texts whose rollouts get their variance amplified, or advantages of one sign, under "
        "three normalisations of the joint reward (the paper's Table 7): from the completions a run logged, or from "
        "one generation batch of a recipe, without training.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", dest="run_dir", metavar="RUN_DIR", help="run trained with log_completions")
    source.add_argument("--config", metavar="RECIPE", help="recipe of coaug train; its fields may follow")
    parser.add_argument(
        "--threshold", type=float, default=0.02, metavar="STD", help="of a small standard deviation; default: 0.02"
    )
    add_output(parser)
    parser.set_defaults(run=advantages, recipe_arguments=[])


def _add_reward(analyses: argparse._SubParsersAction) -> None:
    parser = analyses.add_parser(
        "reward",
        help="error, variance and time of the sampled reward",
        description="Error, variance and time of the sampled reward against the exact one, on generated scores "
        "(the paper's section 3.3).",
    )
    parser.add_argument(
        "--pools", type=int, nargs="+", default=[15, 100, 480, 1000], help="documents; default: 15 100 480 1000"
    )
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[16, 64, 256, 512, 1024, 4096],
        help="draws of the sampled reward; default: 16 64 256 512 1024 4096",
    )
    parser.add_argument("--repeats", type=int, default=10, help="estimates with different draws; default: 10")
    parser.add_argument("--seed", type=int, default=0, help="seed of scores and draws; default: 0")
    parser.add_argument("--output", metavar="DIR", help="folder for reward_study.json and reward_study.png")
    add_output(parser)
    parser.set_defaults(run=reward)


def alignment(options: argparse.Namespace) -> None:
    from ..data.collection import Collection
    from ..studies.alignment import alignment_table, measure_alignment

    smoothing = 1.0  # added to the documents' count of each word
    collection = Collection.load(options.collection, options.split)
    rows = measure_alignment(collection, options.augmentations, smoothing, options.language)
    settings = {
        "collection": collection.name,
        "split": collection.split,
        "unit": "nats",
        "smoothing": smoothing,
        "language": options.language,
    }
    title = (
        f"{collection.name} ({collection.split}): H(Q,D) in nats a word, {smoothing:g} added to the documents' "
        f"count of each word; words as BM25 reads them ({options.language}); unseen: query words in no document"
    )
    _show_analysis(settings, rows, alignment_table(rows, title))


def advantages(options: argparse.Namespace) -> None:
    from ..studies.advantages import anomalies_table, generate_rewards, measure_anomalies, read_rewards

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
    _show_analysis(settings, rows, anomalies_table(rows, title))


def _show_analysis(settings: dict[str, Any], rows: list[Any], table: "Table") -> None:
    show(settings | {"rows": [asdict(row) for row in rows]}, str(table))


def reward(options: argparse.Namespace) -> None:
    from ..studies.sampled_reward import errors_table, save_study, study_rewards
    from ..utils.charts import import_figure

    if options.output:  # rather now than after the work
        import_figure()
        Path(options.output).mkdir(parents=True, exist_ok=True)
    rows = study_rewards(options.pools, options.samples, options.repeats, options.seed)
    title = (
        f"Sampled against exact reward (NDCG@10), 5 rollouts a text, {options.repeats} repeats: mean and largest "
        "absolute error, variance of an estimate, median seconds for the pool"
    )
    settings = {"repeats": options.repeats, "seed": options.seed}
    _show_analysis(settings, rows, errors_table(rows, title))
    if options.output:
        save_study(rows, settings, options.output)
        say(f"{Path(options.output) / 'reward_study.json'}, {Path(options.output) / 'reward_study.png'}")
