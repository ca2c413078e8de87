"""What was logged in training, as the figures of a report."""

from pathlib import Path

import numpy as np

from ..data.groups import TEXT_TYPES
from ..utils.charts import draw_lines
from ..utils.tables import Table
from .facts import find_dev
from .pages import Block, Figure, Figures, Hint, Paragraph, embed
from .record import TRAINER_STATE, RunRecord


# Rows of a table of steps.
STEP_ROWS = 11
# name of the metric, title, what it is, format of its numbers
_BY_TYPE = (
    (
        "reward",
        "Reward",
        "Mean expected nDCG@{k} of rollouts; lines that cover each other are nearly equal; see Numbers.",
        ".4f",
    ),
    (
        "advantage_std",
        "Spread of advantages",
        "Standard deviation, after the scales of the text types; logarithmic.",
        ".3g",
    ),
    ("answer_words", "Words of an answer", "Mean over rollouts.", ".2f"),
    (
        "distinct_words",
        "Distinct words",
        "Of all words answered in a batch; low where texts settle on the same.",
        ".1%",
    ),
    ("answer_rate", "Answered", "Rollouts with an answer that is not empty.", ".1%"),
    ("clipped_ratio", "Cut off", "Rollouts that reached the longest length.", ".1%"),
)
_OF_ALL = (
    ("entropy", "Entropy", "Of the next token in nats, mean.", ".3f"),
    ("grad_norm", "Gradient norm", "Before clipping.", ".3g"),
)


def training_curves(record: RunRecord, folder: Path, source: tuple[str, ...]) -> list[Block]:
    """
    Draws what was logged.

    Args:
        record: The run, or the checkpoint to report of one that was interrupted.
        folder: The run's folder.
        source: The file it was logged in, as the report names it.

    Returns: the figures, or a hint why there are none.
    """
    k = record.training.get("arguments", {}).get("ndcg_k", 10)
    figures = [_dev_figure(record, folder, source)]
    for metric, title, note, form in _BY_TYPE:
        series = {text_type: record.points(f"{text_type}/{metric}") for text_type in TEXT_TYPES}
        figures.append(_curve(title, note.format(k=k), form, series, source, log=metric == "advantage_std"))
    for metric, title, note, form in _OF_ALL:
        figures.append(_curve(title, note, form, {title.lower(): record.points(metric)}, source))
    figures = [figure for figure in figures if figure]
    if not figures:
        return [Hint(f"There are no curves: the folder has no {TRAINER_STATE} with what was logged.")]
    return [Paragraph("By text type: queries, and documents relevant or irrelevant in their group."), Figures(figures)]


def _curve(
    title: str,
    note: str,
    form: str,
    series: dict[str, list[tuple[int, float]]],
    source: tuple[str, ...],
    log: bool = False,
    marked: tuple[int, float] | None = None,
) -> Figure | None:
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    values = [value for points in series.values() for _, value in points]
    changes = [f"{label} from {points[0][1]:{form}} to {points[-1][1]:{form}}" for label, points in series.items()]
    steps = sorted({step for points in series.values() for step, _ in points})
    description = f"By optimizer step, {steps[0]} to {steps[-1]}: {'; '.join(changes)}."
    svg = draw_lines(series, percent=form.endswith("%"), log=log and min(values) > 0, marked=marked)
    return Figure(title, note, embed(svg), description, _step_table(title, series, form), source)


def _step_table(title: str, series: dict[str, list[tuple[int, float]]], form: str) -> Table:
    steps = sorted({step for points in series.values() for step, _ in points})
    shown = [steps[place] for place in sorted({round(p) for p in np.linspace(0, len(steps) - 1, STEP_ROWS)})]
    values = [dict(points) for points in series.values()]
    rows = [[f"{step:,}", *(format(each[step], form) if step in each else "–" for each in values)] for step in shown]
    every = f"{len(shown)} of the {len(steps):,} steps logged" if len(shown) < len(steps) else "all steps logged"
    return Table(f"{title}, {every}", ["step", *series], rows, left=0)


def _dev_figure(record: RunRecord, folder: Path, source: tuple[str, ...]) -> Figure | None:
    name = find_dev(record)
    if name is None:
        return None
    series = {"rebuilt": record.points(name), "training": record.points(f"{name}_reward_statistics")}
    best = max(series["rebuilt"], key=lambda point: point[1])
    kept = ""
    if (folder / f"checkpoint-{best[0]}").is_dir():
        kept = f", kept as checkpoint-{best[0]}"
    elif folder == record.folder:  # an interrupted run says at its top what is reported
        weights = _step_of_weights(record)
        kept = f"; the folder has the weights of step {weights:,}" if weights is not None else ""
    note = f"Best: {best[1]:.4f} at step {best[0]:,}{kept}. "
    if series["training"]:
        note += (
            "Rebuilt: in an index of the augmented corpus, as it is served; training: with the reward's statistics."
        )
    title = f"Dev {name.removeprefix('eval_')} by checkpoint"
    return _curve(title, note, ".4f", series, source, marked=best)


def _step_of_weights(record: RunRecord) -> int | None:
    """The step whose weights a finished run's folder has; `None` where its files do not tell."""
    arguments = record.training.get("arguments")
    if arguments is None:
        return None
    return record.best_step if arguments.get("load_best_model_at_end") else record.history[-1]["step"]
