"""`coaug search`."""

import argparse
import shutil
import time
from typing import TYPE_CHECKING, Any

from ..utils.errors import InputError
from ..utils.terminal import say, show, visible
from .options import add_output


if TYPE_CHECKING:
    from rich.text import Text

    from ..serving.index import Timing


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("search", help="search an index, with or without a policy that augments the queries")
    parser.add_argument("--index", required=True, metavar="DIR", help="folder made by coaug index, or a Hub id")
    parser.add_argument("--revision", help="revision of the index on the Hub")
    parser.add_argument("--model", help="policy that augments the queries: a folder or a Hub id; default: none")
    parser.add_argument("--k", type=int, default=10, help="hits for a query; default: 10")
    add_output(parser, "print a JSON object for each query, a line each")
    parser.add_argument(
        "--timing", action="store_true", help="search for one query at a time, and print how long its parts take"
    )
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="text to search for")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..retrieval.base import check_depth

    for query in options.queries:
        if not query.strip():
            raise InputError("A query is empty; write what to search for.")
        try:
            query.encode()
        except UnicodeEncodeError:  # how Python reads arguments that are not UTF-8
            raise InputError(f"The query {query!r} is not UTF-8; check the encoding of the terminal.") from None
    check_depth(options.k)
    from ..serving.index import SearchIndex

    start = time.perf_counter()
    index = SearchIndex.load(options.index, options.revision)
    augmenter = index.augmenter(options.model) if options.model else None
    if options.timing:
        index.search(options.queries[:1], options.k, augmenter)  # the first one loads what the others find loaded
        loading = time.perf_counter() - start
        results, timings = index.search_timed(options.queries, options.k, augmenter)
    else:
        results, timings = index.search(options.queries, options.k, augmenter), None
    for place, result in enumerate(results):
        seconds = {"seconds": timings[place]._asdict() | {"total": timings[place].total}} if timings else {}
        show(result._asdict() | seconds, _hits(*result), indent=None)
    if timings:
        say(_timings(loading, timings))


def _timings(loading: float, timings: list["Timing"]) -> str:
    from statistics import median

    import numpy as np

    parts = [[1000 * part for part in (*timing, timing.total)] for timing in timings]
    rows = {"query": parts[0]}
    if len(parts) > 1:
        rows = {
            "median": [median(column) for column in zip(*parts, strict=True)],
            "p95": np.percentile(parts, 95, axis=0),
        }
    lines = [
        f"loaded in {loading:.2f} s, a first query included; then, for one query at a time:",
        f"{'ms':>8}{'augment':>10}{'search':>10}{'total':>10}",
    ]
    lines += [f"{name:>8}" + "".join(f"{value:>10.1f}" for value in row) for name, row in rows.items()]
    return "\n".join(lines)


def _hits(query: str, answer: str | None, rows: list[dict[str, Any]]) -> "Text":
    """What a search found for one query, a line a hit, cut to the width of a terminal."""
    from rich.text import Text

    lines = [Text(query, "bold")]
    if answer is not None:
        lines.append(Text(f"  + {' '.join(answer.split())}" if answer else "  (nothing added)", "cyan"))
    if not rows:
        lines.append(Text("  nothing found"))
    width = max((len(row["_id"]) for row in rows), default=0)
    for row in rows:
        line = f"{row['rank']:>4}  {row['score']:>8.4f}  {row['_id']:<{width}}  "
        columns = max(shutil.get_terminal_size().columns - len(line), 20)
        title, text = (" ".join(visible(row[name]).split()) for name in ("title", "text"))
        shown = Text.assemble((title, "bold"), " | " if title and text else "", text)
        shown.truncate(columns, overflow="ellipsis")
        lines.append(Text(line) + shown)
    return Text("\n").join([*lines, Text("")])
