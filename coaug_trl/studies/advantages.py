"""What normalisation does to advantages."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..utils.errors import InputError
from ..utils.tables import Table


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
        normalization: `"center"`, `"group"` or `"batch"`.
        text_type: `"query"`, `"relevant"`, `"irrelevant"` or `"all"`.
        num_texts: Texts of this type, each with its rollouts.
        small_before: Share whose rewards have a standard deviation below the threshold.
        small_after: Share whose advantages have.
        amplified: `small_before` less `small_after`: amplified variance.
        same_sign: Share whose advantages are all positive or all negative.
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
        columns: `group`, `text_type`, `text_id` and `joint_ndcg` of each completion.

    Returns: group, text type and id of each text to the rewards of its rollouts.

    Raises `InputError`: A text has fewer rollouts than another.
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
        run_dir: The run's `output_dir`.

    Returns: a dictionary for each generation batch, as [`group_rewards`] makes them.

    Raises `InputError`: There are no completions, or a file is damaged.
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
        arguments: Command line of `coaug train`. Its `output_dir` is left alone.

    Returns: as [`group_rewards`] makes them.

    Raises `InputError`: A setting or an input file has to be mended.
    """
    from ..training.recipe import make_trainer, parse_arguments, set_up_logging

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
        batches: Whole generation batches, as [`group_rewards`] makes them.
        threshold: Standard deviation below which the variance of a text's rewards, or advantages, is small.

    Returns: for each normalisation all texts, then those of each type.

    Raises `InputError`: `threshold` is not positive.

    Source: arXiv 2506.18670, appendix A.3 and Table 7, whose groups are the rollouts of one text.
    """
    import torch

    from ..data.groups import TEXT_TYPES
    from ..training.advantages import normalize_advantages

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
    return Table(title, header, cells, left=2)
