"""What the commands of `coaug` do; each takes its parsed options and prints what it did."""

import argparse
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import InputError
from ..utils.terminal import note, say, show, visible


# Everything heavier is imported by the command that needs it, so that a short one answers at once.
if TYPE_CHECKING:
    from ir_measures import Measure
    from rich.text import Text

    from ..augmentation.folder import AugmentedCollection
    from ..data.collection import Collection
    from ..evaluation.comparison import Comparison, Table
    from ..policy.settings import GenerationSettings
    from ..publishing.upload import Upload
    from ..retrieval import Retriever
    from ..serving.index import Timing


def _sides(side: str) -> tuple[str, ...]:
    return ("query", "document") if side == "both" else (side,)


def augment(options: argparse.Namespace) -> None:
    from ..augmentation.augmenter import Augmenter
    from ..augmentation.engines.base import best_engine, num_processes, process_index
    from ..augmentation.folder import MANIFEST, describe_side
    from ..data.collection import Collection
    from ..policy.download import policy_folder
    from ..policy.prompts import PromptSet
    from ..policy.settings import PolicySettings

    if not 0 <= options.retry_incomplete <= 1000:
        raise InputError(f"--retry_incomplete is {options.retry_incomplete}; use 0 to 1000.")
    if options.server and options.engine:
        raise InputError("--server and --engine are both given, and only one of them can generate; leave one out.")
    main = process_index() == 0
    collection = Collection.load(options.collection, options.split, stream=True)
    if main:
        say(collection.summary())
    trained = PolicySettings.load(policy_folder(options.model, options.revision))
    prompt_set = PromptSet.load(options.prompt_set) if options.prompt_set else None
    generation = _generation(options)
    if trained and options.retriever not in (None, trained.retriever.get("retriever")):
        theirs = trained.retriever.get("retriever", "none")
        raise InputError(
            f"--retriever is {options.retriever}, and {options.model} is a policy for {theirs}; leave it out."
        )
    if trained is None:
        prompt_set = prompt_set or PromptSet.default("dense" if options.retriever == "dense" else "sparse")
    augmenter = Augmenter.from_pretrained(
        options.model,
        prompt_set,
        generation,
        batch_size=options.batch_size,
        revision=options.revision,
        engine=options.engine or best_engine(),
        server=options.server,
        server_concurrency=options.server_concurrency,
        dtype=options.dtype,
        gpu_memory_utilization=options.gpu_memory_utilization,
    )
    sides = _sides(options.side) if options.side else augmenter.settings.sides
    if options.dry_run:
        if main:
            estimates = {
                side: augmenter.estimate(collection, options.output, side, options.retry_incomplete) for side in sides
            }
            content = {side: asdict(estimate) for side, estimate in estimates.items()}
            show(content, "\n".join(f"{side}: {estimate}" for side, estimate in estimates.items()))
        return
    manifest = augmenter.augment_collection(collection, options.output, sides, options.retry_incomplete)
    if not main:
        return
    lines = [describe_side(side, counts) for side, counts in manifest["sides"].items()]
    shares = f" by process 1 of {num_processes()}" * (num_processes() > 1)
    lines += [f"{side}{shares}: {throughput}" for side, throughput in augmenter.throughput.items()]
    throughput = {side: asdict(throughput) for side, throughput in augmenter.throughput.items()}
    show(
        manifest | {"folder": options.output, "throughput": throughput},
        "\n".join([*lines, str(Path(options.output) / MANIFEST)]),
    )


def _generation(options: argparse.Namespace) -> "GenerationSettings | None":
    """The generation settings given for an untrained model, if any."""
    from ..policy.settings import GenerationSettings

    given = {
        name: getattr(options, name)
        for name in ("max_new_tokens", "repetition_penalty")
        if getattr(options, name) is not None
    }
    return GenerationSettings(**given) if given else None


def index(options: argparse.Namespace) -> None:
    from ..data.collection import Collection
    from ..data.sources import open_source
    from ..serving.index import SearchIndex, refuse_other_content

    refuse_other_content(options.output)  # rather now than after the work
    split = options.split or open_source(options.collection).splits[0]
    collection = Collection.load(options.collection, split)
    say(collection.summary())
    augmented, retriever = _augmented_and_retriever(options, collection, ("document",))
    index = SearchIndex.build(collection, augmented, retriever, options.output)
    show(
        index.manifest | {"folder": options.output},
        f"{len(collection.corpus):,} documents indexed, {'with' if augmented else 'without'} augmentations; "
        f"{options.output}",
    )


def search(options: argparse.Namespace) -> None:
    from ..retrieval.base import check_depth

    for query in options.queries:
        if not query.strip():
            raise InputError("A query is empty; write what to search for.")
        try:
            query.encode()
        except UnicodeEncodeError:  # how Python reads arguments that are not UTF-8
            raise InputError(f"The query {query!r} is not UTF-8; check the encoding of the terminal.") from None
    check_depth(options.k)
    from ..serving.index import SearchIndex

    start = time.perf_counter()
    index = SearchIndex.load(options.index, options.revision)
    augmenter = index.augmenter(options.model) if options.model else None
    if options.timing:
        index.search(options.queries[:1], options.k, augmenter)  # the first one loads what the others find loaded
        loading = time.perf_counter() - start
        results, timings = index.search_timed(options.queries, options.k, augmenter)
    else:
        results, timings = index.search(options.queries, options.k, augmenter), None
    for place, result in enumerate(results):
        seconds = {"seconds": timings[place]._asdict() | {"total": timings[place].total}} if timings else {}
        show(result._asdict() | seconds, _hits(*result), indent=None)
    if timings:
        say(_timings(loading, timings))


def _timings(loading: float, timings: list["Timing"]) -> str:
    from statistics import median

    import numpy as np

    parts = [[1000 * part for part in (*timing, timing.total)] for timing in timings]
    rows = {"query": parts[0]}
    if len(parts) > 1:
        rows = {
            "median": [median(column) for column in zip(*parts, strict=True)],
            "p95": np.percentile(parts, 95, axis=0),
        }
    lines = [
        f"loaded in {loading:.2f} s, a first query included; then, for one query at a time:",
        f"{'ms':>8}{'augment':>10}{'search':>10}{'total':>10}",
    ]
    lines += [f"{name:>8}" + "".join(f"{value:>10.1f}" for value in row) for name, row in rows.items()]
    return "\n".join(lines)


def _hits(query: str, answer: str | None, rows: list[dict[str, Any]]) -> "Text":
    """What a search found for one query, a line a hit, cut to the width of a terminal."""
    from rich.text import Text

    lines = [Text(query, "bold")]
    if answer is not None:
        lines.append(Text(f"  + {' '.join(answer.split())}" if answer else "  (nothing added)", "cyan"))
    if not rows:
        lines.append(Text("  nothing found"))
    width = max((len(row["_id"]) for row in rows), default=0)
    for row in rows:
        line = f"{row['rank']:>4}  {row['score']:>8.4f}  {row['_id']:<{width}}  "
        columns = max(shutil.get_terminal_size().columns - len(line), 20)
        title, text = (" ".join(visible(row[name]).split()) for name in ("title", "text"))
        shown = Text.assemble((title, "bold"), " | " if title and text else "", text)
        shown.truncate(columns, overflow="ellipsis")
        lines.append(Text(line) + shown)
    return Text("\n").join([*lines, Text("")])


def evaluate(options: argparse.Namespace) -> None:
    from ..augmentation.folder import compose
    from ..data.collection import Collection
    from ..evaluation.folder import evaluation_manifest, judged_texts, save_evaluation
    from ..evaluation.measures import MEASURES, parse_measures
    from ..retrieval.base import check_depth, retrieve

    measures = parse_measures(options.measures or MEASURES)
    check_depth(options.k)
    collection = Collection.load(options.collection, options.split)
    say(collection.summary())
    augmented, retriever = _augmented_and_retriever(options, collection, _sides(options.side))
    queries, documents = compose(collection, augmented, retriever)
    retriever.index(documents)
    run = retrieve(retriever, queries, options.k, options.ignore_identical_ids)
    manifest = evaluation_manifest(
        collection, augmented, retriever.config, queries, documents, options.k, options.ignore_identical_ids
    )
    texts = judged_texts(collection, augmented.answers if augmented else None)
    metrics = save_evaluation(options.output, run, collection.qrels, manifest, measures.values(), texts)
    _note_depth(measures, options.k, collection)
    show(
        metrics | {"folder": options.output},
        f"{_means(options.output, run)}\n"
        f"over {metrics['num_queries']:,} judged queries, of which {metrics['num_queries_without_hits']:,} found "
        f"nothing and count 0; {options.output}",
    )


def _note_depth(measures: dict["Measure", str], k: int, collection: "Collection") -> None:
    too_deep = [
        name
        for measure, name in measures.items()
        if k < measure.params.get("cutoff", 0) and k < len(collection.corpus)
    ]
    if too_deep:
        note(f"{', '.join(too_deep)} would need more than the {k:,} hits of --k")


def _means(folder: str, run: dict[str, dict[str, float]]) -> str:
    """The means of an evaluation, and those that leave out queries without hits where there are any."""
    from statistics import fmean

    from ..evaluation.folder import load_evaluation

    evaluation = load_evaluation(folder)
    with_hits = [values for query_id, values in evaluation.per_query.items() if run.get(query_id)]
    width = max(map(len, evaluation.measures))
    lines = []
    for name in evaluation.measures:
        line = f"{name:>{width}}  {evaluation.metrics[name]:.4f}"
        if 0 < len(with_hits) < len(evaluation.per_query):
            mean = fmean(values[name] for values in with_hits)
            line += f"   ({mean:.4f} over the {len(with_hits):,} queries with hits, as BEIR averages)"
        lines.append(line)
    return "\n".join(lines)


def _augmented_and_retriever(
    options: argparse.Namespace, collection: "Collection", sides: tuple[str, ...]
) -> tuple["AugmentedCollection | None", "Retriever"]:
    """What `index` and `evaluate` work with, refused where it does not belong together."""
    from ..augmentation.folder import AugmentedCollection

    augmented, trained_with = None, {}
    if options.augmentations:
        augmented = AugmentedCollection.load(options.augmentations, sides)
        trained_with = augmented.manifest["retriever"]
    retriever = _retriever(options, trained_with, f"{options.augmentations} was made by a policy")
    if augmented and augmented.prompt_set.kind != retriever.kind:
        raise InputError(
            f"{options.augmentations} was made with prompts for {augmented.prompt_set.kind} retrievers, and the "
            f"retriever is {retriever.kind}."
        )
    if augmented and augmented.manifest["collection"] != collection.name:
        raise InputError(
            f"{options.augmentations} belongs to the collection {augmented.manifest['collection']}, not to "
            f"{collection.name}."
        )
    return augmented, retriever


def _retriever(options: argparse.Namespace, trained_with: dict[str, Any], policy: str) -> "Retriever":
    """The retriever of the options; refused where it is not the one that the policy was trained with."""
    from ..policy.settings import retriever_differences
    from ..retrieval import make_retriever

    given = {
        name: getattr(options, option)
        for name, option in (*((name, name) for name in ("fields", "k1", "b", "language")), ("model", "encoder"))
        if getattr(options, option) is not None
    }
    # What the policy was trained for is the default, and nothing else is accepted, but for where its encoder lies.
    settings = {"retriever": options.retriever} | trained_with | given
    if trained_with and retriever_differences(trained_with, settings):
        raise InputError(
            f"{policy} trained for {trained_with}, not for {settings}; "
            "leave the retriever's settings out, or augment with an untrained model."
        )
    if settings.pop("retriever") != options.retriever:
        raise InputError(
            f"{policy} trained for {trained_with}, and the retriever is {options.retriever}; use the one it was "
            "trained for."
        )
    if options.embedding_cache:
        settings["cache_dir"] = options.embedding_cache
    return make_retriever(options.retriever, **settings)


def baselines(options: argparse.Namespace) -> None:
    from ..data.collection import Collection
    from ..evaluation.baselines import COMPARISON_FILE, choose_systems, run_baselines
    from ..evaluation.measures import MEASURES, parse_measures
    from ..policy.download import policy_folder
    from ..policy.settings import PolicySettings
    from ..retrieval.base import check_depth

    measures = parse_measures(options.measures or MEASURES)
    check_depth(options.k)
    generation = _generation(options)
    trained = PolicySettings.load(policy_folder(options.policy)) if options.policy else None
    retriever = _retriever(options, trained.retriever if trained else {}, f"{options.policy} is a policy")
    systems = choose_systems(retriever, options.model, options.policy, options.only)
    collection = Collection.load(options.collection, options.split)
    say(collection.summary())
    comparison = run_baselines(
        systems,
        collection,
        retriever,
        options.output,
        options.model,
        options.policy,
        generation,
        options.batch_size,
        options.revision,
        options.k,
        options.ignore_identical_ids,
        measures.values(),
    )
    _note_depth(measures, options.k, collection)
    if comparison:
        _note_all(comparison)
        show(comparison.content(), f"\n{comparison.render_summary(options.format)}\n")
        say(f"all pairs, measures and examples: {Path(options.output) / COMPARISON_FILE}")


def push(options: argparse.Namespace) -> None:
    from ..publishing.publish import prepare

    if options.space:
        _push_space(options)
        return
    if options.model:
        raise InputError("--model is for a Space; give --space, or leave it out.")
    if options.repo_id is None:
        raise InputError("--repo_id is missing; give the repository to publish to, as USER/NAME.")
    upload = prepare(options.folder, options.repo_id, options.evaluations, options.collection, options.split)
    _push_upload(upload, options)


def _push_space(options: argparse.Namespace) -> None:
    """Writes a Space, of a dry run into a folder that goes away, and pushes it if it is to go anywhere."""
    from tempfile import TemporaryDirectory

    from ..publishing.publish import prepare_space
    from ..publishing.space import write_space
    from ..publishing.upload import check_repo_id
    from ..serving.demo import JudgedQueries
    from ..serving.index import SearchIndex

    if options.repo_id:
        check_repo_id(options.repo_id)  # rather now than after the work
    judged = None
    if options.collection:
        judged = JudgedQueries.load(options.collection, options.split, SearchIndex.load(options.folder))
    with TemporaryDirectory() as temporary:
        folder = temporary if options.dry_run else options.space
        paths = write_space(folder, options.folder, options.model, judged)
        if options.repo_id or options.dry_run:
            _push_upload(prepare_space(folder, paths), options)
        else:
            show(
                {"folder": options.space, "files": len(paths)},
                f"{len(paths)} files in {options.space}; try them by python {Path(options.space) / 'app.py'}",
            )


def _push_upload(upload: "Upload", options: argparse.Namespace) -> None:
    """Uploads, or shows what would be uploaded."""
    from ..publishing.upload import push as push_to_hub

    for line in upload.notes:
        note(line)
    sizes, page = upload.sizes, str(upload.card or "")
    total = f"{len(sizes)} files, {_bytes(sum(sizes.values()))}"
    content = {"repo_id": options.repo_id, "repo_type": upload.repo_type, "files": sizes}
    if options.dry_run:
        files = "\n".join(f"{_bytes(size):>10}  {name}" for name, size in sorted(sizes.items()))
        where = f", to the {upload.repo_type} {options.repo_id}" if options.repo_id else ""
        show(content | {"card": page}, f"{files}\n{total}{where}; nothing was uploaded\n\n{page}".rstrip())
        return
    commit = push_to_hub(upload, options.repo_id, options.private or None, options.revision, options.commit_message)
    show(content | {"url": str(commit.repo_url), "commit": commit.oid}, f"{total}: {commit.repo_url}")


def _bytes(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"


def compare(options: argparse.Namespace) -> None:
    from ..evaluation.comparison import compare_folders

    comparison = compare_folders(options.folders, options.measures)
    _note_all(comparison)
    show(comparison.content(), comparison.render(options.format))


def _note_all(comparison: "Comparison") -> None:
    for text in comparison.notes:
        note(text)


def report(options: argparse.Namespace) -> None:
    from ..publishing.pages import save_report
    from ..publishing.report import make_report

    made = make_report(options.run_dir, options.evaluations, options.augmentations, options.collection)
    paths = list(map(str, save_report(made, options.output or options.run_dir)))
    for text in made.notes:
        note(text)
    lines = [*made.headline, *(f"{hint.text} {hint.command}" for hint in made.hints), ", ".join(paths)]
    show({"headline": made.headline, "files": paths}, "\n".join(lines))


def demo(options: argparse.Namespace) -> None:
    from ..serving.demo import Demo, JudgedQueries, check_address, check_model, import_gradio
    from ..serving.index import SearchIndex

    check_address(options.host, options.port)
    if options.model:
        check_model(options.model)
    import_gradio()  # rather now than after the loading
    index = SearchIndex.load(options.index)
    judged = JudgedQueries.load(options.collection, options.split, index) if options.collection else None
    page = Demo.load(index, options.model, judged, options.plain_index)
    address = page.start(options.host, options.port)
    show({"url": address}, address)
    say("Ctrl-C ends the demo.")
    sys.stdout.flush()  # into a pipe, too, before the long wait
    page.wait()


def analyze_alignment(options: argparse.Namespace) -> None:
    from ..data.collection import Collection
    from ..studies.alignment import alignment_table, measure_alignment

    collection = Collection.load(options.collection, options.split)
    rows = measure_alignment(collection, options.augmentations, options.smoothing, options.language)
    settings = {
        "collection": collection.name,
        "split": collection.split,
        "unit": "nats",
        "smoothing": options.smoothing,
        "language": options.language,
    }
    title = (
        f"{collection.name} ({collection.split}): H(Q,D) in nats a word, {options.smoothing:g} added to the documents' "
        f"count of each word; words as BM25 reads them ({options.language}); unseen: query words in no document"
    )
    _show_analysis(settings, rows, alignment_table(rows, title))


def analyze_advantages(options: argparse.Namespace) -> None:
    from ..studies.advantages import anomalies_table, generate_rewards, measure_anomalies, read_rewards

    if options.config is None:
        if options.recipe_arguments:
            raise InputError(f"{options.recipe_arguments[0]}: fields of a recipe go with --config, not with --run.")
        batches = read_rewards(options.run_dir)
    else:
        batches = [generate_rewards(["--config", options.config, *options.recipe_arguments])]
    rows = measure_anomalies(batches, options.threshold)
    settings = {
        "source": options.run_dir or options.config,
        "num_generation_batches": len(batches),
        "num_rollouts": len(next(iter(batches[0].values()))),
        "threshold": options.threshold,
    }
    title = (
        f"{settings['source']}: {len(batches):,} generation batch{'es' if len(batches) > 1 else ''}, "
        f"{settings['num_rollouts']} rollouts a text; small: a standard deviation below {options.threshold:g}, of the "
        "rewards before and the advantages after; amplified variance: small before less small after"
    )
    _show_analysis(settings, rows, anomalies_table(rows, title))


def _show_analysis(settings: dict[str, Any], rows: list[Any], table: "Table") -> None:
    show(settings | {"rows": [asdict(row) for row in rows]}, str(table))


def analyze_reward(options: argparse.Namespace) -> None:
    from ..studies.sampled_reward import errors_table, import_figure, save_study, study_rewards

    if options.output:  # rather now than after the work
        import_figure()
        Path(options.output).mkdir(parents=True, exist_ok=True)
    rows = study_rewards(options.pools, options.samples, options.repeats, options.seed)
    title = (
        f"Sampled against exact reward (NDCG@10), 5 rollouts a text, {options.repeats} repeats: mean and largest "
        "absolute error, variance of an estimate, median seconds for the pool"
    )
    settings = {"repeats": options.repeats, "seed": options.seed}
    _show_analysis(settings, rows, errors_table(rows, title))
    if options.output:
        save_study(rows, settings, options.output)
        say(f"{Path(options.output) / 'reward_study.json'}, {Path(options.output) / 'reward_study.png'}")
