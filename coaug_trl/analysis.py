"""
The analyses of arXiv 2506.18670: do queries and documents use the same words (Table 3), what does normalisation do to
the advantages (Table 7), and how far is the sampled reward from the exact one (section 3.3).
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .compare import Cell, Table
from .data import Collection, Document
from .errors import InputError
from .files import write_json
from .prompts import document_text
from .retrieval.analyzer import Analyzer
from .rewards import exact_ndcg_rewards, sampled_ndcg_rewards


# Words of queries and documents

COUNT_CHUNK = 10_000


@dataclass(frozen=True)
class Alignment:
    """
    How well the words of queries match those of documents.

    Args:
        folder (`str` or `None`):
            Folder of the augmentations; `None` for the texts as they are.
        texts (`str`):
            `"original"`, `"composed"` (original and augmentation, what is searched and indexed) or `"augmentations"`
            (without the originals).
        cross_entropy (`float` or `None`):
            H(Q, D) in nats a word; `None` where the queries have no word.
        query_words (`int`):
            Words of the queries.
        document_words (`int`):
            Words of the documents.
        vocabulary_size (`int`):
            Different words of queries and documents together.
        unseen_share (`float` or `None`):
            Share of the query words that occur in no document; `None` where the queries have no word.
    """

    folder: str | None
    texts: str
    cross_entropy: float | None
    query_words: int
    document_words: int
    vocabulary_size: int
    unseen_share: float | None


def measure_alignment(
    collection: Collection, folders: Sequence[str | Path], smoothing: float = 1.0, language: str = "english"
) -> list[Alignment]:
    """
    Measures the cross-entropy H(Q, D) of the words of queries and documents, with and without augmentations.

    The paper states neither base, smoothing, tokenizer nor whether the original texts count. Here: nats; add-α
    smoothing of the documents' distribution; words as BM25 reads them (lower case, no stop words, stemmed); over the
    judged queries of the split and all documents, each once, title and text. The composed texts and the augmentations
    alone are both measured.

    Args:
        collection ([`~coaug_trl.Collection`]):
            Whose judged queries and documents.
        folders (`Sequence[str | Path]`):
            Folders made by [`~coaug_trl.Augmenter.augment_collection`].
        smoothing (`float`, *optional*, defaults to `1.0`):
            What is added to the count of each word, α.
        language (`str`, *optional*, defaults to `"english"`):
            Snowball stemmer of the analyzer.

    Returns:
        `list[Alignment]`: the original texts, then for each folder the composed ones, and the augmentations alone if
        both sides are augmented.

    Raises:
        `InputError`: A folder holds no augmentations, those of another collection, or none of some text.

    Source: arXiv 2506.18670, section 4.3 and Table 3.
    """
    from .augmented import AugmentedCollection

    check_smoothing(smoothing)  # rather now than after the counting
    augmented = {str(folder): AugmentedCollection.load(folder) for folder in folders}
    for folder, each in augmented.items():
        if each.manifest["collection"] != collection.name:
            raise InputError(
                f"{folder} belongs to the collection {each.manifest['collection']}, not to {collection.name}."
            )
    queries = [collection.queries[id_] for id_ in collection.qrels]
    settings = (smoothing, language)
    rows = [_align(None, "original", queries, collection.corpus.values(), *settings)]
    for folder, each in augmented.items():
        composed = each.queries(collection).values(), each.documents(collection)
        rows.append(_align(folder, "composed", *composed, *settings))
        if each.answers.keys() == {"query", "document"}:
            queries = [each.answers["query"][id_] for id_ in collection.qrels]
            documents = [Document(id_, "", each.answers["document"][id_]) for id_ in collection.corpus]
            rows.append(_align(folder, "augmentations", queries, documents, *settings))
    return rows


def _align(
    folder: str | None,
    texts: str,
    queries: Iterable[str],
    documents: Iterable[Document],
    smoothing: float,
    language: str,
) -> Alignment:
    query_words = count_words(queries, language)
    document_words = count_words(map(document_text, documents), language)
    unseen = sum(count for word, count in query_words.items() if word not in document_words)
    return Alignment(
        folder=folder,
        texts=texts,
        cross_entropy=cross_entropy(query_words, document_words, smoothing) if query_words else None,
        query_words=query_words.total(),
        document_words=document_words.total(),
        vocabulary_size=len(query_words.keys() | document_words.keys()),
        unseen_share=unseen / query_words.total() if query_words else None,
    )


def count_words(texts: Iterable[str], language: str = "english") -> Counter[str]:
    """
    Counts words as [`~coaug_trl.BM25Retriever`] reads them.

    Args:
        texts (`Iterable[str]`):
            The texts.
        language (`str`, *optional*, defaults to `"english"`):
            Snowball stemmer of the analyzer.

    Returns:
        `Counter[str]`: how often each stem occurs.
    """
    analyzer, texts = Analyzer(language), list(texts)
    words = Counter()
    for first in tqdm(range(0, len(texts), COUNT_CHUNK), desc="Counting words", delay=2, leave=False):
        words.update(chain.from_iterable(analyzer.terms(texts[first : first + COUNT_CHUNK])))
    return words


def cross_entropy(query_words: Counter[str], document_words: Counter[str], smoothing: float = 1.0) -> float:
    """
    Cross-entropy H(Q, D) = −Σ p_Q(w) ln p_D(w) of the words of queries relative to those of documents.

    Args:
        query_words (`Counter[str]`):
            Count of each word in the queries, at least one; their distribution is taken as it is.
        document_words (`Counter[str]`):
            Count of each word in the documents, whose distribution is smoothed over the words of both, since a query
            word that no document has would make H infinite.
        smoothing (`float`, *optional*, defaults to `1.0`):
            What is added to the documents' count of each word.

    Returns:
        `float`: in nats a word; times 1.4427 in bits.

    Raises:
        `InputError`: `smoothing` is not positive.
    """
    check_smoothing(smoothing)
    total = document_words.total() + smoothing * len(query_words.keys() | document_words.keys())
    counts = np.array(list(query_words.values()), dtype=np.float64)
    probabilities = np.array([document_words[word] + smoothing for word in query_words]) / total
    return float(-(counts / counts.sum()) @ np.log(probabilities))


def check_smoothing(smoothing: float) -> None:
    """Raises an `InputError` if the number cannot be added to counts."""
    if not 0 < smoothing < np.inf:
        raise InputError(
            f"smoothing is {smoothing}; it is added to each word's count: use a positive number, such as 1."
        )


def alignment_table(rows: Sequence[Alignment], title: str) -> Table:
    """Sets the rows of [`measure_alignment`] as a table."""
    header = ["augmentations", "texts", "H(Q,D)", "query words", "document words", "vocabulary", "unseen"]
    cells = [
        [
            row.folder or "none",
            {"augmentations": "augmentations alone"}.get(row.texts, row.texts),
            _number(row.cross_entropy, ".3f"),
            f"{row.query_words:,}",
            f"{row.document_words:,}",
            f"{row.vocabulary_size:,}",
            _number(row.unseen_share, ".1%"),
        ]
        for row in rows
    ]
    return Table(title, header, [list(map(Cell, row)) for row in cells], left=2)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# Advantages under each normalisation

NORMALIZATIONS = {"center": "centre", "group": "group (GRPO)", "batch": "batch (REINFORCE++)"}
REWARD_COLUMN = "joint_ndcg"
TEXT_COLUMNS = ("group", "text_type", "text_id")
# Rounding leaves a centred advantage of 0 somewhere below this; it has no sign.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Anomalies:
    """
    What a normalisation does to the rollouts of a text, in shares of texts.

    Args:
        normalization (`str`):
            `"center"`, `"group"` or `"batch"`.
        text_type (`str`):
            `"query"`, `"relevant"`, `"irrelevant"` or `"all"`.
        num_texts (`int`):
            Texts of this type, each with its rollouts.
        small_before (`float`):
            Share whose rewards have a standard deviation below the threshold.
        small_after (`float`):
            Share whose advantages have.
        amplified (`float`):
            `small_before` less `small_after`: amplified variance.
        same_sign (`float`):
            Share whose advantages are all positive or all negative.
    """

    normalization: str
    text_type: str
    num_texts: int
    small_before: float
    small_after: float
    amplified: float
    same_sign: float


def group_rewards(columns: Mapping[str, Sequence]) -> dict[tuple[int, str, str], list[float]]:
    """
    Puts the joint rewards of a generation batch together by text.

    Args:
        columns (`Mapping[str, Sequence]`):
            `group`, `text_type`, `text_id` and `joint_ndcg` of each completion.

    Returns:
        `dict[tuple[int, str, str], list[float]]`: group, text type and id of each text to the rewards of its rollouts.

    Raises:
        `InputError`: A text has fewer rollouts than another.
    """
    rewards = {}
    for *text, reward in zip(*(columns[name] for name in (*TEXT_COLUMNS, REWARD_COLUMN)), strict=True):
        rewards.setdefault(tuple(text), []).append(reward)
    most = max(map(len, rewards.values()), default=0)
    for (group, text_type, text_id), rollouts in rewards.items():
        if len(rollouts) < most:
            raise InputError(
                f"{text_type} text {text_id!r} of group {group} has {len(rollouts)} rollouts and others have {most}: "
                "this is no whole generation batch."
            )
    return rewards


def read_rewards(run_dir: str | Path) -> list[dict[tuple[int, str, str], list[float]]]:
    """
    Reads the joint rewards that a run logged with `log_completions`.

    TRL writes a file each `logging_steps`. It holds one whole generation batch, the last one before: of those between
    two files nothing is kept, one that serves several optimizer steps may be in several files and counts once, and
    the first file after a resume inside a generation batch is empty.

    Args:
        run_dir (`str` or `Path`):
            The run's `output_dir`.

    Returns:
        `list[dict[tuple[int, str, str], list[float]]]`: a dictionary for each generation batch, as [`group_rewards`]
        makes them.

    Raises:
        `InputError`: There are no completions, or a file is damaged.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    folder = Path(run_dir) / "completions"
    paths = sorted(folder.glob("completions_*.parquet"))
    batches = []
    for path in tqdm(paths, desc="Reading completions", delay=2, leave=False):
        try:
            with ParquetFile(path) as file:
                if not file.metadata.num_rows:
                    continue
                names = [*TEXT_COLUMNS, REWARD_COLUMN]
                missing = [name for name in names if name not in file.schema_arrow.names]
                if missing:
                    raise InputError(
                        f"{path} has no column {missing[0]!r}; these completions were not logged by coaug train."
                    )
                columns = file.read(names).to_pydict()
        except (pyarrow.ArrowException, OSError) as error:  # OSError is also what pyarrow says of damaged pages
            raise InputError(f"{path} cannot be read ({error}); delete it to go on without it.") from None
        try:
            batch = group_rewards(columns)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if not batches or batch != batches[-1]:
            batches.append(batch)
    if not batches:
        raise InputError(
            f"{folder}: no completions were logged there; train with --log_completions true, or give a recipe with "
            "--config for a live batch."
        )
    return batches


def generate_rewards(arguments: list[str]) -> dict[tuple[int, str, str], list[float]]:
    """
    Generates and scores the first generation batch of a training run, without training; on one process.

    Args:
        arguments (`list[str]`):
            Command line of `coaug train`. Its `output_dir` is left alone.

    Returns:
        `dict[tuple[int, str, str], list[float]]`: as [`group_rewards`] makes them.

    Raises:
        `InputError`: A setting or an input file has to be mended.
    """
    from .train import make_trainer, parse_arguments, set_up_logging

    set_up_logging()
    script_args, training_args, model_args = parse_arguments(arguments)
    training_args.eval_strategy = "no"
    training_args.push_to_hub = False
    training_args.report_to = []
    with tempfile.TemporaryDirectory() as folder:
        training_args.output_dir = folder
        trainer = make_trainer(script_args, training_args, model_args)
        trainer.model.train()  # else TRL takes the batch for one of an evaluation, with one rollout a text
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        return group_rewards(trainer._logs["extra"] | trainer._logs["rewards"])


def measure_anomalies(
    batches: Sequence[Mapping[tuple[int, str, str], list[float]]], threshold: float = 0.02
) -> list[Anomalies]:
    """
    Measures what each normalisation of the advantages would do to the rollouts of each text.

    Rewards are normalised generation batch by generation batch, whatever the run itself was trained with, and without
    the scales of the text types, which come after. Standard deviations are those of a sample (n − 1), as in the
    normalisations.

    Args:
        batches (`Sequence[Mapping[tuple[int, str, str], list[float]]]`):
            Whole generation batches, as [`group_rewards`] makes them.
        threshold (`float`, *optional*, defaults to `0.02`):
            Standard deviation below which the variance of a text's rewards, or advantages, is small.

    Returns:
        `list[Anomalies]`: for each normalisation all texts, then those of each type.

    Raises:
        `InputError`: `threshold` is not positive.

    Source: arXiv 2506.18670, appendix A.3 and Table 7, whose groups are the rollouts of one text.
    """
    import torch

    from .prompts import TEXT_TYPES
    from .trainer import normalize_advantages

    if not threshold > 0:
        raise InputError(f"threshold is {threshold}; it is a standard deviation: use a positive one, such as 0.02.")
    types = np.array([text_type for batch in batches for _, text_type, _ in batch])
    rewards = [torch.tensor(list(batch.values()), dtype=torch.float64) for batch in batches]
    small_before = torch.cat([each.std(dim=1) < threshold for each in rewards]).numpy()
    rows = []
    for normalization in NORMALIZATIONS:
        small_after, same_sign = [], []
        for each in rewards:
            num_rollouts = each.shape[1]
            advantages = normalize_advantages(each.flatten(), num_rollouts, normalization).view(-1, num_rollouts)
            small_after.append(advantages.std(dim=1) < threshold)
            same_sign.append((advantages > ROUNDING).all(dim=1) | (advantages < -ROUNDING).all(dim=1))
        small_after, same_sign = torch.cat(small_after).numpy(), torch.cat(same_sign).numpy()
        for text_type in ("all", *TEXT_TYPES):
            chosen = types == text_type if text_type != "all" else np.full(len(types), True)
            if chosen.any():
                before, after = float(small_before[chosen].mean()), float(small_after[chosen].mean())
                rows.append(
                    Anomalies(
                        normalization=normalization,
                        text_type=text_type,
                        num_texts=int(chosen.sum()),
                        small_before=before,
                        small_after=after,
                        amplified=before - after,
                        same_sign=float(same_sign[chosen].mean()),
                    )
                )
    return rows


def anomalies_table(rows: Sequence[Anomalies], title: str) -> Table:
    """Sets the rows of [`measure_anomalies`] as a table."""
    header = ["normalisation", "texts", "number", "small before", "small after", "amplified variance", "same sign"]
    cells = [
        [NORMALIZATIONS[row.normalization], row.text_type, f"{row.num_texts:,}"]
        + [f"{share:.1%}" for share in (row.small_before, row.small_after, row.amplified, row.same_sign)]
        for row in rows
    ]
    return Table(title, header, [list(map(Cell, row)) for row in cells], left=2)


# Error of the sampled reward

NUM_ROLLOUTS, NUM_RELEVANT, DOCUMENTS_PER_QUERY, MOST_QUERIES = 5, 5, 15, 32
NDCG_K = 10
CLAIMED_ERROR = 1e-2


@dataclass(frozen=True)
class RewardError:
    """
    How far the sampled rewards of a pool are from the exact ones. Rewards are NDCG@10, from 0 to 1.

    Args:
        num_documents (`int`):
            Documents in the pool, with five rollouts each.
        num_queries (`int`):
            Queries ranked against it, with five rollouts each.
        num_samples (`int`):
            Draws of the sampled estimator.
        query_error (`float`):
            Mean absolute error of the reward of a query rollout.
        query_largest (`float`):
            The largest, over all rollouts and repeats.
        query_variance (`float`):
            Variance of the estimate over repeats, mean over the rollouts.
        document_error (`float`):
            As for queries.
        document_largest (`float`):
            As for queries.
        document_variance (`float`):
            As for queries.
        sampled_seconds (`float`):
            Time of the sampled rewards of the pool, median over repeats.
        exact_seconds (`float`):
            Time of the exact ones, likewise.
    """

    num_documents: int
    num_queries: int
    num_samples: int
    query_error: float
    query_largest: float
    query_variance: float
    document_error: float
    document_largest: float
    document_variance: float
    sampled_seconds: float
    exact_seconds: float


def generate_scores(num_documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Generates scores like those of BM25 in a training batch.

    There is a query for every 15 documents, up to 32 (the paper's batch), with 5 documents relevant to it and to no
    other. A pair of a query and a document has words in common with probability 0.9 if relevant, else 0.4, and then a
    score from a gamma distribution with mean 6, or 4. Under each pair of rollouts the two augmentations share a word
    with probability 0.3 if relevant, else 0.1, which adds a score with mean 2. What each rollout brings to the other
    side's original text adds noise with a standard deviation of 0.5. Pairs with nothing in common are not retrieved:
    −inf.

    Args:
        num_documents (`int`):
            Documents in the pool.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: scores of shape (queries, 5, documents, 5) and relevance, 0 or 1, of shape
        (queries, documents).
    """
    generator = np.random.default_rng((seed, num_documents))
    num_queries = _num_queries(num_documents)
    relevant = np.arange(num_documents) // NUM_RELEVANT == np.arange(num_queries)[:, None]
    relevant = relevant[:, generator.permutation(num_documents)]
    of_pair = relevant[:, None, :, None]
    shape = (num_queries, NUM_ROLLOUTS, num_documents, NUM_ROLLOUTS)

    common = generator.random(of_pair.shape) < np.where(of_pair, 0.9, 0.4)
    scores = np.where(common, generator.gamma(2.0, np.where(of_pair, 3.0, 2.0)), 0.0)
    from_query = generator.normal(0.0, 0.5, (num_queries, NUM_ROLLOUTS, num_documents, 1))
    from_document = generator.normal(0.0, 0.5, (num_queries, 1, num_documents, NUM_ROLLOUTS))
    matched = generator.random(shape) < np.where(of_pair, 0.3, 0.1)
    scores = scores + np.where(common, from_query + from_document, 0.0)
    scores = scores + np.where(matched, generator.gamma(2.0, 1.0, shape), 0.0)
    return np.where(common | matched, scores, -np.inf), relevant.astype(np.float64)


def _num_queries(num_documents: int) -> int:
    return max(1, min(MOST_QUERIES, num_documents // DOCUMENTS_PER_QUERY))


def study_rewards(
    pools: Sequence[int] = (15, 100, 480, 1000),
    samples: Sequence[int] = (16, 64, 256, 512, 1024, 4096),
    repeats: int = 10,
    seed: int = 0,
) -> list[RewardError]:
    """
    Compares sampled rewards with the exact ones, on generated scores.

    Args:
        pools (`Sequence[int]`, *optional*, defaults to `(15, 100, 480, 1000)`):
            Numbers of documents: 15 is a group of the paper, 480 are its generation batch.
        samples (`Sequence[int]`, *optional*, defaults to `(16, 64, 256, 512, 1024, 4096)`):
            Numbers of draws.
        repeats (`int`, *optional*, defaults to `10`):
            Estimates of each kind, with different draws for the same scores.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the scores; the draws of the r-th repeat have the seed `seed + r`.

    Returns:
        `list[RewardError]`: pool by pool, each by the number of draws.

    Raises:
        `InputError`: A number is too small.

    Source: arXiv 2506.18670, section 3.3 (error below 1e-2) and 3.4 (variance about 1e-5).
    """
    for name, numbers, least in (
        ("pools", pools, NUM_RELEVANT),
        ("samples", samples, 1),
        ("repeats", [repeats], 2),
        ("seed", [seed], 0),
    ):
        if min(numbers) < least:
            raise InputError(f"{name}: {min(numbers)} is too small; use at least {least}.")
    rows = []
    samples = sorted(set(samples))
    # Time grows with documents × queries × draws.
    work = {pool: pool * _num_queries(pool) for pool in sorted(set(pools))}
    total = sum(work.values()) * sum(samples) * repeats
    with tqdm(total=total, desc="Sampling", delay=2, leave=False, bar_format="{l_bar}{bar}| {elapsed}") as progress:
        for pool in work:
            scores, relevance = generate_scores(pool, seed)
            exact_runs = [_timed(exact_ndcg_rewards, scores, relevance, NDCG_K) for _ in range(repeats)]
            (exact_queries, exact_documents), _ = exact_runs[0]
            for num_samples in samples:
                runs = []
                for repeat in range(repeats):
                    arguments = (scores, relevance, NDCG_K, num_samples)
                    runs.append(_timed(sampled_ndcg_rewards, *arguments, seed=seed + repeat))
                    progress.update(work[pool] * num_samples)
                rows.append(
                    RewardError(
                        pool,
                        len(relevance),
                        num_samples,
                        *_errors([queries for (queries, _), _ in runs], exact_queries),
                        *_errors([documents for (_, documents), _ in runs], exact_documents),
                        sampled_seconds=float(np.median([seconds for _, seconds in runs])),
                        exact_seconds=float(np.median([seconds for _, seconds in exact_runs])),
                    )
                )
    return rows


def _timed(function: Callable, *args, **kwargs) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return result, time.perf_counter() - start


def _errors(estimates: list[np.ndarray], exact: np.ndarray) -> tuple[float, float, float]:
    """Mean absolute error, the largest, and the mean of the variances over the estimates."""
    errors = np.abs(np.stack(estimates) - exact)
    return float(errors.mean()), float(errors.max()), float(np.var(estimates, axis=0, ddof=1).mean())


def errors_table(rows: Sequence[RewardError], title: str) -> Table:
    """Sets the rows of [`study_rewards`] as a table."""
    sides = [f"{side} {value}" for side in ("query", "doc.") for value in ("error", "largest", "variance")]
    header = ["documents", "queries", "samples", *sides, "sampled s", "exact s"]
    cells = [
        [f"{row.num_documents:,}", f"{row.num_queries:,}", f"{row.num_samples:,}"]
        + [f"{row.query_error:.4f}", f"{row.query_largest:.4f}", f"{row.query_variance:.1e}"]
        + [f"{row.document_error:.4f}", f"{row.document_largest:.4f}", f"{row.document_variance:.1e}"]
        + [f"{row.sampled_seconds:.4f}", f"{row.exact_seconds:.4f}"]
        for row in rows
    ]
    return Table(title, header, [list(map(Cell, row)) for row in cells], left=0)


def save_study(rows: Sequence[RewardError], settings: dict[str, Any], output_dir: str | Path) -> None:
    """
    Writes the rows of [`study_rewards`] as `reward_study.json` and draws them as `reward_study.png`.

    Args:
        rows (`Sequence[RewardError]`):
            The rows.
        settings (`dict[str, Any]`):
            What they were made with.
        output_dir (`str` or `Path`):
            The folder, made if it is not there.

    Raises:
        `InputError`: matplotlib is not installed.
    """
    Figure = import_figure()
    output_dir = Path(output_dir)
    write_json(output_dir / "reward_study.json", settings | {"rows": [asdict(row) for row in rows]})

    samples = sorted({row.num_samples for row in rows})
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    of_queries, of_documents, of_time = figure.subplots(1, 3)
    of_documents.sharey(of_queries)
    for number, pool in enumerate(dict.fromkeys(row.num_documents for row in rows)):
        chosen = [row for row in rows if row.num_documents == pool]
        style = {"color": f"C{number}", "marker": "o", "markersize": 3}
        label = f"{pool:,} documents, {chosen[0].num_queries} quer{'y' if chosen[0].num_queries == 1 else 'ies'}"
        for axes, side in ((of_queries, "query"), (of_documents, "document")):
            axes.plot(samples, [getattr(row, f"{side}_error") for row in chosen], label=label, **style)
            axes.plot(samples, [getattr(row, f"{side}_largest") for row in chosen], linestyle=":", **style)
        of_time.plot(samples, [row.sampled_seconds for row in chosen], **style)
        of_time.axhline(chosen[0].exact_seconds, color=f"C{number}", linestyle="--")
    # Below the curves, where it can be seen.
    lowest = min(row.document_error for row in rows if row.num_samples == samples[0]) / 2
    for axes, title in ((of_queries, "Query rollouts"), (of_documents, "Document rollouts")):
        slope = [lowest * (samples[0] / each) ** 0.5 for each in samples]
        axes.plot(samples, slope, color="black", linewidth=0.8, label="slope of 1 / √samples")
        axes.axhline(CLAIMED_ERROR, color="grey", linewidth=0.8, linestyle="-.", label="0.01, the paper's bound")
        axes.set(title=title, ylabel=f"absolute error of the reward (NDCG@{NDCG_K})")
        axes.text(0.97, 0.97, "solid: mean\ndotted: largest", ha="right", va="top", transform=axes.transAxes)
    of_time.set(title="Time", ylabel="seconds for the rewards of the pool")
    of_time.text(0.03, 0.97, "solid: sampled\ndashed: exact", va="top", transform=of_time.transAxes)
    for axes in (of_queries, of_documents, of_time):
        axes.set(xlabel="samples (draws of one rollout for each document)", xscale="log", yscale="log")
        axes.set_xticks(samples, [f"{each:,}" for each in samples], rotation=45)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.legend(*of_queries.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    path = output_dir / "reward_study.png"
    figure.savefig(path.with_suffix(".tmp"), format="png", dpi=150)
    os.replace(path.with_suffix(".tmp"), path)


def import_figure() -> type:
    """matplotlib's figure; an `InputError` where matplotlib, an extra, is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            'The picture needs matplotlib: pip install "coaug-trl[plot]", or leave --output out.'
        ) from None
    return Figure
