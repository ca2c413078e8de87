"""The `coaug` command."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

from .. import __version__
from ..utils import terminal
from ..utils.errors import InputError, TrainingStopped


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a `coaug` command.

    Args:
        arguments (`list[str]`, *optional*):
            Command line; defaults to that of the process.

    Returns:
        `int`: exit code: 0, 1 for training that stopped itself, 2 for bad input, 130 when interrupted, 141 when nobody reads
        what it prints.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:  # its options are those of three dataclasses, which TRL's parser reads
        terminal.set_up("--quiet" in arguments, "--json" in arguments)
        from .train import main as train

        others = [argument for argument in arguments[1:] if argument not in ("--quiet", "--json")]
        return run_command(lambda: train(others), resumes=True)
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others and not hasattr(options, "recipe_arguments"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.recipe_arguments = others  # fields of a recipe, for TRL's parser
    terminal.set_up(options.quiet, options.json)
    from . import commands

    return run_command(
        lambda: getattr(commands, options.run)(options), resumes=options.run in ("augment", "baselines", "push")
    )


def run_command(command: Callable[[], None], resumes: bool = False) -> int:
    """Runs a command; bad input and interruption end in one line on standard error rather than a traceback."""
    try:
        command()
        sys.stdout.flush()  # a pipe that is closed says so now
    except InputError as error:
        # libraries put line breaks into the messages that ours quote
        terminal.error(" ".join(line.strip() for line in str(error).splitlines()))
        return 2
    except BrokenPipeError:  # its reader has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.filename is None and not full:  # not about a file the user named
            raise
        terminal.error(f"{error.filename or 'a file could not be written'}: {error.strerror or error}")
        return 2
    except TrainingStopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:  # all processes stop together, and one of them speaks
            print(stop, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        more = ": the same command goes on from what has been saved, if anything has" * resumes
        print(f"interrupted{more}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coaug", description="Teach a language model to augment queries and documents, and search with it."
    )
    parser.add_argument("--version", action="version", version=f"coaug {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    commands.add_parser("train", help="train a policy; see coaug train --help", add_help=False)

    augment = commands.add_parser(
        "augment",
        help="augment queries, documents or both with a policy",
        description="Augments the judged queries of a split, all documents, or both. The same command goes on after an "
        "interruption, and generates only for texts that are new or have changed. Under accelerate launch "
        "(scripts/augment.py) each process augments its share, on its own GPU; all must see the folder DIR.",
    )
    augment.add_argument("--model", required=True, help="policy or any causal language model: a folder or a Hub id")
    augment.add_argument("--revision", help="revision of the model on the Hub")
    _add_collection(augment, "test")
    augment.add_argument(
        "--side", choices=["query", "document", "both"], help="default: what the policy was trained on, else both"
    )
    augment.add_argument("--output", required=True, metavar="DIR", help="folder of the augmentations")
    augment.add_argument("--retriever", choices=["bm25", "dense"], help=_UNTRAINED.format("bm25"))
    augment.add_argument("--prompt_set", metavar="FILE", help=_UNTRAINED.format("the package's"))
    augment.add_argument("--max_new_tokens", type=int, help=_UNTRAINED.format("512"))
    augment.add_argument("--repetition_penalty", type=float, help=_UNTRAINED.format("1.2"))
    augment.add_argument(
        "--engine", choices=["vllm", "transformers"], help="what generates; default: vllm where installed"
    )
    augment.add_argument(
        "--server", metavar="URL", help="server with the OpenAI protocol that generates instead, such as vllm serve M"
    )
    augment.add_argument(
        "--server_concurrency", type=int, default=64, metavar="N", help="requests to the server at once; default: 64"
    )
    augment.add_argument(
        "--batch_size", type=int, default=32, help="texts generated for at once by transformers; default: 32"
    )
    augment.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights, for vllm and transformers; default: as they are saved",
    )
    augment.add_argument(
        "--gpu_memory_utilization", type=float, metavar="SHARE", help="of the GPU's memory, for vllm; default: 0.9"
    )
    augment.add_argument(
        "--retry_incomplete",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="TIMES",
        help="try incomplete answers again, by sampling, so often in all; without a number once",
    )
    augment.add_argument(
        "--dry_run", action="store_true", help="estimate tokens, time and disk from a sample, and write nothing"
    )
    _add_output(augment)
    augment.set_defaults(run="augment")

    index = commands.add_parser("index", help="index a collection, with or without augmentations, to search it")
    _add_collection(index, None)
    _add_retriever(index)
    index.add_argument(
        "--augmentations", metavar="DIR", help="made by coaug augment: a folder or a Hub id; default: none"
    )
    index.add_argument("--output", required=True, metavar="DIR", help="folder of the index")
    _add_output(index)
    index.set_defaults(run="index")

    search = commands.add_parser("search", help="search an index, with or without a policy that augments the queries")
    search.add_argument("--index", required=True, metavar="DIR", help="folder made by coaug index, or a Hub id")
    search.add_argument("--revision", help="revision of the index on the Hub")
    search.add_argument("--model", help="policy that augments the queries: a folder or a Hub id; default: none")
    search.add_argument("--k", type=int, default=10, help="hits for a query; default: 10")
    _add_output(search, "print a JSON object for each query, a line each")
    search.add_argument(
        "--timing", action="store_true", help="search for one query at a time, and print how long its parts take"
    )
    search.add_argument("queries", nargs="+", metavar="QUERY", help="text to search for")
    search.set_defaults(run="search")

    evaluate = commands.add_parser("evaluate", help="retrieve and measure, with or without augmentations")
    _add_collection(evaluate, "test")
    _add_retriever(evaluate)
    evaluate.add_argument(
        "--augmentations", metavar="DIR", help="made by coaug augment: a folder or a Hub id; default: none"
    )
    evaluate.add_argument("--side", choices=["query", "document", "both"], default="both", help="side to augment")
    _add_run(evaluate)
    evaluate.add_argument("--output", required=True, metavar="DIR", help="folder of the evaluation")
    _add_output(evaluate)
    evaluate.set_defaults(run="evaluate")

    baselines = commands.add_parser(
        "baselines",
        help="evaluate and compare the field's expansion methods with one model",
        description="Evaluates expansion methods with one language model, and RM3, on the same collection with the "
        "same retriever, and tests them against each other. Systems: none, untrained-query, untrained-document, "
        "untrained-both (the policy's prompts, else the package's), query2doc, hyde (dense only), pseudo-document, "
        "doc2query, rm3 (BM25 only), trained (with --policy). The same command goes on after an interruption.",
    )
    _add_collection(baselines, "test")
    baselines.add_argument("--model", help="language model of all prompts: a folder or a Hub id")
    baselines.add_argument("--revision", help="revision of the model on the Hub")
    baselines.add_argument("--policy", metavar="RUN", help="trained policy, the system trained: a folder or a Hub id")
    baselines.add_argument("--only", nargs="+", default=[], metavar="NAME", help="systems to run; default: all")
    _add_retriever(baselines)
    baselines.add_argument("--max_new_tokens", type=int, help="longest answer of the model, in tokens; default: 512")
    baselines.add_argument("--repetition_penalty", type=float, help="of the model; default: 1.2")
    baselines.add_argument("--batch_size", type=int, default=32, help="texts generated for at once; default: 32")
    _add_run(baselines)
    baselines.add_argument("--output", required=True, metavar="DIR", help="folder of augmentations and evaluations")
    _add_format(baselines)
    _add_output(baselines)
    baselines.set_defaults(run="baselines")

    compare = commands.add_parser("compare", help="test evaluations against each other, pair by pair")
    compare.add_argument("folders", nargs="+", metavar="RUN_DIR", help="evaluation folders, the baseline first")
    compare.add_argument(
        "--measures", nargs="+", metavar="MEASURE", help="such as nDCG@10; default: those in all folders"
    )
    _add_format(compare)
    _add_output(compare)
    compare.set_defaults(run="compare")

    push = commands.add_parser(
        "push",
        help="publish a run, augmentations or an index on the Hugging Face Hub",
        description="Publishes FOLDER as what it holds: a trained policy (a model), augmentations (a dataset) or an "
        "index (a model, as bm25s has them), with a card, and without checkpoints, pickles and paths of this machine. "
        "The same command goes on after a failure, and updates what is there.",
    )
    push.add_argument("folder", metavar="FOLDER", help="output_dir of a training, or what augment or index made")
    push.add_argument("--repo_id", metavar="USER/NAME", help="repository, made if it is not there")
    push.add_argument("--private", action="store_true", help="nobody else may see the repository")
    push.add_argument("--revision", metavar="BRANCH", help="branch, made if it is not there; default: main")
    push.add_argument(
        "--evaluations", nargs="+", default=[], metavar="DIR", help="of a run: evaluations that are not beneath it"
    )
    push.add_argument("--collection", help="of augmentations: their collection, whose texts are published with them")
    push.add_argument("--split", default="test", help="its split; default: test")
    push.add_argument("--space", metavar="DIR", help="of an index: write a Space that searches it, and push that")
    push.add_argument("--model", help="of a Space: policy that augments the queries, a folder or a Hub id")
    push.add_argument("--commit_message", default="Upload by coaug push", help="default: Upload by coaug push")
    push.add_argument("--dry_run", action="store_true", help="list the files and print the card, without the Hub")
    _add_output(push)
    push.set_defaults(run="push")

    report = commands.add_parser(
        "report",
        help="write what a run was, what happened in it and what came of it as a page",
        description="Writes report.html, one self-contained page, and report.md with the same numbers: what was "
        "trained, training curves, evaluations and their significance, queries that gained and lost, the words of "
        "queries and documents, case studies, and cost. What the run lacks is left out, with the command that makes "
        "it.",
    )
    report.add_argument("run_dir", metavar="RUN", help="output_dir of a training")
    report.add_argument(
        "--evaluations",
        nargs="+",
        default=[],
        metavar="DIR",
        help="evaluation folders, or folders of them; default: those beneath RUN, which are always taken",
    )
    report.add_argument(
        "--augmentations",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders made by coaug augment, or folders of them; default: as for --evaluations",
    )
    report.add_argument(
        "--collection",
        help="where the collection is, for the words of its texts; default: its name, if not a folder's",
    )
    report.add_argument("--output", metavar="DIR", help="where to write; default: RUN")
    _add_output(report)
    report.set_defaults(run="report")

    demo = commands.add_parser(
        "demo",
        help="serve a page that searches an index with and without augmentation",
        description="Serves a web page: what a query finds as it is on the documents as they are, beside what it finds "
        "augmented on the index. Nothing is sent anywhere. Ctrl-C ends it.",
    )
    demo.add_argument("--index", required=True, metavar="DIR", help="folder made by coaug index, or its Hub id")
    demo.add_argument("--model", help="policy that augments the queries: a folder or a Hub id; default: none")
    demo.add_argument("--collection", help="the collection that is indexed, for its judged queries; default: none")
    demo.add_argument("--split", default="test", help="split of the judged queries; default: test")
    demo.add_argument(
        "--plain_index",
        metavar="DIR",
        help="index of the documents as they are; default: for BM25 one built in memory, for dense none",
    )
    demo.add_argument("--host", default="127.0.0.1", help="address to serve at; default: 127.0.0.1, this machine only")
    demo.add_argument("--port", type=int, default=7860, help="default: 7860")
    _add_output(demo, "print the address as a JSON object")
    demo.set_defaults(run="demo")

    _add_analyze(commands.add_parser("analyze", help="the analyses of the paper: words, advantages, sampled rewards"))
    return parser


_UNTRAINED = "for a model that was not trained with coaug; default: {}"


def _add_collection(parser: argparse.ArgumentParser, split: str | None) -> None:
    parser.add_argument(
        "--collection", required=True, help="BEIR folder, Hub id, irds:NAME for ir_datasets, or vocabulary-gap"
    )
    default = split or "the first, since every split has the same documents"
    parser.add_argument("--split", default=split, help=f"split whose queries are meant; default: {default}")


def _add_retriever(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--retriever", choices=["bm25", "dense"], default="bm25", help="default: bm25")
    parser.add_argument("--fields", choices=["flat", "best"], help="BM25: title and text as one field or two")
    parser.add_argument("--k1", type=float, help="BM25; default: 1.2")
    parser.add_argument("--b", type=float, help="BM25; default: 0.75")
    parser.add_argument("--language", help="BM25: Snowball stemmer; default: english")
    parser.add_argument("--encoder", help="dense: sentence-transformers model; default: BAAI/bge-base-en-v1.5")
    parser.add_argument("--embedding_cache", metavar="DIR", help="dense: where embeddings are kept; default: nowhere")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=int, default=1000, help="depth of the run; default: 1000")
    parser.add_argument(
        "--measures",
        nargs="+",
        metavar="MEASURE",
        help="any of ir-measures, such as P(rel=2)@5; default: nDCG@10 nDCG@100 R@100 RR@10 AP",
    )
    parser.add_argument(
        "--ignore_identical_ids",
        action="store_true",
        help="leave out the document with the id of the query, where queries are documents: ArguAna, Quora",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=["table", "markdown", "latex"], default="table", help="of the tables; default: table"
    )


def _add_output(parser: argparse.ArgumentParser, as_json: str = "print the result as a JSON object") -> None:
    parser.add_argument("--quiet", action="store_true", help="print the result alone: no progress, no comments")
    parser.add_argument("--json", action="store_true", help=as_json)


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    analyses = parser.add_subparsers(title="analyses", required=True, metavar="ANALYSIS")

    alignment = analyses.add_parser(
        "alignment",
        help="cross-entropy H(Q,D) of the words of queries and documents",
        description="Cross-entropy H(Q,D) of the words of the judged queries relative to those of all documents, in "
        "nats a word, with and without augmentations. Words are those BM25 reads: lower case, no stop words, stemmed. "
        "The paper (Table 3) does not state base, smoothing and tokenizer, so its values cannot be compared with these.",
    )
    _add_collection(alignment, "test")
    alignment.add_argument(
        "--augmentations", nargs="+", required=True, metavar="DIR", help="folders made by coaug augment"
    )
    alignment.add_argument(
        "--smoothing", type=float, default=1.0, help="added to the documents' count of each word; default: 1"
    )
    alignment.add_argument("--language", default="english", help="Snowball stemmer; default: english")
    _add_output(alignment)
    alignment.set_defaults(run="analyze_alignment")

    advantages = analyses.add_parser(
        "advantages",
        usage="coaug analyze advantages [-h] [--threshold STD] [--json] "
        "(--run RUN_DIR | --config RECIPE [--field value ...])",
        help="what each normalisation does to the rewards of a text's rollouts",
        description="Shares of texts whose rollouts get their variance amplified, or advantages of one sign, under "
        "three normalisations of the joint reward (the paper's Table 7): from the completions a run logged, or from "
        "one generation batch of a recipe, without training.",
        allow_abbrev=False,
    )
    source = advantages.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", dest="run_dir", metavar="RUN_DIR", help="run trained with log_completions")
    source.add_argument("--config", metavar="RECIPE", help="recipe of coaug train; its fields may follow")
    advantages.add_argument(
        "--threshold", type=float, default=0.02, metavar="STD", help="of a small standard deviation; default: 0.02"
    )
    _add_output(advantages)
    advantages.set_defaults(run="analyze_advantages", recipe_arguments=[])

    reward = analyses.add_parser(
        "reward",
        help="error, variance and time of the sampled reward",
        description="Error, variance and time of the sampled reward against the exact one, on generated scores "
        "(the paper's section 3.3).",
    )
    reward.add_argument(
        "--pools", type=int, nargs="+", default=[15, 100, 480, 1000], help="documents; default: 15 100 480 1000"
    )
    reward.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[16, 64, 256, 512, 1024, 4096],
        help="draws of the sampled reward; default: 16 64 256 512 1024 4096",
    )
    reward.add_argument("--repeats", type=int, default=10, help="estimates with different draws; default: 10")
    reward.add_argument("--seed", type=int, default=0, help="seed of scores and draws; default: 0")
    reward.add_argument("--output", metavar="DIR", help="folder for reward_study.json and reward_study.png")
    _add_output(reward)
    reward.set_defaults(run="analyze_reward")


if __name__ == "__main__":
    sys.exit(main())
