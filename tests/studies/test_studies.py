"""The paper's analyses: words of queries and documents, normalisations of the advantages, error of the sampled reward."""

import json
import math
import shutil
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from coaug_trl import PromptSet
from coaug_trl.cli import main as cli
from coaug_trl.data.collection import Collection
from coaug_trl.data.document import Document
from coaug_trl.rewards.ndcg import exact_ndcg_rewards
from coaug_trl.studies.advantages import group_rewards, measure_anomalies, read_rewards
from coaug_trl.studies.alignment import count_words, cross_entropy, measure_alignment
from coaug_trl.studies.sampled_reward import generate_scores, study_rewards
from coaug_trl.utils.errors import InputError


PROMPT_SET = PromptSet("sparse", "query:", "document:")


# Words of queries and documents


@pytest.fixture(scope="module")
def animals():
    """A collection of words that the English analyzer leaves as they are; the third query is judged in no split."""
    corpus = {
        "d1": Document("d1", "cat", "cat dog"),
        "d2": Document("d2", "", "fox dog owl"),
        "d3": Document("d3", "", "bat"),
    }
    queries = {"q1": "kitten cat", "q2": "owl", "q3": "elk elk elk"}
    return Collection("animals", "test", corpus, queries, {"q1": {"d1": 1}, "q2": {"d2": 1}}, ("test",))


def write_augmentations(folder, answers, collection="animals"):
    """The files of coaug augment for the given answers by side."""
    folder.mkdir(parents=True)
    PROMPT_SET.save(folder)
    names = {"query": "queries.jsonl", "document": "documents.jsonl"}
    for side, answers_of in answers.items():
        rows = [{"_id": id_, "augmentation": answer, "complete": True} for id_, answer in answers_of.items()]
        (folder / names[side]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    manifest = {"model": "m", "revision": None, "prompt_hash": PROMPT_SET.hash, "generation": {}, "retriever": {}}
    manifest |= {"collection": collection, "versions": {}, "sides": dict.fromkeys(answers, {})}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def brute_force(queries, documents, smoothing):
    queries, documents = Counter(queries.split()), Counter(documents.split())
    vocabulary = set(queries) | set(documents)
    entropy = 0.0
    for word in vocabulary:
        p_query = queries[word] / sum(queries.values())
        p_document = (documents[word] + smoothing) / (sum(documents.values()) + smoothing * len(vocabulary))
        entropy -= p_query * math.log(p_document)
    return entropy


def test_alignment_agrees_with_counting_by_hand(animals, tmp_path):
    answers = {"query": {"q1": "cat pet", "q2": ""}, "document": {"d1": "pet kitten", "d2": "", "d3": "wing"}}
    folder = write_augmentations(tmp_path / "both", answers)
    original, composed, alone = measure_alignment(animals, [folder], smoothing=0.5)
    queries, documents = "kitten cat owl", "cat cat dog fox dog owl bat"
    assert original.cross_entropy == pytest.approx(brute_force(queries, documents, 0.5), abs=1e-12)
    assert composed.cross_entropy == pytest.approx(
        brute_force(f"{queries} cat pet", f"{documents} pet kitten wing", 0.5), abs=1e-12
    )
    assert alone.cross_entropy == pytest.approx(brute_force("cat pet", "pet kitten wing", 0.5), abs=1e-12)
    counts = [(row.query_words, row.document_words, row.vocabulary_size) for row in (original, composed, alone)]
    assert counts == [(3, 7, 6), (5, 10, 8), (2, 3, 4)]
    # kitten is in no original document, but in an augmentation; cat is in no augmentation of a document
    assert [row.unseen_share for row in (original, composed, alone)] == [1 / 3, 0.0, 0.5]
    assert [row.folder for row in (original, composed, alone)] == [None, str(folder), str(folder)]


def test_a_side_without_augmentations_stays_as_it_is(animals, tmp_path):
    folder = write_augmentations(tmp_path / "queries", {"query": {"q1": "cat", "q2": "owl"}})
    _, composed = measure_alignment(animals, [folder])
    assert (composed.texts, composed.query_words, composed.document_words) == ("composed", 5, 7)


def test_augmentations_without_a_word_have_no_cross_entropy(animals, tmp_path):
    answers = {"query": {"q1": "", "q2": ""}, "document": {"d1": "pet", "d2": "", "d3": ""}}
    *_, alone = measure_alignment(animals, [write_augmentations(tmp_path / "empty", answers)])
    assert (alone.cross_entropy, alone.unseen_share, alone.query_words) == (None, None, 0)


def test_words_are_those_of_bm25():
    assert count_words(["The Statins' effects, the statin's effect\nSTATIN"]) == {"statin": 3, "effect": 2}
    assert count_words([]) == {}
    assert count_words(["Häuser Haus"], "german") == {"haus": 2}


words = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 50), min_size=1).map(Counter)


@given(words)
def test_the_cross_entropy_of_a_distribution_with_itself_is_its_entropy(counts):
    p = np.array(list(counts.values())) / counts.total()
    assert cross_entropy(counts, counts, 1e-12) == pytest.approx(-(p * np.log(p)).sum(), abs=1e-9)


@given(words, words, st.floats(0.01, 5))
def test_the_cross_entropy_is_least_for_the_distribution_of_the_queries(queries, documents, smoothing):
    assert cross_entropy(queries, documents, smoothing) >= cross_entropy(queries, queries, 1e-12) - 1e-9


def test_shared_words_lower_the_cross_entropy(animals, tmp_path):
    apart = {"query": {"q1": "pet", "q2": "bird"}, "document": {"d1": "claw", "d2": "wing", "d3": "wing"}}
    agreed = {"query": {"q1": "pet", "q2": "bird"}, "document": {"d1": "pet", "d2": "bird", "d3": "bird"}}
    folders = [write_augmentations(tmp_path / "apart", apart), write_augmentations(tmp_path / "agreed", agreed)]
    _, composed_apart, alone_apart, composed_agreed, alone_agreed = measure_alignment(animals, folders)
    assert composed_agreed.cross_entropy < composed_apart.cross_entropy
    assert alone_agreed.cross_entropy < alone_apart.cross_entropy


@pytest.mark.parametrize("smoothing", [0, -1, math.nan, math.inf])
def test_smoothing_must_be_positive(smoothing):
    with pytest.raises(InputError, match="smoothing"):
        cross_entropy(Counter("a"), Counter("b"), smoothing)


def test_the_alignment_command(coaug, beir_folder, tmp_path):
    collection = Collection.load(beir_folder, "test")
    answers = {"query": dict.fromkeys(collection.qrels, "same"), "document": dict.fromkeys(collection.corpus, "same")}
    folder = write_augmentations(tmp_path / "same", answers, collection.name)
    arguments = ["analyze", "alignment", "--collection", beir_folder, "--augmentations", folder]
    code, printed, errors = coaug(*arguments, "--json")
    assert (code, errors) == (0, "")
    result = json.loads(printed)
    assert (result["unit"], result["smoothing"], result["split"]) == ("nats", 1.0, "test")
    by_texts = {row["texts"]: row for row in result["rows"]}
    assert by_texts["augmentations"]["cross_entropy"] == pytest.approx(0)  # one word alone on both sides
    assert by_texts["composed"]["cross_entropy"] < by_texts["original"]["cross_entropy"]
    code, printed, _ = coaug(*arguments)
    assert code == 0 and "nats" in printed and f"{by_texts['composed']['cross_entropy']:.3f}" in printed


def test_alignment_refuses_other_folders(refused, beir_folder, tmp_path):
    arguments = ["analyze", "alignment", "--collection", beir_folder, "--augmentations"]
    assert "/no/such" in refused(*arguments, "/no/such")
    other = write_augmentations(tmp_path / "other", {"query": {}}, "nfcorpus")
    assert "belongs to the collection nfcorpus" in refused(*arguments, other)
    lacking = write_augmentations(tmp_path / "lacking", {"query": {"test-salt": ""}}, "advice")
    assert "lack 7 queries" in refused(*arguments, lacking)


# Advantages


def columns(texts):
    """The columns of a completions table for (group, text type, id, rewards) of each text."""
    rows = [(*text, reward) for *text, rewards in texts for reward in rewards]
    return dict(zip(("group", "text_type", "text_id", "joint_ndcg"), map(list, zip(*rows, strict=True)), strict=True))


# Mean 0.47 and standard deviation 0.37 over the batch.
TEXTS = [
    (0, "query", "a", [0.0, 0.3, 0.3]),  # all below the mean
    (0, "relevant", "a", [0.9, 0.91, 0.92]),  # all above it; a deviation of 0.01, 0.027 when divided by that of all
    (0, "irrelevant", "c", [0.1, 0.1, 0.1]),  # all below it; a deviation of 0, whatever it is divided by
    (1, "query", "b", [0.2, 0.6, 1.0]),
    (1, "relevant", "d", [0.5, 1.0, 0.0]),
    (1, "irrelevant", "c", [0.499, 0.5, 0.501]),  # all above it; a deviation of 0.001, 0.0027 when divided
]
# normalisation and text type: small before, small after, amplified, same sign, in texts
BY_HAND = {
    ("center", "all"): (3, 3, 0, 0),
    ("center", "query"): (0, 0, 0, 0),
    ("center", "relevant"): (1, 1, 0, 0),
    ("center", "irrelevant"): (2, 2, 0, 0),
    ("group", "all"): (3, 1, 2, 0),
    ("group", "query"): (0, 0, 0, 0),
    ("group", "relevant"): (1, 0, 1, 0),
    ("group", "irrelevant"): (2, 1, 1, 0),
    ("batch", "all"): (3, 2, 1, 4),
    ("batch", "query"): (0, 0, 0, 1),
    ("batch", "relevant"): (1, 0, 1, 1),
    ("batch", "irrelevant"): (2, 2, 0, 2),
}


def shares(rows):
    return {
        (row.normalization, row.text_type): (row.small_before, row.small_after, row.amplified, row.same_sign)
        for row in rows
    }


def test_anomalies_of_a_batch_counted_by_hand():
    rows = measure_anomalies([group_rewards(columns(TEXTS))], threshold=0.02)
    num_texts = {(row.normalization, row.text_type): row.num_texts for row in rows}
    assert num_texts == {key: 6 if key[1] == "all" else 2 for key in BY_HAND}
    found = shares(rows)
    assert found.keys() == BY_HAND.keys()
    for key, counts in BY_HAND.items():
        assert found[key] == pytest.approx([count / num_texts[key] for count in counts]), key


def assert_equal_shares(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key] == pytest.approx(expected[key]), key


def test_the_order_of_the_rows_does_not_matter():
    table = columns(TEXTS)
    order = np.random.default_rng(0).permutation(18)
    shuffled = {name: [values[place] for place in order] for name, values in table.items()}
    expected = shares(measure_anomalies([group_rewards(table)]))
    assert_equal_shares(shares(measure_anomalies([group_rewards(shuffled)])), expected)


def test_batches_are_normalised_one_by_one():
    """In one batch together the texts of the easier half would all be above the mean."""
    easier = [(*text, [1 + reward for reward in rewards]) for *text, rewards in TEXTS]
    batches = [group_rewards(columns(texts)) for texts in (TEXTS, easier)]
    assert_equal_shares(shares(measure_anomalies(batches)), shares(measure_anomalies(batches[:1])))


def test_the_same_reward_everywhere_is_no_anomaly():
    """Means of equal rewards differ from them by rounding, which must not count as a sign."""
    batch = group_rewards(columns([(0, "query", str(i), [0.1 * i + 0.7] * 5) for i in range(4)]))
    found = shares(measure_anomalies([batch]))
    assert found["center", "all"] == (1, 1, 0, 0) and found["group", "all"] == (1, 1, 0, 0)
    assert found["batch", "all"] == (1, 1, 0, 1)


def test_a_batch_with_a_rollout_missing_is_refused():
    table = {name: values[:-1] for name, values in columns(TEXTS).items()}
    with pytest.raises(InputError, match="'c' of group 1 has 2 rollouts and others have 3"):
        group_rewards(table)


@pytest.fixture(scope="module")
def recipe(beir_folder, tiny_model, tmp_path_factory):
    """A recipe of 4 groups of 6 texts with 3 rollouts, two optimizer steps a generation batch."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = {
        "model_name_or_path": str(tiny_model),
        "collection": str(beir_folder),
        "output_dir": str(folder / "run"),
        "groups_per_batch": 4,
        "group_size": 6,
        "num_relevant": 2,
        "num_generations": 3,
        "updates_per_batch": 2,
        "per_device_train_batch_size": 36,
        "max_completion_length": 16,
        "max_steps": 4,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "log_completions": True,
        "num_completions_to_print": 0,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run_dir(recipe):
    assert cli.main(["train", "--config", str(recipe)]) == 0
    return recipe.parent / "run"


def test_advantages_of_a_run(coaug, run_dir):
    paths = sorted((run_dir / "completions").glob("*.parquet"))
    assert len(paths) == 4  # two optimizer steps on each of two generation batches
    code, printed, errors = coaug("analyze", "advantages", "--run", run_dir, "--threshold", 0.05, "--json")
    assert (code, errors) == (0, "")
    result = json.loads(printed)
    assert (result["num_generation_batches"], result["num_rollouts"], result["threshold"]) == (2, 3, 0.05)
    found = {(row["normalization"], row["text_type"]): row for row in result["rows"]}

    tables = [pd.read_parquet(paths[place]) for place in (0, 2)]
    small, small_after, same_sign = [], [], []
    for table in tables:
        key = ["group", "text_type", "text_id"]
        small += list(table.groupby(key).joint_ndcg.std() < 0.05)
        table["standardized"] = (table.joint_ndcg - table.joint_ndcg.mean()) / (table.joint_ndcg.std() + 1e-4)
        by_text = table.groupby(key).standardized
        small_after += list(by_text.std() < 0.05)
        same_sign += list((by_text.min() > 0) | (by_text.max() < 0))
    assert found["batch", "all"]["num_texts"] == len(small) == 48
    assert 0 < np.mean(small) < 1 and np.mean(same_sign) > 0
    for normalization in ("center", "group", "batch"):
        assert found[normalization, "all"]["small_before"] == pytest.approx(np.mean(small))
    assert found["batch", "all"]["amplified"] == pytest.approx(np.mean(small) - np.mean(small_after))
    assert found["batch", "all"]["same_sign"] == pytest.approx(np.mean(same_sign))
    assert found["group", "all"]["same_sign"] == found["center", "all"]["same_sign"] == 0
    # the run was trained with centred advantages, scaled by text type
    logged = pd.concat(tables)
    queries = logged[logged.text_type == "query"].groupby(["group", "text_id"]).advantage
    assert found["center", "query"]["small_after"] == pytest.approx((queries.std() < 0.05).mean())

    code, printed, _ = coaug("analyze", "advantages", "--run", run_dir)
    assert code == 0 and "2 generation batches, 3 rollouts a text" in printed


def test_a_live_batch_is_the_first_of_training(coaug, recipe, run_dir, tmp_path):
    """The same recipe and seed: the first generation batch that the run logged."""
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    code, printed, _ = coaug("analyze", "advantages", "--config", recipe, "--json")
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    (tmp_path / "completions").mkdir()
    shutil.copy(run_dir / "completions" / "completions_00001.parquet", tmp_path / "completions")
    _, logged, _ = coaug("analyze", "advantages", "--run", tmp_path, "--json")
    assert json.loads(printed)["rows"] == json.loads(logged)["rows"]


def test_a_live_batch_takes_fields_of_the_recipe(coaug, recipe):
    arguments = ["--group_size", 3, "--num_relevant", 1, "--per_device_train_batch_size", 18]
    code, printed, _ = coaug("analyze", "advantages", "--config", recipe, *arguments, "--json", "--threshold", 0.1)
    result = json.loads(printed)
    assert code == 0 and result["threshold"] == 0.1 and result["rows"][0]["num_texts"] == 12


def test_a_file_that_a_resumed_run_left_empty_is_passed_over(run_dir, tmp_path):
    shutil.copytree(run_dir / "completions", tmp_path / "completions")
    empty = pd.DataFrame({name: [] for name in ("step", "prompt", "completion", "advantage")})
    empty.to_parquet(tmp_path / "completions" / "completions_00000.parquet")
    assert read_rewards(tmp_path) == read_rewards(run_dir)


def test_runs_without_completions_are_refused(refused, run_dir, tmp_path):
    analyze = ["analyze", "advantages", "--run"]
    assert "no completions were logged" in refused(*analyze, tmp_path / "missing")
    assert "log_completions" in refused(*analyze, tmp_path)
    path = tmp_path / "completions" / "completions_00001.parquet"
    path.parent.mkdir()
    whole = (run_dir / "completions" / path.name).read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for damaged in (b"", whole[:300], whole[:4] + b"\xab" * (len(whole) - footer - 4) + whole[-footer:]):
        path.write_bytes(damaged)
        assert f"{path} cannot be read" in refused(*analyze, tmp_path)
    pd.DataFrame({"step": [1], "group": [0]}).to_parquet(path)
    assert "has no column 'text_type'" in refused(*analyze, tmp_path)
    pd.read_parquet(run_dir / "completions" / "completions_00001.parquet")[:-1].to_parquet(path)
    assert "completions_00001.parquet: " in refused(*analyze, tmp_path)


def test_wrong_arguments_of_advantages_are_refused(refused, coaug, recipe, run_dir):
    analyze = ["analyze", "advantages"]
    assert "threshold is 0.0" in refused(*analyze, "--run", run_dir, "--threshold", 0)
    assert "--group_size" in refused(*analyze, "--run", run_dir, "--group_size", 3)
    assert "/no/such.yaml" in refused(*analyze, "--config", "/no/such.yaml")
    assert "group_siez" in refused(*analyze, "--config", recipe, "--group_siez", 3)
    code, _, errors = coaug(*analyze)
    assert code == 2 and "--run --config is required" in errors
    code, _, errors = coaug("analyze", "reward", "--group_size", 3)
    assert code == 2 and "unrecognized arguments: --group_size 3" in errors


# Error of the sampled reward


def test_more_samples_have_smaller_errors():
    few, more, most = study_rewards(pools=[30], samples=[4096, 16, 256], repeats=4)
    assert (few.num_samples, more.num_samples, most.num_samples) == (16, 256, 4096)
    assert (few.num_documents, few.num_queries) == (30, 2)
    for side in ("query", "document"):
        for smaller, larger in ((most, more), (more, few)):
            # the standard error falls with the root of the samples, by 4; the variance with the samples, by 16
            ratio = getattr(larger, f"{side}_error") / getattr(smaller, f"{side}_error")
            assert 2 < ratio < 8
            assert getattr(larger, f"{side}_largest") > getattr(smaller, f"{side}_largest")
            assert 4 < getattr(larger, f"{side}_variance") / getattr(smaller, f"{side}_variance") < 64
        assert getattr(few, f"{side}_error") < getattr(few, f"{side}_largest")


@pytest.mark.parametrize("num_documents", [5, 15, 100])
def test_generated_scores_leave_something_to_estimate(num_documents):
    scores, relevance = generate_scores(num_documents, seed=3)
    num_queries = max(1, num_documents // 15)
    assert scores.shape == (num_queries, 5, num_documents, 5) and relevance.shape == (num_queries, num_documents)
    assert (relevance.sum(axis=1) == 5).all() and (relevance.sum(axis=0) <= 1).all()
    assert np.isneginf(scores).any() and not np.isnan(scores).any() and not np.isposinf(scores).any()
    queries, documents = exact_ndcg_rewards(scores, relevance)
    assert 0 < queries.mean() < 1 and np.ptp(queries, axis=1).min() > 0
    again, _ = generate_scores(num_documents, seed=3)
    assert np.array_equal(again, scores) and not np.array_equal(generate_scores(num_documents, seed=4)[0], scores)


def test_the_reward_command_writes_numbers_and_picture(coaug, tmp_path):
    arguments = ["--pools", 15, 30, "--samples", 8, 32, "--repeats", 3, "--seed", 5, "--output", tmp_path / "study"]
    code, printed, _ = coaug("analyze", "reward", *arguments)
    assert code == 0 and "exact s" in printed
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"reward_study.json", "reward_study.png"}
    study = json.loads((tmp_path / "study" / "reward_study.json").read_text())
    assert (study["repeats"], study["seed"]) == (3, 5)
    assert [(row["num_documents"], row["num_samples"]) for row in study["rows"]] == [
        (15, 8),
        (15, 32),
        (30, 8),
        (30, 32),
    ]
    assert (tmp_path / "study" / "reward_study.png").read_bytes().startswith(b"\x89PNG")
    assert f"{study['rows'][0]['query_error']:.4f}" in printed


def test_a_picture_needs_matplotlib(refused, coaug, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python finds a package that is not installed
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    arguments = ["analyze", "reward", "--pools", 15, "--samples", 8, "--repeats", 2]
    assert 'pip install ".[plot]"' in refused(*arguments, "--output", tmp_path / "study")
    assert not (tmp_path / "study").exists()
    assert coaug(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pools", 4], "pools: 4"),
        (["--samples", 16, 0], "samples: 0"),
        (["--repeats", 1], "repeats: 1"),
        (["--seed", -1], "seed: -1"),
    ],
)
def test_a_study_of_nothing_is_refused(refused, arguments, expected):
    assert expected in refused("analyze", "reward", *arguments)
