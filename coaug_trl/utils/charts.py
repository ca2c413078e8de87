"""All that is drawn: SVG for pages, PNG for cards and studies, through matplotlib and its own settings."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import InputError


# As wide as a phone shows them, so that letters keep their size there; SVG has 72 units an inch.
WIDTH, HEIGHT, LETTERS = 340, 216, 12
INK, MUTED, LINE = "#1a1d21", "#5a626c", "#b9bfc6"
SERIES = ("#0b61a4", "#b04a00", "#5b5f66", INK)
# Told apart by more than their colour.
_DASHES = ((), (5, 2), (1.5, 1.8), (6, 2, 1.5, 2))
# Lines with as many points as this mark each of them.
_FEW = 15
# About as many as can be told apart: points of a line, and queries side by side.
_POINTS, _QUERIES = 400, 1000


def draw_lines(
    series: dict[str, list[tuple[int, float]]],
    ylabel: str = "",
    percent: bool = False,
    log: bool = False,
    marked: tuple[int, float] | None = None,
    form: str = "svg",
) -> bytes:
    """
    Draws values by optimizer step, each line named at its end.

    Args:
        series: Name of each line, up to four, to steps and finite values; a single line goes without its name.
        ylabel: What the values are.
        percent: Whether values are shares, to be shown as per cent.
        log: Whether values, all positive, stand on a logarithmic scale.
        marked: Step and value of the best point.
        form: `"svg"`, without a background, or `"png"`.

    Returns: the file, the same whenever the same is drawn.
    """
    series = {label: _thin(points) for label, points in series.items() if points}
    with _style():
        figure, axes = _figure()
        for points, colour, dashes in zip(series.values(), SERIES, _DASHES, strict=False):
            few = {"marker": "o", "markersize": 4} if len(points) <= _FEW else {}
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, dashes=dashes, clip_on=False, **few)
        _scale(axes, [value for points in series.values() for _, value in points], percent, log)
        axes.set(xlabel="optimizer step", ylabel=ylabel)
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
        return _save(figure, form)


def _scale(axes, values: list[float], percent: bool, log: bool) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.tick_params(axis="y", which="minor", length=0)
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if min(values) >= 0:
        axes.set_ylim(0, max(values) * 1.08 or 1)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def draw_gains(changes: Sequence[float], ylabel: str) -> bytes:
    """
    Draws how much each query gained or lost, the greatest gain first.

    Args:
        changes: Change of each query.
        ylabel: What has changed.

    Returns: an SVG file without a background.
    """
    with _style():
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
        return _save(figure, "svg")


def draw_errors(rows: Sequence[dict[str, Any]], k: int, bound: float) -> bytes:
    """
    Draws how far sampled rewards are from the exact ones, and how long both take, by the number of samples.

    Args:
        rows: Of [`~coaug_trl.studies.sampled_reward.RewardError`], as dictionaries.
        k: Of the NDCG.
        bound: An error to compare with.

    Returns: a PNG file.

    Raises `InputError`: matplotlib is not installed.
    """
    figure = import_figure()(figsize=(13, 4.6), layout="constrained")
    samples = sorted({row["num_samples"] for row in rows})
    of_queries, of_documents, of_time = figure.subplots(1, 3)
    of_documents.sharey(of_queries)
    for number, pool in enumerate(dict.fromkeys(row["num_documents"] for row in rows)):
        chosen = [row for row in rows if row["num_documents"] == pool]
        style = {"color": f"C{number}", "marker": "o", "markersize": 3}
        count = chosen[0]["num_queries"]
        label = f"{pool:,} documents, {count} quer{'y' if count == 1 else 'ies'}"
        for axes, side in ((of_queries, "query"), (of_documents, "document")):
            axes.plot(samples, [row[f"{side}_error"] for row in chosen], label=label, **style)
            axes.plot(samples, [row[f"{side}_largest"] for row in chosen], linestyle=":", **style)
        of_time.plot(samples, [row["sampled_seconds"] for row in chosen], **style)
        of_time.axhline(chosen[0]["exact_seconds"], color=f"C{number}", linestyle="--")
    # Below the curves, where it can be seen.
    lowest = min(row["document_error"] for row in rows if row["num_samples"] == samples[0]) / 2
    for axes, title in ((of_queries, "Query rollouts"), (of_documents, "Document rollouts")):
        slope = [lowest * (samples[0] / each) ** 0.5 for each in samples]
        axes.plot(samples, slope, color="black", linewidth=0.8, label="slope of 1 / √samples")
        axes.axhline(bound, color="grey", linewidth=0.8, linestyle="-.", label=f"{bound:g}, the paper's bound")
        axes.set(title=title, ylabel=f"absolute error of the reward (NDCG@{k})")
        axes.text(0.97, 0.97, "solid: mean\ndotted: largest", ha="right", va="top", transform=axes.transAxes)
    of_time.set(title="Time", ylabel="seconds for the rewards of the pool")
    of_time.text(0.03, 0.97, "solid: sampled\ndashed: exact", va="top", transform=of_time.transAxes)
    for axes in (of_queries, of_documents, of_time):
        axes.set(xlabel="samples (draws of one rollout for each document)", xscale="log", yscale="log")
        axes.set_xticks(samples, [f"{each:,}" for each in samples], rotation=45)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.legend(*of_queries.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    return _save(figure, "png", dpi=150)


def import_figure(hint: str = 'pip install ".[plot]", or leave --output out') -> type:
    """matplotlib's figure; an `InputError` with this hint where matplotlib, an extra, is not installed."""
    try:
        import matplotlib.figure
    except ImportError:
        raise InputError(f"The picture needs matplotlib: {hint}.") from None
    return matplotlib.figure.Figure


def _style():
    """Letters as letters, taken as they are, and the same bytes whenever the same is drawn."""
    from matplotlib import rc_context

    sizes = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
    lines = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    muted = ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    return rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "coaug", "text.parse_math": False, "text.color": INK}
        | {"axes.facecolor": "none", "figure.facecolor": "none", "font.family": "sans-serif"}
        | {f"axes.spines.{side}": False for side in ("top", "right", "left")}
        | dict.fromkeys(sizes, LETTERS)
        | dict.fromkeys(lines, LINE)
        | dict.fromkeys(muted, MUTED)
    )


def _figure():
    figure = import_figure()(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _save(figure, form: str, dpi: int = 300) -> bytes:
    file = io.BytesIO()
    if form == "png":
        figure.savefig(file, format="png", dpi=dpi, facecolor="white")
    else:
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


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
