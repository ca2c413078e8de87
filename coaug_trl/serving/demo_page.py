"""What the demo shows, as HTML. Every text from outside goes through [`escape`] or [`marked`], and nothing else does."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from ..evaluation.examples import mark
from ..retrieval.analyzer import Analyzer


EXCERPT_WORDS, EXCERPT_CHARACTERS = 60, 600
# Gradio fills templates in by these.
_TEMPLATE = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "@": "&#64;"})


class Hit(NamedTuple):
    """
    A document on one side of the page.

    Args:
        rank: From 1.
        score: Of the retriever.
        document: `_id`, `title` and `text`.
        hidden: Words of the query or its augmentation that are in the document's augmentation only.
        grade: What it was judged, if it was.
        moved: `"up"`, `"down"`, `"same"`, or `""` where there is nothing to compare.
        elsewhere: Its rank on the other side, in words.
    """

    rank: int
    score: float
    document: dict[str, str]
    hidden: list[str]
    grade: int | None
    moved: str
    elsewhere: str


class Column(NamedTuple):
    """
    One side of the page.

    Args:
        title: Its heading.
        searched: What was searched for in what.
        figures: Times and values.
        hits: The first hits; `None` while they are waited for.
        own: Terms of the query.
        added: Terms that only the augmentation has.
        empty: What is said where there are no hits.
    """

    title: str
    searched: str
    figures: list[str]
    hits: list[Hit] | None
    own: set[str]
    added: set[str]
    empty: str = ""


def escape(text: str) -> str:
    """A text that is shown as it is, whatever it holds."""
    return html.escape(text).translate(_TEMPLATE)


def marked(analyzer: Analyzer, text: str, own: set[str], added: set[str], cut: bool = False) -> str:
    """
    Marks words of a text.

    Args:
        analyzer: Says what the same word is.
        text: The text.
        own: Terms marked as the query's own.
        added: Terms marked as added to it.
        cut: Whether to cut a long text to where most words are marked.

    Returns: HTML.
    """
    limits = (EXCERPT_WORDS, EXCERPT_CHARACTERS) if cut else (None, None)
    pieces = mark(analyzer, " ".join(text.split()), {"own": own, "added": added}, *limits)
    return "".join(
        f'<mark class="{piece.mark}">{escape(piece.text)}</mark>' if piece.mark else escape(piece.text)
        for piece in pieces
    )


def header(collection: str, compares: bool) -> str:
    """What the page is."""
    lead = (
        "A model adds words to your query. Below it, what is found without and with them."
        if compares
        else "Plain search: no model was given to augment queries."
    )
    return f'<h1>Search {escape(collection)}</h1><p class="lead">{lead}</p>'


def facts(parts: Sequence[str]) -> str:
    """What stands at the foot of the page."""
    return f'<p class="facts">{escape(" · ".join(parts))}</p>'


def notice(text: str) -> str:
    """A line to the user in place of an augmentation."""
    return f'<p class="notice">{escape(text)}</p>'


def waiting() -> str:
    """Why the model does not write yet."""
    return _panel("Waiting for the model", "<p>It writes for one search after the other.</p>")


def augmentation(analyzer: Analyzer, answer: str, own: set[str], writing: bool = False) -> str:
    """What the model adds to a query, or has added so far."""
    (terms,) = analyzer.terms([answer])
    words = marked(analyzer, answer, own, set(terms) - own)
    if writing:
        return _panel("The model is writing", f'<p dir="auto">{words}<span class="caret"></span></p>')
    if not answer:
        return _panel("The model added nothing", "<p>The query is searched for as it is.</p>")
    return _panel("The model added", f'<p dir="auto">{words}</p>')


def _panel(title: str, content: str) -> str:
    return f'<section class="panel"><h2>{title}</h2>{content}</section>'


def results(analyzer: Analyzer, summary: str, columns: Sequence[Column]) -> str:
    """The sides of the page, below a line that sums up."""
    legend = '<mark class="own">words of the query</mark>'
    if len(columns) > 1:
        legend += ' <mark class="added">words the model added</mark>'
    head = f'<div class="summary"><p>{escape(summary)}</p><p>{legend}</p></div>'
    return f'{head}<div class="columns">{"".join(_column(analyzer, column) for column in columns)}</div>'


def _column(analyzer: Analyzer, column: Column) -> str:
    figures = "".join(f"<span>{escape(figure)}</span>" for figure in column.figures)
    head = (
        f'<h2>{escape(column.title)}</h2><p class="searched">{escape(column.searched)}</p>'
        f'<p class="figures">{figures}</p>'
    )
    if column.hits is None:
        body = '<p class="empty">…</p>'
    elif not column.hits:
        body = f'<p class="empty">{escape(column.empty)}</p>'
    else:
        body = f"<ol>{''.join(_hit(analyzer, hit, column) for hit in column.hits)}</ol>"
    return f"<section>{head}{body}</section>"


def _hit(analyzer: Analyzer, hit: Hit, column: Column) -> str:
    title, text = (
        marked(analyzer, hit.document[name], column.own, column.added, cut=name == "text")
        for name in ("title", "text")
    )
    grade = name = ""
    if hit.grade is not None:
        name = "relevant" if hit.grade > 0 else "judged"
        judged = f"relevant (grade {hit.grade})" if hit.grade > 0 else f"judged not relevant ({hit.grade})"
        grade = f'<span class="grade">{judged}</span>'
    hidden = marked(analyzer, ", ".join(hit.hidden), column.own, column.added)
    return (
        f'<li class="{name}"><span class="rank">{hit.rank}</span><div class="hit">'
        + (f'<h3 dir="auto">{title}</h3>' if title else "")
        + f'<p class="text" dir="auto">{text}</p>'
        + (f'<p class="hidden">in its augmentation: {hidden}</p>' if hidden else "")
        + f'<p class="foot">{grade}<span class="id">{escape(hit.document["_id"])}</span>'
        f"<span>score {hit.score:.4f}</span>"
        + (f'<span class="{hit.moved}">{escape(hit.elsewhere)}</span>' if hit.moved else "")
        + "</p></div></li>"
    )


CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .main.fillable { padding: 16px clamp(14px, 3vw, 32px); }
.coaug .html-container { padding: 0; }
.coaug-query .submit-button { min-width: 6em; border-radius: 6px; font-weight: 600; background: #1d4ed8; color: #fff; }
.coaug-query .submit-button:hover { background: #1e40af; }
.gradio-container .coaug-status { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.coaug { color: var(--body-text-color); font-size: 15px; line-height: 1.5; overflow-wrap: anywhere;
  --own: #1d4ed8; --own-fill: #dbeafe; --added: #9a3412; --added-fill: #ffedd5; --good: #15803d; --bad: #b91c1c;
  --line: var(--border-color-primary); --quiet: #57606a; }
.dark .coaug { --own: #93c5fd; --own-fill: #1e3a5f; --added: #fdba74; --added-fill: #4a2c12; --good: #4ade80;
  --bad: #f87171; --quiet: #a3acb9; }
.coaug h1 { font-size: 1.6rem; line-height: 1.2; font-weight: 650; margin: .6rem 0 .2rem; }
.coaug h2 { font-size: 1rem; font-weight: 650; margin: 0; }
.coaug h3 { font-size: 1rem; font-weight: 600; line-height: 1.35; margin: 0; }
.coaug p { margin: 0; }
.coaug p span { color: inherit; }
.coaug .lead, .coaug .searched, .coaug .figures, .coaug .foot, .coaug .hidden, .coaug .facts { color: var(--quiet); }
.coaug .searched, .coaug .figures, .coaug .foot, .coaug .hidden, .coaug .facts, .coaug .summary { font-size: .86rem; }
.coaug .notice { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 8px; }
.coaug .panel { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--background-fill-secondary); }
.coaug .panel h2 { font-size: .86rem; font-weight: 500; color: var(--quiet); }
.coaug .panel p { min-height: 1.6em; font-size: 1.05rem; }
.coaug mark { color: var(--own); background: var(--own-fill); border-radius: 3px; padding: 0 .15em;
  border-bottom: 1px solid currentColor; }
.coaug mark.added { color: var(--added); background: var(--added-fill); border-bottom-style: dotted; }
.coaug .caret { display: inline-block; width: .5em; height: 1.05em; margin-left: .2em; vertical-align: text-bottom;
  background: var(--added); animation: coaug-blink 1s steps(2, start) infinite; }
@keyframes coaug-blink { to { visibility: hidden; } }
.coaug .summary { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .3rem 1.5rem;
  margin: .2rem 0 1rem; }
.coaug .columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 2rem; }
.coaug .columns section { min-width: 0; }
.coaug .figures, .coaug .foot { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline;
  font-variant-numeric: tabular-nums; }
.coaug .figures { min-height: 1.5em; }
.coaug ol { list-style: none; margin: .7rem 0 0; padding: 0; border-top: 1px solid var(--line); }
.coaug li { display: flex; gap: .7rem; margin: 0; padding: .7rem .6rem .7rem .5rem; border-bottom: 1px solid var(--line);
  border-left: 3px solid transparent; }
.coaug li.relevant { border-left-color: var(--good); }
.coaug .rank { flex: none; min-width: 1.5em; text-align: right; color: var(--quiet); font-variant-numeric: tabular-nums; }
.coaug .hit { min-width: 0; flex: 1; }
.coaug .foot { margin-top: .25rem; }
.coaug .foot .id { font-family: ui-monospace, monospace; }
.coaug .grade { padding: 0 .45em; border: 1px solid currentColor; border-radius: 99px; }
.coaug li.relevant .grade, .coaug .up { color: var(--good); }
.coaug .down { color: var(--bad); }
.gradio-container .coaug .wrap.minimal { overflow: visible; }
.gradio-container .coaug .pending { opacity: 1; }
.coaug .empty { margin-top: .7rem; padding: .7rem 0; border-top: 1px solid var(--line); color: var(--quiet); }
.coaug .facts { margin: 1.5rem 0 1rem; }
@media (prefers-reduced-motion: reduce) { .coaug .caret { animation: none; } }
"""
