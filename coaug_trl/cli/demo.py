"""`coaug demo`."""

import argparse
import errno
import socket
import sys
from pathlib import Path

from ..policy.fingerprint import ADAPTER_FILE
from ..utils.errors import InputError
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
    from ..serving.demo import Demo, JudgedQueries, import_gradio
    from ..serving.index import SearchIndex

    _check_address(options.host, options.port)
    if options.model:
        _check_model(options.model)
    import_gradio()  # rather now than after the loading
    index = SearchIndex.load(options.index)
    judged = JudgedQueries.load(options.collection, options.split, index) if options.collection else None
    page = Demo.load(index, options.model, judged, options.plain_index)
    address = page.start(options.host, options.port)
    show({"url": address}, address)
    say("Ctrl-C ends the demo.")
    sys.stdout.flush()  # into a pipe, too, before the long wait
    page.wait()


def _check_model(model: str) -> None:
    """
    Looks whether the folder of a model is there, before anything is loaded that takes long; the Hub is not asked.

    Raises `InputError`: There is no such folder, or no model in it.
    """
    if Path(model).is_dir():
        if not any((Path(model) / name).is_file() for name in ("config.json", ADAPTER_FILE)):
            raise InputError(f"{model}: no model is in this folder; give one that coaug train wrote.")
    elif Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1:  # not a Hub id
        raise InputError(f"{model}: no such folder; give one that coaug train wrote.")


def _check_address(host: str, port: int) -> None:
    """
    Tries an address, before anything is loaded that takes long.

    Raises `InputError`: The port is taken, or this machine has no such address.
    """
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}; use 1 to 65535, such as 7860.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:  # also what a name that stands for no address raises
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"Port {port} of {host} is taken; choose another with --port.") from None
        raise InputError(
            f"{host}:{port} cannot be served: {error.strerror}; choose another --host or --port."
        ) from None
