"""`coaug compare`."""

import argparse

from ..utils.terminal import show
from .options import add_format, add_output, note_all


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compare", help="test evaluations against each other, pair by pair")
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="evaluation folders, the baseline first")
    parser.add_argument(
        "--measures", nargs="+", metavar="MEASURE", help="such as nDCG@10; default: those in all folders"
    )
    add_format(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..evaluation.comparison import compare_folders

    comparison = compare_folders(options.folders, options.measures)
    note_all(comparison.notes)
    show(comparison.content(), comparison.render(options.format))
