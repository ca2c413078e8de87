"""Compare evaluations: means, paired tests of all pairs, and the queries that changed most, with examples."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..utils.errors import InputError
from ..utils.tables import Cell, Table, write
from .examples import Example, example_tables, read_examples
from .folder import TEXTS_FILE, Evaluation, load_evaluation
from .significance import compare_differences, holm


LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIGNIFICANT = 0.01
EXAMPLES = 3


@dataclass(frozen=True)
class Pair:
    """
    Two systems compared by one measure; differences are the later system minus the earlier.

    Args:
        measure: Name of the measure.
        earlier: Place of the system that was listed first.
        later: Place of the other.
        mean_difference: Mean of the differences.
        interval: Its 95 % confidence interval by Student's t, not corrected; not numbers for a single query.
        effect_size: Cohen's d_z, the mean of the differences in units of their standard deviation: infinite where
            every query differs by the same, not a number for a single query.
        wins: Queries on which the later system is better.
        ties: Queries on which they are equal.
        losses: Queries on which the later system is worse.
        p_t_test: Of the paired Student test, as [`~coaug_trl.evaluation.significance.compare`] gives it.
        p_randomization: Of Fisher's randomisation test, likewise.
        p_t_test_holm: Corrected by [`holm`] for the number of pairs.
        p_randomization_holm: Likewise.
    """

    measure: str
    earlier: int
    later: int
    mean_difference: float
    interval: tuple[float, float]
    effect_size: float
    wins: int
    ties: int
    losses: int
    p_t_test: float
    p_randomization: float
    p_t_test_holm: float
    p_randomization_holm: float


@dataclass(frozen=True)
class Comparison:
    """
    Systems compared on the same queries.

    Args:
        names: Names of the systems, the baseline first.
        values: Measure to, for each system, query id to value.
        pairs: All pairs of systems, measure by measure.
        examples: The queries that changed most from the first system to the last, with their texts.
        notes: What was left out.
    """

    names: list[str]
    values: dict[str, list[dict[str, float]]]
    pairs: list[Pair]
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        """What p-values are corrected for, in words."""
        count = math.comb(len(self.names), 2)
        return "the one pair of systems" if count == 1 else f"the {count} pairs of systems, measure by measure"

    def means(self, measure: str) -> list[float]:
        """Mean of a measure for each system."""
        return [fmean(values.values()) for values in self.values[measure]]

    def beaten(self, measure: str) -> list[list[int]]:
        """
        For each system the places of those it is better than, with a corrected p of the t test below 0.01.

        The t test, because a drawn randomisation test has a smallest p (2 in 10,000), which the correction for eleven
        systems already lifts above 0.01.
        """
        beaten = [[] for _ in self.names]
        for pair in self.pairs:
            if pair.measure == measure and pair.p_t_test_holm < SIGNIFICANT:
                better, worse = (pair.later, pair.earlier) if pair.mean_difference > 0 else (pair.earlier, pair.later)
                beaten[better].append(worse)
        return [sorted(places) for places in beaten]

    def changes(self, measure: str) -> list[tuple[str, float, float]]:
        """
        The queries that gained most from the first system to the last, then those that lost most.

        Args:
            measure: Name of the measure.

        Returns: query id, value of the first system, value of the last; up to three gains and up to three losses, the
            greatest first.
        """
        first, last = self.values[measure][0], self.values[measure][-1]
        by_change = sorted(first, key=lambda query_id: (first[query_id] - last[query_id], query_id))
        gained = [query_id for query_id in by_change[:EXAMPLES] if last[query_id] > first[query_id]]
        lost = [query_id for query_id in by_change[: -EXAMPLES - 1 : -1] if last[query_id] < first[query_id]]
        return [(query_id, first[query_id], last[query_id]) for query_id in gained + lost]

    def between(self, earlier: int, later: int) -> "Comparison":
        """
        Two of the systems, without examples; p-values stay corrected for all pairs of this comparison.

        Args:
            earlier: Place of the system that was listed first.
            later: Place of the other.

        Returns: of these two.
        """
        places = (earlier, later)
        return Comparison(
            names=[self.names[place] for place in places],
            values={measure: [values[place] for place in places] for measure, values in self.values.items()},
            pairs=[replace(pair, earlier=0, later=1) for pair in self.pairs if (pair.earlier, pair.later) == places],
        )

    def content(self) -> dict[str, Any]:
        """Means, tests of all pairs, and the queries that changed most by the first measure, for JSON."""
        first = next(iter(self.values))
        return {
            "names": self.names,
            "num_queries": len(self.values[first][0]),
            "means": {measure: self.means(measure) for measure in self.values},
            "pairs": [asdict(pair) for pair in self.pairs],
            "changes": [{"_id": id_, "first": before, "last": after} for id_, before, after in self.changes(first)],
            "notes": self.notes,
        }

    def render(self, format: str = "table") -> str:
        """
        Writes the tables: means, with three systems or more the matrix of p-values of the first measure, pairs for
        each measure, and the queries that changed most by the first measure; then what the first system and the last
        made of those queries.

        Args:
            format: `"table"` for a terminal, `"markdown"`, or `"latex"` (needs the package booktabs).

        Returns: the tables and examples, with an empty line between them.
        """
        parts = [*self._summary(), *map(self.pairs_table, self.values), self._changes()]
        if self.examples:
            parts += example_tables(next(iter(self.values)), (self.names[0], self.names[-1]), self.examples, format)
        return write(parts, format)

    def render_summary(self, format: str = "table") -> str:
        """
        Writes the means and the matrix of p-values alone: what fits a screen with many systems.

        Args:
            format: As in [`render`].

        Returns: the two tables, with an empty line between them.
        """
        return write(self._summary(), format)

    def _summary(self) -> list[Table]:
        # With two systems the one pair says it all.
        return [self.means_table()] + [self.matrix_table(next(iter(self.values)))] * (len(self.names) > 2)

    def means_table(self) -> Table:
        measures = list(self.values)
        means = {measure: [round(mean, 4) for mean in self.means(measure)] for measure in measures}
        beaten = {measure: self.beaten(measure) for measure in measures}
        rows = [
            [LETTERS[place], name]
            + [
                Cell(
                    f"{means[measure][place]:.4f}",
                    bold=means[measure][place] == max(means[measure]),
                    superscript="".join(LETTERS[other] for other in beaten[measure][place]),
                )
                for measure in measures
            ]
            for place, name in enumerate(self.names)
        ]
        num_queries = len(self.values[measures[0]][0])
        title = (
            f"Means over {num_queries:,} queries; superscripts: systems it beats "
            f"(paired t test, p < {SIGNIFICANT} after Holm's correction for {self.family})"
        )
        return Table(title, ["", "system", *measures], rows, left=2)

    def matrix_table(self, measure: str) -> Table:
        """Row against column: + where the row is better, - where it is worse, and the corrected p of the t test."""
        cells = {}
        for pair in self.pairs:
            if pair.measure == measure:
                sign = (pair.mean_difference > 0) - (pair.mean_difference < 0)
                cells[pair.later, pair.earlier] = f"{'-=+'[sign + 1]} {format_p(pair.p_t_test_holm)}"
                cells[pair.earlier, pair.later] = f"{'+=-'[sign + 1]} {format_p(pair.p_t_test_holm)}"
        places = range(len(self.names))
        rows = [
            [LETTERS[row], self.names[row]] + [cells.get((row, column), "") for column in places] for row in places
        ]
        title = (
            f"{measure}: is the row better (+) or worse (-) than the column, with p of the paired t test after Holm's "
            f"correction for {self.family}"
        )
        return Table(title, ["", "system", *(LETTERS[place] for place in places)], rows, left=2)

    def pairs_table(self, measure: str) -> Table:
        return Table(
            f"{measure}: all pairs; w/t/l: wins, ties, losses of the pair's first; p of the paired t test and of "
            f"Fisher's randomisation test, each before and after Holm's correction for {self.family}",
            ["pair", "difference", "d_z", "w/t/l", "p t", "Holm", "p Fisher", "Holm"],
            [
                [
                    f"{LETTERS[pair.later]} - {LETTERS[pair.earlier]}",
                    f"{pair.mean_difference:+.4f}",
                    f"{pair.effect_size:+.2f}",
                    f"{pair.wins}/{pair.ties}/{pair.losses}",
                    format_p(pair.p_t_test),
                    format_p(pair.p_t_test_holm),
                    format_p(pair.p_randomization),
                    format_p(pair.p_randomization_holm),
                ]
                for pair in self.pairs
                if pair.measure == measure
            ],
        )

    def _changes(self) -> Table:
        measure = next(iter(self.values))
        rows = [
            [query_id, f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}"]
            for query_id, first, last in self.changes(measure)
        ]
        title = f"{measure}: the queries that gained and lost most from {self.names[0]} to {self.names[-1]}"
        if not rows:
            title = f"{measure}: no query gained or lost from {self.names[0]} to {self.names[-1]}"
        return Table(title, ["query", self.names[0], self.names[-1], "change"], rows, left=1)


def compare_folders(
    folders: Sequence[str | Path], measures: Iterable[str] | None = None, examples: bool = True
) -> Comparison:
    """
    Compares evaluation folders pair by pair.

    Args:
        folders: Two to 26 folders that [`~coaug_trl.evaluation.folder.save_evaluation`] wrote, the baseline first.
        measures: Measures to compare by; defaults to those of the first folder that all have.
        examples: Whether to read examples of the first system and the last.

    Returns: systems are named by their folders.

    Raises `InputError`: fewer than two folders or more than 26, one given twice, one that is no evaluation, or folders
        of different queries or collections, or without a measure that is asked for or that all have.
    """
    if not 2 <= len(folders) <= len(LETTERS):
        raise InputError(f"Compare two evaluation folders or more, up to {len(LETTERS)}; given: {len(folders)}.")
    names = _distinct_names(folders)
    evaluations = [load_evaluation(folder) for folder in folders]
    measures, notes = _common_measures(measures, folders, evaluations)
    for folder, evaluation in zip(folders[1:], evaluations[1:], strict=True):
        notes += _check_alike(folders[0], evaluations[0], folder, evaluation)
    values = {
        measure: [
            {query_id: evaluation.per_query[query_id][measure] for query_id in evaluations[0].per_query}
            for evaluation in evaluations
        ]
        for measure in measures
    }
    comparison = Comparison(names, values, _test_pairs(values), notes=notes)
    changes = comparison.changes(measures[0]) if examples else []
    without_texts = [folder for folder in (folders[0], folders[-1]) if not (Path(folder) / TEXTS_FILE).is_file()]
    if changes and without_texts:
        notes.append(f"no examples: {without_texts[0]} has no {TEXTS_FILE}; evaluate again with coaug evaluate")
    elif changes:
        languages = [language_of(evaluation) for evaluation in (evaluations[0], evaluations[-1])]
        comparison = replace(comparison, examples=read_examples((folders[0], folders[-1]), changes, languages))
    return comparison


def _check_alike(folder: str | Path, one: Evaluation, other_folder: str | Path, other: Evaluation) -> list[str]:
    """Refuses evaluations that are not of the same queries and judgments; notes on what else differs."""
    # Ids such as 1, 2, 3 may be the same in collections that have nothing to do with each other.
    collections = [each.manifest.get("collection") for each in (one, other)]
    if None not in collections and collections[0] != collections[1]:
        raise InputError(f"{folder} is of the collection {collections[0]}, {other_folder} of {collections[1]}.")
    judgments = [each.manifest.get("hashes", {}).get("judgments") for each in (one, other)]
    if None not in judgments and judgments[0] != judgments[1]:
        raise InputError(f"{folder} and {other_folder} were evaluated with different judgments; evaluate one again.")
    if one.per_query.keys() != other.per_query.keys():
        example = sorted(one.per_query.keys() ^ other.per_query.keys())[0]
        has, lacks = (folder, other_folder) if example in one.per_query else (other_folder, folder)
        raise InputError(
            f"Only runs over the same queries can be compared: {has} has query {example!r}, {lacks} does not."
        )
    notes = []
    for setting in ("depth", "ignore_identical_ids"):
        ours, theirs = (each.manifest.get(setting) for each in (one, other))
        if None not in (ours, theirs) and ours != theirs:
            notes.append(f"{setting} is {ours} in {folder} and {theirs} in {other_folder}: they are not alike")
    ours, theirs = one.manifest["retriever"], other.manifest["retriever"]
    differing = [
        f"{name} is {ours[name]} and {theirs[name]}" for name in ours if theirs.get(name, ours[name]) != ours[name]
    ]
    if differing:
        notes.append(f"the retrievers differ: {', '.join(differing)} in {folder} and {other_folder}")
    return notes


def _test_pairs(values: dict[str, list[dict[str, float]]]) -> list[Pair]:
    """All pairs of systems, tested measure by measure; p-values are corrected within a measure."""
    places = list(combinations(range(len(next(iter(values.values())))), 2))
    matrices = [np.array([list(system.values()) for system in systems]) for systems in values.values()]
    differences = [matrix[later] - matrix[earlier] for matrix in matrices for earlier, later in places]
    tests = compare_differences(np.stack(differences, axis=1))
    pairs = []
    for number, measure in enumerate(values):
        of_measure = tests[number * len(places) :][: len(places)]
        corrected = [holm([test[name] for test in of_measure]) for name in ("p_t_test", "p_randomization")]
        for (earlier, later), test, p_t, p_randomization in zip(places, of_measure, *corrected, strict=True):
            del test["num_queries"]
            pairs.append(
                Pair(measure, earlier, later, **test, p_t_test_holm=p_t, p_randomization_holm=p_randomization)
            )
    return pairs


def _common_measures(
    measures: Iterable[str] | None, folders: Sequence[str | Path], evaluations: list[Evaluation]
) -> tuple[list[str], list[str]]:
    """The measures asked for, which all folders must have, or else those all have; and a note on others."""
    wanted = list(dict.fromkeys(measures or evaluations[0].measures))
    absent = {}
    for folder, evaluation in zip(folders, evaluations, strict=True):
        for measure in wanted:
            if measure not in evaluation.measures:
                absent.setdefault(measure, (folder, ", ".join(evaluation.measures)))
    common = [measure for measure in wanted if measure not in absent]
    if absent and (measures or not common):
        measure, (folder, its_measures) = next(iter(absent.items()))
        raise InputError(f"{folder} has no {measure}; its measures are {its_measures}.")
    notes = [f"{measure} is left out: {folder} does not have it" for measure, (folder, _) in absent.items()]
    return common, notes


def language_of(evaluation: Evaluation) -> str:
    """The language of the words that examples mark: BM25's, and English for other retrievers."""
    return evaluation.manifest.get("retriever", {}).get("language", "english")


def _distinct_names(folders: Sequence[str | Path]) -> list[str]:
    """The last part of each path, with as many parts before it as make all of them different."""
    paths = [Path(folder).resolve() for folder in folders]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise InputError(f"{folders[place]} is given twice; compare different evaluations.")
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def format_p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"
