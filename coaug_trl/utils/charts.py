"""Small charts for a page: SVG that takes its colours and letters from the page, and is described in words."""

import io
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np


# As wide as a phone shows them, so that letters keep their size there; one unit is a pixel.
WIDTH, HEIGHT, LETTERS = 340, 216, 12
# matplotlib writes these colours, and the page says what they are in light and in dark.
INK, MUTED, LINE = "#100001", "#100002", "#100003"
SERIES = ("#100004", "#100005", "#100006")
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)
}
# Told apart by more than their colour.
_DASHES = ((), (5, 2), (1.5, 1.8))
# Lines with as many points as this mark each of them.
_FEW = 15
# About as many as can be told apart: points of a line, and queries side by side.
_POINTS, _QUERIES = 400, 1000


def draw_lines(
    name: str,
    title: str,
    description: str,
    series: dict[str, list[tuple[int, float]]],
    percent: bool = False,
    log: bool = False,
    marked: tuple[int, float] | None = None,
) -> str:
    """
    Draws values by optimizer step, each line named at its end.

    Args:
        name (`str`):
            Of the chart, different from that of any other on the page.
        title (`str`):
            What it shows, for screen readers.
        description (`str`):
            What is to be seen in it, likewise.
        series (`dict[str, list[tuple[int, float]]]`):
            Name of each line, up to three, to steps and finite values; a single line goes without its name.
        percent (`bool`, *optional*, defaults to `False`):
            Whether values are shares, to be shown as per cent.
        log (`bool`, *optional*, defaults to `False`):
            Whether values, all positive, stand on a logarithmic scale.
        marked (`tuple[int, float]`, *optional*):
            Step and value of the best point.

    Returns:
        `str`: an `svg` element.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with _style(name):
        figure, axes = _figure()
        values = [value for points in series.values() for _, value in points]
        series = {label: _thin(points) for label, points in series.items()}
        for (_, points), colour, dashes in zip(series.items(), SERIES, _DASHES, strict=False):
            few = {"marker": "o", "markersize": 4} if len(points) <= _FEW else {}
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, dashes=dashes, clip_on=False, **few)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
            axes.tick_params(axis="y", which="minor", length=0)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            if min(values) >= 0:
                axes.set_ylim(0, max(values) * 1.08 or 1)
            if percent:
                axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.set_xlabel("optimizer step")
        if len(series) > 1:
            axes.get_ylim()  # matplotlib finds the limits when they are asked for
            last = [axes.transLimits.transform(axes.transScale.transform(points[-1])) for points in series.values()]
            places = _spread([y for _, y in last], gap=0.1)
            for label, colour, y in zip(series, SERIES, places, strict=False):
                axes.text(1.03, y, label, color=colour, va="center", transform=axes.transAxes)
        if marked:
            axes.plot(*marked, "o", color=INK, markersize=9, fillstyle="none", markeredgewidth=1.6, clip_on=False)
            # where the lines are not
            place = {"y": 0.05} if marked[1] > sum(axes.get_ylim()) / 2 else {"y": 0.97, "va": "top"}
            text = f"best (circled): {marked[1]:.4f} at step {marked[0]:,}"
            axes.text(0.98, s=text, color=INK, ha="right", transform=axes.transAxes, **place)
        return _embed(figure, name, title, description)


def draw_gains(name: str, title: str, description: str, changes: Sequence[float], ylabel: str) -> str:
    """
    Draws how much each query gained or lost, the greatest gain first.

    Args:
        name (`str`):
            Of the chart, different from that of any other on the page.
        title (`str`):
            What it shows, for screen readers.
        description (`str`):
            What is to be seen in it, likewise.
        changes (`Sequence[float]`):
            Change of each query.
        ylabel (`str`):
            What has changed.

    Returns:
        `str`: an `svg` element.
    """
    with _style(name):
        figure, axes = _figure()
        changes = np.sort(changes)[::-1]
        gain, loss = SERIES[:2]
        better, worse = int((changes > 0).sum()), int((changes < 0).sum())
        # of many queries every so many-th, the first and the last among them
        shown = changes[np.linspace(0, len(changes) - 1, min(len(changes), _QUERIES)).round().astype(int)]
        edges = np.linspace(0, len(changes), len(shown) + 1)
        for part, colour in ((shown.clip(min=0), gain), (shown.clip(max=0), loss)):
            axes.stairs(part, edges, fill=True, color=colour, linewidth=0)
        axes.axhline(0, color=INK, linewidth=1)
        top, bottom = max(changes.max(), 0), min(changes.min(), 0)
        room = 0.2 * (top - bottom or 1)  # for the words
        limits = (min(bottom, -room * bool(worse)), max(top, room) * 1.04)
        axes.set(xlim=(0, len(changes)), ylim=limits, ylabel=ylabel)
        axes.spines.bottom.set_visible(False)
        axes.set_xlabel(f"{len(changes):,} queries, the greatest gain first")
        axes.set_xticks([])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0")
        if worse:
            axes.text(0.02, 0.03, f"{worse:,} worse", color=loss, transform=axes.transAxes)
        counts = ((better, "better", gain), (len(changes) - better - worse, "equal", MUTED))
        for line, (count, word, colour) in enumerate(each for each in counts if each[0]):
            place = {"y": 0.97 - 0.1 * line, "ha": "right", "va": "top", "transform": axes.transAxes}
            axes.text(0.98, s=f"{count:,} {word}", color=colour, **place)
        return _embed(figure, name, title, description)


def _style(name: str):
    """Letters as letters, taken as they are, and the same bytes whenever the same is drawn."""
    from matplotlib import rc_context

    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "text.parse_math": False,
            "font.size": LETTERS,
            "text.color": INK,
            "axes.labelcolor": MUTED,
            "axes.edgecolor": LINE,
            "xtick.color": LINE,
            "ytick.color": LINE,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "axes.labelsize": LETTERS,
            "xtick.labelsize": LETTERS,
            "ytick.labelsize": LETTERS,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "grid.color": LINE,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
        }
    )


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")  # SVG has 72 units an inch
    axes = figure.subplots()
    axes.grid(axis="y", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of a line with many points the first, the last, and the least and the greatest of every stretch."""
    if len(points) <= _POINTS:
        return points
    kept = {0, len(points) - 1}
    for stretch in np.array_split(np.arange(len(points)), _POINTS // 2):
        by_value = sorted(stretch.tolist(), key=lambda place: points[place][1])
        kept |= {by_value[0], by_value[-1]}
    return [points[place] for place in sorted(kept)]


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves places between 0 and 1 apart until neighbours are `gap` from each other."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places, dtype=float)
    least = 0.0
    for place in order:
        moved[place] = max(moved[place], least)
        least = moved[place] + gap
    most = 1.0
    for place in order[::-1]:
        moved[place] = min(moved[place], most)
        most = moved[place] - gap
    return moved.tolist()


def _embed(figure, name: str, title: str, description: str) -> str:
    """An `svg` element to stand in HTML: no fonts, styles or names that would reach beyond it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    referred = set(re.findall(r"#([\w-]+)[\")]", file.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key != "id" or value in referred:
                element.set(key.rpartition("}")[2], _own(value, name, referred))
        if element.tag == "text":  # the letters of the page
            element.set("style", re.sub(r"font-family: [^;]+;? ?", "", element.get("style", "")))
    root.attrib = {
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "class": "chart",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-description",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{'description' if place else 'title'}")
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _own(value: str, name: str, referred: set[str]) -> str:
    """An attribute with the colours of the page, and with names that no other chart has."""
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, f"var({variable})")
    if value in referred:
        return f"{name}-{value}"
    for target in referred:
        if value in (f"#{target}", f"url(#{target})"):
            return value.replace("#", f"#{name}-")
    return value
