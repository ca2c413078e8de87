"""`coaug augment`, and what `accelerate launch scripts/augment.py` runs."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import InputError
from ..utils.terminal import say, show
from .options import add_collection, add_output, generation_settings, sides


if TYPE_CHECKING:
    from ..augmentation.augmenter import Augmenter


UNTRAINED = "for a model that was not trained with coaug; default: {}"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "augment",
        help="augment queries, documents or both with a policy",
        description="Augments the judged queries of a split, all documents, or both. The same command goes on after an "
        "interruption, and generates only for texts that are new or have changed. Under accelerate launch "
        "(scripts/augment.py) each process augments its share, on its own GPU; all must see the folder DIR.",
    )
    parser.add_argument("--model", required=True, help="policy or any causal language model: a folder or a Hub id")
    parser.add_argument("--revision", help="revision of the model on the Hub")
    add_collection(parser)
    parser.add_argument(
        "--side", choices=["query", "document", "both"], help="default: what the policy was trained on, else both"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the augmentations")
    parser.add_argument("--retriever", choices=["bm25", "dense"], help=UNTRAINED.format("bm25"))
    parser.add_argument("--prompt_set", metavar="FILE", help=UNTRAINED.format("the package's"))
    parser.add_argument("--max_new_tokens", type=int, help=UNTRAINED.format("512"))
    _add_engine(parser)
    parser.add_argument(
        "--retry_incomplete",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="TIMES",
        help="try incomplete answers again, by sampling, so often in all; without a number once",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="estimate tokens, time and disk from a sample, and write nothing"
    )
    add_output(parser)
    parser.set_defaults(run=run, resumes=True)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", choices=["vllm", "transformers"], help="what generates; default: vllm where installed"
    )
    parser.add_argument(
        "--server", metavar="URL", help="server with the OpenAI protocol that generates instead, such as vllm serve M"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="texts generated for at once by transformers; default: 32"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights, for vllm and transformers; default: as they are saved",
    )


def run(options: argparse.Namespace) -> None:
    from ..augmentation.engines.base import num_processes, process_index
    from ..augmentation.folder import MANIFEST, describe_side
    from ..data.collection import Collection

    if not 0 <= options.retry_incomplete <= 1000:
        raise InputError(f"--retry_incomplete is {options.retry_incomplete}; use 0 to 1000.")
    if options.server and options.engine:
        raise InputError("--server and --engine are both given, and only one of them can generate; leave one out.")
    main = process_index() == 0
    collection = Collection.load(options.collection, options.split, stream=True)
    if main:
        say(collection.summary())
    augmenter = _augmenter(options)
    chosen = sides(options.side) if options.side else augmenter.settings.sides
    if options.dry_run:
        if main:
            estimates = {
                side: augmenter.estimate(collection, options.output, side, options.retry_incomplete) for side in chosen
            }
            content = {side: asdict(estimate) for side, estimate in estimates.items()}
            show(content, "\n".join(f"{side}: {estimate}" for side, estimate in estimates.items()))
        return
    manifest = augmenter.augment_collection(collection, options.output, chosen, options.retry_incomplete)
    if not main:
        return
    lines = [describe_side(side, counts) for side, counts in manifest["sides"].items()]
    shares = f" by process 1 of {num_processes()}" * (num_processes() > 1)
    lines += [f"{side}{shares}: {throughput}" for side, throughput in augmenter.throughput.items()]
    throughput = {side: asdict(throughput) for side, throughput in augmenter.throughput.items()}
    show(
        manifest | {"folder": options.output, "throughput": throughput},
        "\n".join([*lines, str(Path(options.output) / MANIFEST)]),
    )


def _augmenter(options: argparse.Namespace) -> "Augmenter":
    from ..augmentation.augmenter import Augmenter
    from ..augmentation.engines.base import best_engine
    from ..policy.download import policy_folder
    from ..policy.prompts import PromptSet
    from ..policy.settings import PolicySettings

    trained = PolicySettings.load(policy_folder(options.model, options.revision))
    prompt_set = PromptSet.load(options.prompt_set) if options.prompt_set else None
    generation = generation_settings(options)
    if trained and options.retriever not in (None, trained.retriever.get("retriever")):
        theirs = trained.retriever.get("retriever", "none")
        raise InputError(
            f"--retriever is {options.retriever}, and {options.model} is a policy for {theirs}; leave it out."
        )
    if trained is None:
        prompt_set = prompt_set or PromptSet.default("dense" if options.retriever == "dense" else "sparse")
    return Augmenter.from_pretrained(
        options.model,
        prompt_set,
        generation,
        batch_size=options.batch_size,
        revision=options.revision,
        engine=options.engine or best_engine(),
        server=options.server,
        dtype=options.dtype,
    )
