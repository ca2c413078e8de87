"""A web page on which a query is searched for with and without augmentation, side by side."""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..evaluation.examples import stems
from ..evaluation.measures import evaluate_run
from ..retrieval import BM25Retriever, Retriever, make_retriever
from ..retrieval.analyzer import Analyzer
from ..utils.errors import InputError
from . import demo_page as demo_html
from .index import SearchIndex
from .judged import MAX_QUERY, JudgedQueries


if TYPE_CHECKING:
    import gradio

    from ..augmentation.augmenter import Augmenter

HITS = 10  # shown
DEPTH = 1000  # ranked, as in an evaluation: ranks on the other side are known, and nDCG is that of coaug evaluate
WAITING = 16  # searches in line; more are turned away
ANSWER_SECONDS = 120  # the longest that the model writes for one query, also where nobody reads along any more
MEASURE = "nDCG@10"
LOOPBACK = ["127.0.0.1", "localhost"]  # a page elsewhere whose name is made to lead here is refused


class Ranking(NamedTuple):
    """
    What one side found.

    Args:
        title: Its heading.
        searched: What was searched for in what.
        text: What was searched for.
        retriever: Where.
        hits: Document ids and scores, best first.
        seconds: How long its parts took.
    """

    title: str
    searched: str
    text: str
    retriever: Retriever
    hits: list[tuple[str, float]]
    seconds: dict[str, float]


class Part(NamedTuple):
    """
    What changes on the page; `None` is what stays as it is.

    Args:
        augmentation: HTML of what the model adds.
        results: HTML of both sides.
        status: A sentence for those who hear the page.
    """

    augmentation: str | None
    results: str | None
    status: str | None


class Demo:
    """
    Searches an index with and without augmentation, and shows both on a page.

    Whoever reaches the page can keep the model busy: input, waiting searches and their time are bounded, visitors are
    not told apart. It is for this machine or people one knows; on the open internet it belongs behind something that
    lets in and limits its visitors.

    Args:
        index: The index.
        augmenter: What augments the queries; without it there is one side, of queries as they are.
        plain: With an index of the documents as they are, where queries as they are are searched for; defaults to the
            index.
        judged: Queries whose relevant documents are marked, some of them as examples.

    Example:

    ```python
    >>> demo = Demo.load("indexes/nfcorpus", "runs/nfcorpus")
    >>> demo.start(port=7860)
    'http://127.0.0.1:7860/'
    >>> demo.wait()
    ```
    """

    def __init__(
        self,
        index: SearchIndex,
        augmenter: "Augmenter | None" = None,
        plain: Retriever | None = None,
        judged: JudgedQueries | None = None,
    ):
        self.index, self.augmenter, self.plain = index, augmenter, plain or index.retriever
        self.judged = judged or JudgedQueries({}, {})
        self.analyzer = Analyzer(index.retriever.config.get("language", "english"))
        self._page: gradio.Blocks | None = None
        self._step = threading.Lock()  # neither stemmers nor encoders may be used by two threads at once

    @classmethod
    def load(
        cls,
        index: SearchIndex | str | Path,
        model: str | None = None,
        judged: JudgedQueries | None = None,
        plain_index: str | Path | None = None,
    ) -> "Demo":
        """
        Loads index and policy; where the documents of a BM25 index are augmented, builds one of them as they are, too.

        Args:
            index: The index, its folder or its Hub id.
            model: Policy that augments the queries: a folder or a Hub id.
            judged: As above.
            plain_index: Index of the same documents as they are, in place of one that is built.

        Raises `InputError`: Something is not there, or does not belong together.
        """
        if not isinstance(index, SearchIndex):
            index = SearchIndex.load(index)
        augmenter = index.augmenter(model) if model else None
        plain = None
        if plain_index:
            plain = _load_plain(plain_index, index)
        elif augmenter and _is_augmented(index) and isinstance(index.retriever, BM25Retriever):
            plain = make_retriever(**index.retriever.config)
            plain.index(index.read_all())
        return cls(index, augmenter, plain, judged)

    def answer(self, query: str) -> Iterator[Part]:
        """
        Searches for a query.

        Args:
            query: What was typed.

        Returns: what is found without the model, the augmentation after every token, and the results of both.
        """
        query = query.strip()
        if fault := _fault(query):
            yield Part(demo_html.notice(fault), "", fault)
            return
        grades, own = self.judged.grades(query), self._terms(query)
        on_augmented = self.plain is self.index.retriever and self.augmented
        title = "Query as it is" if on_augmented else "Without augmentation"
        bare = self._search(title, "the query as it is", query, self.plain)
        if self.augmenter is None:
            yield Part("", self._show(query, grades, [bare]), f"{_count(bare)}.")
            return
        yield Part(demo_html.waiting(), self._show(query, grades, [bare], waiting=True), "Waiting for the model.")
        answer, seconds = "", 0.0
        with closing(self.augmenter.stream("query", query)) as answers:
            while True:
                start = time.perf_counter()
                written = next(answers, None)
                seconds += time.perf_counter() - start  # without what the page takes to show it
                if written is None:
                    break
                if seconds > ANSWER_SECONDS:
                    fault = f"The model was stopped: it had been writing for {ANSWER_SECONDS:g} seconds."
                    yield Part(demo_html.notice(fault), self._show(query, grades, [bare]), fault)
                    return
                answer = written
                yield Part(demo_html.augmentation(self.analyzer, written, own, writing=True), None, None)
        text = self.augmenter.settings.prompt_set.compose_query(query, answer)
        augmented = self._search("With augmentation", "the augmented query", text, self.index.retriever, seconds)
        count = len(answer.split())
        yield Part(
            demo_html.augmentation(self.analyzer, answer, own),
            self._show(query, grades, [bare, augmented]),
            f"The model added {count:,} word{'s' * (count != 1)}; {_count(bare)} without augmentation, "
            f"{_count(augmented)} with it.",
        )

    def _serve(self, query: str | None, steps: int | None = None) -> Iterator[list[Any]]:
        """The first steps of an answer, or all, for Gradio to show."""
        skip = import_gradio().skip
        with closing(self.answer(query or "")) as parts:
            for _ in count() if steps is None else range(steps):
                with self._step:
                    part = next(parts, None)
                if part is None:
                    return
                yield [skip() if content is None else content for content in part]

    @property
    def augmented(self) -> bool:
        """Whether the documents of the index are augmented."""
        return _is_augmented(self.index)

    def _search(
        self, title: str, subject: str, text: str, retriever: Retriever, augmenting: float | None = None
    ) -> Ranking:
        start = time.perf_counter()
        (hits,) = retriever.search([text], DEPTH)
        seconds = {} if augmenting is None else {"augment": augmenting}
        seconds["search"] = time.perf_counter() - start
        augmented = retriever is self.index.retriever and self.augmented
        searched = f"{subject}, on the {'augmented documents' if augmented else 'documents as they are'}"
        return Ranking(title, searched, text, retriever, hits, seconds)

    def _show(self, query: str, grades: dict[str, int], rankings: list[Ranking], waiting: bool = False) -> str:
        """HTML of the sides that are there, without the augmentation and with it."""
        documents = self.index.documents({id_ for ranking in rankings for id_, _ in ranking.hits[:HITS]})
        before, after = rankings[0], rankings[1] if len(rankings) > 1 else None
        columns = [self._column(query, grades, before, documents, after, "now")]
        if after:
            columns.append(self._column(query, grades, after, documents, before, "was"))
        if waiting:
            columns.append(demo_html.Column("With augmentation", "when the model has written", [], None, set(), set()))
        summary = ""
        if grades:
            num_relevant = sum(grade > 0 for grade in grades.values())
            summary = f"A judged query with {num_relevant:,} relevant document{'s' * (num_relevant != 1)}"
        return demo_html.results(self.analyzer, summary, columns)

    def _column(
        self,
        query: str,
        grades: dict[str, int],
        ranking: Ranking,
        documents: dict[str, dict[str, str]],
        other: Ranking | None,
        when: str,
    ) -> demo_html.Column:
        """One side, with the ranks its documents have on the other."""
        figures = [f"{part} {1000 * seconds:,.1f} ms" for part, seconds in ranking.seconds.items()]
        if grades:
            values, _ = evaluate_run({"query": grades}, {"query": dict(ranking.hits)}, [MEASURE])
            figures.insert(0, f"{MEASURE} {values[MEASURE]:.3f}")
        terms = self._terms(ranking.text)
        own = terms & self._terms(query)
        shown = ranking.hits[:HITS]
        hidden = self._hidden(ranking, [documents[id_] for id_, _ in shown])
        hits = []
        for rank, ((id_, score), words) in enumerate(zip(shown, hidden, strict=True), start=1):
            moved, elsewhere = _move(rank, id_, other, when) if other else ("", "")
            hits.append(demo_html.Hit(rank, score, documents[id_], words, grades.get(id_), moved, elsewhere))
        empty = "Nothing was found." if terms else "Nothing was found: there is no word to search for in the query."
        return demo_html.Column(ranking.title, ranking.searched, figures, hits, own, terms - own, empty)

    def _terms(self, text: str) -> set[str]:
        return stems(self.analyzer, text)

    def _hidden(self, ranking: Ranking, documents: list[dict[str, str]]) -> list[list[str]]:
        """For each document the words that were searched for and found in its augmentation only, where that is known."""
        if not (
            ranking.retriever is self.index.retriever
            and self.augmented
            and isinstance(self.index.retriever, BM25Retriever)
        ):
            return [[] for _ in documents]
        words = {}
        for word in re.finditer(self.analyzer.word, ranking.text):
            for term in self._terms(word.group()):
                words.setdefault(term, word.group())
        found = ranking.retriever.matches(words, [document["_id"] for document in documents])
        return [
            [words[term] for term in words if term in terms - self._terms(f"{document['title']}\n{document['text']}")]
            for terms, document in zip(found, documents, strict=True)
        ]

    def page(self) -> "gradio.Blocks":
        """The page, for Gradio to launch."""
        gradio = import_gradio()
        name = self.index.manifest["collection"]

        def look(query: str | None) -> Iterator[list[Any]]:
            yield from self._serve(query, steps=1)

        def write(query: str | None) -> Iterator[list[Any]]:
            yield from self._serve(query)

        def html(content: str = "", **kwargs) -> "gradio.HTML":
            return gradio.HTML(content, **{"elem_classes": "coaug", "padding": False, "js_on_load": None} | kwargs)

        with gradio.Blocks(title=f"Search {name}", analytics_enabled=False) as page:
            html(demo_html.header(name, self.augmenter is not None))
            query = gradio.Textbox(
                label=f"Query, at most {MAX_QUERY} characters",
                max_length=MAX_QUERY,
                max_lines=1,
                submit_btn="Search",
                elem_classes="coaug-query",
            )
            if examples := self.judged.examples():
                samples = gradio.Dataset(
                    label="Judged queries", components=[query], samples=[[text] for text in examples], type="index"
                )
                # In the browser alone: the server is not asked which one it is.
                samples.click(None, samples, query, js=f"index => {json.dumps(examples)}[index]")
            # Filled in, rather than put there, it is read out when it changes.
            status = html(elem_classes="coaug-status", js_on_load="element.setAttribute('role', 'status')")
            augmentation, results = html(), html()
            html(demo_html.facts(self.facts()))
            shown = [augmentation, results, status]
            private = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple"}
            looked = query.submit(look, query, shown, **private)
            if self.augmenter:
                # All get at once what is found without the model, which writes for one after the other.
                written = looked.then(
                    write, query, shown, **private | {"show_progress": "minimal"}, show_progress_on=augmentation
                )
                query.submit(None, cancels=written, queue=False)  # a newer query ends the one before
        return page.queue(max_size=WAITING, api_open=False, default_concurrency_limit=1)

    def facts(self) -> list[str]:
        """What index and model are."""
        manifest, retriever = self.index.manifest, self.index.retriever.config
        settings = ", ".join(f"{name} {value}" for name, value in retriever.items() if name in ("k1", "b", "fields"))
        made_with = manifest["augmentations"]
        facts = [
            f"{manifest['collection']}: {manifest['num_documents']:,} documents",
            f"augmented by {model_name(made_with['model'])} ({made_with['revision']})"
            if made_with
            else "not augmented",
            f"BM25 ({settings})" if retriever["retriever"] == "bm25" else f"dense ({model_name(retriever['model'])})",
        ]
        if self.augmenter:
            same = made_with and made_with["revision"] == self.augmenter.revision
            model = "the same model" if same else f"{model_name(self.augmenter.name)} ({self.augmenter.revision})"
            longest = self.augmenter.settings.generation.max_new_tokens
            facts.append(f"queries augmented by {model}, greedily, in at most {longest:,} tokens")
        return facts

    def start(self, host: str | None = None, port: int | None = None) -> str:
        """
        Serves the page from a thread of its own.

        Args:
            host: Address to serve at; defaults to `GRADIO_SERVER_NAME` of the environment, which a Space sets, and to
                the loopback address.
            port: Its port; defaults to `GRADIO_SERVER_PORT`, and to the first free one from 7860.

        Returns: where the page is.

        Raises `InputError`: The port is taken, or this machine has no such address.
        """
        gradio = import_gradio()
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from .demo_server import PageRequests

        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the net
        self._page = self.page()
        searches = {index for index, function in self._page.fns.items() if function.fn}
        guards = []
        if (host or os.environ.get("GRADIO_SERVER_NAME", LOOPBACK[0])) in LOOPBACK:  # else any name may lead here
            guards = [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK, www_redirect=False)]
        try:
            _, address, _ = self._page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                max_file_size=1,  # nothing is to be uploaded
                blocked_paths=["/"],
                app_kwargs={"middleware": [Middleware(PageRequests, searches=searches), *guards]},
                theme=gradio.themes.Default(primary_hue="blue", **fonts),
                css=demo_html.CSS,
            )
        except OSError as error:
            raise InputError(f"{host or ''}:{port or ''}: the page cannot be served there: {error}") from None
        return address

    def wait(self) -> None:
        """Serves until it is interrupted (Ctrl-C), or [`stop`] is called."""
        try:
            while self._page.is_running:
                time.sleep(0.2)
        except KeyboardInterrupt:
            self.stop()

    def stop(self) -> None:
        """Ends the server, also while browsers are connected."""
        if self._page.server:
            self._page.server.force_exit = True  # else it waits for them
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # and says what it has cut off
        self._page.close(verbose=False)


def _fault(query: str) -> str:
    """Why a query cannot be searched for, if it cannot."""
    if not query:
        return "Type a query first."
    if len(query) > MAX_QUERY:
        return f"The query has {len(query):,} characters; at most {MAX_QUERY} are taken."
    try:
        query.encode()
    except UnicodeEncodeError:
        return "The query holds a character that is not valid Unicode."
    return ""


def _count(ranking: Ranking) -> str:
    """How many hits are shown, in words."""
    count = min(len(ranking.hits), HITS)
    return f"{count} result{'s' * (count != 1)}"


def _move(rank: int, id_: str, other: Ranking, when: str) -> tuple[str, str]:
    """Whether augmentation moves a document up or down, and its rank on the other side in words."""
    there = next((place for place, (other_id, _) in enumerate(other.hits, start=1) if other_id == id_), None)
    if there == rank:
        return "same", "same rank"
    if there is None:
        where = f"not in the first {DEPTH:,}" if len(other.hits) == DEPTH else "not found"
        return ("up", f"{where} without") if when == "was" else ("down", f"{where} with it")
    return "up" if (there > rank) == (when == "was") else "down", f"{when} {there:,}"


def model_name(model: str) -> str:
    """A model's Hub id, or the last part of its path: where a server keeps its files is nobody's business."""
    return Path(model).name if Path(model).is_absolute() or model.count("/") != 1 or Path(model).exists() else model


def _is_augmented(index: SearchIndex) -> bool:
    return index.manifest["augmentations"] is not None


def _load_plain(folder: str | Path, index: SearchIndex) -> Retriever:
    """An index of the same documents as they are, with the same retriever."""
    plain = SearchIndex.load(folder)
    if _is_augmented(plain):
        raise InputError(f"{folder}: its documents are augmented; give an index made without --augmentations.")
    for name in ("collection", "num_documents", "retriever"):
        if plain.manifest[name] != index.manifest[name]:
            raise InputError(
                f"{folder} and {index.name} cannot be compared: {name} is {plain.manifest[name]} and "
                f"{index.manifest[name]}; index the same collection with the same retriever."
            )
    return plain.retriever


def import_gradio() -> Any:
    """
    Gradio, told not to send anything home.

    Raises `InputError`: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise InputError(f'The demo needs Gradio ({error}): pip install ".[demo]".') from None
    return gradio
