"""What came of a run, for its report: the headline, the tables of systems and the change of each query."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.comparison import LETTERS, SIGNIFICANT, Comparison, Pair, format_p
from ..evaluation.examples import read_texts
from ..evaluation.folder import TEXTS_FILE
from ..utils.charts import draw_gains
from ..utils.tables import Table
from .facts import Contrast, Results, describe_retriever, name_augmented, name_sides
from .pages import Bars, Block, Figure, Figures, Fold, Hint, Numbers, Paragraph, embed
from .record import Run


# Rows of the table of queries, half of which are gains and half losses, and letters of a query in it.
QUERY_ROWS, QUERY_LENGTH = 100, 100
EVALUATE = (
    "coaug augment --model RUN --collection C --output RUN/augmentations && "
    "coaug evaluate --collection C --augmentations RUN/augmentations --output RUN/evaluations/policy"
)
BASELINE = "coaug evaluate --collection C --output RUN/evaluations/none"


def find_headline(run: Run, results: list[Results]) -> tuple[list[str], Bars | None, list[Hint]]:
    """The main result in sentences and as bars, and what is missing for it."""
    if not results:
        hint = Hint("The run has not been evaluated on held-out queries. To do so:", EVALUATE)
        return ["What training did to retrieval is not known yet."], None, [hint]
    main = results[0]
    policy = main.group[-1]
    source = run.source(*(each.folder / "metrics.json" for each in main.group))
    count = policy.evaluation.metrics["num_queries"]
    queries = f"{_queries(count)} of {where(main)}"
    if policy.system != "policy":
        means = [(each.folder.name, each.evaluation.metrics[main.measure]) for each in main.group]
        hint = Hint("This policy has not been evaluated. To do so:", EVALUATE)
        text = f"There are evaluations of other systems on {queries}, but none of this policy."
        return [text], Bars(main.measure, f"{main.measure} on {queries}", means, source), [hint]
    value = policy.evaluation.metrics[main.measure]
    settings, retriever = run.record.settings, policy.evaluation.manifest["retriever"]
    known = retriever == settings.retriever and retriever.get("model", retriever["retriever"])
    sentences = [
        f"On {queries}, {main.measure} is {value:.4f} with this policy, which augments {name_sides(policy.sides)} for "
        f"{known or describe_retriever(retriever)} in {run.source(policy.folder)[0]}.",
        *([SEEN[main.seen]] if main.seen else []),
    ]
    rows = [("this policy", value)]
    for contrast in main.contrasts:
        pair = contrast.pair
        other = main.group[contrast.other].evaluation.metrics[main.measure]
        sentences.append(
            f"With {contrast.kind}, it is {other:.4f}. The policy's difference is {_signed(pair.mean_difference)} "
            f"({_interval(pair)}{_p(pair.p_t_test_holm)}): better for {_queries(pair.wins)}, equal for "
            f"{pair.ties:,}, worse for {pair.losses:,}."
        )
        rows.insert(-1, (contrast.label, other))
    if main.contrasts:
        sentences.append(
            f"p is that of the paired t test after Holm's correction for {main.comparison.family}; the intervals, by "
            "Student's t, are not corrected."
        )
    source = run.source(
        *(main.group[contrast.other].folder / "metrics.json" for contrast in main.contrasts),
        policy.folder / "metrics.json",
    )
    hints = []
    if retriever != settings.retriever or policy.sides != sorted(settings.sides):
        text = (
            f"It was trained to augment {name_sides(settings.sides)} for {describe_retriever(settings.retriever)}, and has not been "
            "evaluated so. To do so:"
        )
        hints.append(Hint(text, EVALUATE))
    if not any(main.group[contrast.other].system == "none" for contrast in main.contrasts):
        hints.append(Hint("It has not been compared with retrieval without augmentation. To do so:", BASELINE))
    bars = (
        Bars(main.measure, f"{main.measure} on {queries}", rows, source)
        if max(each for _, each in rows) <= 1
        else None
    )
    return sentences, bars, hints


SEEN = {
    "trained": "It was trained on these queries, so this does not tell how it does on new ones: evaluate it on test.",
    "chosen": "Checkpoints were chosen on these queries, so values are higher than on new ones: evaluate it on test.",
}


def where(results: Results) -> str:
    """Collection and split, as far as they are known."""
    manifest = results.group[0].evaluation.manifest
    parts = [manifest.get("collection"), manifest.get("split") and f"{manifest['split']} split"]
    return ", ".join(filter(None, parts)) or "a collection that was not recorded"


def _interval(pair: Pair) -> str:
    low, high = pair.interval
    return "" if math.isnan(low) else f"95\N{NO-BREAK SPACE}% interval {_signed(low)} to {_signed(high)}, "


def _queries(count: int) -> str:
    return f"{count:,} {'query' if count == 1 else 'queries'}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _p(value: float) -> str:
    written = format_p(value)
    sign, number = ("<", written[1:]) if written.startswith("<") else ("=", written)
    return f"p\N{NO-BREAK SPACE}{sign}\N{NO-BREAK SPACE}{number}"


def result_tables(run: Run, results: Results) -> list[Block]:
    """Systems that were compared: means, tests, and the change of each query."""
    group, comparison, measure = results.group, results.comparison, results.measure
    metrics = run.source(*(each.folder / "metrics.json" for each in group))
    values = run.source(*(each.folder / "per_query.jsonl" for each in group))
    blocks: list[Block] = []
    if comparison is None:
        evaluation = group[0].evaluation
        means = [f"{evaluation.metrics[name]:.4f}" for name in evaluation.measures]
        table = Table("Means", ["system", *evaluation.measures], [[group[0].folder.name, *means]], left=1)
        blocks.append(Numbers(table, metrics))
        blocks.append(Hint("There is nothing to compare it with; coaug baselines makes more."))
    else:
        blocks += _significance(results)
        blocks.append(Numbers(comparison.means_table(), values))
    blocks.append(Numbers(_systems_table(run, results), metrics))
    if comparison is None:
        return blocks
    folds = {"All pairs, tested": [comparison.pairs_table(measure)]}
    if len(group) > 2:
        folds["All pairs, tested"].insert(0, comparison.matrix_table(measure))
    others = [comparison.pairs_table(each) for each in comparison.values if each != measure]
    if others:
        folds["All pairs by the other measures"] = others
    if results.contrasts:
        blocks.append(Figures([_gains(run, results, contrast) for contrast in results.contrasts], wide=True))
    return blocks + [Fold(title, [Numbers(table, values) for table in tables]) for title, tables in folds.items()]


def _significance(results: Results) -> list[Block]:
    """What the policy is significantly better and worse than, by each measure."""
    comparison, policy = results.comparison, len(results.group) - 1
    if results.group[policy].system != "policy":
        return []
    texts = {}
    for measure in comparison.values:
        beaten = comparison.beaten(measure)
        worse = [place for place, theirs in enumerate(beaten) if policy in theirs]
        rest = [place for place in range(policy) if place not in (*beaten[policy], *worse)]
        parts = [
            ("significantly better than", beaten[policy]),
            ("significantly worse than", worse),
            ("not to be told from", rest),
        ]
        texts[measure] = " and ".join(
            f"{relation} {_names(comparison, places)}" for relation, places in parts if places
        )
    same = len(set(texts.values())) == 1
    said = (
        [f"{texts[results.measure]} by every measure"]
        if same
        else [f"{text} by {name}" for name, text in texts.items()]
    )
    rule = f"paired t test, p < {SIGNIFICANT} after Holm's correction for {comparison.family}"
    return [Paragraph(f"This policy ({comparison.names[policy]}) is {'; '.join(said)} ({rule}).")]


def _names(comparison: Comparison, places: Sequence[int]) -> str:
    """Names of systems, or their number where it is all the others."""
    if len(places) == len(comparison.names) - 1 > 2:
        return f"all {len(places)} others"
    names = [comparison.names[place] for place in places]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _systems_table(run: Run, results: Results) -> Table:
    retrievers = [each.evaluation.manifest.get("retriever", {}) for each in results.group]
    differ = any(each != retrievers[0] for each in retrievers)
    rows = []
    for place, (each, retriever) in enumerate(zip(results.group, retrievers, strict=True)):
        augmentations = each.evaluation.manifest.get("augmentations") or {}
        by = (
            "this policy"
            if each.system == "policy"
            else augmentations.get("model") or ("RM3" if "rm3" in retriever else "")
        )
        row = [
            LETTERS[place],
            results.names[place],
            name_augmented(each),
            by or "–",
            *[describe_retriever(retriever)] * differ,
            f"{each.evaluation.metrics['num_queries']:,}",
            f"{each.evaluation.metrics['num_queries_without_hits']:,}",
        ]
        rows.append(row)
    retriever = "" if differ else f", all with {describe_retriever(retrievers[0])}"
    title = f"What was evaluated{retriever}; queries without hits count 0"
    header = ["", "system", "augmented", "by", *["retriever"] * differ, "queries", "without hits"]
    return Table(title, header, rows, left=len(header) - 2)


def _gains(run: Run, results: Results, contrast: Contrast) -> Figure:
    measure, pair = results.measure, contrast.pair
    before, after = (contrast.alone.values[measure][place] for place in (0, 1))
    folders = [results.group[place].folder for place in (contrast.other, contrast.policy)]
    ids = sorted(before, key=lambda id_: (before[id_] - after[id_], id_))
    half = QUERY_ROWS // 2
    shown = ids if len(ids) <= QUERY_ROWS else ids[:half] + ids[-half:]
    texts = _query_texts(folders[1], shown)
    rows = [
        [id_, texts.get(id_, ""), f"{before[id_]:.4f}", f"{after[id_]:.4f}"] + [_signed(after[id_] - before[id_])]
        for id_ in shown
    ]
    most = "" if shown is ids else f" (the {half} with the greatest gain and the {half} with the greatest loss)"
    names = contrast.alone.names
    table = Table(f"{measure} of each query{most}", ["query", "text", *names, "change"], rows, left=2)
    title = f"Query by query: {names[1]} against {names[0]}"
    mean = f"mean {_signed(pair.mean_difference)}, effect size d_z {pair.effect_size:+.2f}".replace("-", "−")
    description = (
        f"Change in {measure} of each query: {pair.wins} better, {pair.ties} equal, {pair.losses} worse; {mean}."
    )
    changes = [after[id_] - before[id_] for id_ in ids]
    image = embed(draw_gains(changes, f"change in {measure}"))
    source = run.source(*(folder / "per_query.jsonl" for folder in folders))
    note = f"{mean[0].upper()}{mean[1:]}, {_interval(pair)}{_p(pair.p_t_test_holm)}."
    return Figure(title, note, image, description, table, source)


def _query_texts(folder: Path, query_ids: Sequence[str]) -> dict[str, str]:
    path = folder / TEXTS_FILE
    if not path.is_file():
        return {}
    texts = read_texts(path, {("query", id_) for id_ in query_ids})
    short = {id_: " ".join(text.split()) for (_, id_), (text, _) in texts.items()}
    return {id_: text if len(text) <= QUERY_LENGTH else f"{text[:QUERY_LENGTH]} …" for id_, text in short.items()}
