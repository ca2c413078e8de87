"""
`coaug report`: what a run was, what happened in it and what came of it, as one page of HTML and the same in Markdown.

The page is self-contained: no scripts, nothing from the network. Both forms are written from the same blocks, so that
they have the same numbers.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..evaluation.comparison import LETTERS, SIGNIFICANT, Comparison, Pair, format_p, language_of
from ..evaluation.examples import read_examples, read_texts
from ..evaluation.folder import TEXTS_FILE
from ..policy.prompts import PROMPT_SET_FILE
from ..policy.settings import POLICY_FILE
from ..training.record import TRAINING_FILE
from ..utils.charts import draw_gains
from ..utils.errors import InputError
from ..utils.tables import Table
from ..utils.terminal import describe_seconds
from .curves import training_curves
from .facts import (
    SIDE_NAMES,
    Contrast,
    Results,
    describe_retriever,
    describe_training,
    find_results,
    is_finite,
    name_augmented,
    name_sides,
    write_value,
)
from .pages import (
    Bars,
    Block,
    Cases,
    Facts,
    Figure,
    Figures,
    Fold,
    Hint,
    Numbers,
    Paragraph,
    Report,
    Section,
    Verbatim,
    embed,
)
from .record import DEPTH, TRAINER_STATE, RunRecord, find_evaluations, load_record


# Rows of the table of queries, half of which are gains and half losses, and letters of a query in it.
QUERY_ROWS, QUERY_LENGTH = 100, 100


class _Run:
    """A run's record, and names of files relative to its folder."""

    def __init__(self, folder: Path, evaluations: Iterable[str | Path]):
        self.folder = folder
        checkpoint = None
        if folder.is_dir() and not (folder / TRAINER_STATE).is_file():  # interrupted, or only its weights were saved
            from ..training.checkpoints import last_whole_checkpoint  # with all of transformers' trainer

            checkpoint = last_whole_checkpoint(folder, quiet=True)
        if checkpoint:
            evaluations = [*evaluations, *find_evaluations(folder)]
        self.record: RunRecord = load_record(checkpoint or folder, evaluations)
        self.checkpoint = Path(checkpoint).name if checkpoint else None
        self.name = folder.resolve().name

    def source(self, *paths: Path) -> tuple[str, ...]:
        """Paths as the report names them."""
        relative = [Path(os.path.relpath(path.resolve(), self.folder.resolve())) for path in paths]
        shared = {(path.parent.parent, path.name) for path in relative}
        if len(relative) > 2 and len(shared) == 1:  # one path, as a shell would read it
            folders = ",".join(path.parent.name for path in relative)
            relative = [relative[0].parent.parent / f"{{{folders}}}" / relative[0].name]
        return tuple(path.as_posix() for path in relative)

    def of_record(self, *names: str) -> tuple[str, ...]:
        """Files of the run's own."""
        return self.source(*(self.record.folder / name for name in names))


def make_report(
    run_folder: str | Path,
    evaluations: Iterable[str | Path] = (),
    augmentations: Iterable[str | Path] = (),
    collection: str | None = None,
) -> Report:
    """
    Puts the report of a run together.

    Args:
        run_folder (`str` or `Path`):
            `output_dir` of a training. Of one that was interrupted, the last whole checkpoint is reported.
        evaluations (`Iterable[str | Path]`, *optional*):
            Evaluation folders, or folders of them, besides those beneath the run's.
        augmentations (`Iterable[str | Path]`, *optional*):
            Folders of augmentations, or folders of them, besides those beneath the run's.
        collection (`str`, *optional*):
            Where to read the collection for the words of queries and documents; defaults to its name, which is enough
            for a Hub id, `irds:NAME` and `vocabulary-gap` but not for a folder.

    Returns:
        [`Report`]: to be written by [`save_report`].

    Raises:
        `InputError`: The folder holds no trained policy, a file is damaged, there is nothing in a folder that was
            given, or matplotlib is not installed.
    """
    _check_packages()
    run = _Run(Path(run_folder), evaluations)
    folders = _find_augmentations(run.folder)
    for given in augmentations:
        beneath = _find_augmentations(Path(given))
        if not beneath:
            raise InputError(f"{given}: no augmentations are there; make them with coaug augment.")
        folders += beneath
    folders = list({path.resolve(): path for path in folders}.values())

    results = sorted(
        find_results(run.record), key=lambda each: not each.of_policy
    )  # what is about this policy comes first
    headline, bars, hints = _headline(run, results)
    sections = [
        Section("training", "What was trained", _trained(run)),
        Section("curves", "Training curves", training_curves(run.record, run.folder, run.of_record(TRAINER_STATE))),
        *(
            Section(f"results-{number}" if number > 1 else "results", f"Results: {_where(each)}", _tables(run, each))
            for number, each in enumerate(results, start=1)
        ),
        Section("words", "Shared words: H(Q,D)", _words(run, results, folders, collection)),
        Section("cases", "Case studies", _cases(run, results)),
        Section("cost", "What it cost", _cost(run, folders)),
    ]
    name = run.record.training.get("collection")
    subtitle = f"Run {run.name}" + f", interrupted: as of {run.checkpoint}" * bool(run.checkpoint)
    return Report(
        title=f"Co-augmentation of {name}" if name else "Co-augmentation",
        subtitle=f"{subtitle}. Files are named relative to its folder.",
        headline=headline,
        bars=bars,
        hints=hints,
        sections=[section for section in sections if section.blocks],
        notes=[note for each in results for note in each.notes],
    )


def _check_packages() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f'The report needs {error.name}: pip install ".[report]".') from None


def _find_augmentations(folder: Path) -> list[Path]:
    patterns = ["/".join(["*"] * depth + ["manifest.json"]) for depth in range(DEPTH + 1)]
    paths = [path.parent for pattern in patterns for path in folder.glob(pattern)]
    # An index has a manifest and answers to its documents, too.
    return sorted(
        path
        for path in paths
        if any((path / name).is_file() for name in ("queries.jsonl", "documents.jsonl"))
        and "sides" in read_json(path / "manifest.json", missing={})
    )


# Sections


EVALUATE = (
    "coaug augment --model RUN --collection C --output RUN/augmentations && "
    "coaug evaluate --collection C --augmentations RUN/augmentations --output RUN/evaluations/policy"
)
BASELINE = "coaug evaluate --collection C --output RUN/evaluations/none"


def _headline(run: _Run, results: list[Results]) -> tuple[list[str], Bars | None, list[Hint]]:
    if not results:
        hint = Hint("The run has not been evaluated on held-out queries. To do so:", EVALUATE)
        return ["What training did to retrieval is not known yet."], None, [hint]
    main = results[0]
    policy = main.group[-1]
    source = run.source(*(each.folder / "metrics.json" for each in main.group))
    count = policy.evaluation.metrics["num_queries"]
    queries = f"{_queries(count)} of {_where(main)}"
    if policy.system != "policy":
        means = [(each.folder.name, each.evaluation.metrics[main.measure]) for each in main.group]
        hint = Hint("This policy has not been evaluated. To do so:", EVALUATE)
        text = f"There are evaluations of other systems on {queries}, but none of this policy."
        return [text], Bars(main.measure, f"{main.measure} on {queries}", means, source), [hint]
    value = policy.evaluation.metrics[main.measure]
    settings, retriever = run.record.settings, policy.evaluation.manifest["retriever"]
    sentences = [
        f"On {queries}, {main.measure} is {value:.4f} with this policy, which augments {name_sides(policy.sides)} for "
        f"{retriever.get('model', retriever['retriever']) if retriever == settings.retriever else describe_retriever(retriever)} in "
        f"{run.source(policy.folder)[0]}.",
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


def _where(results: Results) -> str:
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


def _trained(run: _Run) -> list[Block]:
    record, training, settings = run.record, run.record.training, run.record.settings
    versions = read_json(record.folder / POLICY_FILE, missing={}).get("versions", {})
    trained_part = "all weights"
    if record.adapter:
        adapter = read_json(record.folder / "adapter_config.json", missing={})
        rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
        trained_part = f"an adapter ({adapter.get('peft_type', 'LoRA')}, rank {rank}, alpha {alpha})"
    arguments, facts = training.get("arguments", {}), describe_training(record)
    counts = (
        "{queries} training queries with {judgments} judgments, {documents} documents".format_map(facts)
        if training
        else None
    )
    rows = [
        ("Base model", training.get("base_model")),
        ("Trained", f"{trained_part}; {name_sides(settings.sides)} augmented"),
        ("Collection", training.get("collection")),
        ("Splits", _splits(training)),
        ("Counts", counts),
        ("Optimizer steps", facts.get("steps")),
        ("Retriever", describe_retriever(settings.retriever)),
        (
            "Answers",
            f"greedy, up to {settings.generation.max_new_tokens:,} tokens, repetition penalty "
            f"{settings.generation.repetition_penalty:g}",
        ),
        ("Device", training.get("device")),
        ("Processes", facts.get("processes")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    files = [TRAINING_FILE] * bool(training) + [POLICY_FILE]
    blocks: list[Block] = [Facts([(name, str(value)) for name, value in rows if value], run.of_record(*files))]
    if not training:
        text = f"There is no {TRAINING_FILE} (an older version wrote none), so what it was trained on is not known."
        blocks.append(Hint(text))
    for side in settings.sides:
        prompt = getattr(settings.prompt_set, side)
        if prompt:
            blocks.append(Fold(f"Prompt for {SIDE_NAMES[side]}", [Verbatim(prompt, run.of_record(PROMPT_SET_FILE))]))
    if arguments:
        rows = [[name, write_value(value)] for name, value in sorted(arguments.items())]
        table = Table(f"{len(rows)} arguments", ["argument", "value"], rows, left=2)
        blocks.append(Fold("Arguments that differ from the defaults", [Numbers(table, run.of_record(TRAINING_FILE))]))
    return blocks


def _splits(training: dict[str, Any]) -> str | None:
    if not training:
        return None
    dev = training["eval_split"]
    return f"trained on {training['train_split']}" + f", evaluated on {dev} in training" * bool(dev)


def _tables(run: _Run, results: Results) -> list[Block]:
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


def _systems_table(run: _Run, results: Results) -> Table:
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


def _gains(run: _Run, results: Results, contrast: Contrast) -> Figure:
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


def _words(run: _Run, results: list[Results], folders: list[Path], given: str | None) -> list[Block]:
    from ..augmentation.folder import read_manifest
    from ..data.collection import Collection
    from ..studies.alignment import alignment_table, measure_alignment

    if not folders:
        text = "H(Q,D), the cross-entropy of their words, needs the augmentations; give the folder of coaug augment:"
        return [Hint(text, "coaug report RUN --augmentations DIR")]
    manifests = {folder: read_manifest(folder) for folder in folders}
    name = given or next(iter(manifests.values()))["collection"]
    splits = [each.group[0].evaluation.manifest.get("split") for each in results]
    split = next(filter(None, splits), "test")
    try:
        collection = Collection.load(name, split)
    except InputError as error:
        text = (
            "H(Q,D), the cross-entropy of their words, needs the collection, which cannot be read "
            f"({str(error).rstrip('.')}). To say where it is:"
        )
        return [Hint(text, "coaug report RUN --collection FOLDER")]
    chosen = [
        folder
        for folder, manifest in manifests.items()
        if manifest["collection"] == collection.name
        and split in manifest["sides"].get("query", {"splits": [split]}).get("splits", [])
    ]
    if not chosen:
        return [Hint(f"No augmentations are of {collection.name} and its {split} queries, so H(Q,D) is left out.")]
    language = run.record.settings.retriever.get("language", "english")
    try:
        rows = measure_alignment(collection, chosen, language=language)
    except InputError as error:
        return [Hint(f"H(Q,D), the cross-entropy of their words, cannot be measured: {error}")]
    rows = [replace(row, folder=row.folder and run.source(Path(row.folder))[0]) for row in rows]
    title = (
        f"H(Q,D) of {collection.name} ({split}) in nats a word, 1 added to the documents' count of each word; words "
        f"as BM25 reads them ({language}); unseen: query words in no document"
    )
    identity = run.record.identity or {}
    own = {run.source(folder)[0] for folder in chosen if identity.items() <= manifests[folder].items()}
    # without a word in the queries there is no H, but augmentations may bring some
    measured = [row for row in rows if row.texts != "augmentations" and row.cross_entropy is not None]
    measured.sort(key=lambda row: (row.folder is None, row.folder not in own))  # this policy first, none last
    values = []
    for row in measured:
        what = (
            f"with {row.folder}" + " (this policy)" * (row.folder in own)
            if row.folder
            else "for the texts as they are"
        )
        values.append(f"{row.cross_entropy:.3f} {what}")
    text = "The lower H(Q,D), the likelier the words of the queries are in the documents."
    if values:
        text += f" It is {' and '.join(filter(None, [', '.join(values[:-1]), values[-1]]))}."
    text += (
        " These are averages over different words: augmented queries have words of their own, so part of a difference "
        "comes from them and not from the words that were there before."
    )
    return [Paragraph(text), Numbers(alignment_table(rows, title), run.source(*chosen))]


def _cases(run: _Run, results: list[Results]) -> list[Block]:
    blocks: list[Block] = []
    for each in results:
        for contrast in each.contrasts:
            folders = [each.group[place].folder for place in (contrast.other, contrast.policy)]
            names = tuple(contrast.alone.names)
            title = f"{names[1]} against {names[0]}" + f", {_where(each)}" * (len(results) > 1)
            changes = contrast.alone.changes(each.measure)
            missing = [
                name for name, folder in zip(names, folders, strict=True) if not (folder / TEXTS_FILE).is_file()
            ]
            if changes and not missing:
                languages = [language_of(each.group[place].evaluation) for place in (contrast.other, contrast.policy)]
                examples = read_examples(folders, changes, languages)
                source = run.source(*(folder / TEXTS_FILE for folder in folders))
                blocks.append(Cases(title, each.measure, names, examples, source))
            else:  # nothing changed, or the texts were not kept
                why = f"{missing[0]} has no {TEXTS_FILE}; evaluate it again" if missing else "there are none"
                blocks.append(Hint(f"{title}: {why}."))
    if not blocks:
        return [Hint("There are none: they need an evaluation of this policy and one of another system.")]
    text = (
        "The queries that gained most and those that lost most, each with the relevant document whose part in the DCG "
        "changed most in the direction of the query's change. Words that query and document share are marked."
    )
    return [Paragraph(text), *blocks]


def _cost(run: _Run, folders: list[Path]) -> list[Block]:
    from ..augmentation.folder import read_manifest

    record, facts = run.record, describe_training(run.record)
    steps = [value for _, value in record.points("step_time")]
    evaluations = [value for _, value in record.points("eval_runtime")]
    runtime = record.last("train_runtime")
    rows = [
        ("Tokens", "tokens" in facts and f"{facts['tokens']} read and generated in training, prompts included"),
        ("Completions", "completions" in facts and f"{facts['completions']} generated in training"),
        ("Optimizer steps", "seconds" in facts and f"{facts['seconds']} in all, with generation"),
        ("One of them", steps and f"{describe_seconds(median(steps))} (median of what was logged)"),
        (
            "Dev evaluations",
            evaluations and f"{describe_seconds(fmean(evaluations))} each (mean of {len(evaluations)})",
        ),
        ("Whole command", is_finite(runtime) and f"{describe_seconds(runtime)}, since it was last started"),
    ]
    blocks: list[Block] = []
    shown = [(name, value) for name, value in rows if value]
    if shown:
        blocks.append(Facts(shown, run.of_record(TRAINER_STATE)))
    rows = []
    for folder in folders:
        manifest = read_manifest(folder)
        for side, counts in manifest["sides"].items():
            numbers = [f"{counts.get(name, 0):,}" for name in ("texts", "empty", "incomplete", "truncated")]
            by = ", ".join(manifest.get("engines", [])) or "–"
            cost = counts.get("cost", {})
            numbers += [f"{cost['tokens']:,}", describe_seconds(cost["seconds"])] if cost else ["–", "–"]
            rows.append([run.source(folder)[0], SIDE_NAMES.get(side, side), by, *numbers])
    if rows:
        title = (
            "Augmentations; empty: left as they were, incomplete: answers cut off, truncated: texts cut for the model; "
            "tokens and time: generated for all of them so far, processes added up"
        )
        header = ["folder", "side", "generated by", "texts", "empty", "incomplete", "truncated", "tokens", "time"]
        source = run.source(*(folder / "manifest.json" for folder in folders))
        blocks.append(Numbers(Table(title, header, rows, left=3), source))
    return blocks or [Hint(f"Tokens and times are not known: the folder has no {TRAINER_STATE}.")]
