import json
import re
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
from conftest import write_beir_collection
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_comparison import write_evaluation
from test_trainer import DEFAULTS, PROMPT_SET, teach_expansions

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, Collection
from coaug_trl.cli.main import main
from coaug_trl.evaluation.comparison import compare_folders, format_p
from coaug_trl.policy.settings import PolicySettings
from coaug_trl.publishing.pages import render_markdown, save_report
from coaug_trl.publishing.record import load_record
from coaug_trl.publishing.report import make_report
from coaug_trl.studies.alignment import measure_alignment
from coaug_trl.utils.charts import LETTERS, WIDTH, _spread, _thin, draw_gains, draw_lines


IMAGE = "<img src=x onerror=alert(1)>"
SCRIPT = "</script><script>alert(2)</script> | `a` **b** $c$ &amp; {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    """The small collection, with markup in all texts."""
    folder = write_beir_collection(tmp_path_factory.mktemp("collections") / "hostile")
    for name, text in (("queries", IMAGE), ("corpus", SCRIPT)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            row["text"] = f"{text} {row['text']}"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained_run(hostile_folder, tiny_model, tmp_path_factory):
    """A run of three steps, evaluated with its augmentations and without."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    collection = Collection.load(hostile_folder)
    model = str(teach_expansions(tiny_model, collection, tmp_path_factory.mktemp("expanding")))
    changes = {
        "max_steps": 3,
        "learning_rate": 1e-5,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    args = CoAugConfig(output_dir=str(run), **{**DEFAULTS, "log_completions": False, **changes})
    dev = collection.with_split("dev")
    trainer = CoAugTrainer(model, args, collection, BM25Retriever(), PROMPT_SET, eval_collection=dev)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    command = ["--collection", str(hostile_folder), "--quiet"]
    assert main(["augment", "--model", str(run), *command, "--output", str(run / "augmentations")]) == 0
    assert main(["evaluate", *command, "--output", str(run / "evaluations" / "none")]) == 0
    augmented = ["--augmentations", str(run / "augmentations"), "--output", str(run / "evaluations" / "policy")]
    assert main(["evaluate", *command, *augmented]) == 0
    return run


@pytest.fixture(scope="module")
def written(trained_run, hostile_folder, tmp_path_factory):
    """The HTML file and the Markdown file."""
    return save_report(make_report(trained_run, collection=str(hostile_folder)), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def markdown(written):
    return written[1].read_text(encoding="utf-8")


@pytest.fixture
def run_copy(trained_run, tmp_path):
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained_run, tmp_path / "copy"))


@pytest.fixture
def page(chromium, written):
    """The page, opened; whatever it should not do fails the test."""
    faults = []
    page = chromium.new_page()
    watch(page, faults)
    page.goto(written[0].as_uri())
    yield page
    page.close()
    assert faults == []


def watch(page, faults):
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.endswith("report.html") or faults.append(request.url))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))


def metrics_of(run, system):
    return json.loads((run / "evaluations" / system / "metrics.json").read_text(encoding="utf-8"))


def table_rows(markdown, header):
    """The cells of the first Markdown table whose header begins so."""
    lines = markdown[markdown.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def text_of(report):
    return render_markdown(report).replace("\\", "")


# In a browser


def test_the_page_reads_on_a_phone_and_on_a_desk_in_light_and_dark(chromium, written):
    papers = set()
    for width, scheme in product((1280, 360), ("light", "dark")):
        faults = []
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        watch(page, faults)
        page.goto(written[0].as_uri())
        for folded in (True, False):
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, scheme, folded)
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        scales = page.evaluate(f"[...document.querySelectorAll('img.chart')].map(each => each.width / {WIDTH})")
        assert len(scales) >= 9 and LETTERS * min(scales) >= 11
        assert page.evaluate("[...document.querySelectorAll('img')].every(each => each.complete && each.naturalWidth)")
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        drawn = page.evaluate("getComputedStyle(document.querySelector('img.chart')).filter")
        papers.add(drawn)
        assert faults == []
        context.close()
    assert len(papers) == 4  # paper and ink, in light and in dark


def test_texts_with_markup_are_shown_as_texts(page, markdown):
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    shown = page.evaluate("document.body.textContent")
    assert IMAGE in shown and "</script><script>alert(2)</script> | `a` **b** $c$ &amp; {{ 7 * 7 }}" in shown
    assert page.locator("img:not(.chart)").count() == page.locator("script").count() == 0
    rendered = MarkdownIt("commonmark").enable("table").render(markdown)
    assert "<img" not in rendered and "<script" not in rendered and "&lt;img src=x onerror=alert(1)&gt;" in rendered
    for table in re.findall(r"<table>(.*?)</table>", rendered, re.DOTALL):
        assert len({row.count("</td>") + row.count("</th>") for row in table.split("</tr>")[:-1]}) == 1


def test_prompts_are_shown_as_they_are(run_copy, chromium, tmp_path):
    settings = PolicySettings.load(run_copy)
    prompt = f"Write words for ```{IMAGE}``` and\n  nothing | else."
    replace(settings, prompt_set=replace(settings.prompt_set, query=prompt)).save(run_copy)
    html, markdown = save_report(make_report(run_copy), tmp_path)
    assert f"````text\n{prompt}\n````" in markdown.read_text(encoding="utf-8")
    page = chromium.new_page()
    page.goto(html.as_uri())
    assert page.locator("pre").first.text_content() == prompt
    page.close()


def test_it_can_be_used_from_the_keyboard_and_by_a_screen_reader(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len(set(ids))
    charts = page.locator("img.chart")
    assert charts.count() >= 9
    for chart in charts.all():
        words = chart.get_attribute("alt").split(": ", maxsplit=1)
        assert len(words) == 2 and all(words)
    targets = page.evaluate("[...document.querySelectorAll('a')].map(each => each.getAttribute('href').slice(1))")
    assert set(targets) <= set(ids)


def test_tables_have_names_and_stops_only_where_they_may_scroll(chromium, page, written):
    rows = page.evaluate(
        "[...document.querySelectorAll('tbody tr')].map(row => row.querySelectorAll('th[scope=row]').length)"
    )
    assert rows and set(rows) == {1}
    assert page.locator("table > caption").count() == page.locator("table").count()
    names = page.locator("tbody th").all_text_contents()
    assert {"none", "policy"} <= set(names) and not {"a", "b"} & set(names)
    summaries = page.locator("figure summary").all_text_contents()
    assert len(summaries) == len(set(summaries)) and all(text.startswith("Numbers of ") for text in summaries)
    assert page.locator(".scroll:not([tabindex])").count() > 0 and page.locator("pre[tabindex]").count() == 0
    for width in (360, 1280):
        narrow = chromium.new_page(viewport={"width": width, "height": 800})
        narrow.goto(written[0].as_uri())
        narrow.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        unreachable = narrow.evaluate(
            "[...document.querySelectorAll('.scroll:not([tabindex])')].filter(each => "
            "each.scrollWidth > each.clientWidth || each.scrollHeight > each.clientHeight).length"
        )
        assert unreachable == 0
        narrow.close()


def test_shared_words_are_marked(page, trained_run):
    comparison = compare_folders([trained_run / "evaluations" / name for name in ("none", "policy")])
    shared = [
        piece.text
        for example in comparison.examples
        for system in example.sides
        for side in system
        for piece in (*side.text, *side.augmentation)
        if piece.mark
    ]
    assert comparison.examples and shared
    assert "part in the DCG changed most in the direction of the query's change" in page.text_content("#cases")
    assert page.locator("mark").all_text_contents() == shared
    heads = page.locator(".case h4").all_text_contents()
    assert [re.search(r"query (\S+): ", head)[1] for head in heads] == [each.query_id for each in comparison.examples]


# Its numbers


def test_numbers_are_those_of_the_evaluations(trained_run, markdown, page):
    policy, none = (metrics_of(trained_run, system) for system in ("policy", "none"))
    comparison = compare_folders([trained_run / "evaluations" / name for name in ("none", "policy")])
    (pair,) = (pair for pair in comparison.pairs if pair.measure == "nDCG@10")
    headline = " ".join(page.locator(".lead").all_text_contents()).replace("\xa0", " ")
    assert f"nDCG@10 is {policy['nDCG@10']:.4f} with this policy" in headline
    assert f"no augmentation, it is {none['nDCG@10']:.4f}." in headline
    assert f"{pair.mean_difference:+.4f}".replace("-", "−") in headline and "On 8 queries of hostile" in headline
    assert format_p(pair.p_t_test_holm).removeprefix("<") in headline
    queries = "query" if pair.wins == 1 else "queries"
    assert f"better for {pair.wins} {queries}, equal for {pair.ties}, worse for {pair.losses}." in headline

    header, measures = "| | system | nDCG@10", ["nDCG@10", "nDCG@100", "R@100", "RR@10", "AP"]
    header = next(line for line in markdown.splitlines() if "system | nDCG@10 | nDCG@100" in line)
    for row, expected in zip(table_rows(markdown, header), (none, policy), strict=True):
        values = [re.sub(r"<sup>.*?</sup>|\*", "", cell) for cell in row[2:]]
        assert values == [f"{expected[measure]:.4f}" for measure in measures]
    tables = page.locator("table").all_text_contents()
    assert any(all(f"{none[m]:.4f}" in text and f"{policy[m]:.4f}" in text for m in measures) for text in tables)
    counts = next(line for line in markdown.splitlines() if line.startswith("| b | policy | queries and documents"))
    assert counts.endswith(f"| this policy | {policy['num_queries']} | {policy['num_queries_without_hits']} |")


def test_the_chart_of_queries_has_each_query_of_the_files(trained_run, markdown):
    values = {
        system: {
            row["_id"]: row["nDCG@10"]
            for row in map(json.loads, (trained_run / "evaluations" / system / "per_query.jsonl").open())
        }
        for system in ("none", "policy")
    }
    rows = table_rows(markdown, "| query | text | none | policy | change |")
    rows = [re.split(r"(?<!\\)\|", "|".join(row)) for row in rows]
    assert {row[0] for row in rows} == values["none"].keys()
    changes = []
    for query_id, *_, before, after, change in rows:
        assert before == f"{values['none'][query_id]:.4f}" and after == f"{values['policy'][query_id]:.4f}"
        changes.append(float(change.replace("−", "-")))
        assert changes[-1] == pytest.approx(values["policy"][query_id] - values["none"][query_id], abs=6e-5)
    assert changes == sorted(changes, reverse=True)


def test_curves_are_those_that_were_logged_and_the_best_checkpoint_is_named(trained_run, markdown):
    history = json.loads((trained_run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rewards = [entry for entry in history if "query/reward" in entry]
    expected = [
        [
            str(entry["step"]),
            *(f"{entry[f'{text_type}/reward']:.4f}" for text_type in ("query", "relevant", "irrelevant")),
        ]
        for entry in rewards
    ]
    section = markdown[markdown.index("### Reward") :]
    assert table_rows(section, "| step | query | relevant | irrelevant |") == expected
    assert "lines that cover each other are nearly equal; see Numbers." in section
    dev = {entry["step"]: entry["eval_nDCG@10"] for entry in history if "eval_nDCG@10" in entry}
    best = max(dev, key=dev.get)
    assert f"Best: {dev[best]:.4f} at step {best}, kept as checkpoint-{best}." in markdown
    assert "8 training queries with 24 judgments, 40 documents" in markdown


def test_words_are_measured_as_by_analyze(trained_run, hostile_folder, markdown):
    rows = measure_alignment(Collection.load(hostile_folder, "test"), [trained_run / "augmentations"])
    shown = table_rows(markdown, "| augmentations | texts | H(Q,D) |")
    assert [row[2] for row in shown] == [f"{row.cross_entropy:.3f}" for row in rows]
    assert [row[0] for row in shown] == ["none", *["augmentations"] * (len(rows) - 1)]


def test_a_collection_that_cannot_be_found_is_asked_for(trained_run):
    text = text_of(make_report(trained_run))
    assert "needs the collection, which cannot be read" in text and "`coaug report RUN --collection FOLDER`" in text


def test_cost_is_what_was_logged(trained_run, markdown):
    history = json.loads((trained_run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry][-1]
    # 4 groups of 6 texts with 3 rollouts, two optimizer steps on each generation batch
    assert f"{tokens:,.0f} read and generated" in markdown and "144 generated in training" in markdown
    assert re.search(r"\| augmentations \| queries \| transformers, float32 \| 8 \|", markdown)


def test_the_same_run_gives_the_same_bytes_and_files_that_it_names_are_there(
    trained_run, hostile_folder, written, coaug, tmp_path
):
    code, printed, errors = coaug(
        "report", trained_run, "--collection", hostile_folder, "--output", tmp_path / "again", "--json"
    )
    assert code == 0, errors
    paths = json.loads(printed)["files"]
    for path, other in zip(written, paths, strict=True):
        assert path.read_bytes() == Path(other).read_bytes()
    named = set(re.findall(r"<code>([^<]+)</code>", written[0].read_text(encoding="utf-8")))
    assert {"trainer_state.json", "evaluations/none/metrics.json"} <= named
    assert all((trained_run / name).exists() for name in named)


def rewrite(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def add_evaluation(run, name, source, change):
    """Another evaluation with the values of one that is there, made otherwise."""
    folder = shutil.copytree(run / "evaluations" / source, run / "evaluations" / name)
    rewrite(folder / "manifest.json", change)
    return folder


def test_the_main_evaluation_is_what_the_policy_was_trained_for(run_copy):
    other_retriever = add_evaluation(run_copy, "z-k1", "policy", lambda each: each["retriever"].update(k1=3.0))
    add_evaluation(run_copy, "z-queries", "policy", lambda each: each.update(augmented_sides=["query"]))
    record = load_record(run_copy)
    assert [each.folder.name for each in record.comparable[0]][-1] == "policy"
    first, *rest = make_report(run_copy).headline
    assert "which augments queries and documents for bm25 in evaluations/policy." in first
    assert "the 6 pairs of systems" in rest[-1]
    shutil.rmtree(run_copy / "evaluations" / "policy")
    report = make_report(run_copy)
    assert "in evaluations/z-queries." in report.headline[0]
    shutil.rmtree(run_copy / "evaluations" / "z-queries")
    report = make_report(run_copy)
    assert (
        f"k1 3.0, b 0.75, language english, fields flat) in evaluations/{other_retriever.name}" in report.headline[0]
    )
    assert "With no augmentation and another retriever, it is" in " ".join(report.headline)
    assert "It was trained to augment queries and documents for bm25 (k1 1.2" in report.hints[0].text


def test_the_headline_says_what_the_queries_were_used_for(run_copy):
    def headline(split, **arguments):
        for name in ("none", "policy"):
            rewrite(run_copy / "evaluations" / name / "manifest.json", lambda each: each.update(split=split))
        rewrite(run_copy / "training.json", lambda each: each["arguments"].update(arguments))
        return " ".join(make_report(run_copy).headline)

    assert "Checkpoints were chosen" not in headline("test") + headline("dev")
    assert "Checkpoints were chosen on these queries" in headline("dev", load_best_model_at_end=True)
    assert "It was trained on these queries" in headline("train")
    rewrite(run_copy / "training.json", lambda each: each.update(collection="another"))
    assert "trained on these queries" not in headline("train") and "Checkpoints" not in headline("dev")


def test_the_test_split_comes_first_and_the_training_split_last(run_copy):
    for split in ("train", "dev"):
        for name in ("none", "policy"):
            for copy in range({"train": 3, "dev": 2}[split]):  # more than of the test split
                add_evaluation(
                    run_copy, f"{split}-{name}-{copy}", name, lambda each, split=split: each.update(split=split)
                )
    assert [group[0].key[1] for group in load_record(run_copy).comparable] == ["test", "dev", "train"]
    report = make_report(run_copy)
    assert "hostile, test split" in report.headline[0]
    titles = [section.title for section in report.sections if section.title.startswith("Results")]
    assert titles == [f"Results: hostile, {split} split" for split in ("test", "dev", "train")]


def test_the_best_baseline_is_neither_another_policy_nor_another_retriever(run_copy):
    def made_by(retriever):
        return lambda each: each["augmentations"].update(revision="0" * 16, retriever=retriever)

    add_evaluation(run_copy, "stronger", "none", lambda each: each["retriever"].update(k1=3.0))
    assert "With the best other system, stronger, it is" in " ".join(make_report(run_copy).headline)
    add_evaluation(run_copy, "policy-2", "policy", made_by({"retriever": "bm25"}))
    assert "the best baseline" not in " ".join(make_report(run_copy).headline)
    add_evaluation(run_copy, "untrained", "none", lambda each: None)
    manifest = json.loads((run_copy / "evaluations" / "policy" / "manifest.json").read_text(encoding="utf-8"))
    made_by({})(manifest)
    rewrite(run_copy / "evaluations" / "untrained" / "manifest.json", lambda each: each.update(manifest))
    report = make_report(run_copy)
    assert "With the best baseline, untrained, it is" in " ".join(report.headline)
    assert [label for label, _ in report.bars.rows] == ["no augmentation", "untrained", "this policy"]
    add_evaluation(run_copy, "rm3", "policy", lambda each: (each.update(augmentations=None, augmented_sides=[]),
                   each["retriever"].update(rm3={"k": 10})))  # fmt: skip
    shutil.rmtree(run_copy / "evaluations" / "untrained")
    assert "With the best baseline, rm3, it is" in " ".join(make_report(run_copy).headline)


def test_p_values_are_said_to_be_of_what_and_intervals_are_shown(trained_run):
    report = make_report(trained_run)
    comparison = compare_folders([trained_run / "evaluations" / name for name in ("none", "policy")])
    low, high = (f"{bound:+.4f}".replace("-", "−") for bound in comparison.pairs[0].interval)
    assert f"(95\xa0% interval {low} to {high}, p" in report.headline[1]
    assert report.headline[-1].startswith("p is that of the paired t test after Holm's correction for the one pair")
    assert text_of(report).count(f"interval {low} to {high}") == 2  # and below the chart


def test_shared_words_of_this_policy_are_told_first(trained_run, hostile_folder, markdown):
    rows = measure_alignment(Collection.load(hostile_folder, "test"), [trained_run / "augmentations"])
    plain, composed = (f"{row.cross_entropy:.3f}" for row in rows[:2])
    text = markdown.replace("\\", "")
    assert f"It is {composed} with augmentations (this policy) and {plain} for the texts as they are." in text
    assert "averages over different words" in text


@pytest.mark.parametrize("place", ["best_global_step", "best_model_checkpoint"])
def test_whose_weights_the_folder_has_is_read_rather_than_guessed(run_copy, place):
    history = json.loads((run_copy / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    dev = {entry["step"]: entry["eval_nDCG@10"] for entry in history if "eval_nDCG@10" in entry}
    best = max(dev, key=dev.get)
    other = next(step for step in (2, 1) if step != best)  # best by another measure
    for path in run_copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert f"at step {best}; the folder has the weights of step 3." in text_of(make_report(run_copy))
    value = {"best_global_step": other, "best_model_checkpoint": f"/elsewhere/checkpoint-{other}"}[place]
    nothing = {"best_global_step": None, "best_model_checkpoint": None}
    rewrite(run_copy / "trainer_state.json", lambda each: each.update({**nothing, place: value}))
    rewrite(run_copy / "training.json", lambda each: each["arguments"].update(load_best_model_at_end=True))
    assert f"at step {best}; the folder has the weights of step {other}." in text_of(make_report(run_copy))
    rewrite(run_copy / "trainer_state.json", lambda each: each.update(nothing))
    assert "the folder has the weights" not in text_of(make_report(run_copy))


# What a run may lack


def test_a_run_that_was_only_trained_says_how_to_evaluate_it(run_copy, coaug):
    for name in ("evaluations", "augmentations"):
        shutil.rmtree(run_copy / name)
    code, printed, _ = coaug("report", run_copy)
    assert code == 0 and "coaug evaluate --collection C" in printed
    text = (run_copy / "report.md").read_text(encoding="utf-8")
    assert "coaug augment --model RUN" in text and "### Reward" in text and "H\\(Q,D" not in text.split("## Shared")[0]
    assert "--augmentations DIR" in text
    assert (run_copy / "report.html").is_file()


def test_a_run_of_version_0_1_0_without_history(run_copy):
    for path in (run_copy / "training.json", run_copy / "trainer_state.json", *run_copy.glob("checkpoint-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = text_of(make_report(run_copy))
    assert "There is no training.json (an older version wrote none)" in text and "There are no curves" in text
    assert f"{metrics_of(run_copy, 'policy')['nDCG@10']:.4f} with this policy" in text


def test_one_system_is_not_compared(run_copy):
    shutil.rmtree(run_copy / "evaluations" / "none")
    text = text_of(make_report(run_copy))
    assert f"{metrics_of(run_copy, 'policy')['nDCG@10']:.4f} with this policy" in text
    assert "not been compared" in text and "coaug evaluate --collection C --output RUN/evaluations/none" in text
    shutil.copytree(run_copy / "evaluations" / "policy", run_copy / "other")
    shutil.rmtree(run_copy / "evaluations")
    manifest = json.loads((run_copy / "other" / "manifest.json").read_text())
    manifest["augmentations"]["revision"] = "0" * 16
    (run_copy / "other" / "manifest.json").write_text(json.dumps(manifest))
    assert "but none of this policy" in text_of(make_report(run_copy))


def test_an_interrupted_run_is_reported_as_of_its_last_whole_checkpoint(run_copy):
    for name in ("coaug.json", "trainer_state.json", "training.json", "model.safetensors"):
        (run_copy / name).unlink()
    (run_copy / "checkpoint-3" / "trainer_state.json").unlink()
    report = make_report(run_copy)
    assert "interrupted: as of checkpoint-2" in report.subtitle
    text = text_of(report)
    assert "from checkpoint-2/trainer_state.json" in text and "- **Optimizer steps:** 2" in text
    assert "evaluations/none/metrics.json" in text
    assert re.search(r"Best: 0\.\d{4} at step [12], kept as checkpoint-[12]\.", text)


def damage(path, name, value):
    content = json.loads(path.read_text(encoding="utf-8"))
    if value is None:
        del content[name]
    else:
        content[name] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("training.json", "num_train_queries", None),
        ("training.json", "num_documents", "many"),
        ("training.json", "eval_split", None),
        ("training.json", "collection", 7),
        ("training.json", "arguments", [1]),
        ("training.json", "steps_per_batch", 0),
        ("trainer_state.json", "log_history", {"step": 1}),
        ("trainer_state.json", "log_history", [{"step": 1}, 2]),
        ("trainer_state.json", "log_history", [{"reward": 0.5}]),
        ("trainer_state.json", "log_history", [{"step": "1"}]),
        ("trainer_state.json", "best_global_step", "first"),
    ],
)
def test_damaged_records_are_refused(run_copy, refused, file, name, value):
    damage(run_copy / file, name, value)
    message = refused("report", run_copy)
    assert f"{file}: " in message and name in message and "restore the file" in message


def test_an_evaluation_without_its_retriever_is_refused(run_copy, refused):
    damage(run_copy / "evaluations" / "none" / "manifest.json", "retriever", None)
    assert "none/manifest.json does not say with which retriever" in refused("report", run_copy)


def test_values_that_are_no_numbers_are_left_out(run_copy, tmp_path):
    path = run_copy / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    for entry in state["log_history"]:
        for number, name in enumerate(sorted(entry)):
            if name not in ("step", "epoch", "entropy"):
                entry[name] = (float("nan"), None, float("inf"))[number % 3]
    path.write_text(json.dumps(state), encoding="utf-8")
    html, markdown = (path.read_text(encoding="utf-8") for path in save_report(make_report(run_copy), tmp_path))
    assert "### Entropy" in markdown and "### Reward" not in markdown and "nan" not in markdown.lower().split()
    assert ">nan<" not in html.lower() and ">inf<" not in html.lower()


def test_other_collections_and_many_systems_follow_the_main_result(run_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("coaug_trl.publishing.facts.LETTERS", "abc")  # rather than 26
    manifest = {"collection": "generated", "split": "test", "retriever": {"retriever": "bm25"}}
    for number in range(4):
        write_evaluation(tmp_path / "others" / f"s{number}", 1 + number / 10, number, manifest, 9, ["nDCG@10"])
    report = make_report(run_copy, [tmp_path / "others"])
    titles = [section.title for section in report.sections if section.title.startswith("Results")]
    assert titles == ["Results: hostile, test split", "Results: generated, test split"]
    assert "hostile" in report.headline[0]
    assert report.notes == ["3 evaluations are compared, 1 more left out"]
    text = text_of(report)
    values = [json.loads(line)["nDCG@10"] for line in (tmp_path / "others" / "s3" / "per_query.jsonl").open()]
    assert f"| c | s3 | {fmean(values):.4f}" in text.replace("**", "") and "| s1 |" not in text


def test_an_adapter_is_called_one(run_copy):
    (run_copy / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    assert "an adapter (LORA, rank 8, alpha 16)" in text_of(make_report(run_copy))


def test_a_missing_package_is_named(trained_run, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'needs matplotlib: pip install ".[report]"' in refused("report", trained_run)


def test_wrong_folders_are_refused(trained_run, refused, tmp_path):
    assert "not the folder of a trained policy" in refused("report", tmp_path / "missing")
    assert "no augmentations are there" in refused("report", trained_run, "--augmentations", tmp_path)
    assert "no finished evaluation is there" in refused("report", trained_run, "--evaluations", tmp_path)
    shutil.copytree(trained_run / "augmentations", tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    assert "manifest.json: not JSON" in refused("report", trained_run, "--augmentations", tmp_path)
    assert not (trained_run / "report.html").exists()


# Charts


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_labels_stand_apart_in_the_order_of_their_lines(places):
    moved = _spread(places, 0.1)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
    ordered = sorted(moved)
    assert all(after - before > 0.1 - 1e-9 for before, after in zip(ordered, ordered[1:], strict=False))
    order = sorted(range(len(places)), key=places.__getitem__)
    assert [moved[place] for place in order] == ordered


@given(st.lists(st.floats(-1, 1), min_size=401, max_size=900))
def test_lines_are_thinned_without_losing_a_peak(values):
    points = list(enumerate(values))
    kept = _thin(points)
    assert len(kept) <= 402 and kept == sorted(set(kept)) and set(kept) <= set(points)
    assert {points[0], points[-1]} <= set(kept)
    assert max(value for _, value in kept) == max(values) and min(value for _, value in kept) == min(values)


def test_charts_of_long_runs_and_many_queries_stay_small():
    short, long = (draw_lines({"reward": [(step, step % 7) for step in range(length)]}) for length in (400, 40_000))
    assert len(long) < 3 * len(short)
    few, many = (draw_gains([i / n - 0.25 for i in range(n)], "change").decode() for n in (1000, 50_000))
    assert len(many) < 1.5 * len(few)
    assert "37,499 better" in many and "1 equal" in many and "12,500 worse" in many


def test_a_chart_says_how_many_gained_and_lost_and_takes_texts_as_they_are():
    svg = draw_gains([0.5, 0.25, 0.0, -0.5], f"{IMAGE} & $x^2$ in $\\alpha$ <b>").decode()
    for text in (
        "2 better",
        "1 equal",
        "1 worse",
        "&lt;img src=x onerror=alert(1)&gt; &amp; $x^2$ in $\\alpha$ &lt;b&gt;",
    ):
        assert text in svg
    assert "<script" not in svg and "<dc:date>" not in svg and "@import" not in svg
    equal = draw_gains([0.0, 0.0], "change").decode()
    assert "2 equal" in equal and "better" not in equal and "worse" not in equal
