"""Fills the templates of cards and reports."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..utils.tables import Table, escape_markdown


def render(name: str, **content: Any) -> str:
    """
    Fills a template.

    Args:
        name: Of a file in `templates`. All text in one of HTML is escaped; one of Markdown has filters that do so.
        content: What the template names.

    Returns: the page or the card.
    """
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        finalize=lambda value: clean(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "inline": inline,
        "code": code,
        "fence": fence,
        "grid": grid,
        "table": Table.markdown,
        "json": json.dumps,
        "shell": shlex.quote,
    }
    return environment.get_template(name).render(**content)


def clean(text: str) -> str:
    """Without what neither HTML nor Markdown can hold: control characters and halves of surrogate pairs."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", text)
    return text.encode("utf-8", "replace").decode("utf-8")


def line(value: Any) -> str:
    """A value as a single line; what shows it in Markdown escapes it."""
    return " ".join(str(value).split())


def inline(value: Any) -> str:
    """A value within a line of Markdown, in which nothing is markup."""
    return escape_markdown(line(value))


def longest_run(text: str) -> int:
    """How many backticks follow each other at most."""
    return max(map(len, re.findall("`+", text)), default=0)


def code(value: Any) -> str:
    """Code within a line: nothing in it is markup, backticks included."""
    text = line(value)
    ticks = "`" * (longest_run(text) + 1)
    padding = " " * (len(ticks) > 1)
    return f"{ticks}{padding}{text}{padding}{ticks}"


def fence(text: str, language: str) -> str:
    """A block of code that ends where its fence ends, whatever the text holds."""
    ticks = "`" * max(3, longest_run(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def grid(rows: Iterable[Sequence[Any]], *header: str, left: int = 2) -> str:
    """Rows under a header, as a table of Markdown."""
    return Table("", list(header), [list(map(str, row)) for row in rows], left).markdown()
