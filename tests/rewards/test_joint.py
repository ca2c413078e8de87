"""The joint reward against plain computations on small pools."""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from transformers import TrainerState

from coaug_trl import BM25Retriever, CoAugConfig, Document, PromptSet, exact_ndcg_rewards
from coaug_trl.data.groups import Group
from coaug_trl.retrieval import Retriever
from coaug_trl.rewards.joint import JointReward
from coaug_trl.rewards.ndcg import divide_document_rewards, exact_ndcg, sampled_ndcg, sum_document_rewards
from coaug_trl.rewards.pool import Corpus


PROMPT_SET = PromptSet("sparse", "query:", "document:")
ROLLOUTS = 3
# statins-0 and gluten-1 are drawn by two groups; gluten-1 is irrelevant to the query of the first group and relevant,
# with grade 2, to that of the second.
GROUPS = [
    Group(8, ("train-statins",), ("statins-0", "statins-1", "gluten-1", "coffee-3"), 2),
    Group(9, ("train-gluten",), ("gluten-0", "gluten-1", "statins-0", "salt-2"), 2),
    Group(10, ("train-salt", "train-sugar"), ("salt-0", "sugar-1", "running-2", "pollen-3"), 2),
]
WORDS = [
    *("statin", "tablets", "heart", "attack", "wheat", "bread", "stomach", "pain", "salty", "snacks", "blood"),
    *("pressure", "sweet", "lemonade", "tooth", "decay", "cause", "review", "adult", "unheard", "invented"),
    *("children", "volunteers", "measured", "sources", "parents", "espresso", "year"),
]


@pytest.fixture(scope="module")
def uneven(collection):
    """
    The collection with documents of very different lengths, so that no two of them have the same score, and with
    judgments that its words do not follow, so that rewards vary.
    """
    documents = [
        replace(document, text=document.text + " filler" * (10 * place))
        for place, document in enumerate(collection.corpus.values())
    ]
    qrels = {
        "train-statins": {"statins-0": 1, "coffee-3": 2},
        "train-gluten": {"gluten-1": 2, "statins-0": 1, "salt-2": 0},
        "train-salt": {"salt-0": 1, "pollen-3": 3},
        "train-sugar": {"running-2": 2},
    }
    return replace(collection, corpus={document.id: document for document in documents}, qrels=qrels)


def settings(tmp_path, **changes) -> CoAugConfig:
    defaults = {
        "output_dir": str(tmp_path),
        "num_generations": ROLLOUTS,
        "group_size": 16,
        "updates_per_batch": 1,
        "per_device_train_batch_size": 1,
        "ndcg_k": 3,
        "bm25_statistics": "original",
        "seed": 7,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    return CoAugConfig(**{**defaults, **changes})


def fitted(collection) -> BM25Retriever:
    retriever = BM25Retriever()
    retriever.fit(list(collection.corpus.values()))
    return retriever


def make_rows(groups, augment="both", rollouts=ROLLOUTS) -> list[tuple]:
    """(group, text type, id) of every completion, as the trainer passes them."""
    return [
        (group, text_type, text_id)
        for group in groups
        for text_type, text_id in group.rows(augment)
        for _ in range(rollouts)
    ]


def make_answers(count, seed=0) -> list[str]:
    """Some answers are empty."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.choice([0, 2, 3, 5, 7]))) for _ in range(count)]


def completions_of(answers) -> list[str]:
    return [f"thinking <answer> {answer}</answer>" if answer else "no tags" for answer in answers]


def call(reward, rows, answers, step=0, log=None, conversational=False) -> np.ndarray:
    completions = completions_of(answers)
    if conversational:
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
    values = reward(
        completions=completions,
        group=[group for group, _, _ in rows],
        text_type=[text_type for _, text_type, _ in rows],
        text_id=[text_id for _, _, text_id in rows],
        trainer_state=TrainerState(global_step=step),
        log_extra=(lambda column, values: None) if log is None else log.__setitem__,
        prompts=["ignored"] * len(rows),
    )
    assert all(isinstance(value, float) for value in values)
    return np.array(values)


def pool_texts(groups, rows, answers, collection):
    """
    What competes in one pool, put together by hand: by (group, query id) the texts of a query's rollouts, and by
    document id (row or None, document) for the rollouts that all groups drew.
    """
    queries, documents = {}, {}
    for group in groups:
        for query_id in group.queries:
            own = [i for i, row in enumerate(rows) if row == (group, "query", query_id)]
            text = collection.queries[query_id]
            queries[group, query_id] = [(i, f"{text}\n{answers[i]}" if answers[i] else text) for i in own] or [
                (None, text)
            ]
        for document_id in group.documents:
            own = [
                i
                for i, (row_group, text_type, text_id) in enumerate(rows)
                if (row_group, text_id) == (group, document_id) and text_type != "query"
            ]
            document = collection.corpus[document_id]
            rollouts = [
                (i, replace(document, text=f"{document.text}\n{answers[i]}") if answers[i] else document) for i in own
            ]
            if rollouts:
                documents.setdefault(document_id, []).extend(rollouts)
            else:
                documents[document_id] = [(None, document)]
    return queries, documents


def plain_rewards(groups, rows, answers, collection, pool, relevant_weight, k=3) -> np.ndarray:
    """The rewards by the public array function; a document with fewer rollouts than others repeats all of its own."""
    rewards = np.full(len(rows), np.nan)
    retriever = fitted(collection)
    for members in [groups] if pool == "batch" else [[group] for group in groups]:
        queries, documents = pool_texts(members, rows, answers, collection)
        width = math.lcm(*map(len, documents.values()))
        repeated = {id_: rollouts * (width // len(rollouts)) for id_, rollouts in documents.items()}
        columns = [document for rollouts in repeated.values() for _, document in rollouts]
        flat = retriever.score([text for rollouts in queries.values() for _, text in rollouts], columns)
        scores = flat.reshape(len(queries), -1, len(documents), width)
        assert_no_ties(scores)
        relevance = np.array(
            [[collection.qrels[query_id].get(id_, 0) for id_ in documents] for _, query_id in queries]
        )
        query_rewards, document_rewards = exact_ndcg_rewards(scores, relevance, k, relevant_weight)
        for texts, values in ((queries, query_rewards), (repeated, document_rewards)):
            for rollouts, row_values in zip(texts.values(), values, strict=True):
                for (i, _), value in zip(rollouts, row_values, strict=True):
                    if i is not None:
                        rewards[i] = value
    return rewards


def assert_no_ties(scores):
    """Equal scores of two documents would make the expected rewards depend on the order of the pool."""
    for row in scores.reshape(-1, *scores.shape[2:]):
        seen = [set(document[np.isfinite(document)]) for document in row]
        assert not any(one & other for one, other in itertools.combinations(seen, 2))


class EqualScores(Retriever):
    """Every document scores the same, so a pool's order alone decides."""

    kind = "sparse"
    config = {}

    def score(self, queries, documents):
        return np.ones((len(queries), len(documents)))

    def unused(self, *args):
        raise NotImplementedError

    fit = state = load_state = index = search = save = load = unused


@pytest.mark.parametrize("relevant_weight", [0.0, 10.0])
@pytest.mark.parametrize("pool", ["group", "batch"])
@pytest.mark.parametrize("augment", ["both", "query", "document"])
def test_exact_rewards_equal_a_plain_computation(uneven, tmp_path, augment, pool, relevant_weight):
    args = settings(tmp_path, augment=augment, candidate_pool=pool, relevant_weight=relevant_weight)
    rows = make_rows(GROUPS, augment)
    answers = make_answers(len(rows), seed=1)
    found = call(JointReward(uneven, fitted(uneven), PROMPT_SET, args), rows, answers)
    expected = plain_rewards(GROUPS, rows, answers, uneven, pool, relevant_weight)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found.std() > 0.005  # otherwise anything would pass


@pytest.mark.parametrize("pool", ["group", "batch"])
@pytest.mark.parametrize("augment", ["both", "query", "document"])
def test_sampled_rewards_come_close_to_a_plain_computation(uneven, tmp_path, augment, pool):
    args = settings(
        tmp_path, augment=augment, candidate_pool=pool, reward_estimator="sampled", num_reward_samples=20_000
    )
    rows = make_rows(GROUPS, augment)
    answers = make_answers(len(rows), seed=1)
    reward = JointReward(uneven, fitted(uneven), PROMPT_SET, args)
    found = call(reward, rows, answers)
    expected = plain_rewards(GROUPS, rows, answers, uneven, pool, 10.0)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert expected.std() > 0.02
    np.testing.assert_array_equal(found, call(reward, rows, answers))  # the same step draws the same
    if augment != "query":
        assert not np.array_equal(found, call(reward, rows, answers, step=1))


def test_rewards_equal_an_enumeration_of_all_draws(uneven, tmp_path):
    """Without the package's NDCG: every choice of one rollout a document is ranked and measured one by one."""
    groups, k, weight = GROUPS[:2], 3, 10.0
    rows = make_rows(groups, rollouts=2)
    answers = make_answers(len(rows), seed=3)
    args = settings(tmp_path, num_generations=2, relevant_weight=weight, ndcg_k=k)
    found = call(JointReward(uneven, fitted(uneven), PROMPT_SET, args), rows, answers)

    queries, documents = pool_texts(groups, rows, answers, uneven)
    score = fitted(uneven).score
    columns = [(id_, i, document) for id_, rollouts in documents.items() for i, document in rollouts]
    places = [[n for n, column in enumerate(columns) if column[0] == id_] for id_ in documents]
    query_value, totals, counts = {}, np.zeros(len(columns)), np.zeros(len(columns))
    for (_, query_id), rollouts in queries.items():
        gains = [uneven.qrels[query_id].get(id_, 0) for id_ in documents]
        ideal = sum(gain / math.log2(n + 2) for n, gain in enumerate(sorted(gains, reverse=True)[:k]))
        for i, text in rollouts:
            scores = score([text], [document for *_, document in columns])[0]
            values = {}
            for draw in itertools.product(*places):
                ranking = sorted(
                    (n for n in range(len(draw)) if scores[draw[n]] > -np.inf), key=lambda n: -scores[draw[n]]
                )
                values[draw] = sum(gains[n] / math.log2(rank + 2) for rank, n in enumerate(ranking[:k])) / ideal
            query_value[i] = np.mean(list(values.values()))
            for n, own in enumerate(places):
                for column in own:
                    conditional = np.mean([value for draw, value in values.items() if column in draw])
                    totals[column] += (1 + weight * gains[n]) * conditional
                    counts[column] += 1 + weight * gains[n]
    expected = np.full(len(rows), np.nan)
    for i, value in query_value.items():
        expected[i] = value
    for column, (_, i, _) in enumerate(columns):
        expected[i] = totals[column] / counts[column]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_every_step_samples_anew(uneven, tmp_path):
    """With one document no order can differ: the query's reward is how often its one matching rollout is drawn."""
    rows = make_rows([Group(0, ("train-sugar",), ("running-2",), 1)])
    args = settings(tmp_path, reward_estimator="sampled", num_reward_samples=101)
    reward = JointReward(uneven, fitted(uneven), PROMPT_SET, args)
    values = [call(reward, rows, ["", "", "", "sweet lemonade", "", ""], step)[0] for step in range(3)]
    assert len(set(values)) > 1 and all(0.15 < value < 0.5 for value in values)


@pytest.mark.parametrize("pool", ["group", "batch"])
@pytest.mark.parametrize(
    ("augment", "num_rows", "per_document"), [("both", 3, 3), ("query", 3, 1), ("document", 1, 3)]
)
def test_a_side_that_is_not_augmented_has_one_rollout(collection, tmp_path, augment, num_rows, per_document, pool):
    shapes = []

    class Counting(EqualScores):
        def score(self, queries, documents):
            shapes.append((len(queries), len(documents)))
            return super().score(queries, documents)

    groups = GROUPS[:2]  # they share two of their documents
    rows = make_rows(groups, augment)
    args = settings(tmp_path, augment=augment, candidate_pool=pool)
    call(JointReward(collection, Counting(), PROMPT_SET, args), rows, [""] * len(rows))
    # One call in either pool; in the batch pool a verbatim document that both drew stands once.
    in_batch = 6 if augment == "query" and pool == "batch" else 8 * per_document
    assert shapes == [(2 * num_rows, in_batch)]


def test_documents_of_other_groups_compete_in_the_batch_pool_only(collection, tmp_path):
    rows = make_rows(GROUPS)
    answers = make_answers(len(rows), seed=1)
    changed = [
        answer if group is GROUPS[0] else "statin tablets heart attack"
        for answer, (group, _, _) in zip(answers, rows, strict=True)
    ]
    first = np.array([group is GROUPS[0] for group, _, _ in rows])
    for pool, differs in (("group", False), ("batch", True)):
        reward = JointReward(collection, fitted(collection), PROMPT_SET, settings(tmp_path, candidate_pool=pool))
        before, after = call(reward, rows, answers), call(reward, rows, changed)
        assert (not np.allclose(before[first], after[first])) == differs


def test_a_document_drawn_twice_counts_once_in_the_ideal_ranking(collection, tmp_path):
    """The one relevant document of the pool is always first, so its query's rollouts are perfect."""
    groups = [
        Group(0, ("train-statins",), ("statins-1", "coffee-3"), 1),
        Group(1, ("train-gluten",), ("gluten-1", "statins-1"), 1),
    ]
    rows = make_rows(groups)
    # Only the first group's copy names the query's words often; a copy counted by itself would rank below others.
    answers = [
        "statin tablets heart attack" if text_type == "query" or text_id == "statins-1" else "statin tablets"
        for _, text_type, text_id in rows
    ]
    args = settings(tmp_path, candidate_pool="batch", ndcg_k=10)
    rewards = call(JointReward(collection, fitted(collection), PROMPT_SET, args), rows, answers)
    own = [i for i, (group, text_type, _) in enumerate(rows) if group is groups[0] and text_type == "query"]
    np.testing.assert_allclose(rewards[own], 1.0)


def test_rollouts_of_a_document_drawn_twice_share_its_draws(collection, tmp_path):
    """A copy with the same answers gets the same rewards; each rollout stands for its share of both groups' rollouts."""
    rows = make_rows(GROUPS)
    answers = make_answers(len(rows), seed=1)
    copies = [[i for i, row in enumerate(rows) if row[0] is group and row[2] == "statins-0"] for group in GROUPS[:2]]
    for one, other in zip(*copies, strict=True):
        answers[other] = answers[one]
    batch = JointReward(collection, fitted(collection), PROMPT_SET, settings(tmp_path, candidate_pool="batch"))
    rewards = call(batch, rows, answers)
    np.testing.assert_allclose(rewards[copies[0]], rewards[copies[1]], atol=1e-12)
    group = JointReward(collection, fitted(collection), PROMPT_SET, settings(tmp_path, candidate_pool="group"))
    rewards = call(group, rows, answers)
    assert not np.allclose(rewards[copies[0]], rewards[copies[1]])


def test_labels_come_from_the_judgments_not_from_the_role_in_a_group(collection, tmp_path):
    """gluten-1 stands in the first group as irrelevant, and counts for the second group's query all the same."""
    groups = [
        Group(0, ("train-statins",), ("statins-1", "gluten-1"), 1),
        Group(1, ("train-gluten",), ("coffee-3", "salt-2"), 0),
    ]
    rows = make_rows(groups)
    args = settings(tmp_path, candidate_pool="batch")
    rewards = call(JointReward(collection, fitted(collection), PROMPT_SET, args), rows, [""] * len(rows))
    second = [i for i, (group, text_type, _) in enumerate(rows) if group is groups[1] and text_type == "query"]
    np.testing.assert_allclose(rewards[second], 1.0)
    unjudged = replace(collection, qrels={**collection.qrels, "train-gluten": {"gluten-0": 1}})
    rewards = call(JointReward(unjudged, fitted(collection), PROMPT_SET, args), rows, [""] * len(rows))
    np.testing.assert_allclose(rewards[second], 0.0)


def places_of_ties(collection, args, step) -> dict[str, int]:
    """
    The place of each document of a pool where all scores are equal, found by making it the one relevant document,
    which stands first in its group.
    """
    documents = ("statins-0", "statins-1", "statins-4", "gluten-1", "coffee-3", "salt-2")
    places = {}
    for document_id in documents:
        judged = replace(collection, qrels={"train-statins": {document_id: 1}})
        others = tuple(other for other in documents if other != document_id)
        rows = make_rows([Group(0, ("train-statins",), (document_id, *others), 1)])
        rewards = call(JointReward(judged, EqualScores(), PROMPT_SET, args), rows, [""] * len(rows), step)
        places[document_id] = round(2 ** (1 / rewards[0]) - 1)
    return places


@pytest.mark.parametrize("pool", ["group", "batch"])
def test_the_order_of_a_pool_does_not_know_relevance(collection, tmp_path, pool):
    args = settings(tmp_path, candidate_pool=pool, ndcg_k=10)
    by_step = [places_of_ties(collection, args, step) for step in range(40)]
    # Were the order to depend on relevance, two documents would have the same place when it is their turn.
    assert all(sorted(places.values()) == [1, 2, 3, 4, 5, 6] for places in by_step)
    assert len({tuple(places.values()) for places in by_step}) > 20
    means = np.mean([list(places.values()) for places in by_step], axis=0)
    assert means.min() > 2.5 and means.max() < 4.5, "some documents come first in most steps"
    assert by_step[3] == places_of_ties(collection, args, 3)
    assert by_step != [places_of_ties(collection, replace(args, seed=8), step) for step in range(40)]


@pytest.mark.parametrize("pool", ["group", "batch"])
def test_conversational_and_plain_completions_earn_the_same(collection, tmp_path, pool):
    rows = make_rows(GROUPS)
    answers = make_answers(len(rows))
    reward = JointReward(collection, fitted(collection), PROMPT_SET, settings(tmp_path, candidate_pool=pool))
    plain, messages = call(reward, rows, answers), call(reward, rows, answers, conversational=True)
    np.testing.assert_array_equal(plain, messages)


def test_the_completions_table_gets_its_columns(collection, tmp_path):
    rows = make_rows(GROUPS)
    answers = make_answers(len(rows))
    log = {}
    call(JointReward(collection, fitted(collection), PROMPT_SET, settings(tmp_path)), rows, answers, log=log)
    assert log == {
        "group": [group.position for group, _, _ in rows],
        "text_type": [text_type for _, text_type, _ in rows],
        "text_id": [text_id for _, _, text_id in rows],
        "answer": answers,
    }


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("pool", ["group", "batch"])
def test_empty_texts_and_answers_are_scored(collection, tmp_path, pool, estimator):
    empty = replace(
        collection,
        corpus={**collection.corpus, "empty": Document("empty", "", "")},
        queries={**collection.queries, "blank": ""},
        qrels={**collection.qrels, "blank": {"empty": 1, "statins-0": 1}},
    )
    groups = [
        Group(0, ("blank",), ("empty", "statins-0", "coffee-3"), 2),
        Group(1, ("train-gluten",), ("gluten-0", "empty", "salt-2"), 1),
    ]
    rows = make_rows(groups)
    args = settings(tmp_path, candidate_pool=pool, reward_estimator=estimator)
    reward = JointReward(empty, fitted(empty), PROMPT_SET, args)
    rewards = call(reward, rows, [""] * len(rows))
    texts = dict(zip([(group.position, text_id) for group, _, text_id in rows], rewards, strict=True))
    assert texts[0, "blank"] == 0.0  # a query without a word finds nothing
    assert texts[1, "train-gluten"] > 0.9
    # An answer makes the empty texts findable.
    answers = ["cholesterol" if text_id in ("blank", "empty", "statins-0") else "" for _, _, text_id in rows]
    texts = dict(
        zip([(group.position, text_id) for group, _, text_id in rows], call(reward, rows, answers), strict=True)
    )
    assert texts[0, "blank"] == pytest.approx(1.0)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("pool", ["group", "batch"])
def test_rewards_lie_between_0_and_1(collection, tmp_path, pool, estimator):
    args = settings(tmp_path, candidate_pool=pool, reward_estimator=estimator, num_reward_samples=64)
    reward = JointReward(collection, fitted(collection), PROMPT_SET, args)
    rows = make_rows(GROUPS)
    for seed in range(10):
        rewards = call(reward, rows, make_answers(len(rows), seed), step=seed)
        assert rewards.min() >= 0 and rewards.max() <= 1 + 1e-12


class Failing(EqualScores):
    def score(self, queries, documents):
        raise KeyError("no such term")


@pytest.mark.parametrize("pool", ["group", "batch"])
def test_an_error_names_the_process_and_its_cause(collection, tmp_path, pool):
    rows = make_rows(GROUPS)
    reward = JointReward(collection, Failing(), PROMPT_SET, settings(tmp_path, candidate_pool=pool))
    with pytest.raises(RuntimeError, match="process 0: KeyError: 'no such term'") as raised:
        call(reward, rows, [""] * len(rows))
    assert isinstance(raised.value.__cause__, KeyError)


def test_with_two_fields_an_answer_joins_the_title(uneven, tmp_path):
    retriever = BM25Retriever(fields="best")
    retriever.fit(list(uneven.corpus.values()))
    reward = JointReward(uneven, retriever, PROMPT_SET, settings(tmp_path, num_generations=2, relevant_weight=0.0))
    group = Group(0, ("train-statins",), ("statins-0", "gluten-1"), 1)
    rows = make_rows([group], rollouts=2)
    answers = ["wheat bread", "heart attack", "unheard invented", "", "heart attack", "statin tablets"]

    documents = {id_: uneven.corpus[id_] for id_ in group.documents}
    titled = [
        replace(documents[id_], title=f"{documents[id_].title}\n{answer}" if answer else documents[id_].title)
        for id_, answer in zip(("statins-0", "statins-0", "gluten-1", "gluten-1"), answers[2:], strict=True)
    ]
    queries = [f"{uneven.queries['train-statins']}\n{answer}" for answer in answers[:2]]
    scores = retriever.score(queries, titled).reshape(1, 2, 2, 2)
    assert_no_ties(scores[0])
    relevance = np.array([[uneven.qrels["train-statins"].get(id_, 0) for id_ in group.documents]])
    query_rewards, document_rewards = exact_ndcg_rewards(scores, relevance, 3, 0.0)
    expected = [*query_rewards.ravel(), *document_rewards.ravel()]
    np.testing.assert_allclose(call(reward, rows, answers), expected, atol=1e-12)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("augment", ["both", "query", "document"])
def test_with_the_corpus_pool_all_documents_compete(collection, tmp_path, augment, estimator):
    """Against the whole matrix of scores: batch documents with their rollouts, all others with one text."""
    rows = make_rows(GROUPS, augment)
    answers = make_answers(len(rows), seed=3)
    args = settings(tmp_path, augment=augment, candidate_pool="corpus", reward_estimator=estimator)
    draw = random.Random(1)
    # many of the texts outside the batch are equal, so that equal scores are frequent
    outside = [
        replace(document, text=draw.choice(["statin tablets", "wheat bread sources", document.text]))
        for document in collection.corpus.values()
    ]
    retriever = fitted(collection)
    corpus = Corpus(outside, retriever, seed=11)
    rewards = call(JointReward(collection, retriever, PROMPT_SET, args, corpus), rows, answers, step=4)

    queries, in_batch = pool_texts(GROUPS, rows, answers, collection)
    others = {document.id: [(None, document)] for document in outside}
    documents = {id_: in_batch.get(id_, others[id_]) for id_ in corpus.document_ids}
    columns = [document for rollouts in documents.values() for _, document in rollouts]
    counts = [len(rollouts) for rollouts in documents.values()]
    rollout_document = np.repeat(np.arange(len(documents)), counts)
    texts = [(query_id, i, text) for (_, query_id), rollouts in queries.items() for i, text in rollouts]
    scores = retriever.score([text for *_, text in texts], columns)
    relevance = np.array([[collection.qrels[id_].get(each, 0) for each in documents] for id_, *_ in texts], float)
    if estimator == "exact":
        values, conditional = exact_ndcg(scores, rollout_document, relevance, 3)
        tolerance = 1e-12
    else:
        values, conditional = sampled_ndcg(scores, rollout_document, relevance, 3, num_samples=20_000)
        tolerance = 0.15  # of 512 draws, for a rollout that is shown in a sixth of them
    sums = sum_document_rewards(conditional, rollout_document, relevance, args.relevant_weight)
    expected = np.full(len(rows), np.nan)
    for (_, i, _), value in zip(texts, values, strict=True):
        if i is not None:
            expected[i] = value
    shown = [i for rollouts in documents.values() for i, _ in rollouts]
    for i, value in zip(shown, divide_document_rewards(*sums, rollout_document), strict=True):
        if i is not None:
            expected[i] = value
    assert len({round(value, 6) for value in rewards}) > 2
    np.testing.assert_allclose(rewards, expected, atol=tolerance)


def test_equal_scores_of_the_corpus_pool_rank_in_an_order_that_does_not_know_the_batch(collection, tmp_path):
    """With equal scores throughout, the one relevant document, in the batch, gets every place of the ranking."""
    args = settings(tmp_path, candidate_pool="corpus", ndcg_k=40, num_generations=2)
    judged = replace(collection, qrels={"train-statins": {"statins-0": 1}})
    rows = make_rows([Group(0, ("train-statins",), ("statins-0", "gluten-1"), 1)], rollouts=2)
    places = []
    for seed in range(60):
        corpus = Corpus(list(collection.corpus.values()), EqualScores(), seed)
        reward = JointReward(judged, EqualScores(), PROMPT_SET, args, corpus)
        places.append(round(2 ** (1 / call(reward, rows, [""] * len(rows))[0]) - 1))
        assert places[-1] == corpus.place["statins-0"] + 1
    assert 15 < np.mean(places) < 26


def test_the_ideal_of_the_corpus_pool_is_that_of_all_judged_documents(collection, tmp_path):
    """Two of three relevant documents are drawn; the batch pool calls their ranking ideal, the corpus pool does not."""
    group = Group(0, ("train-statins",), ("statins-0", "statins-1", "salt-2"), 2)
    rows = make_rows([group])
    corpus = [
        replace(document, title="", text="nothing" if document.id != "statins-4" else "no match")
        for document in collection.corpus.values()
    ]
    retriever = fitted(collection)
    values = {}
    for pool in ("batch", "corpus"):
        args = settings(tmp_path, candidate_pool=pool)
        reward = JointReward(collection, retriever, PROMPT_SET, args, Corpus(corpus, retriever, 0))
        if pool == "batch":
            reward.corpus = None
        values[pool] = call(reward, rows, [""] * len(rows))[0]
    # ideal: grades 2, 1, 1 at ranks 1, 2, 3; retrieved: the two of the batch, in the order that both pools share
    discounts = 1 / np.log2([2, 3, 4])
    share = ([2, 1] @ discounts[:2]) / ([2, 1, 1] @ discounts)
    np.testing.assert_allclose(values["corpus"], values["batch"] * share, atol=1e-12)


def test_the_corpus_is_the_same_whoever_encodes_it(collection):
    retriever = fitted(collection)
    documents = list(collection.corpus.values())
    whole = retriever.encode(documents)
    parts = [retriever.encode(documents[first : first + 13]) for first in range(0, len(documents), 13)]
    queries = [*collection.queries.values(), "", "unheard"]
    np.testing.assert_array_equal(retriever.score(queries, whole.concatenate(parts)), retriever.score(queries, whole))
    np.testing.assert_array_equal(retriever.score(queries, whole), retriever.score(queries, documents))
    places = np.random.default_rng(0).permutation(len(documents))[:9]
    np.testing.assert_array_equal(
        retriever.score(queries, whole.take(places)), retriever.score(queries, whole)[:, places]
    )


@pytest.mark.parametrize("pool", ["group", "batch", "corpus"])
def test_a_query_that_is_a_document_need_not_compete_with_itself(collection, tmp_path, pool):
    """As in ArguAna: the corpus has each query as a document, which would rank first for it."""
    query = collection.queries["train-statins"]
    itself = Document("train-statins", "", query)
    arguana = replace(collection, corpus=collection.corpus | {itself.id: itself})
    group = Group(0, ("train-statins",), ("statins-0", "statins-1", "train-statins"), 2)
    rows = make_rows([group])
    rewards = {}
    for ignore in (False, True):
        args = settings(tmp_path, candidate_pool=pool, ignore_identical_ids=ignore, ndcg_k=10)
        corpus = Corpus(list(arguana.corpus.values()), fitted(arguana), 0) if pool == "corpus" else None
        rewards[ignore] = call(JointReward(arguana, fitted(arguana), PROMPT_SET, args, corpus), rows, [""] * 12)
    without = Group(0, ("train-statins",), ("statins-0", "statins-1"), 2)
    args = settings(tmp_path, candidate_pool=pool, ndcg_k=10)
    corpus = Corpus(list(collection.corpus.values()), fitted(arguana), 0) if pool == "corpus" else None
    expected = call(JointReward(collection, fitted(arguana), PROMPT_SET, args, corpus), make_rows([without]), [""] * 9)
    assert rewards[True][0] == pytest.approx(expected[0])
    assert rewards[False][0] < rewards[True][0] - 0.1


def test_a_query_outside_the_batch_need_not_compete_with_itself_either(collection, tmp_path):
    itself = Document("train-statins", "", collection.queries["train-statins"])
    documents = [*collection.corpus.values(), itself]
    arguana = replace(collection, corpus={document.id: document for document in documents})
    rows = make_rows([Group(0, ("train-statins",), ("statins-0", "statins-1", "salt-2"), 2)])
    rewards = []
    for ignore, texts in ((False, documents), (True, documents), (False, documents[:-1])):
        args = settings(tmp_path, candidate_pool="corpus", ignore_identical_ids=ignore)
        corpus = Corpus(texts, fitted(arguana), 0)
        rewards.append(call(JointReward(arguana, fitted(arguana), PROMPT_SET, args, corpus), rows, [""] * 12)[0])
    assert rewards[0] < rewards[1] == pytest.approx(rewards[2])


@pytest.mark.parametrize("pool", ["batch", "corpus"])
def test_statistics_follow_the_rollouts_from_batch_to_batch(collection, tmp_path, pool):
    """A word that every rollout adds is worth less in the next batch, for all documents with the same statistics."""
    args = settings(tmp_path, candidate_pool=pool, bm25_statistics="running")
    retriever = fitted(collection)
    corpus = Corpus(list(collection.corpus.values()), retriever, 0) if pool == "corpus" else None
    reward = JointReward(collection, retriever, PROMPT_SET, args, corpus)
    rows = make_rows(GROUPS)
    answers = ["common" if text_type != "query" else "" for _, text_type, _ in rows]

    def worth() -> float:
        return retriever.score(["common"], [Document("d", "", "common")])[0, 0]

    frozen = JointReward(
        collection,
        fitted(collection),
        PROMPT_SET,
        settings(tmp_path, candidate_pool=pool, bm25_statistics="original"),
        corpus,
    )
    worths = [worth()]
    for step in range(3):
        rewards = call(reward, rows, answers, step)
        if step == 0:
            np.testing.assert_array_equal(rewards, call(frozen, rows, answers, step))
        worths.append(worth())
    assert worths == sorted(worths, reverse=True) and len(set(worths)) == 4
    # every document of the batch got the word: a step moves the estimate by a twentieth of all documents
    shares = retriever.state()["fields"][0]["added_shares"]
    assert shares == {"common": pytest.approx(1 - 0.95**3)}
