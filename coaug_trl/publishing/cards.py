"""The cards that models, augmentations and indexes carry on the Hub, written from what is in their folders."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from ..data.groups import TEXT_TYPES
from ..evaluation.comparison import LETTERS, Comparison, format_p
from ..policy.download import CURVES_FILE
from ..training.record import license_of
from ..utils.names import is_hub_id, last_part, without_folders
from ..utils.tables import Cell, Table, escape_markdown
from ..utils.terminal import describe_seconds
from .record import Evaluated, RunRecord


PAPER = "https://huggingface.co/papers/2506.18670"
TAGS = ("trl", "coaug", "information-retrieval")
PAPER_TAG = "arxiv:2506.18670"
SIDE_NAMES = {"query": "queries", "document": "documents"}
# A curve of its own for each text type only where this much can be seen between them.
VISIBLE = 0.02
# Of measures whose names on the Hub differ from ours, which are those of ir-measures.
HUB_METRICS = {"nDCG": "ndcg", "R": "recall", "RR": "mrr", "P": "precision", "AP": "map"}
SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
CITATION = """\
```bibtex
@misc{liu2025coaugmentation,
  title         = {Harnessing the Power of Reinforcement Learning for Language-Model-Based Information Retriever via
                   Query-Document Co-Augmentation},
  author        = {Liu, Jingming and Li, Yumeng and Shi, Wei and Ding, Yao-Xiang and Su, Hui and Zhou, Kun},
  year          = {2025},
  eprint        = {2506.18670},
  archivePrefix = {arXiv}
}

@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
             Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}
```"""


# The model


def model_card(record: RunRecord, repo_id: str) -> ModelCard:
    """
    Writes the card of a trained policy.

    Args:
        record ([`~coaug_trl.publishing.record.RunRecord`]):
            Its run, with the evaluations to state.
        repo_id (`str`):
            Where it is published, `user/name`.

    Returns:
        [`~huggingface_hub.ModelCard`]: with the means of the policy as `model-index`. It shows the picture
        `reward.png` if [`draw_curves`] can draw one.

    Raises:
        `InputError`: Evaluations of the run cannot be compared.
    """
    settings = record.settings
    comparisons = [(group, _compare(record, group)) for group in record.comparable]
    held_out = [pair for pair in comparisons if _why_seen(record, pair[0]) is None]
    license_fields = record.training.get("base_license") or license_of(record.training.get("base_model"))
    sections = [
        f"# {escape_markdown(repo_id.split('/')[-1])}",
        _what_it_does(record),
        _headline(held_out),
        _section("Use", *_use(record, repo_id)),
        _section("Results", *_results(record, comparisons)),
        _section("Training", *_training(record)),
        _section("Data", _data(record)),
        _section("Prompts", *_prompts(record)),
        _section("Retriever and generation", _settings_table(settings.retriever, settings.generation.__dict__)),
        _section("Limits", _bullets(_limits(record, comparisons))),
        _section("Licence", _license(record, license_fields)),
        _section("Citation", CITATION),
    ]
    data = ModelCardData(
        base_model=record.training["base_model"] if _base_is_on_hub(record) else None,
        base_model_relation=("adapter" if record.adapter else "finetune") if _base_is_on_hub(record) else None,
        datasets=[name] if is_hub_id(name := record.training.get("collection", "")) else None,
        library_name="peft" if record.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *TAGS,
            *(f"{side}-expansion" for side in settings.sides),
            *_retriever_tag(settings.retriever),
            PAPER_TAG,
        ],
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(held_out) or None,
        **license_fields,
    )
    if data.eval_results is None:
        data.pop("model_name")  # which is part of a model-index alone
    return ModelCard(_with_metadata(data, sections))


def draw_curves(record: RunRecord, path: str | Path) -> bool:
    """
    Draws the reward of the rollouts, by text type where that makes a difference, and nDCG on the dev split.

    Args:
        record ([`~coaug_trl.publishing.record.RunRecord`]):
            The run.
        path (`str` or `Path`):
            The PNG file to write.

    Returns:
        `bool`: whether it was drawn: matplotlib is installed, and something was logged.
    """
    if not _can_draw(record):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curves = {text_type: record.curve(f"{text_type}/reward") for text_type in TEXT_TYPES}
    labels = {"query": "queries", "relevant": "relevant documents", "irrelevant": "irrelevant documents"}
    few = {"marker": "o", "markersize": 3} if len(record.curve("reward")) < 10 else {}
    if _differ(curves.values()):
        for text_type, curve in curves.items():
            if curve:
                axes.plot(*zip(*curve, strict=True), label=f"reward of {labels[text_type]}", **few)
    else:
        axes.plot(*zip(*record.curve("reward"), strict=True), label="reward of the rollouts in training", **few)
    if measure := _dev_measure(record):
        label = f"{measure.removeprefix('eval_')} on the dev split, greedy"
        axes.plot(*zip(*record.curve(measure), strict=True), "ko--", markersize=4, label=label)
    axes.set(xlabel="optimizer step", ylabel="reward, nDCG", xlim=0, ylim=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def _can_draw(record: RunRecord) -> bool:
    return bool(record.curve("reward")) and find_spec("matplotlib") is not None


def _differ(curves: Iterable[list[tuple[int, float]]]) -> bool:
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    return any(max(values) - min(values) > VISIBLE for values in by_step.values())


def _dev_measure(record: RunRecord) -> str | None:
    """The name under which nDCG on the dev split was logged, if it was."""
    names = dict.fromkeys(name for entry in record.history for name in entry if name.startswith("eval_nDCG@"))
    return next((name for name in names if not name.endswith("_reward_statistics") and record.curve(name)), None)


# What it is, and how to use it


def _what_it_does(record: RunRecord) -> str:
    retriever, sides = record.settings.retriever, _sides(record.settings.sides)
    sparse = record.settings.prompt_set.kind == "sparse"
    finder = "BM25" if sparse else f"the encoder {_code(_short(retriever.get('model', 'it was trained for')))}"
    adapter = "a LoRA adapter of" if record.adapter else "trained from"
    jointly = (
        "Both sides learn together, so that query and document settle on the same words. "
        if len(record.settings.sides) == 2
        else ""
    )
    return (
        f"A language model, {adapter} {_base_name(record)}, that adds to {sides} what helps {finder} find documents "
        f"that are worded differently from the query. {jointly}Its reward in training was the NDCG of the retriever's "
        f"own ranking ([paper]({PAPER}), [TRL](https://github.com/huggingface/trl)). It does not answer questions."
    )


def _headline(comparisons: list[tuple[list[Evaluated], Comparison | None]]) -> str | None:
    """What the policy changed on the first collection it was evaluated on, in one sentence."""
    for group, _ in comparisons:
        last = group[-1].evaluation
        measure, retriever = last.measures[0], last.manifest["retriever"]
        before = [
            each.evaluation.metrics[measure]
            for each in group
            if each.system == "none"
            and each.evaluation.manifest["retriever"] == retriever
            and measure in each.evaluation.metrics
        ]
        if before and group[-1].system == "policy":
            return (
                f"**{measure} on {escape_markdown(_group_name(group))}: {last.metrics[measure]:.4f}, against "
                f"{before[0]:.4f} without augmentation, over {last.metrics['num_queries']:,} queries.**"
            )
    return None


def _use(record: RunRecord, repo_id: str) -> Iterable[str]:
    settings = record.settings
    side = settings.sides[0]
    package = "coaug-trl" if settings.prompt_set.kind == "sparse" else "coaug-trl[dense]"
    yield _fence(f'pip install "{package}"', "bash")
    text = "why do my knees hurt after running" if side == "query" else "Patients who jogged had sore knees."
    composed = (
        "print(augmenter.settings.prompt_set.compose_query(text, augmentation.answer))  # what is searched for"
        if side == "query"
        else "print(augmentation.answer)  # what joins the document"
    )
    yield _fence(
        f"""\
from coaug_trl import Augmenter

augmenter = Augmenter.from_pretrained({json.dumps(repo_id)})
text = {json.dumps(text)}
augmentation = augmenter.generate("{side}", [text])[0]
{composed}""",
        "python",
    )
    yield "From a collection to search results; see `coaug --help` for the form of a collection:"
    name = record.training.get("collection", "")
    collection = shlex.quote(name) if _loadable(name) else "path/to/collection"
    model, retriever = shlex.quote(repo_id), _index_options(settings.retriever)
    augmentations = " --augmentations augmentations" if "document" in settings.sides else ""
    # Where the documents are as they are, nothing says which retriever the policy was trained for.
    options = retriever if augmentations == "" else retriever[:1]
    policy = f" --model {model}" if "query" in settings.sides else ""
    commands = [
        f"coaug augment --model {model} --collection {collection} --output augmentations",
        f"coaug index --collection {collection}{augmentations}{''.join(options)} --output index",
        f'coaug search --index index{policy} "{text}"',
    ]
    yield _fence("\n".join(commands if augmentations else commands[1:]), "bash")


def _index_options(retriever: dict[str, Any]) -> list[str]:
    """The options of `coaug index` that make this retriever: first which one, then its settings."""
    names = {"fields": "fields", "k1": "k1", "b": "b", "language": "language", "model": "encoder"}
    settings = [
        f" --{option} {shlex.quote(str(retriever[name]))}" for name, option in names.items() if name in retriever
    ]
    return [f" --retriever {retriever.get('retriever', 'bm25')}", *settings]


# Results


def _compare(record: RunRecord, group: Sequence[Evaluated]) -> Comparison | None:
    return record.compare(group) if group[-1].system == "policy" and len(group) <= len(LETTERS) else None


def _why_seen(record: RunRecord, group: list[Evaluated]) -> str | None:
    """What the run has learnt of the queries of an evaluation, which is then no result; `None` if nothing."""
    training = record.training
    collection, split, _ = group[0].key
    if collection != training.get("collection"):
        return None
    if split == training.get("train_split"):
        return "the model was trained on these queries"
    if split == training.get("eval_split") and training.get("arguments", {}).get("load_best_model_at_end"):
        return "the checkpoint was chosen by these queries"
    return None


def _results(record: RunRecord, comparisons: list[tuple[list[Evaluated], Comparison | None]]) -> Iterable[str]:
    if not comparisons:
        yield "No evaluation was published with this model; `coaug evaluate` makes one."
    for group, comparison in comparisons:
        yield _means_table(group, _why_seen(record, group)).markdown()
        if comparison:
            yield _tests_table(group, comparison).markdown()
    if comparisons:
        yield "Runs, judgments and the values of each query are in `evaluations/`."


def _means_table(group: list[Evaluated], seen: str | None) -> Table:
    measures = [
        name for name in group[-1].evaluation.measures if all(name in each.evaluation.metrics for each in group)
    ]
    retrievers = [_retriever_name(each.evaluation.manifest["retriever"]) for each in group]
    differ = len(set(retrievers)) > 1
    best = {name: max(each.evaluation.metrics[name] for each in group) for name in measures}
    rows = []
    for each, retriever in zip(group, retrievers, strict=True):
        metrics = each.evaluation.metrics
        values = [Cell(f"{metrics[name]:.4f}", bold=metrics[name] == best[name]) for name in measures]
        counts = [Cell(f"{metrics[name]:,}") for name in ("num_queries", "num_queries_without_hits")]
        texts = [Cell(_system(each)), Cell(_sides(each.sides) or "nothing")]
        rows.append([*texts, *[Cell(retriever)] * differ, *values, *counts])
    header = ["system", "augmented", *["retriever"] * differ, *measures, "queries", "without hits"]
    title = (
        f"{_group_name(group)}: {f'no result, since {seen}; ' if seen else ''}means over every judged query, of which "
        "those without hits count 0"
        + f"; {retrievers[0]}" * (not differ)
        + "; other systems have the names of their folders" * any(each.system == "other" for each in group)
    )
    return Table(title, header, rows, left=2 + differ)


def _tests_table(group: list[Evaluated], comparison: Comparison) -> Table:
    measure = next(iter(comparison.values))
    last = len(group) - 1
    rows = [
        [
            Cell(f"{_system(group[pair.earlier])}, {_sides(group[pair.earlier].sides) or 'nothing'} augmented"),
            Cell(f"{pair.mean_difference:+.4f}"),
            Cell(f"{pair.wins}/{pair.ties}/{pair.losses}"),
            Cell(format_p(pair.p_t_test_holm)),
            Cell(format_p(pair.p_randomization_holm)),
        ]
        for pair in comparison.pairs
        if pair.measure == measure and pair.later == last
    ]
    title = (
        f"{measure} of {_system(group[last])}, {_sides(group[last].sides)} augmented, less that of each other system; "
        f"p of the paired t test and of Fisher's randomisation test, Holm-corrected for all {len(group)} systems"
    )
    return Table(title, ["less", "difference", "wins/ties/losses", "p t", "p Fisher"], rows, left=1)


def _system(evaluated: Evaluated) -> str:
    if evaluated.system == "other":
        return _line(evaluated.folder.name)
    return {"policy": "this model", "none": "none"}[evaluated.system]


def _group_name(group: list[Evaluated]) -> str:
    collection, split, _ = group[0].key
    return f"{_line(collection)} ({_line(split)})"


def _eval_results(comparisons: list[tuple[list[Evaluated], Comparison | None]]) -> list[EvalResult]:
    """The means of the policy with most sides augmented, for each collection and split."""
    results = []
    for group, _ in comparisons:
        evaluated = group[-1]
        if evaluated.system != "policy":
            continue
        collection, split, _ = evaluated.key
        for measure in evaluated.evaluation.measures:
            results.append(
                EvalResult(
                    task_type="text-retrieval",
                    task_name="Retrieval",
                    dataset_type=_dataset_type(collection),
                    dataset_name=_group_name(group),
                    dataset_split=_line(split),
                    metric_type=_hub_metric(measure),
                    metric_name=f"{measure}, {_sides(evaluated.sides)} augmented",
                    metric_value=evaluated.evaluation.metrics[measure],
                )
            )
    return results


def _dataset_type(collection: str) -> str:
    """A collection's name as the Hub takes it, which knows no colon, blank or second slash."""
    if re.fullmatch(r"([\w-]+/)?[\w.-]+", collection, re.ASCII):
        return collection
    return re.sub(r"[^\w.-]+", "-", collection, flags=re.ASCII).strip("-") or "collection"


def _hub_metric(measure: str) -> str:
    """`nDCG@10` as `ndcg_at_10`; a measure with parameters of its own stays as it is."""
    name, _, cutoff = measure.partition("@")
    return f"{HUB_METRICS[name]}{'_at_' * bool(cutoff)}{cutoff}" if name in HUB_METRICS else measure


# How it was made


def _training(record: RunRecord) -> Iterable[str]:
    if _can_draw(record):
        yield f"![Reward and nDCG in training]({CURVES_FILE})"
    rows = list(_training_rows(record))
    if not rows:
        yield "The run left no record of its training."
        return
    yield _table(["", "training"], rows)
    arguments = record.training.get("arguments")
    if arguments:
        yield "Arguments that differ from the defaults of `CoAugConfig`:"
        yield _fence(yaml.safe_dump(without_folders(arguments), sort_keys=False, allow_unicode=True).strip(), "yaml")


def _training_rows(record: RunRecord) -> Iterable[tuple[str, str]]:
    training, history = record.training, record.history
    if training:
        yield "began with", _base_text(record)
    if history:
        yield "optimizer steps", f"{history[-1]['step']:,}"
    if (epoch := record.last("epoch")) is not None:
        yield "epochs", f"{epoch:.1f}"
    if record.num_completions:
        yield "completions", f"{record.num_completions:,}"
    if tokens := record.last("num_tokens"):
        yield "tokens, prompts and completions", f"{int(tokens):,}"
    if record.step_seconds:
        yield "time of all steps, generation included", describe_seconds(record.step_seconds)
    if training:
        yield "processes", f"{training['num_processes']:,} ({_line(training['device'])})"
    if (reward := record.last("reward")) is not None:
        yield "mean reward, last logged", f"{reward:.4f}"
    if measure := _dev_measure(record):
        curve = record.curve(measure)
        step, best = max(curve, key=lambda point: point[1])
        yield f"{measure.removeprefix('eval_')} on the dev split, last", f"{curve[-1][1]:.4f}"
        yield f"{measure.removeprefix('eval_')} on the dev split, best", f"{best:.4f} at step {step:,}"


def _data(record: RunRecord) -> str:
    training = record.training
    if not training:
        return "The run left no record of its data."
    name = _line(training["collection"])
    rows = [
        ("collection", name),
        ("documents", f"{training['num_documents']:,}"),
        (
            f"trained on the split {_line(training['train_split'])}",
            f"{training['num_train_queries']:,} queries, {training['num_train_judgments']:,} judgments",
        ),
    ]
    if training.get("eval_split"):
        rows.append(("evaluated in training on the split", _line(training["eval_split"])))
    for group in record.comparable:
        rows.append(
            (
                "evaluated afterwards on",
                f"{_group_name(group)}, {group[0].evaluation.metrics['num_queries']:,} queries",
            )
        )
    return _table(["", "data"], rows)


def _prompts(record: RunRecord) -> Iterable[str]:
    prompt_set = record.settings.prompt_set
    yield (
        f"Prompt set {_code(prompt_set.hash)}, for {prompt_set.kind} retrievers. The text follows as the user's "
        f"message; the answer is what stands between `<answer>` and `</answer>`. Documents are cut to "
        f"{prompt_set.max_document_tokens:,} tokens before the model reads them."
    )
    for side in prompt_set.sides:
        yield f"For {SIDE_NAMES[side]}:"
        yield _fence(getattr(prompt_set, side), "text")


def _settings_table(retriever: dict[str, Any], generation: dict[str, Any]) -> str:
    rows = [(name, _line(without_folders(value, name))) for name, value in retriever.items() if value is not None]
    rows += [("generation", "greedy"), *((name, _line(value)) for name, value in generation.items())]
    return _table(["setting", "value"], rows)


def _limits(record: RunRecord, comparisons: list[tuple[list[Evaluated], Comparison | None]]) -> Iterable[str]:
    settings = record.settings
    yield (
        "It belongs to the prompts, the generation settings and the retriever above; `coaug` refuses others. With "
        "another retriever nothing is known of it."
    )
    if settings.prompt_set.kind == "sparse" and "document" in settings.sides:
        yield (
            "BM25's statistics must be counted anew from the augmented documents, as `coaug index` does: an index of "
            "the documents as they were would weigh the added words wrongly."
        )
    if len(settings.sides) == 2:
        yield (
            "Queries and documents were trained together and should be augmented together, by this model; one side "
            "alone may be worse than none."
        )
    evaluated = [group for group, _ in comparisons if group[-1].system == "policy"]
    for group in evaluated:
        if seen := _why_seen(record, group):
            yield f"The values on {escape_markdown(_group_name(group))} are no result: {seen}."
    if evaluated := [group for group in evaluated if not _why_seen(record, group)]:
        names = ", ".join(escape_markdown(_group_name(group)) for group in evaluated)
        yield f"Retrieval was measured on {names} and on nothing else."
    else:
        yield "Retrieval with this model was not measured on held-out queries."
    if record.training.get("arguments", {}).get("load_best_model_at_end"):
        yield "The checkpoint was chosen on the dev split, so its dev values are higher than on new queries."
    yield _cost(record)
    yield (
        "What it adds is written to be found, not to be true, and was never checked; it belongs into the index, not "
        "before a reader. It was trained for this one reward and may have lost abilities of its base model."
    )


def _cost(record: RunRecord) -> str:
    sides = record.settings.sides
    length = record.last("completions/mean_length")
    mean = f"; in training they had {length:.0f} on average" if length else ""
    whose = {
        ("query",): "every query, while its user waits",
        ("document",): "every document, once",
        ("query", "document"): "every document, once, and every query, while its user waits",
    }[tuple(sides)]
    return (
        f"It costs a completion of up to {record.settings.generation.max_new_tokens:,} tokens for {whose}{mean}. "
        "Latency was not measured here; `coaug search --timing` does."
    )


# Base model and licence


def _license(record: RunRecord, fields: dict[str, str]) -> str:
    if fields:
        stated = fields.get("license_name", fields["license"])
        return f"That of the base model, {_base_name(record)}: {_code(stated)}."
    where = "its page states it" if _base_is_on_hub(record) else "none is stated there"
    return f"The licence of the base model applies: {_base_name(record)}; {where}."


def _base_is_on_hub(record: RunRecord) -> bool:
    # Runs of earlier versions do not say whether it was a folder.
    name = record.training.get("base_model", "")
    return is_hub_id(name) and not record.training.get("base_model_is_folder", Path(name).exists())


def _base_text(record: RunRecord) -> str:
    name = record.training.get("base_model") or ""
    return name if _base_is_on_hub(record) else f"{_line(last_part(name))} (not on the Hub)"


def _base_name(record: RunRecord) -> str:
    """The base model in running text: a link, or the name of its folder."""
    name = record.training.get("base_model")
    if not name:
        return "a model that its run does not name"
    return (
        f"[{escape_markdown(name)}](https://huggingface.co/{name})"
        if _base_is_on_hub(record)
        else (f"{_code(last_part(name))}, which is not on the Hub")
    )


# Augmentations and indexes


def augmentations_card(manifest: dict[str, Any], repo_id: str, with_texts: bool) -> DatasetCard:
    """
    Writes the card of augmentations that are published as a dataset.

    Args:
        manifest (`dict[str, Any]`):
            `manifest.json` of the augmentations.
        repo_id (`str`):
            Where they are published, `user/name`.
        with_texts (`bool`):
            Whether the texts that are augmented are published with them.

    Returns:
        [`~huggingface_hub.DatasetCard`]: with a configuration for each side, of the Parquet files in its folder.
    """
    sides = list(manifest["sides"])
    collection = manifest["collection"]
    columns = {
        "_id": "of the query or document in the collection",
        "augmentation": "what the model adds; empty where it added nothing",
        "complete": "whether the model's answer was whole",
    }
    if with_texts:
        columns |= {
            "title": "of a document, as it is in the collection",
            "text": "as it is in the collection",
            "augmented_text": "text and augmentation, as they are searched for or indexed",
        }
    rows = [
        [
            _line(SIDE_NAMES[side]),
            f"{counts['texts']:,}",
            f"{counts['empty']:,}",
            f"{counts['incomplete']:,}",
            f"{counts['truncated']:,}",
        ]
        for side, counts in manifest["sides"].items()
    ]
    snippet = ["from datasets import load_dataset", ""]
    snippet += [
        f'{SIDE_NAMES[side]} = load_dataset({json.dumps(repo_id)}, "{SIDE_NAMES[side]}", split="train")'
        for side in sides
    ]
    snippet += [f"print({SIDE_NAMES[sides[0]]}[0])"]
    texts = (
        "The texts are part of the dataset, and the licence of the collection applies to them."
        if with_texts
        else "The texts themselves are not part of the dataset: join them by `_id`."
    )
    sections = [
        f"# {escape_markdown(repo_id.split('/')[-1])}",
        f"What {_link(manifest)} adds to the {_sides(sides)} of {_collection_link(collection)}, so that "
        f"{_retriever_text(manifest['retriever'])} finds documents that are worded differently from the query "
        f"([paper]({PAPER})).",
        _section(
            "Use",
            _fence("\n".join(snippet), "python"),
            _table(["column", ""], list(columns.items())),
            *([_index_snippet(collection, repo_id)] if "document" in sides else []),
        ),
        _section(
            "Contents",
            _table(["config", "texts", "left as they were", "answers incomplete", "texts cut"], rows, left=1),
        ),
        _section("How it was made", _provenance(manifest)),
        _section(
            "Limits and licence",
            _bullets(
                [
                    f"{texts} Augmentations are derived from the texts; the licences of the collection and of the "
                    "model apply.",
                    "They are written to be found, not to be true, and were not checked.",
                    "Queries have to be augmented by the same model; BM25's statistics have to be counted from the "
                    "augmented documents, as `coaug index` does.",
                ]
            ),
        ),
        _section("Citation", CITATION),
    ]
    num_texts = sum(counts["texts"] for counts in manifest["sides"].values())
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        tags=[*TAGS, *(f"{side}-expansion" for side in sides), *_retriever_tag(manifest["retriever"]), PAPER_TAG],
        task_categories=["text-retrieval"],
        annotations_creators=["machine-generated"],
        source_datasets=[collection] if is_hub_id(collection) else None,
        size_categories=[next((size for most, size in SIZES.items() if num_texts < most), "n>10M")],
        configs=[
            {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.parquet"}]}
            for name in map(SIDE_NAMES.get, sides)
        ],
    )
    return DatasetCard(_with_metadata(data, sections))


def _index_snippet(collection: str, repo_id: str) -> str:
    name = shlex.quote(collection) if _loadable(collection) else "path/to/collection"
    return _fence(f"coaug index --collection {name} --augmentations {shlex.quote(repo_id)} --output index", "bash")


def index_card(manifest: dict[str, Any], repo_id: str) -> ModelCard:
    """
    Writes the card of an index.

    Args:
        manifest (`dict[str, Any]`):
            `manifest.json` of the index.
        repo_id (`str`):
            Where it is published, `user/name`.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card.
    """
    collection, retriever, augmentations = (manifest[name] for name in ("collection", "retriever", "augmentations"))
    bm25 = retriever["retriever"] == "bm25"
    command = f"coaug search --index {shlex.quote(repo_id)}"
    if augmentations:
        model = shlex.quote(augmentations["model"]) if _model_on_hub(augmentations) else "path/to/model"
        command += f" --model {model}"
    package = "coaug-trl" if bm25 else "coaug-trl[dense]"
    use = [_fence(f'pip install "{package}"\n{command} "what to search for"', "bash")]
    if bm25 and retriever["fields"] == "flat":
        use += [
            "Or with bm25s alone, given the terms of a query as the index has them:",
            _fence(
                f"""\
from bm25s.hf import BM25HF
from coaug_trl.retrieval.analyzer import Analyzer

index = BM25HF.load_from_hub({json.dumps(repo_id)})
terms = Analyzer({json.dumps(retriever["language"])}).terms(["what to search for"])
places, scores = index.retrieve(terms, k=10)  # places in document_ids.json""",
                "python",
            ),
        ]
    augmented = f", with what {_link(augmentations)} added to them" if augmentations else ", as they are"
    rows = [("collection", _line(collection)), ("documents", f"{manifest['num_documents']:,}")]
    rows += [(name, _line(without_folders(value, name))) for name, value in retriever.items() if value is not None]
    limits = ["The texts of the documents are part of the index; the licence of the collection applies to them."]
    if augmentations:
        limits += [
            "Queries have to be augmented by the model that augmented the documents; `coaug search` refuses one with "
            "other prompts or another retriever."
        ]
    sections = [
        f"# {escape_markdown(repo_id.split('/')[-1])}",
        f"An index of the {manifest['num_documents']:,} documents of {_collection_link(collection)}{augmented}, for "
        f"{_retriever_text(retriever)}{f' ([paper]({PAPER}))' * bool(augmentations)}.",
        _section("Use", *use),
        _section("Contents", _table(["", "index"], rows)),
        _section("How it was made", _provenance(augmentations)) if augmentations else None,
        _section("Limits and licence", _bullets(limits)),
        _section("Citation", CITATION) if augmentations else None,
    ]
    data = ModelCardData(
        datasets=[collection] if is_hub_id(collection) else None,
        library_name="bm25s" if bm25 else "sentence-transformers",
        tags=[*TAGS[1:], *_retriever_tag(retriever), *["bm25s"] * bm25, *[PAPER_TAG] * bool(augmentations)],
    )
    return ModelCard(_with_metadata(data, sections))


def _provenance(manifest: dict[str, Any]) -> str:
    rows = [("model", _line(_model_name(manifest)))]
    rows += [(name, _line(manifest[name])) for name in ("revision", "prompt_hash") if manifest.get(name)]
    rows += [("engine", _line(", ".join(manifest["engines"])))] if manifest.get("engines") else []
    rows += [("generation", "greedy"), *((name, _line(value)) for name, value in manifest["generation"].items())]
    rows += [
        (f"retriever: {name}", _line(without_folders(value, name)))
        for name, value in manifest["retriever"].items()
        if value is not None
    ]
    rows += [(name, _line(value)) for name, value in manifest.get("versions", {}).items() if value != "not installed"]
    return _table(["", "setting"], rows)


def _link(manifest: dict[str, Any]) -> str:
    name = _model_name(manifest)
    return f"[{escape_markdown(name)}](https://huggingface.co/{name})" if _model_on_hub(manifest) else _code(name)


def _collection_link(name: str) -> str:
    return f"[{escape_markdown(name)}](https://huggingface.co/datasets/{name})" if is_hub_id(name) else _code(name)


def _retriever_text(retriever: dict[str, Any]) -> str:
    if not retriever:  # of a model that was not trained for one
        return "a retriever"
    if retriever["retriever"] == "bm25":
        return "BM25"
    return f"the encoder {_code(_short(retriever['model']))}"


def _retriever_name(retriever: dict[str, Any]) -> str:
    """A retriever in a table, short: BM25 with its settings, or its encoder."""
    if retriever.get("retriever", "bm25") != "bm25":
        return _line(_short(retriever.get("model", "dense")))
    settings = ", ".join(f"{name} {retriever[name]}" for name in ("k1", "b", "fields") if name in retriever)
    return f"BM25 ({settings})" if settings else "BM25"


def _retriever_tag(retriever: dict[str, Any]) -> list[str]:
    return [_line(retriever["retriever"])] if "retriever" in retriever else []


# Text


def _with_metadata(data: ModelCardData | DatasetCardData, sections: Iterable[str | None]) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *parts])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: list[str], rows: Iterable[Sequence[str]], left: int = 2) -> str:
    return Table("", header, [list(map(_line, row)) for row in rows], left).markdown()


def _sides(sides: Iterable[str]) -> str:
    return " and ".join(name for side, name in SIDE_NAMES.items() if side in sides)


def _line(value: Any) -> str:
    """A value as a single line; what shows it in Markdown escapes it."""
    return " ".join(str(value).split())


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _code(text: Any) -> str:
    """Code within a line: nothing in it is markup, backticks included."""
    text = _line(text)
    ticks = "`" * (_longest_run(text) + 1)
    padding = " " * (len(ticks) > 1)
    return f"{ticks}{padding}{text}{padding}{ticks}"


def _fence(text: str, language: str) -> str:
    """A block of code that ends where its fence ends, whatever the text holds."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


# Names


def _loadable(name: str) -> bool:
    """Whether `--collection` takes the name anywhere, since it is not that of a folder."""
    return is_hub_id(name) or name.startswith("irds:") or name == "vocabulary-gap"


def _model_name(manifest: dict[str, Any]) -> str:
    return manifest["model"] if _model_on_hub(manifest) else last_part(manifest["model"])


def _model_on_hub(manifest: dict[str, Any]) -> bool:
    """Whether the model of a manifest is one of the Hub; older manifests do not say whether it was a folder."""
    return is_hub_id(manifest["model"]) and not manifest.get("model_is_folder")


def _short(name: str) -> str:
    """A model's name: that of a folder without the path to it."""
    return without_folders(name, "model")
