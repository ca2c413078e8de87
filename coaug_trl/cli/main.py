"""The `coaug` command."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

from .. import __version__
from ..utils import terminal
from ..utils.errors import InputError, TrainingStopped
from . import analyze, augment, baselines, compare, demo, evaluate, index, push, report, search, train


COMMANDS = (train, augment, index, search, evaluate, baselines, compare, push, report, demo, analyze)


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a `coaug` command.

    Args:
        arguments: Command line; defaults to that of the process.

    Returns: exit code: 0, 1 for training that stopped itself, 2 for bad input, 130 when interrupted, 141 when nobody
        reads what it prints.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:  # its options are those of three dataclasses, which TRL's parser reads
        terminal.set_up("--quiet" in arguments, "--json" in arguments)
        others = [argument for argument in arguments[1:] if argument not in ("--quiet", "--json")]
        return run_command(lambda: train.run(others), resumes=True)
    parser = make_parser()
    options, others = parser.parse_known_args(arguments)
    if others and "recipe_arguments" not in options:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.recipe_arguments = others  # fields of a recipe, for TRL's parser
    terminal.set_up(options.quiet, options.json)
    return run_command(lambda: options.run(options), options.resumes)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command but `coaug train`, whose options TRL's parser reads."""
    parser = argparse.ArgumentParser(
        prog="coaug", description="Teach a language model to augment queries and documents, and search with it."
    )
    parser.add_argument("--version", action="version", version=f"coaug {__version__}")
    parser.set_defaults(resumes=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
