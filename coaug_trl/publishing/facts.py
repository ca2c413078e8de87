"""What a run's record says, found once for its card and its report."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..evaluation.comparison import LETTERS, Comparison, Pair
from ..utils.terminal import describe_seconds
from .record import Evaluated, RunRecord


# What the main result is told by, where it was measured.
MEASURE = "nDCG@10"
SIDE_NAMES = {"query": "queries", "document": "documents"}


@dataclass(frozen=True)
class Contrast:
    """The policy against one other system: what that is called, the places of both, and their tests."""

    kind: str
    label: str
    other: int
    policy: int
    pair: Pair  # by the main measure, corrected for all systems
    alone: Comparison


@dataclass(frozen=True)
class Results:
    """
    Evaluations that can be compared.

    Args:
        group: The evaluations, that of the policy last.
        measure: What the main result is told by.
        comparison: Of all of them, if there are two or more.
        contrasts: The policy against retrieval without augmentation and against the best other system, as far as they
            are there.
        seen: What the run has learnt of the queries, `"trained"` or `"chosen"`; then the values are no result.
        notes: What was left out.
    """

    group: list[Evaluated]
    measure: str
    comparison: Comparison | None
    contrasts: list[Contrast]
    seen: str | None
    notes: list[str]

    @property
    def of_policy(self) -> bool:
        """Whether the policy is among them."""
        return self.group[-1].system == "policy"

    @property
    def names(self) -> list[str]:
        """The systems, by their folders."""
        return self.comparison.names if self.comparison else [self.group[0].folder.name]

    def means(self, place: int) -> dict[str, float]:
        """Measures and counts of an evaluation."""
        return self.group[place].evaluation.metrics


def find_results(record: RunRecord, of_others: bool = True) -> list[Results]:
    """
    Compares what can be compared.

    Args:
        record: The run.
        of_others: Whether to compare evaluations, too, among which there is none of the policy.

    Returns: one for each collection and split, in the order of [`RunRecord.comparable`].

    Raises `InputError`: Evaluations of the run cannot be compared.
    """
    return [_results(record, group, of_others) for group in record.comparable]


def _results(record: RunRecord, group: list[Evaluated], of_others: bool) -> Results:
    notes, seen = [], record.seen(group)
    if len(group) > len(LETTERS):
        notes.append(f"{len(LETTERS)} evaluations are compared, {len(group) - len(LETTERS)} more left out")
        group = [group[0], *group[1 - len(LETTERS) :]]
    comparison = record.compare(group) if of_others or group[-1].system == "policy" else None
    measures = list(comparison.values) if comparison else group[0].evaluation.measures
    measure = MEASURE if MEASURE in measures else measures[0]
    if comparison is None:
        return Results(group, measure, None, [], seen, notes)
    contrasts = _contrasts(group, comparison, measure) if group[-1].system == "policy" else []
    return Results(group, measure, comparison, contrasts, seen, notes + comparison.notes)


def _contrasts(group: list[Evaluated], comparison: Comparison, measure: str) -> list[Contrast]:
    policy, means = len(group) - 1, comparison.means(measure)
    alike = [_searched_with(each) == _searched_with(group[policy]) for each in group]
    plain = [place for place, each in enumerate(group) if each.system == "none"]
    plain.sort(key=lambda place: not alike[place])
    others = [place for place, each in enumerate(group) if each.system != "policy" and place not in plain[:1]]
    # neither another retriever nor another trained policy is a baseline
    baselines = [place for place in others if alike[place] and group[place].system == "other"]
    baselines = [place for place in baselines if not _trained_for(group[place])]
    chosen = []
    if plain:
        kind = "no augmentation" + " and another retriever" * (not alike[plain[0]])
        chosen.append((kind, kind, plain[0]))
    if others:
        best = max(baselines or others, key=means.__getitem__)
        name = comparison.names[best]
        chosen.append((f"the best {'baseline' if baselines else 'other system'}, {name}", name, best))
    contrasts = []
    for kind, label, place in chosen:
        alone = comparison.between(place, policy)
        (pair,) = (pair for pair in alone.pairs if pair.measure == measure)
        contrasts.append(Contrast(kind, label, place, policy, pair, alone))
    return contrasts


def _searched_with(evaluated: Evaluated) -> dict[str, Any]:
    """The retriever's configuration, but for RM3, which adds to queries as a policy does."""
    return {name: value for name, value in evaluated.evaluation.manifest["retriever"].items() if name != "rm3"}


def _trained_for(evaluated: Evaluated) -> dict[str, Any]:
    """The retriever that the model behind the augmentations was trained for; empty for an untrained one."""
    return (evaluated.evaluation.manifest.get("augmentations") or {}).get("retriever") or {}


def describe_training(record: RunRecord) -> dict[str, str]:
    """
    The figures of a training, written out, as far as they are known.

    Args:
        record: The run.

    Returns: `documents`, `queries` and `judgments` it trained on, `processes`, `completions`; of what was logged
        `steps`, `epochs`, `tokens`, the time of all steps as `seconds`, and the last `reward`.
    """
    training, last = record.training, record.last
    counts = {
        "documents": training.get("num_documents"),
        "queries": training.get("num_train_queries"),
        "judgments": training.get("num_train_judgments"),
        "processes": training.get("num_processes"),
        "completions": record.num_completions,
        "steps": record.history[-1]["step"] if record.history else None,
        "tokens": last("num_tokens"),
    }
    facts = {name: f"{count:,.0f}" for name, count in counts.items() if is_finite(count)}
    if is_finite(epoch := last("epoch")):
        facts["epochs"] = f"{epoch:.1f}"
    if record.step_seconds and is_finite(record.step_seconds):
        facts["seconds"] = describe_seconds(record.step_seconds)
    if is_finite(reward := last("reward")):
        facts["reward"] = f"{reward:.4f}"
    return facts


def find_dev(record: RunRecord) -> str | None:
    """The name under which nDCG on the dev split was logged, if it was."""
    names = sorted({name for entry in record.history for name in entry if re.fullmatch(r"eval_nDCG@\d+", name)})
    return next((name for name in names if record.points(name)), None)


def is_finite(value: Any) -> bool:
    """Whether a value from a file is a number that can be shown."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def name_sides(sides: Iterable[str]) -> str:
    """The augmented sides in words, queries first."""
    return " and ".join(name for side, name in SIDE_NAMES.items() if side in sides)


def name_augmented(evaluated: Evaluated) -> str:
    """What was augmented in an evaluation."""
    return name_sides(evaluated.sides) or (
        "queries" if "rm3" in evaluated.evaluation.manifest["retriever"] else "nothing"
    )


def describe_retriever(config: dict[str, Any]) -> str:
    """A retriever's configuration in a line."""
    rest = ", ".join(f"{name} {write_value(value)}" for name, value in config.items() if name != "retriever")
    return f"{config.get('retriever', 'unknown')}" + f" ({rest})" * bool(rest)


def write_value(value: Any) -> str:
    """A setting as it is read in a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
