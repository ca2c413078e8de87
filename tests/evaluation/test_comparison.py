import json
import re
import shutil
import sys
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coaug_trl.cli import main as cli
from coaug_trl.evaluation.comparison import LETTERS, compare_folders
from coaug_trl.evaluation.folder import load_evaluation, save_evaluation
from coaug_trl.evaluation.measures import MEASURES
from coaug_trl.evaluation.significance import effect_size, holm
from coaug_trl.utils.errors import InputError


NUM_QUERIES = 12  # few enough for the randomisation test to go through all sign flips
MANIFEST = {"collection": "generated", "split": "test", "retriever": {"retriever": "bm25"}}


def write_evaluation(folder, noise, seed=0, manifest=MANIFEST, num_queries=NUM_QUERIES, measures=MEASURES):
    """A run over the same judgments for every folder: the less noise, the better."""
    rng = np.random.default_rng(0)
    documents = [f"d{i}" for i in range(400)]  # so that R@100 is not 1 for all
    qrels = {f"q{i}": {d: int(rng.integers(1, 3)) for d in rng.choice(documents, 6, replace=False)} for i in range(99)}
    qrels = dict(list(qrels.items())[:num_queries])
    rng = np.random.default_rng(seed)
    run = {q: {d: relevant.get(d, 0) + noise * rng.normal() for d in documents} for q, relevant in qrels.items()}
    save_evaluation(folder, run, qrels, manifest, measures)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluations")
    return [
        write_evaluation(root / name, noise, seed)
        for seed, (name, noise) in enumerate([("base_line", 3.0), ("better", 0.6), ("50%", 2.5)])
    ]


@pytest.fixture(scope="module")
def comparison(folders):
    return compare_folders(folders)


@pytest.fixture
def compare_command(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = cli.main(["compare", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def written_values(folder, measure):
    """Straight from the file, by query id."""
    rows = [json.loads(line) for line in (folder / "per_query.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["_id"]: row[measure] for row in rows}


# The numbers


def test_p_values_are_scipys_on_the_values_of_the_files(comparison, folders):
    places = list(combinations(range(3), 2))
    assert [(pair.measure, pair.earlier, pair.later) for pair in comparison.pairs] == [
        (measure, *pair) for measure in MEASURES for pair in places
    ]
    for pair in comparison.pairs:
        earlier, later = (written_values(folders[place], pair.measure) for place in (pair.earlier, pair.later))
        a, b = np.array([later[query_id] for query_id in earlier]), np.array(list(earlier.values()))
        assert pair.p_t_test == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
        flips = stats.permutation_test(
            (a - b,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
        )
        assert pair.p_randomization == pytest.approx(flips.pvalue, rel=1e-9)
        assert pair.mean_difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
        assert pair.effect_size == pytest.approx((a - b).mean() / (a - b).std(ddof=1))
        assert pair.effect_size == pytest.approx(stats.ttest_rel(a, b).statistic / NUM_QUERIES**0.5)
        assert (pair.wins, pair.ties, pair.losses) == ((a > b).sum(), (a == b).sum(), (a < b).sum())


def test_the_correction_is_over_the_pairs_of_one_measure(comparison):
    for measure in MEASURES:
        pairs = [pair for pair in comparison.pairs if pair.measure == measure]
        assert [pair.p_t_test_holm for pair in pairs] == holm([pair.p_t_test for pair in pairs])
        assert [pair.p_randomization_holm for pair in pairs] == holm([pair.p_randomization for pair in pairs])
        least = min(pairs, key=lambda pair: pair.p_t_test)
        assert least.p_t_test_holm == pytest.approx(3 * least.p_t_test)


def test_a_system_beats_those_it_is_significantly_better_than(comparison):
    assert comparison.beaten("nDCG@10") == [[], [0, 2], []]
    for measure in MEASURES:
        better = {(winner, loser) for winner, losers in enumerate(comparison.beaten(measure)) for loser in losers}
        means = comparison.means(measure)
        for pair in comparison.pairs:
            if pair.measure == measure:
                order = sorted((pair.earlier, pair.later), key=means.__getitem__, reverse=True)
                assert (tuple(order) in better) == (pair.p_t_test_holm < 0.01)


def test_holm_on_a_worked_example():
    # ascending: 4 x 0.005, 3 x 0.01, 2 x 0.03; then 1 x 0.04, which may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_corrects_upwards_in_order_and_no_more_than_bonferroni(p_values):
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c <= min(1, len(p_values) * p)
        for other_p, other_c in zip(p_values, corrected, strict=True):
            assert p > other_p or c <= other_c
    assert corrected[p_values.index(max(p_values))] == max(corrected)


def test_effect_size_where_there_is_no_deviation():
    assert effect_size(np.zeros(2)) == 0
    assert effect_size(np.array([0.3, 0.4]) - [0.1, 0.2]) == np.inf
    assert effect_size(np.array([0.1, 0.2]) - [0.3, 0.4]) == -np.inf
    assert np.isnan(effect_size(np.ones(1)))


def test_the_queries_that_changed_most(comparison, folders):
    first, last = (written_values(folders[place], "AP") for place in (0, -1))
    changes = comparison.changes("AP")
    differences = [after - before for _, before, after in changes]
    everything = sorted(last[query_id] - first[query_id] for query_id in first)
    assert differences == sorted((d for d in everything[-3:] if d > 0), reverse=True) + [
        d for d in everything[:3] if d < 0
    ]
    assert all((first[query_id], last[query_id]) == (before, after) for query_id, before, after in changes)


def test_two_of_the_systems_keep_their_values_and_corrected_p_values(comparison, folders):
    two, alone = comparison.between(1, 2), compare_folders(folders[1:])
    assert two.names == alone.names and two.values == alone.values
    assert [(pair.earlier, pair.later) for pair in two.pairs] == [(0, 1)] * len(MEASURES)
    for pair, uncorrected in zip(two.pairs, alone.pairs, strict=True):
        assert pair.p_t_test == uncorrected.p_t_test == uncorrected.p_t_test_holm
        assert pair.p_t_test_holm >= pair.p_t_test and pair.mean_difference == uncorrected.mean_difference
        low, high = pair.interval
        assert low < pair.mean_difference < high and (low > 0 or high < 0) == (pair.p_t_test < 0.05)


def test_more_queries_than_can_be_gone_through(tmp_path):
    folders = [write_evaluation(tmp_path / str(seed), 1 + seed / 4, seed, num_queries=60) for seed in range(3)]
    for pair in compare_folders(folders, ["AP"]).pairs:
        earlier, later = (written_values(folders[place], "AP") for place in (pair.earlier, pair.later))
        differences = np.array([later[query_id] - earlier[query_id] for query_id in earlier])
        flips = stats.permutation_test((differences,), np.mean, permutation_type="samples", random_state=1)
        assert pair.p_randomization == pytest.approx(flips.pvalue, abs=0.03)  # both are drawn


def test_equal_systems_have_nothing_to_tell_apart(folders, tmp_path, compare_command):
    shutil.copytree(folders[0], tmp_path / "copy")
    code, printed, _ = compare_command(folders[0], tmp_path / "copy", "--measures", "AP")
    assert code == 0
    assert "no query gained or lost from base_line to copy" in printed
    assert re.search(rf"b - a +\+0\.0000 +\+0\.00 +0/{NUM_QUERIES}/0( +1\.0000){{4}}\n", printed)


# What is printed


def numbers(text):
    return re.findall(r"[+-]?\d+\.\d{4}|\d+/\d+/\d+", text)


def test_all_formats_hold_the_same_numbers(folders, comparison, compare_command):
    printed = {}
    for name in ("table", "markdown", "latex"):
        code, printed[name], _ = compare_command(*folders, "--format", name)
        assert code == 0
        assert printed[name] == comparison.render(name) + "\n"
    assert numbers(printed["table"]) == numbers(printed["markdown"]) == numbers(printed["latex"])
    for place, folder in enumerate(folders):
        for measure in MEASURES:
            mean = fmean(written_values(folder, measure).values())
            assert comparison.means(measure)[place] == pytest.approx(mean)
            assert f"{mean:.4f}" in numbers(printed["table"])
    for pair in comparison.pairs:
        assert f"{pair.wins}/{pair.ties}/{pair.losses}" in printed["table"]
    best = f"{comparison.means('nDCG@10')[1]:.4f}"
    assert f"{best}ᵃᶜ" in printed["table"]
    assert f"**{best}**<sup>ac</sup>" in printed["markdown"]
    assert rf"\textbf{{{best}}}\textsuperscript{{ac}}" in printed["latex"]
    assert f"Means over {NUM_QUERIES} queries" in printed["table"]


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_narrow_terminal_folds_names_and_never_numbers(comparison, monkeypatch, width):
    whole = comparison.render("table")
    many = replace(comparison, names=["a-system-with-a-long-name", *comparison.names[1:]])
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    printed = re.sub(r"\x1b\[[\d;]*m", "", many.render("table"))  # without bold type
    assert sorted(numbers(printed)) == sorted(numbers(whole))
    if width >= 80:
        assert max(map(len, printed.splitlines())) <= width


def test_a_terminal_gets_bold_type_and_a_pipe_does_not(folders, compare_command, monkeypatch):
    assert "[1m" not in compare_command(*folders)[1]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, printed, _ = compare_command(*folders)
    assert "\x1b[1m" in printed and "[1m" not in printed.replace("\x1b[1m", "")


def test_the_test_and_what_it_is_corrected_for_are_named(comparison, folders):
    for name in ("table", "markdown", "latex"):
        text = comparison.render(name)
        assert text.count("the 3 pairs of systems, measure by measure") == 2 + len(MEASURES)
        assert "paired t test" in text and "randomisation test" in text
    assert "the one pair of systems" in compare_folders(folders[:2]).render("markdown")


def test_the_matrix_has_every_pair_from_both_sides(comparison, folders):
    summary = comparison.render_summary("markdown")
    assert comparison.render("markdown").startswith(summary)
    matrix = [line.strip("| ").split(" | ") for line in summary.split("\n\n")[-1].splitlines()[2:]]
    cells = {
        row[0]: dict(zip("abc", (cell.replace("\\", "").strip() for cell in row[2:]), strict=False)) for row in matrix
    }
    assert [row[1].strip() for row in matrix] == comparison.names
    for pair in comparison.pairs:
        if pair.measure == MEASURES[0]:
            p = f"{pair.p_t_test_holm:.4f}" if pair.p_t_test_holm >= 0.0001 else "<0.0001"
            sign = "+" if pair.mean_difference > 0 else "-"
            later, earlier = LETTERS[pair.later], LETTERS[pair.earlier]
            assert cells[later][earlier] == f"{sign} {p}"
            assert cells[earlier][later] == f"{'-' if sign == '+' else '+'} {p}"
    assert all(cells[name].get(name, "") == "" for name in "abc")
    assert "is the row better" not in compare_folders(folders[:2]).render("table")


def test_markdown_tables_are_whole(comparison):
    tables = [block for block in comparison.render("markdown").split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 + len(MEASURES) + 1
    for table in tables:
        header, rule, *rows = table.splitlines()
        assert set(rule) <= set("|-: ")
        assert rows
        assert {line.count("|") for line in table.splitlines()} == {header.count("|")}


def test_latex_tables_are_whole(comparison):
    latex = comparison.render("latex")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2 + len(MEASURES) + 1
    assert latex.count("{") == latex.count("}")
    assert r"base\_line" in latex and r"50\%" in latex and "<" not in latex
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", latex, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1
        assert {line.count(" & ") for line in rows} == {len(columns) - 1}


def test_names_that_would_be_markup_are_shown_as_they_are(tmp_path):
    paths = [write_evaluation(tmp_path / name, 1.0) for name in ("[bold]x", "a|b", ":smile:")]
    table, markdown = (compare_folders(paths, ["AP"]).render(name) for name in ("table", "markdown"))
    assert all(path.name in table for path in paths)
    assert r"a\|b" in markdown


def test_measures_are_chosen_and_ordered(folders, compare_command):
    code, printed, _ = compare_command(*folders, "--measures", "R@100", "AP")
    assert code == 0
    assert re.search(r"system +R@100 +AP\n", printed)
    assert "nDCG@10" not in printed


def test_older_evaluations_are_compared_by_the_measures_all_have(folders, tmp_path, compare_command):
    older = write_evaluation(tmp_path / "older", 1.0, measures=["AP", "R@100"])
    for pair, measures in (([folders[0], older], "R@100 +AP"), ([older, folders[0]], "AP +R@100")):
        code, printed, errors = compare_command(*pair)
        assert code == 0
        assert re.search(rf"system +{measures}\n", printed)
        assert ("note: nDCG@100 is left out:" in errors) == (pair[1] == older)
    code, _, errors = compare_command(folders[0], older, "--measures", "nDCG@10")
    assert code == 2 and "older has no nDCG@10; its measures are AP, R@100." in errors
    strange = write_evaluation(tmp_path / "strange", 1.0, measures=["P@3"])
    with pytest.raises(InputError, match="strange has no nDCG@10; its measures are P@3"):
        compare_folders([folders[0], strange])


def test_folders_of_one_name_are_told_apart_by_their_parents(tmp_path):
    paths = [write_evaluation(tmp_path / seed / "bm25", 1.0, int(seed)) for seed in ("1", "2")]
    assert compare_folders(paths, ["AP"]).names == ["1/bm25", "2/bm25"]


def test_an_evaluation_is_read_as_it_was_written(folders):
    evaluation = load_evaluation(folders[0])
    assert evaluation.manifest == MANIFEST
    assert evaluation.measures == list(MEASURES)
    assert evaluation.metrics == json.loads((folders[0] / "metrics.json").read_text(encoding="utf-8"))
    assert {id_: values["AP"] for id_, values in evaluation.per_query.items()} == written_values(folders[0], "AP")


# Examples

TEXTS = {
    ("query", "q1"): "How to treat heartburn?",
    ("query", "q2"): "the\x1b[31m flu_season",
    ("query", "q3"): "running",
    ("document", "d1"): "Acid reflux\nTreating a patient's reflux " + "on and on " * 40,
    ("document", "d2"): "50% of {all} | *influenza* cases & more",
    ("document", "d3"): "Runs & runners",
    ("document", "d4"): "Reflux, heartburn",
}
QRELS = {"q1": {"d4": 1, "d1": 1}, "q2": {"d2": 2}, "q3": {"d3": 1, "d1": 0}}


def write_example(folder, run, answers, manifest=MANIFEST):
    rows = [
        {"_id": id_, "type": type_, "text": text, "augmentation": answers.get(id_, "")}
        for (type_, id_), text in TEXTS.items()
    ]
    save_evaluation(folder, run, QRELS, manifest, texts=rows)
    return folder


@pytest.fixture
def two_systems(tmp_path):
    first = {"q1": {"d4": 2.0, "d3": 1.0}, "q2": {"d3": 2.0, "d2": 1.0}, "q3": {"d3": 1.0}}
    last = {"q1": {"d4": 2.0, "d1": 1.0}, "q2": {"d2": 1.0}, "q3": {"d1": 2.0, "d3": 1.0}}
    answers = {"q1": "gastric reflux's", "q2": "influenza", "d1": "HEARTBURNS " + "word " * 70}
    return [write_example(tmp_path / "plain", first, {}), write_example(tmp_path / "added", last, answers)]


def shown(pieces):
    return "".join(f"[{piece.text}]" if piece.mark else piece.text for piece in pieces)


def test_examples_show_the_document_that_moved_and_the_words_shared(two_systems):
    comparison = compare_folders(two_systems)
    assert comparison.notes == []
    q1, q2, q3 = (next(e for e in comparison.examples if e.query_id == id_) for id_ in ("q1", "q2", "q3"))
    assert [example.query_id for example in comparison.examples] == [id_ for id_, *_ in comparison.changes("nDCG@10")]
    assert {example.query_id: example.values for example in comparison.examples} == {
        id_: (first, last) for id_, first, last in comparison.changes("nDCG@10")
    }
    # d4 was first for both systems; q3 lost by d3, whose other judged document is not relevant
    assert (q1.document_id, q1.ranks) == ("d1", (None, 2))
    assert (q2.document_id, q2.ranks) == ("d2", (2, 1))
    assert (q3.document_id, q3.ranks) == ("d3", (1, 2))

    (query, document), (augmented_query, augmented_document) = q1.sides
    assert shown(query.text) == "How to [treat] heartburn?"
    assert query.augmentation == document.augmentation == []
    assert shown(document.text).startswith("Acid reflux [Treating] a patient's reflux on and on on")
    assert len(shown(document.text).removesuffix(" …").split()) == 40
    assert shown(augmented_query.text) == "How to [treat] [heartburn]?"
    assert shown(augmented_query.augmentation) == "gastric [reflux's]"
    assert shown(augmented_document.text).startswith("Acid [reflux] [Treating] a patient's [reflux] on")
    assert shown(augmented_document.augmentation) == "[HEARTBURNS]" + " word" * 59 + " …"
    assert [[shown(side.text) for side in sides] for sides in q3.sides] == [["[running]", "[Runs] & runners"]] * 2


def test_examples_in_all_formats(two_systems, compare_command):
    code, table, errors = compare_command(*two_systems)
    assert (code, errors) == (0, "")
    assert "query and document share are in capitals" in " ".join(table.split())
    assert re.search(r"Query q1: 0\.\d{4} to 1\.0000; document d1: not found to rank 2\n", table)
    assert "  added  query     How to TREAT HEARTBURN?\n                   + gastric REFLUX'S\n" in table
    assert "  plain  query     How to TREAT heartburn?\n" in table
    assert "\x1b" not in table
    examples = table[table.index("Query q") :]
    assert max(map(len, examples.splitlines())) <= 100
    # the same texts for both systems are shown once
    assert "  both  query     RUNNING\n        document  RUNS & runners" in table
    assert "document d3: rank 1 to rank 2\n" in table

    markdown = compare_command(*two_systems, "--format", "markdown")[1]
    assert "|  | document | 50% of {all} \\| \\***influenza**\\* cases \\& more |  |" in markdown
    assert "| added | query | How to **treat** **heartburn**? | gastric **reflux's** |" in markdown
    assert all(line.count(" | ") == 3 for line in markdown.splitlines() if line.startswith("| added"))

    latex = compare_command(*two_systems, "--format", "latex")[1]
    assert r"50\% of \{all\} | *\textbf{influenza}* cases \& more" in latex
    assert latex.count("{") == latex.count("}")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1 + len(MEASURES) + 1 + 3


def test_on_a_terminal_shared_words_are_styled(two_systems, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "60"), ("NO_COLOR", "")):
        monkeypatch.setenv(name, value)
    table = compare_folders(two_systems).render()
    assert "\x1b[1;32mheartburn\x1b[0m?" in table
    assert "\x1b[31m" not in table
    plain = re.sub(r"\x1b\[[\d;]*m", "", table)
    assert "HEARTBURN?" not in plain
    assert max(map(len, plain[plain.index("Query q") :].splitlines())) <= 60


def test_the_words_are_those_of_the_systems_language(two_systems, tmp_path):
    german = {"retriever": {"retriever": "bm25", "language": "german"}}
    run = {"q3": {"d3": 1.0}}
    # Porter takes both for run-, Snowball's German stemmer does not
    other = write_example(tmp_path / "german", run, {}, german)
    q3 = next(e for e in compare_folders([other, two_systems[1]]).examples if e.query_id == "q3")
    assert [[shown(side.text) for side in sides] for sides in q3.sides] == [
        ["running", "Runs & runners"],
        ["[running]", "[Runs] & runners"],
    ]


def test_without_texts_there_are_no_examples_but_a_note(two_systems, compare_command):
    (two_systems[0] / "texts.jsonl").unlink()
    code, printed, errors = compare_command(*two_systems)
    assert code == 0
    assert "Query q1" not in printed and "q1 " in printed
    assert errors.startswith("note: no examples:") and errors.count("\n") == 1
    assert "plain has no texts.jsonl; evaluate again" in errors
    # those between the first and the last need none
    last = shutil.copytree(two_systems[1], two_systems[1].with_name("last"))
    assert compare_folders([two_systems[1], two_systems[0], last]).notes == []


def test_evaluate_writes_what_compare_shows(coaug, beir_folder, tmp_path):
    for name, k1 in (("one", 0.2), ("two", 3.0)):
        evaluate = ("evaluate", "--collection", beir_folder, "--output", tmp_path / name)
        assert coaug(*evaluate, "--k1", k1, "--b", 0 if name == "one" else 1)[0] == 0
    code, printed, errors = coaug("compare", tmp_path / "one", tmp_path / "two", "--measures", "AP")
    assert code == 0
    # whoever compares augmentations wants to know that something else differs, too
    noted = f"note: the retrievers differ: k1 is 0.2 and 3.0, b is 0.0 and 1.0 in {tmp_path / 'one'} and {tmp_path / 'two'}\n"
    assert errors == noted
    changed = re.findall(r"^ (test-\w+) .*[+-]0\.\d+$", printed, re.MULTILINE)
    assert re.findall(r"^Query (test-\w+):", printed, re.MULTILINE) == changed


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("texts.jsonl", "{", "texts.jsonl, line 8: not a row"),
        ("texts.jsonl", '{"_id": "d1", "type": "document", "text": 1, "augmentation": ""}', "texts.jsonl, line 8"),
        ("run.trec", "q1 Q0", "run.trec: not a TREC file"),
        ("qrels.trec", "q1 0 d1 x", "qrels.trec: not a TREC file"),
    ],
)
def test_damaged_files_of_examples_are_refused(two_systems, name, line, message):
    with open(two_systems[0] / name, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message):
        compare_folders(two_systems)


# Bad input


def test_refusals_of_the_command_are_one_line(folders, tmp_path, compare_command):
    for arguments, named in (
        ([folders[0]], "two evaluation folders or more"),
        ([folders[0], tmp_path / "nowhere"], "nowhere is not a finished evaluation"),
        ([folders[0], folders[1], folders[0] / "." / ".." / "base_line"], "given twice"),
        ([*folders, "--measures", "AP", "nDCG@7"], f"has no nDCG@7; its measures are {', '.join(MEASURES)}"),
    ):
        code, printed, errors = compare_command(*arguments)
        assert (code, printed) == (2, "")
        assert errors.startswith("error:") and errors.count("\n") == 1
        assert named in errors


def test_more_systems_than_letters_are_refused(folders):
    with pytest.raises(InputError, match="up to 26"):
        compare_folders([folders[0]] * (len(LETTERS) + 1))


def test_runs_over_different_queries_are_refused(folders, tmp_path):
    fewer = write_evaluation(tmp_path / "fewer", 1.0, num_queries=NUM_QUERIES - 1)
    for pair in ([folders[0], fewer], [fewer, folders[0]]):
        with pytest.raises(InputError, match=r"base_line has query 'q11', .*fewer does not"):
            compare_folders(pair)


def test_runs_over_different_collections_are_refused_though_the_ids_agree(folders, tmp_path):
    other = write_evaluation(tmp_path / "other", 1.0, manifest=MANIFEST | {"collection": "another"})
    with pytest.raises(InputError, match="of the collection generated, .* of another"):
        compare_folders([folders[0], other])
    unknown = write_evaluation(tmp_path / "unknown", 1.0, manifest={"retriever": {}})
    assert compare_folders([folders[0], unknown], ["AP"]).names == ["base_line", "unknown"]


@pytest.mark.parametrize("name", ["per_query.jsonl", "manifest.json", "metrics.json"])
def test_a_folder_that_is_no_evaluation_is_refused_with_what_is_missing(folders, tmp_path, name):
    folder = shutil.copytree(folders[0], tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        load_evaluation(folder)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("per_query.jsonl", lambda text: text[:-20], "per_query.jsonl, line 12"),
        ("per_query.jsonl", lambda text: text + '{"AP": 0.5}\n', "per_query.jsonl, line 13"),
        ("per_query.jsonl", lambda text: text + "[]\n", "per_query.jsonl, line 13"),
        ("per_query.jsonl", lambda text: text + '{"_id": "q", "AP": 1}\n', "line 13: other measures"),
        ("per_query.jsonl", lambda text: text + text.splitlines()[0] + "\n", "line 13: query 'q0' is there twice"),
        ("per_query.jsonl", lambda text: "", "has no query"),
        ("per_query.jsonl", lambda text: text[text.index("\n") + 1 :], "not of one evaluation"),
        ("metrics.json", lambda text: text[:10], "metrics.json: not JSON"),
        ("metrics.json", lambda text: "{}", "not of one evaluation"),
        ("manifest.json", lambda text: "[]", "manifest.json: not a JSON object"),
    ],
)
def test_a_damaged_evaluation_is_refused(folders, tmp_path, name, damage, message):
    folder = shutil.copytree(folders[1], tmp_path / "copy")
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(damage(text), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        load_evaluation(folder)


def test_folders_of_other_judgments_are_refused_and_other_depths_noted(tmp_path):
    def write(name, **manifest):
        return write_evaluation(tmp_path / name, 1.0, manifest=MANIFEST | manifest)

    one = write("one", hashes={"judgments": "aaaa"}, depth=1000)
    other = write("other", hashes={"judgments": "bbbb"}, depth=1000)
    with pytest.raises(InputError, match="one and .*other were evaluated with different judgments"):
        compare_folders([one, other])
    shallow = write("shallow", hashes={"judgments": "aaaa"}, depth=5)
    assert any("depth is 1000 in" in note and "and 5 in" in note for note in compare_folders([one, shallow]).notes)
    assert not any("depth" in note for note in compare_folders([one, write("again", depth=1000)]).notes)
