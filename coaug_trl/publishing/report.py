"""
`coaug report`: what a run was, what happened in it and what came of it, as one page of HTML and the same in Markdown.

The page is self-contained: no scripts, nothing from the network. Both forms are written from the same blocks, so that
they have the same numbers.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..evaluation.comparison import language_of
from ..evaluation.examples import read_examples
from ..evaluation.folder import TEXTS_FILE
from ..policy.prompts import PROMPT_SET_FILE
from ..policy.settings import POLICY_FILE
from ..training.record import TRAINING_FILE
from ..utils.charts import import_figure
from ..utils.errors import InputError
from ..utils.files import read_json
from ..utils.tables import Table
from ..utils.terminal import describe_seconds
from .curves import training_curves
from .facts import (
    SIDE_NAMES,
    Results,
    describe_retriever,
    describe_training,
    find_results,
    is_finite,
    name_sides,
    write_value,
)
from .pages import (
    Block,
    Cases,
    Facts,
    Fold,
    Hint,
    Numbers,
    Paragraph,
    Report,
    Section,
    Verbatim,
)
from .record import DEPTH, TRAINER_STATE, Run
from .results import find_headline, result_tables, where


def make_report(
    run_folder: str | Path,
    evaluations: Iterable[str | Path] = (),
    augmentations: Iterable[str | Path] = (),
    collection: str | None = None,
) -> Report:
    """
    Puts the report of a run together.

    Args:
        run_folder: `output_dir` of a training. Of one that was interrupted, the last whole checkpoint is reported.
        evaluations: Evaluation folders, or folders of them, besides those beneath the run's.
        augmentations: Folders of augmentations, or folders of them, besides those beneath the run's.
        collection: Where to read the collection for the words of queries and documents; defaults to its name, which is
            enough for a Hub id, `irds:NAME` and `vocabulary-gap` but not for a folder.

    Returns: to be written by [`save_report`].

    Raises `InputError`: The folder holds no trained policy, a file is damaged, there is nothing in a folder that was
        given, or matplotlib is not installed.
    """
    import_figure('pip install ".[report]"')
    run = Run(Path(run_folder), evaluations)
    folders = _all_augmentations(run.folder, augmentations)
    results = sorted(
        find_results(run.record), key=lambda each: not each.of_policy
    )  # what is about this policy comes first
    headline, bars, hints = find_headline(run, results)
    sections = [
        Section("training", "What was trained", _trained(run)),
        Section("curves", "Training curves", training_curves(run.record, run.folder, run.of_record(TRAINER_STATE))),
        *(
            Section(
                f"results-{number}" if number > 1 else "results", f"Results: {where(each)}", result_tables(run, each)
            )
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


def _all_augmentations(folder: Path, given: Iterable[str | Path]) -> list[Path]:
    """Folders of augmentations beneath the run's and beneath those that were given."""
    folders = _find_augmentations(folder)
    for path in given:
        beneath = _find_augmentations(Path(path))
        if not beneath:
            raise InputError(f"{path}: no augmentations are there; make them with coaug augment.")
        folders += beneath
    return list({path.resolve(): path for path in folders}.values())


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


def _trained(run: Run) -> list[Block]:
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


def _words(run: Run, results: list[Results], folders: list[Path], given: str | None) -> list[Block]:
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


def _cases(run: Run, results: list[Results]) -> list[Block]:
    blocks: list[Block] = []
    for each in results:
        for contrast in each.contrasts:
            folders = [each.group[place].folder for place in (contrast.other, contrast.policy)]
            names = tuple(contrast.alone.names)
            title = f"{names[1]} against {names[0]}" + f", {where(each)}" * (len(results) > 1)
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


def _cost(run: Run, folders: list[Path]) -> list[Block]:
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
