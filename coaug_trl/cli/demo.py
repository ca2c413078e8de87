"""`coaug demo`."""

import argparse
import sys

from ..utils.terminal import say, show
from .options import add_output


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="serve a page that searches an index with and without augmentation",
        description="Serves a web page: what a query finds as it is on the documents as they are, beside what it finds "
        "augmented on the index. Nothing is sent anywhere. Ctrl-C ends it.",
    )
    parser.add_argument("--index", required=True, metavar="DIR", help="folder made by coaug index, or its Hub id")
    parser.add_argument("--model", help="policy that augments the queries: a folder or a Hub id; default: none")
    parser.add_argument("--collection", help="the collection that is indexed, for its judged queries; default: none")
    parser.add_argument("--split", default="test", help="split of the judged queries; default: test")
    parser.add_argument(
        "--plain_index",
        metavar="DIR",
        help="index of the documents as they are; default: for BM25 one built in memory, for dense none",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    add_output(parser, "print the address as a JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..serving.demo import Demo, JudgedQueries, check_address, check_model, import_gradio
    from ..serving.index import SearchIndex

    check_address(options.host, options.port)
    if options.model:
        check_model(options.model)
    import_gradio()  # rather now than after the loading
    index = SearchIndex.load(options.index)
    judged = JudgedQueries.load(options.collection, options.split, index) if options.collection else None
    page = Demo.load(index, options.model, judged, options.plain_index)
    address = page.start(options.host, options.port)
    show({"url": address}, address)
    say("Ctrl-C ends the demo.")
    sys.stdout.flush()  # into a pipe, too, before the long wait
    page.wait()
