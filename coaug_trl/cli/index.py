"""`coaug index`."""

import argparse

from ..utils.terminal import say, show
from .options import add_augmentations, add_collection, add_output, add_retriever, augmented_and_retriever


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("index", help="index a collection, with or without augmentations, to search it")
    add_collection(parser, None)
    add_retriever(parser)
    add_augmentations(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the index")
    add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..data.collection import Collection
    from ..data.sources import open_source
    from ..serving.index import SearchIndex, refuse_other_content

    refuse_other_content(options.output)  # rather now than after the work
    split = options.split or open_source(options.collection).splits[0]
    collection = Collection.load(options.collection, split)
    say(collection.summary())
    augmented, retriever = augmented_and_retriever(options, collection, ("document",))
    index = SearchIndex.build(collection, augmented, retriever, options.output)
    show(
        index.manifest | {"folder": options.output},
        f"{len(collection.corpus):,} documents indexed, {'with' if augmented else 'without'} augmentations; "
        f"{options.output}",
    )
