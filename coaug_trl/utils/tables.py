"""Tables and what stands between them, written for a terminal, in Markdown or in LaTeX."""

import re
import string
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


# In a narrow terminal: what a column of names may be folded to, and what stands between two columns.
NAME_WIDTH, GAP = 20, 2
# Columns of a file or a pipe: a row of numbers is never folded there, a text is.
UNFOLDED, FOLDED = 1000, 100

_SUPERSCRIPTS = str.maketrans(string.ascii_lowercase, "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖ𐞥ʳˢᵗᵘᵛʷˣʸᶻ")
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "…": r"\ldots{}",
    }
)


class Piece(NamedTuple):
    """A stretch of a text; `mark` says why it is marked, and is empty where it is not."""

    text: str
    mark: str = ""


class Cell(NamedTuple):
    """
    What stands in a row under a column.

    Args:
        text: The text; in pieces where some of it is marked.
        bold: Whether it is in bold type.
        superscript: Letters raised after it.
    """

    text: str | list[Piece]
    bold: bool = False
    superscript: str = ""


@dataclass(frozen=True)
class Table:
    """
    A table.

    Args:
        title: What stands above it, and alone where there are no rows.
        header: Names of the columns.
        rows: What is no [`Cell`] becomes one.
        left: The first columns, which are text; the others are numbers and aligned to the right.
        prose: The last columns, if they are sentences to be folded. Then all columns are text; a terminal shows no
            header and puts these columns below each other.
    """

    title: str
    header: list[str]
    rows: Sequence[Sequence[Cell | str]]
    left: int = 1
    prose: int = 0

    def __post_init__(self):
        rows = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]
        object.__setattr__(self, "rows", rows)

    def __str__(self) -> str:
        return self.terminal()

    def terminal(self) -> str:
        """Names are folded where the terminal is narrow, numbers never: columns that do not fit follow below."""
        return _terminal_prose(self) if self.prose else _terminal_numbers(self)

    def markdown(self) -> str:
        """Nothing in title, header and cells is taken for markup."""
        rule = ["---" if self.prose or column < self.left else "---:" for column in range(len(self.header))]
        rows = [[_write(cell, escape_markdown, "**{}**", "<sup>{}</sup>") for cell in row] for row in self.rows]
        lines = [list(map(escape_markdown, self.header)), rule, *rows] if rows else []
        written = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([escape_markdown(self.title), "", *written]).strip()

    def latex(self) -> str:
        """A table with a caption; needs the package booktabs."""
        if not self.rows:
            return escape_latex(self.title)
        rows = [
            [_write(cell, escape_latex, r"\textbf{{{}}}", r"\textsuperscript{{{}}}") for cell in row]
            for row in self.rows
        ]
        left = len(self.header) - self.prose if self.prose else self.left
        columns = "l" * left + (f"p{{{0.72 / self.prose:.2f}\\linewidth}}" if self.prose else "r") * (
            len(self.header) - left
        )
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{escape_latex(self.title)}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                " & ".join(map(escape_latex, self.header)) + r" \\",
                r"\midrule",
                *(" & ".join(row) + r" \\" for row in rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def write(parts: Iterable[Table | str], format: str = "table") -> str:
    """
    Writes tables and paragraphs.

    Args:
        parts: In their order.
        format: `"table"` for a terminal, `"markdown"`, or `"latex"`.

    Returns: the parts with an empty line between them.
    """
    paragraph = {"table": _terminal_paragraph, "markdown": escape_markdown, "latex": escape_latex}[format]
    method = {"table": Table.terminal, "markdown": Table.markdown, "latex": Table.latex}[format]
    return "\n\n".join(paragraph(part) if isinstance(part, str) else method(part) for part in parts)


def describe_marks(format: str) -> str:
    """How marked pieces stand out, as the end of a sentence."""
    if format != "table":
        return "bold"
    return "marked" if _console(FOLDED).color_system else "in capitals"


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*`<\[\]~&$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def escape_latex(text: str) -> str:
    return text.translate(_LATEX)


def _write(cell: Cell, escape, bold: str, raised: str) -> str:
    pieces = [Piece(cell.text, "bold" * cell.bold)] if isinstance(cell.text, str) else cell.text
    # a line break would end the row
    escaped = ((escape(re.sub(r"\s+", " ", piece.text)), piece.mark) for piece in pieces)
    text = "".join(bold.format(text) if mark else text for text, mark in escaped)
    return text + raised.format(cell.superscript) if cell.superscript else text


def _console(width: int) -> Console:
    """`width` is for a file or a pipe; a terminal has its own."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else width, highlight=False)


def _print(console: Console, *parts: Text | RichTable) -> str:
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()


def _text(cell: Cell, capitals: bool = False) -> Text:
    # Text, not str: rich takes square brackets and colons of a str for markup
    if isinstance(cell.text, str):
        return Text(cell.text + cell.superscript.translate(_SUPERSCRIPTS), "bold" * cell.bold)
    return Text.assemble(
        *(
            (piece.text.upper() if capitals and piece.mark else piece.text, "bold green" if piece.mark else "")
            for piece in cell.text
        )
    )


def _terminal_paragraph(text: str) -> str:
    return _print(_console(FOLDED), Text(text))


def _terminal_numbers(table: Table) -> str:
    console = _console(UNFOLDED)
    lines = [table.header, *([_text(cell).plain for cell in row] for row in table.rows)]
    widths = [max(cell_len(line[column]) for line in lines) + GAP for column in range(len(table.header))]
    names = list(range(table.left))
    names_width = sum(min(widths[column], NAME_WIDTH) for column in names)
    console.width = max(console.width, names_width + max(widths[table.left :], default=0))
    room = console.width - names_width
    blocks: list[list[int]] = [[]]
    for column in range(table.left, len(table.header)):
        if blocks[-1] and sum(widths[each] for each in blocks[-1]) + widths[column] > room:
            blocks.append([])
        blocks[-1].append(column)
    tables = [_rich_table(table, names + block) for block in blocks] if table.rows else []
    return _print(console, Text(table.title), *tables)


def _rich_table(table: Table, columns: list[int]) -> RichTable:
    rich_table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        name = column < table.left
        rich_table.add_column(
            Text(table.header[column]), justify="left" if name else "right", overflow="fold", no_wrap=not name
        )
    for row in table.rows:
        rich_table.add_row(*(_text(row[column]) for column in columns))
    return rich_table


def _terminal_prose(table: Table) -> str:
    console = _console(FOLDED)
    capitals = console.color_system is None
    names = len(table.header) - table.prose
    grid = RichTable.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for _ in range(names + 1):
        grid.add_column(overflow="fold")
    for row in table.rows:
        first, *texts = (_text(cell, capitals) for cell in row[names:] if cell.text)
        texts = Text.assemble(first, *(part for text in texts for part in ("\n+ ", text)))
        grid.add_row(Text("  ") + _text(row[0]), *map(_text, row[1:names]), texts)
    return _print(console, Text(table.title, "bold"), grid)
