"""What mkdocs does besides: files of the repository's root as pages, formulas as MathML, docstrings as TRL's are shown."""

import re
from pathlib import Path
from xml.etree import ElementTree

from griffe import Extension
from latex2mathml.converter import convert


ROOT = Path(__file__).parent.parent
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*(?:\\\(|\\\[)(?P<latex>.*?)(?:\\\)|\\\])\s*</(?P=tag)>', re.DOTALL
)
DRAWING = re.compile(r'<img [^>]*src="(?P<path>assets/\w+\.svg)"[^>]*>')
SECTION = re.compile(r"^(Args|Parameters|Returns|Raises):\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)
LIST = re.compile(r"^( *(?!- )\S.*\n)(?= *- )", re.MULTILINE)
ARGUMENT = re.compile(r"^(?P<names>\*{0,2}\w[\w, *]*?)(?: \((?P<type>.*)\))?:(?P<rest>.*)$")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")
# The names that the reference describes, and their paths.
DESCRIBED = {
    path.rpartition(".")[2]: path
    for path in re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
}


# mkdocs


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """A page may be a file of the repository's root, whose links start there."""
    name = page.meta.get("file")
    if name is None:
        return markdown
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](").replace('src="docs/', 'src="')


def on_page_content(html: str, **kwargs) -> str:
    """Formulas as MathML, which browsers draw without a script; drawings within the page, so that they have its colours."""
    return DRAWING.sub(_to_svg, FORMULA.sub(_to_mathml, html))


def _to_svg(match: re.Match) -> str:
    return f'<span class="drawing">{(ROOT / "docs" / match["path"]).read_text(encoding="utf-8")}</span>'


def _to_mathml(match: re.Match) -> str:
    latex = ElementTree.fromstring(f"<i>{match['latex']}</i>").text  # without HTML's entities
    if match["tag"] == "span":
        return convert(latex)
    return f'<div class="formula">{convert(latex, display="block")}</div>'


# griffe, by which mkdocstrings reads the code


class Docstrings(Extension):
    """Turns the sections of TRL's docstrings into lists, and `[`Name`]` into a link where the name has a place here."""

    def on_object(self, *, obj, loader, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """
    A docstring in TRL's form as Markdown.

    Args:
        docstring (`str`):
            Text with sections such as this one.

    Returns:
        `str`: with a list for each section.
    """
    docstring = LIST.sub(r"\1\n", docstring + "\n")  # Markdown wants an empty line before a list
    docstring = SECTION.sub(_section, docstring)
    return REFERENCE.sub(lambda match: _reference(match[1]), docstring)


def _section(match: re.Match) -> str:
    lines = match[2].rstrip().split("\n")
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    items, in_item = [], []
    for line in lines:
        line = line[indent:]
        starts = line.startswith("`") if match[1] == "Raises" else line[:1].strip() and match[1] != "Returns"
        if starts and in_item:
            items.append(in_item)
            in_item = []
        in_item.append(line)
    items.append(in_item)
    title = "Parameters" if match[1] == "Args" else match[1]
    shown = [_argument(item) if title == "Parameters" else [line.strip() for line in item] for item in items]
    listed = ["- " + "\n".join(("    " + line).rstrip() for line in item).lstrip() for item in shown]
    text = ("\n\n" if any("" in item for item in shown) else "\n").join(listed)  # a list within ends with a blank
    return f"\n**{title}**\n\n{text}\n\n"


def _argument(item: list[str]) -> list[str]:
    """`name (type): description` with the name in bold, and the description behind it."""
    found = ARGUMENT.match(item[0])
    if found is None:
        return item
    names = ", ".join(f"**`{name.strip()}`**" for name in found["names"].split(","))
    kind = f" ({found['type']})" if found["type"] else ""
    body = [line[4:] if line.startswith("    ") else line for line in item[1:]]
    return [f"{names}{kind}:{found['rest']}" + (f" {body[0]}" if body else ""), *body[1:]]


def _reference(name: str) -> str:
    """A link to the name, or to its class, if the reference describes it."""
    *_, last = parts = name.split(".")
    for owner, member in ((last, ""), (parts[-2] if len(parts) > 1 else "", f".{last}")):
        if owner in DESCRIBED:
            return f"[`{name.removeprefix('coaug_trl.')}`][{DESCRIBED[owner]}{member}]"
    return f"`{name}`"
