"""A report as a page of HTML and as Markdown: what it is made of, and how that is written."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..evaluation.examples import Example, example_tables
from ..utils.files import atomic_open
from ..utils.tables import Table, write
from .templating import clean, fence, inline, render


HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
# Letters of a row, and rows with the header, of a table that never scrolls.
NARROW, SHORT = 28, 10


# What a report is made of


@dataclass(frozen=True)
class Paragraph:
    """A sentence or a few."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Hint:
    """What is missing, and the command that makes it."""

    kind: ClassVar[str] = "hint"
    text: str
    command: str = ""


@dataclass(frozen=True)
class Bars:
    """A few values between 0 and 1, and where they come from."""

    kind: ClassVar[str] = "bars"
    measure: str
    title: str
    rows: list[tuple[str, float]]
    source: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    rows: list[tuple[str, str]]
    source: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """A table."""

    kind: ClassVar[str] = "numbers"
    table: Table
    source: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A chart, a line on what it shows, and its numbers, which Markdown has in its place."""

    kind: ClassVar[str] = "figure"
    title: str
    note: str
    image: str  # of [`embed`]
    description: str
    table: Table
    source: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """Charts beside each other, in as many columns as there is room for, or two."""

    kind: ClassVar[str] = "figures"
    figures: list[Figure]
    wide: bool = False


@dataclass(frozen=True)
class Verbatim:
    """A text as it is."""

    kind: ClassVar[str] = "verbatim"
    text: str
    source: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """What not everyone wants to see."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: list["Block"]


@dataclass(frozen=True)
class Cases:
    """What two systems made of some queries and of a document relevant to each."""

    kind: ClassVar[str] = "cases"
    title: str
    measure: str
    names: tuple[str, str]
    examples: list[Example]
    source: tuple[str, ...]


Block = Paragraph | Hint | Bars | Facts | Numbers | Figure | Figures | Verbatim | Fold | Cases


@dataclass(frozen=True)
class Section:
    """A part of the report under a heading; `name` is what links call it."""

    name: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    """
    A report, ready to be written.

    Args:
        title: Its heading.
        subtitle: Which run it is about.
        headline: The main result in a few sentences.
        bars: Its values.
        hints: What the main result lacks.
        sections: The rest.
        notes: What was left out.
    """

    title: str
    subtitle: str
    headline: list[str]
    bars: Bars | None
    hints: list[Hint]
    sections: list[Section]
    notes: list[str]


# Writing


def save_report(report: Report, folder: str | Path) -> list[Path]:
    """
    Writes a report as `report.html` and `report.md`.

    Args:
        report: The report.
        folder: Where to; made if it is not there.

    Returns: the two files.
    """
    paths = [Path(folder) / HTML_FILE, Path(folder) / MARKDOWN_FILE]
    for path, content in zip(paths, (render_html(report), render_markdown(report)), strict=True):
        with atomic_open(path) as file:
            file.write(content)
    return paths


def embed(svg: bytes) -> str:
    """A chart as the address of a picture: nothing in it reaches the page, and nothing is fetched."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def render_html(report: Report) -> str:
    """The page; all text in it is escaped."""
    return render("report.html.jinja", report=report, may_scroll=_may_scroll)


def _may_scroll(table: Table) -> bool:
    """Whether a table may be wider than a phone, or longer than the box of a figure's numbers."""
    rows = [table.header, *([cell.text + cell.superscript for cell in row] for row in table.rows)]
    letters = sum(max(len(row[column]) for row in rows) + 2 for column in range(len(table.header)))
    return letters > NARROW or len(rows) > SHORT


def render_markdown(report: Report) -> str:
    """The same in Markdown, with numbers in the place of charts."""
    blocks = [f"# {inline(report.title)}", inline(report.subtitle), inline(" ".join(report.headline))]
    if report.bars:
        blocks.append(_block(report.bars, 2))
    blocks += [_block(hint, 2) for hint in report.hints]
    for section in report.sections:
        blocks += [f"## {inline(section.title)}", *(_block(block, 3) for block in section.blocks)]
    blocks += [f"Note: {inline(note)}." for note in report.notes]
    return clean("\n\n".join(blocks)) + "\n"


def _block(block: Block, level: int) -> str:
    """A block in Markdown, its own headings of this level."""
    heading = "#" * level
    match block:
        case Paragraph(text):
            return inline(text)
        case Hint(text, command):
            return f"> {inline(text)}" + f" `{command}`" * bool(command)
        case Bars(measure, title, rows, source):
            cells = [[label, f"{value:.4f}"] for label, value in rows]
            return _table(Table(title, ["system", measure], cells, left=1), source)
        case Facts(rows, source):
            return "\n".join(f"- **{name}:** {inline(value)}" for name, value in rows) + f"\n\n{_from(source)}"
        case Numbers(table, source):
            return _table(table, source)
        case Figure(title, note, _, _, table, source):
            return "\n\n".join([f"{heading} {inline(title)}", inline(note), _table(table, source)])
        case Figures(figures, _):
            return "\n\n".join(_block(figure, level) for figure in figures)
        case Verbatim(text, source):
            return f"{fence(text.strip(), 'text')}\n\n{_from(source)}"
        case Fold(title, blocks):
            return "\n\n".join([f"{heading} {inline(title)}", *(_block(each, level + 1) for each in blocks)])
        case Cases(title, measure, names, examples, source):
            written = write(example_tables(measure, names, examples, "markdown"), "markdown")
            return f"{heading} {inline(title)}\n\n{written}\n\n{_from(source)}"


def _table(table: Table, source: tuple[str, ...]) -> str:
    return f"{table.markdown()}\n\n{_from(source)}"


def _from(source: tuple[str, ...]) -> str:
    return f"<sub>from {', '.join(map(inline, source))}</sub>"
