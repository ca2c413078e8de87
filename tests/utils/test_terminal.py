"""Every command speaks alike: results on standard output, `--quiet` and `--json`, colour on a terminal alone."""

import argparse
import json
import os
import pty
import subprocess
import sys

import pytest

from coaug_trl.cli import main as cli
from coaug_trl.utils import terminal


def leaves(parser: argparse.ArgumentParser, name: str = "coaug"):
    """The commands that do something, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from leaves(below, f"{name} {command}")
            return
    yield name, parser


COMMANDS = [(name, parser) for name, parser in leaves(cli.make_parser()) if name != "coaug train"]


@pytest.mark.parametrize("parser", [parser for _, parser in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_every_command_can_be_quiet_and_speak_json(parser):
    options = {string for action in parser._actions for string in action.option_strings}
    assert {"--quiet", "--json"} <= options


@pytest.fixture(scope="module")
def evaluations(beir_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    for name, fields in (("flat", "flat"), ("best", "best")):
        command = ["evaluate", "--collection", str(beir_folder), "--fields", fields, "--output", str(folder / name)]
        assert cli.main(command) == 0
    return folder


def test_json_is_all_that_standard_output_holds(coaug, beir_folder, evaluations, tmp_path):
    commands = {
        "index": ("index", "--collection", beir_folder, "--output", tmp_path / "index"),
        "evaluate": ("evaluate", "--collection", beir_folder, "--output", tmp_path / "evaluation"),
        "compare": ("compare", evaluations / "flat", evaluations / "best"),
        "reward": ("analyze", "reward", "--pools", "15", "--samples", "16", "--repeats", "2"),
    }
    printed = {}
    for name, command in commands.items():
        code, out, errors = coaug(*command, "--json")
        assert code == 0, errors
        printed[name] = json.loads(out)
    assert printed["index"]["num_documents"] == 40
    assert printed["evaluate"] == json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) | {
        "folder": str(tmp_path / "evaluation")
    }
    assert printed["compare"]["names"] == ["flat", "best"]
    means = [json.loads((evaluations / name / "metrics.json").read_text())["nDCG@10"] for name in ("flat", "best")]
    assert printed["compare"]["means"]["nDCG@10"] == pytest.approx(means)
    assert len(printed["reward"]["rows"]) == 1


def test_json_goes_on_saying_what_goes_on_but_elsewhere(coaug, beir_folder, tmp_path):
    code, out, errors = coaug("evaluate", "--collection", beir_folder, "--output", tmp_path / "e", "--json")
    assert code == 0
    assert "40 documents" in errors and "40 documents" not in out


def test_quiet_leaves_the_result_alone(coaug, beir_folder, tmp_path):
    command = ("evaluate", "--collection", beir_folder, "--output", tmp_path / "evaluation")
    code, loud, _ = coaug(*command)
    assert code == 0
    code, out, errors = coaug(*command, "--quiet")
    assert (code, errors) == (0, "")
    assert "nDCG@10" in out
    assert "40 documents" in loud and "40 documents" not in out


def test_quiet_still_says_what_is_wrong(refused, tmp_path):
    assert "nothing" in refused("evaluate", "--collection", tmp_path / "nothing", "--output", tmp_path, "--quiet")


def test_a_search_prints_a_json_object_a_line(coaug, beir_folder, tmp_path):
    assert coaug("index", "--collection", beir_folder, "--output", tmp_path / "index")[0] == 0
    code, out, _ = coaug("search", "--index", tmp_path / "index", "--json", "--timing", "statins", "salt")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["query"] for row in rows] == ["statins", "salt"]
    assert rows[0]["hits"][0]["_id"].startswith("statins")


def test_numbers_that_json_has_no_word_for_become_null(capsys):
    terminal.set_up(as_json=True)
    try:
        terminal.show({"effect": float("inf"), "rows": [{"p": float("nan")}]}, "")
    finally:
        terminal.set_up()
    assert json.loads(capsys.readouterr().out) == {"effect": None, "rows": [{"p": None}]}


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(evaluations):
    command = [
        sys.executable,
        "-m",
        "coaug_trl.cli.main",
        "compare",
        str(evaluations / "flat"),
        str(evaluations / "best"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    assert b"Traceback" not in errors and b"BrokenPipe" not in errors
    assert process.wait() == 141


def run_on_terminal(arguments: list[str], **environment) -> str:
    """What a command prints where standard output and error are a terminal."""
    master, slave = pty.openpty()
    environment = {"TERM": "xterm-256color", **os.environ, **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "coaug_trl.cli.main", *arguments], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    printed = b""
    try:
        while chunk := os.read(master, 4096):
            printed += chunk
    except OSError:  # how Linux ends a pseudo-terminal
        pass
    process.wait()
    os.close(master)
    return printed.decode()


def test_colour_is_for_terminals(beir_folder, tmp_path):
    index = str(tmp_path / "index")
    assert cli.main(["index", "--collection", str(beir_folder), "--output", index]) == 0
    search = ["search", "--index", index, "statins"]
    assert "\x1b[1mstatins\x1b[0m" in run_on_terminal(search)
    assert "\x1b[1m" not in run_on_terminal(search, TERM="dumb")
    piped = subprocess.run([sys.executable, "-m", "coaug_trl.cli.main", *search], capture_output=True, text=True)
    assert piped.returncode == 0 and "\x1b" not in piped.stdout + piped.stderr
    missing = ["search", "--index", str(tmp_path / "missing"), "statins"]
    assert "\x1b[1;31merror:\x1b[0m" in run_on_terminal(missing)


def test_control_characters_of_documents_do_not_reach_the_terminal(coaug, tmp_path):
    (tmp_path / "qrels").mkdir()
    text = "statins \x1b[31mred\x07 and \x9b2J blank"
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "d1", "title": "a\x1b]0;t\x07", "text": text}) + "\n")
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "statins"}) + "\n")
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    assert coaug("index", "--collection", tmp_path, "--output", tmp_path / "index")[0] == 0
    code, out, _ = coaug("search", "--index", tmp_path / "index", "statins")
    assert code == 0 and "statins" in out and "red" in out
    assert not any(character in out for character in "\x1b\x07\x9b")
