"""The cards that models, augmentations and indexes carry on the Hub, written from what is in their folders."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from ..data.groups import TEXT_TYPES
from ..evaluation.comparison import format_p
from ..policy.download import CURVES_FILE
from ..training.record import license_of
from ..utils.charts import draw_lines
from ..utils.names import is_hub_id, last_part, without_folders
from ..utils.tables import Cell, Table
from .facts import (
    SIDE_NAMES,
    Results,
    describe_retriever,
    describe_training,
    find_dev,
    find_results,
    name_augmented,
    name_sides,
)
from .record import Evaluated, RunRecord
from .templating import line, render


TAGS = ("trl", "coaug", "information-retrieval")
PAPER_TAG = "arxiv:2506.18670"
# A curve of its own for each text type only where this much can be seen between them.
VISIBLE = 0.02
# Of measures whose names on the Hub differ from ours, which are those of ir-measures.
HUB_METRICS = {"nDCG": "ndcg", "R": "recall", "RR": "mrr", "P": "precision", "AP": "map"}
SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


# The model


def model_card(record: RunRecord, repo_id: str) -> ModelCard:
    """
    Writes the card of a trained policy.

    Args:
        record: Its run, with the evaluations to state.
        repo_id: Where it is published, `user/name`.

    Returns: with the means of the policy as `model-index`. It shows the picture `reward.png` if [`draw_curves`] can
        draw one.

    Raises `InputError`: Evaluations of the run cannot be compared.
    """
    settings, training = record.settings, record.training
    results = find_results(record, of_others=False)
    held_out = [each for each in results if each.seen is None]
    license_fields = training.get("base_license") or license_of(training.get("base_model"))
    base = name_model(training.get("base_model"), _base_is_on_hub(record))
    retriever = without_folders(settings.retriever)
    text = render(
        "model_card.md.jinja",
        repo_id=repo_id,
        record=record,
        settings=settings,
        training=training,
        facts=describe_training(record),
        base=base,
        sides=name_sides(settings.sides),
        side_names=SIDE_NAMES,
        encoder=None if settings.prompt_set.kind == "sparse" else retriever.get("model", "it was trained for"),
        headline=_headline(held_out),
        results=[(each, _group_name(each.group), _means_table(each), _tests_table(each)) for each in results],
        measured=[_group_name(each.group) for each in held_out if each.of_policy],
        training_rows=_training_rows(record, base),
        data_rows=_data_rows(record) if training else [],
        setting_rows=_setting_rows(retriever, settings.generation.__dict__),
        picture=CURVES_FILE if _can_draw(record) else None,
        arguments=_write_arguments(training.get("arguments")),
        license=license_fields.get("license_name", license_fields.get("license")),
        collection=name if _loadable(name := training.get("collection", "")) else "path/to/collection",
        index_options=_index_options(settings.retriever),
    )
    data = ModelCardData(
        base_model=base["name"] if base["on_hub"] else None,
        base_model_relation=("adapter" if record.adapter else "finetune") if base["on_hub"] else None,
        datasets=[name] if is_hub_id(name) else None,
        library_name="peft" if record.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=_tags(settings.sides, settings.retriever),
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(held_out) or None,
        **license_fields,
    )
    if data.eval_results is None:
        data.pop("model_name")  # which is part of a model-index alone
    return ModelCard(_with_metadata(data, text))


def draw_curves(record: RunRecord, path: str | Path) -> bool:
    """
    Draws the reward of the rollouts, by text type where that makes a difference, and nDCG on the dev split.

    Args:
        record: The run.
        path: The PNG file to write.

    Returns: whether it was drawn: matplotlib is installed, and something was logged.
    """
    if not _can_draw(record):
        return False
    series = {text_type: record.points(f"{text_type}/reward") for text_type in TEXT_TYPES}
    by_step: dict[int, list[float]] = {}
    for step, value in (point for points in series.values() for point in points):
        by_step.setdefault(step, []).append(value)
    if all(max(values) - min(values) <= VISIBLE for values in by_step.values()):
        series = {"reward": record.points("reward")}
    ylabel = "reward"
    if measure := find_dev(record):
        ylabel = "reward, nDCG"
        series[f"{measure.removeprefix('eval_')}, dev"] = record.points(measure)
    Path(path).write_bytes(draw_lines(series, ylabel, form="png"))
    return True


def _can_draw(record: RunRecord) -> bool:
    return bool(record.points("reward")) and find_spec("matplotlib") is not None


def _headline(held_out: list[Results]) -> dict[str, str] | None:
    """What the policy changed on the first collection it was evaluated on."""
    for results in held_out:
        if results.contrasts and results.contrasts[0].kind == "no augmentation":
            contrast, measure = results.contrasts[0], results.measure
            means = results.means(contrast.policy)
            return {
                "measure": measure,
                "where": _group_name(results.group),
                "after": f"{means[measure]:.4f}",
                "before": f"{results.means(contrast.other)[measure]:.4f}",
                "queries": f"{means['num_queries']:,}",
                "p": format_p(contrast.pair.p_t_test_holm),
            }
    return None


def _index_options(retriever: dict[str, Any]) -> list[tuple[str, str]]:
    """The options of `coaug index` that make this retriever: first which one, then its settings."""
    names = {"fields": "fields", "k1": "k1", "b": "b", "language": "language", "model": "encoder"}
    settings = [(option, str(retriever[name])) for name, option in names.items() if name in retriever]
    return [("retriever", retriever.get("retriever", "bm25")), *settings]


def _means_table(results: Results) -> Table:
    group = results.group
    measures = [
        name for name in group[-1].evaluation.measures if all(name in each.evaluation.metrics for each in group)
    ]
    retrievers = [describe_retriever(without_folders(each.evaluation.manifest["retriever"])) for each in group]
    differ = len(set(retrievers)) > 1
    best = {name: max(each.evaluation.metrics[name] for each in group) for name in measures}
    rows = []
    for each, retriever in zip(group, retrievers, strict=True):
        metrics = each.evaluation.metrics
        values = [Cell(f"{metrics[name]:.4f}", bold=metrics[name] == best[name]) for name in measures]
        counts = [f"{metrics[name]:,}" for name in ("num_queries", "num_queries_without_hits")]
        rows.append([_system(each), name_augmented(each), *[retriever] * differ, *values, *counts])
    header = ["system", "augmented", *["retriever"] * differ, *measures, "queries", "without hits"]
    title = (
        f"{_group_name(group)}: {f'no result, since {SEEN[results.seen]}; ' if results.seen else ''}means over every "
        "judged query, of which those without hits count 0"
        + f"; {retrievers[0]}" * (not differ)
        + "; other systems have the names of their folders" * any(each.system == "other" for each in group)
    )
    return Table(title, header, rows, left=2 + differ)


SEEN = {
    "trained": "the model was trained on these queries",
    "chosen": "the checkpoint was chosen by these queries",
}


def _tests_table(results: Results) -> Table | None:
    """The policy against each other system, by the main measure."""
    group, comparison, last = results.group, results.comparison, len(results.group) - 1
    if comparison is None or not results.of_policy:
        return None
    rows = [
        [
            f"{_system(group[pair.earlier])}, {name_augmented(group[pair.earlier])} augmented",
            f"{pair.mean_difference:+.4f}",
            f"{pair.wins}/{pair.ties}/{pair.losses}",
            format_p(pair.p_t_test_holm),
            format_p(pair.p_randomization_holm),
        ]
        for pair in comparison.pairs
        if pair.measure == results.measure and pair.later == last
    ]
    title = (
        f"{results.measure} of {_system(group[last])}, {name_sides(group[last].sides)} augmented, less that of each "
        "other system; p of the paired t test and of Fisher's randomisation test, Holm-corrected for all "
        f"{len(group)} systems"
    )
    header = ["less", "difference", "wins/ties/losses", "p t", "p Fisher"]
    return Table(title, header, rows, left=1)


def _system(evaluated: Evaluated) -> str:
    return {"policy": "this model", "none": "none"}.get(evaluated.system, evaluated.folder.name)


def _group_name(group: list[Evaluated]) -> str:
    collection, split, _ = group[0].key
    return f"{line(collection)} ({line(split)})"


def _eval_results(held_out: list[Results]) -> list[EvalResult]:
    """The means of the policy with most sides augmented, for each collection and split."""
    return [
        EvalResult(
            task_type="text-retrieval",
            task_name="Retrieval",
            dataset_type=_dataset_type(results.group[-1].key[0]),
            dataset_name=_group_name(results.group),
            dataset_split=line(results.group[-1].key[1]),
            metric_type=_hub_metric(measure),
            metric_name=f"{measure}, {name_sides(results.group[-1].sides)} augmented",
            metric_value=results.means(-1)[measure],
        )
        for results in held_out
        if results.of_policy
        for measure in results.group[-1].evaluation.measures
    ]


def _dataset_type(collection: str) -> str:
    """A collection's name as the Hub takes it, which knows no colon, blank or second slash."""
    if re.fullmatch(r"([\w-]+/)?[\w.-]+", collection, re.ASCII):
        return collection
    return re.sub(r"[^\w.-]+", "-", collection, flags=re.ASCII).strip("-") or "collection"


def _hub_metric(measure: str) -> str:
    """`nDCG@10` as `ndcg_at_10`; a measure with parameters of its own stays as it is."""
    name, _, cutoff = measure.partition("@")
    return f"{HUB_METRICS[name]}{'_at_' * bool(cutoff)}{cutoff}" if name in HUB_METRICS else measure


def _training_rows(record: RunRecord, base: dict[str, Any]) -> list[tuple[str, str]]:
    training, facts = record.training, describe_training(record)
    rows = [
        ("began with", training and base["name"] + " (not on the Hub)" * (not base["on_hub"])),
        ("optimizer steps", facts.get("steps")),
        ("epochs", facts.get("epochs")),
        ("completions", facts.get("completions")),
        ("tokens, prompts and completions", facts.get("tokens")),
        ("time of all steps, generation included", facts.get("seconds")),
        ("processes", training and f"{facts.get('processes', '?')} ({training.get('device', 'unknown')})"),
        ("mean reward, last logged", facts.get("reward")),
    ]
    if measure := find_dev(record):
        points = record.points(measure)
        step, best = max(points, key=lambda point: point[1])
        name = f"{measure.removeprefix('eval_')} on the dev split"
        rows += [(f"{name}, last", f"{points[-1][1]:.4f}"), (f"{name}, best", f"{best:.4f} at step {step:,}")]
    return [(name, value) for name, value in rows if value]


def _data_rows(record: RunRecord) -> list[tuple[str, str]]:
    training, facts = record.training, describe_training(record)
    rows = [
        ("collection", training["collection"]),
        ("documents", facts["documents"]),
        (
            f"trained on the split {training['train_split']}",
            f"{facts['queries']} queries, {facts['judgments']} judgments",
        ),
    ]
    if training.get("eval_split"):
        rows.append(("evaluated in training on the split", training["eval_split"]))
    for group in record.comparable:
        queries = group[0].evaluation.metrics["num_queries"]
        rows.append(("evaluated afterwards on", f"{_group_name(group)}, {queries:,} queries"))
    return rows


def _write_arguments(arguments: dict[str, Any] | None) -> str:
    if not arguments:
        return ""
    return yaml.safe_dump(without_folders(arguments), sort_keys=False, allow_unicode=True).strip()


# Augmentations and indexes


def augmentations_card(manifest: dict[str, Any], repo_id: str, with_texts: bool) -> DatasetCard:
    """
    Writes the card of augmentations that are published as a dataset.

    Args:
        manifest: `manifest.json` of the augmentations.
        repo_id: Where they are published, `user/name`.
        with_texts: Whether the texts that are augmented are published with them.

    Returns: with a configuration for each side, of the Parquet files in its folder.
    """
    sides, collection, retriever = manifest["sides"], manifest["collection"], manifest["retriever"]
    names = [SIDE_NAMES[side] for side in sides]
    text = render(
        "augmentations_card.md.jinja",
        repo_id=repo_id,
        names=names,
        counts=[
            (SIDE_NAMES[side], *(f"{counts[name]:,}" for name in ("texts", "empty", "incomplete", "truncated")))
            for side, counts in sides.items()
        ],
        with_texts=with_texts,
        **_shared(collection, retriever, manifest),
    )
    num_texts = sum(counts["texts"] for counts in sides.values())
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        tags=_tags(sides, retriever),
        task_categories=["text-retrieval"],
        annotations_creators=["machine-generated"],
        source_datasets=[collection] if is_hub_id(collection) else None,
        size_categories=[next((size for most, size in SIZES.items() if num_texts < most), "n>10M")],
        configs=[
            {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.parquet"}]} for name in names
        ],
    )
    return DatasetCard(_with_metadata(data, text))


def index_card(manifest: dict[str, Any], repo_id: str) -> ModelCard:
    """
    Writes the card of an index.

    Args:
        manifest: `manifest.json` of the index.
        repo_id: Where it is published, `user/name`.

    Returns: the card.
    """
    collection, retriever, augmentations = (manifest[name] for name in ("collection", "retriever", "augmentations"))
    bm25 = retriever["retriever"] == "bm25"
    documents = f"{manifest['num_documents']:,}"
    rows = [("collection", collection), ("documents", documents)]
    rows += [(name, value) for name, value in without_folders(retriever).items() if value is not None]
    text = render(
        "index_card.md.jinja",
        repo_id=repo_id,
        documents=documents,
        rows=rows,
        bm25=bm25,
        language=retriever["language"] if bm25 and retriever["fields"] == "flat" else None,
        **_shared(collection, retriever, augmentations),
    )
    data = ModelCardData(
        datasets=[collection] if is_hub_id(collection) else None,
        library_name="bm25s" if bm25 else "sentence-transformers",
        tags=[*TAGS[1:], line(retriever["retriever"]), *["bm25s"] * bm25, *[PAPER_TAG] * bool(augmentations)],
    )
    return ModelCard(_with_metadata(data, text))


def _shared(collection: str, retriever: dict[str, Any], manifest: dict[str, Any] | None) -> dict[str, Any]:
    """What the cards of augmentations and of an index both say; `manifest` is that of the augmentations."""
    encoder = None if retriever.get("retriever") == "bm25" else without_folders(retriever).get("model")
    return {
        "collection": {"name": collection, "on_hub": is_hub_id(collection)},
        "collection_option": collection if _loadable(collection) else "path/to/collection",
        "retriever": "BM25" if retriever else "a retriever",  # where it is no encoder
        "encoder": encoder,
        "model": name_model(manifest["model"], _model_on_hub(manifest)) if manifest else None,
        "provenance": _provenance(manifest) if manifest else [],
    }


def _provenance(manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [("model", name_model(manifest["model"], _model_on_hub(manifest))["name"])]
    rows += [(name, manifest[name]) for name in ("revision", "prompt_hash") if manifest.get(name)]
    rows += [("engine", ", ".join(manifest["engines"]))] if manifest.get("engines") else []
    rows += _setting_rows(without_folders(manifest["retriever"]), manifest["generation"])
    return rows + [(name, value) for name, value in manifest.get("versions", {}).items() if value != "not installed"]


def _setting_rows(retriever: dict[str, Any], generation: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [(f"retriever: {name}", value) for name, value in retriever.items() if value is not None]
    return [*rows, ("generation", "greedy"), *generation.items()]


def _tags(sides: Any, retriever: dict[str, Any]) -> list[str]:
    named = [line(retriever["retriever"])] if "retriever" in retriever else []
    return [*TAGS, *(f"{side}-expansion" for side in sides), *named, PAPER_TAG]


def _with_metadata(data: ModelCardData | DatasetCardData, text: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


# Names


def name_model(name: str | None, on_hub: bool) -> dict[str, Any]:
    """A model as a card shows it: its name on the Hub, or its folder's without the way there; empty if unknown."""
    return {"name": (name or "") if on_hub else line(last_part(name or "")), "on_hub": on_hub}


def _base_is_on_hub(record: RunRecord) -> bool:
    # Runs of earlier versions do not say whether it was a folder.
    name = record.training.get("base_model", "")
    return is_hub_id(name) and not record.training.get("base_model_is_folder", Path(name).exists())


def _loadable(name: str) -> bool:
    """Whether `--collection` takes the name anywhere, since it is not that of a folder."""
    return is_hub_id(name) or name.startswith("irds:") or name == "vocabulary-gap"


def _model_on_hub(manifest: dict[str, Any]) -> bool:
    """Whether the model of a manifest is one of the Hub; older manifests do not say whether it was a folder."""
    return is_hub_id(manifest["model"]) and not manifest.get("model_is_folder")
