"""`coaug report`."""

import argparse

from ..utils.terminal import show
from .options import add_output, note_all


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="write what a run was, what happened in it and what came of it as a page",
        description="Writes report.html, one self-contained page, and report.md with the same numbers: what was "
        "trained, training curves, evaluations and their significance, queries that gained and lost, the words of "
        "queries and documents, case studies, and cost. What the run lacks is left out, with the command that makes "
        "it.",
    )
    parser.add_argument("run_dir", metavar="RUN", help="output_dir of a training")
    parser.add_argument(
        "--evaluations",
        nargs="+",
        default=[],
        metavar="DIR",
        help="evaluation folders, or folders of them; default: those beneath RUN, which are always taken",
    )
    parser.add_argument(
        "--augmentations",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders made by coaug augment, or folders of them; default: as for --evaluations",
    )
    parser.add_argument(
        "--collection",
        help="where the collection is, for the words of its texts; default: its name, if not a folder's",
    )
    parser.add_argument("--output", metavar="DIR", help="where to write; default: RUN")
    add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..publishing.pages import save_report
    from ..publishing.report import make_report

    made = make_report(options.run_dir, options.evaluations, options.augmentations, options.collection)
    paths = list(map(str, save_report(made, options.output or options.run_dir)))
    note_all(made.notes)
    lines = [*made.headline, *(f"{hint.text} {hint.command}" for hint in made.hints), ", ".join(paths)]
    show({"headline": made.headline, "files": paths}, "\n".join(lines))
