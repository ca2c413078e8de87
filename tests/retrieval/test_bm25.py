import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coaug_trl.data.document import Document
from coaug_trl.evaluation.measures import evaluate_run
from coaug_trl.retrieval import BM25Retriever, bm25, load_retriever
from coaug_trl.retrieval.base import best_places
from coaug_trl.retrieval.statistics import FOLLOW_RATE
from coaug_trl.utils.errors import InputError


CORPUS = [
    Document("d1", "Statins", "Statins lower cholesterol. A statin's effect is dose dependent."),
    Document("d2", "Fish oil", "Fish oil and omega-3 fatty acids: no effect on cholesterol"),
    Document("d3", "", "Vitamin D in the elderly"),
    Document("d4", "Empty", ""),
    Document("d5", "Fish", "Fish fish fish and vitamin D"),
]
QUERIES = ["statin effects", "fish fish vitamin D", "cholesterol of the elderly", "halibut", "the of and", ""]

# No stop words, and words that are their own stems: the brute-force formula below needs no analyzer.
WORDS = ["ab", "cod", "dub", "fig", "gnu", "hop", "x", "w7"]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
documents_of = st.lists(texts, min_size=1, max_size=8).map(
    lambda contents: [Document(str(i), "", text) for i, text in enumerate(contents)]
)


def random_texts(number, num_words, seed):
    """Some words are frequent and others rare."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"word{rank}" for rank in (300 ** rng.random(num_words)).astype(int)) for _ in range(number)]


def fitted(documents, **options):
    retriever = BM25Retriever(**options)
    retriever.fit(documents)
    return retriever


def brute_force(query, text, corpus_texts, k1=1.2, b=0.75):
    """Lucene's BM25 of one pair, written out."""
    corpus_words = [set(corpus_text.split()) for corpus_text in corpus_texts]
    average_length = sum(len(corpus_text.split()) for corpus_text in corpus_texts) / len(corpus_texts) or 1
    frequencies = Counter(text.split())
    norm = k1 * (1 - b + b * len(text.split()) / average_length)
    score = -math.inf
    for word in query.split():
        if frequencies[word]:
            df = max(1, sum(word in words for words in corpus_words))
            idf = math.log(1 + (len(corpus_texts) - df + 0.5) / (df + 0.5))
            score = max(score, 0) + idf * frequencies[word] / (frequencies[word] + norm)
    return score


class TestAnalyzer:
    def terms(self, text, language="english"):
        """The distinct terms of a text."""
        return set(fitted([Document("d", "", text)], language=language).state()["fields"][0]["document_frequencies"])

    @pytest.mark.parametrize(
        "text, terms",
        [
            ("Vitamin D and the B cells", {"vitamin", "d", "b", "cell"}),
            ("the patient's heart, Parkinson’s", {"patient", "heart", "parkinson"}),
            ("It's 'quoted' words' end", {"quot", "word", "end"}),
            ("don't O'Neil's", {"don't", "o'neil"}),
            ("omega-3 running RUNS", {"omega", "3", "run"}),
            ("Ärzte naïve Ωmega", {"ärzte", "naïv", "ωmega"}),
            ("line\nbreak's\r\nend", {"line", "break", "end"}),
        ],
    )
    def test_english(self, text, terms):
        assert self.terms(text) == terms

    def test_bm25s_has_lucenes_stop_words(self):
        assert len(bm25s.stopwords.STOPWORDS_EN) == 33

    def test_other_languages(self):
        assert self.terms("Die Häuser und das Haus", "german") == {"haus"}
        assert self.terms("talot ja talo", "finnish") == {"talo", "ja"}  # bm25s has no stop words for Finnish

    def test_a_broken_line_changes_nothing(self):
        broken = Document("a", "Fish oil", "helps\nthe heart\n\nfish\nfish")
        joined = Document("b", "", "Fish oil helps the heart fish fish")
        scores = fitted(CORPUS).score(["fish heart"], [broken, joined])
        assert scores[0, 0] == scores[0, 1] > 0


class TestScore:
    @settings(max_examples=50, deadline=None)
    @given(corpus=documents_of, others=documents_of, queries=st.lists(texts, min_size=1, max_size=4))
    def test_formula_with_fixed_statistics(self, corpus, others, queries):
        corpus_texts = [document.text for document in corpus]
        scores = fitted(corpus).score(queries, others)
        expected = [[brute_force(query, document.text, corpus_texts) for document in others] for query in queries]
        np.testing.assert_allclose(scores, expected, rtol=1e-12)

    @settings(max_examples=50, deadline=None)
    @given(corpus=documents_of, query=texts, k1=st.sampled_from([0.9, 1.2, 2.0]), b=st.sampled_from([0.0, 0.4, 1.0]))
    def test_agrees_with_bm25s_on_the_fitted_corpus(self, corpus, query, k1, b):
        reference = bm25s.BM25(k1=k1, b=b, method="lucene")
        if not query or not any(document.text for document in corpus):
            return
        reference.index([document.text.split() for document in corpus], show_progress=False)
        expected = reference.get_scores(query.split())
        scores = fitted(corpus, k1=k1, b=b).score([query], corpus)[0]
        np.testing.assert_allclose(np.where(np.isinf(scores), 0, scores), expected, atol=1e-5)

    def test_a_repeated_query_word_counts_as_often_as_it_occurs(self):
        once, thrice = fitted(CORPUS).score(["vitamin", "vitamin Vitamins vitamin"], CORPUS)
        np.testing.assert_allclose(thrice, 3 * once)

    def test_an_unseen_word_is_worth_a_word_seen_once(self):
        retriever = fitted([Document("a", "", "cod fig"), Document("b", "", "fig gnu")])
        seen, unseen = retriever.score(["cod", "zyx"], [Document("c", "", "cod zyx")])
        assert seen == unseen == pytest.approx(math.log(2) / (1 + 1.2))

    def test_minus_infinity_without_a_common_term(self):
        scores = fitted(CORPUS).score(QUERIES, CORPUS)
        assert scores.dtype == np.float64
        assert np.array_equal(
            np.isfinite(scores),
            [
                [1, 1, 0, 0, 0],
                [0, 1, 1, 0, 1],
                [1, 1, 1, 0, 0],
                [0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0],
            ],
        )
        assert (scores[np.isfinite(scores)] > 0).all()
        assert np.isneginf(scores[~np.isfinite(scores)]).all()

    def test_scoring_leaves_the_statistics_alone(self):
        retriever = fitted(CORPUS)
        before = retriever.state()
        retriever.score(["zyx zyx cholesterol"], [Document("new", "zyx", "zyx cholesterol " * 50)])
        assert retriever.state() == before
        assert before["fields"][0]["num_documents"] == len(CORPUS)

    def test_a_value_depends_on_its_pair_only_to_the_last_bit(self):
        rng = np.random.default_rng(0)
        words = [f"word{i}" for i in range(600)]
        documents = [Document(str(i), "", " ".join(rng.choice(words, 80))) for i in range(40)]
        queries = [" ".join(rng.choice(words, 100)) for _ in range(12)]
        retriever = fitted(documents)
        scores = retriever.score(queries, documents)
        for i in range(12):
            assert np.array_equal(scores[[i], i : i + 2], retriever.score([queries[i]], documents[i : i + 2]))

    def test_no_queries_or_no_documents(self):
        retriever = fitted(CORPUS)
        assert retriever.score([], CORPUS).shape == (0, 5)
        assert retriever.score(QUERIES, []).shape == (6, 0)
        assert retriever.score([""], [Document("a", "", "")]).tolist() == [[-math.inf]]

    def test_a_corpus_without_words(self):
        retriever = fitted([Document("a", "", ""), Document("b", "", "the")])
        assert np.isfinite(retriever.score(["cod"], [Document("c", "", "cod")])).all()

    def test_best_fields(self):
        retriever = fitted(CORPUS, fields="best")
        titles = [Document(d.id, "", d.title) for d in CORPUS]
        bodies = [Document(d.id, "", d.text) for d in CORPUS]
        by_title = np.maximum(fitted(titles).score(QUERIES, titles), 0)
        by_body = np.maximum(fitted(bodies).score(QUERIES, bodies), 0)
        expected = np.maximum(by_title, by_body) + 0.5 * np.minimum(by_title, by_body)
        np.testing.assert_allclose(np.maximum(retriever.score(QUERIES, CORPUS), 0), expected)

    def test_statistics_are_needed_first(self):
        with pytest.raises(RuntimeError, match="fit"):
            BM25Retriever().score(["a"], CORPUS)
        with pytest.raises(InputError, match="no documents"):
            BM25Retriever().fit([])


class TestState:
    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_round_trip_through_json(self, fields):
        retriever, restored = fitted(CORPUS, fields=fields), BM25Retriever(fields=fields)
        restored.load_state(json.loads(json.dumps(retriever.state())))
        assert np.array_equal(restored.score(QUERIES, CORPUS), retriever.score(QUERIES, CORPUS))

    def test_other_settings_are_refused(self):
        with pytest.raises(InputError, match="k1"):
            BM25Retriever(k1=0.9).load_state(fitted(CORPUS).state())


class TestSearch:
    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_agrees_with_score(self, fields):
        retriever = BM25Retriever(fields=fields)
        retriever.index(CORPUS)
        scores = retriever.score(QUERIES, CORPUS)
        for row, hits in zip(scores, retriever.search(QUERIES, k=5), strict=True):
            order = [i for i in np.argsort(-row, kind="stable") if np.isfinite(row[i])]
            assert [document_id for document_id, _ in hits] == [CORPUS[i].id for i in order]
            np.testing.assert_allclose([score for _, score in hits], row[order], rtol=1e-12)

    def test_rank_needs_no_index(self, monkeypatch):
        monkeypatch.setattr("coaug_trl.retrieval.base.SCORE_CHUNK", 2 * len(QUERIES))
        indexed = BM25Retriever()
        indexed.index(CORPUS)
        for expected, ranked in zip(
            indexed.search(QUERIES, k=2), fitted(CORPUS).rank(QUERIES, CORPUS, 2), strict=True
        ):
            assert [document_id for document_id, _ in ranked] == [document_id for document_id, _ in expected]
            assert [score for _, score in ranked] == pytest.approx([score for _, score in expected])

    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_nearest_ranks_what_is_not_left_out(self, fields, monkeypatch):
        titles, queries = random_texts(300, 3, 2), [*random_texts(40, 6, 1), ""]
        documents = [Document(f"d{i}", titles[i], text) for i, text in enumerate(random_texts(300, 12, 0))]
        retriever = BM25Retriever(fields=fields)
        retriever.fit(documents)
        left_out = np.random.default_rng(0).random(300) < 0.4
        scores = np.where(left_out, -np.inf, retriever.score(queries, documents))
        monkeypatch.setattr("coaug_trl.retrieval.base.SCORE_CHUNK", 7 * 300)
        found, places = retriever.nearest(queries, retriever.encode(documents), 9, left_out)
        for row, row_found, row_places in zip(scores, found, places, strict=True):
            expected = [i for i in np.argsort(-row, kind="stable") if np.isfinite(row[i])][:9]
            assert row_places[: len(expected)].tolist() == expected
            assert row_found[: len(expected)].tolist() == row[expected].tolist()
            assert np.all(row_found[len(expected) :] == -np.inf)

    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_followed_statistics_become_those_of_the_augmented_corpus(self, fields):
        """With the whole corpus in every batch, and two equal rollouts of each document."""
        augmented = [
            Document(each.id, f"{each.title} extra{i % 3}", f"{each.text}\ncod sugar word{i}")
            for i, each in enumerate(CORPUS)
        ]
        retriever, expected = fitted(CORPUS, fields=fields), fitted(augmented, fields=fields)
        originals, rollouts = (retriever.encode([*documents]) for documents in (CORPUS, augmented))
        places = np.repeat(np.arange(len(CORPUS)), 2)
        queries = [*QUERIES, "extra1 word2 sugar"]
        before = retriever.score(queries, augmented)
        retriever.follow(originals, rollouts.take(places), places)
        one_step = retriever.state()["fields"][-1]
        assert one_step["added_shares"]["word0"] == pytest.approx(FOLLOW_RATE / len(CORPUS))
        for _ in range(600):
            retriever.follow(originals, rollouts.take(places), places)
        np.testing.assert_allclose(retriever.score(queries, augmented), expected.score(queries, augmented), rtol=1e-9)
        assert not np.allclose(before, expected.score(queries, augmented))
        # and back again, once nothing is added any more
        for _ in range(600):
            retriever.follow(originals, originals.take(places), places)
        np.testing.assert_allclose(retriever.score(queries, augmented), before, rtol=1e-9)
        assert not any(statistics["added_shares"] for statistics in retriever.state()["fields"])

    def test_followed_statistics_count_each_rollout_of_a_document_alike(self):
        retriever = fitted(CORPUS)
        originals = retriever.encode(CORPUS[:2])
        first, second = CORPUS[:2]
        texts = [first, replace(first, text=f"{first.text} new"), replace(second, text=f"{second.text} new new")]
        retriever.follow(originals, retriever.encode(texts), np.array([0, 0, 1]))
        statistics = retriever.state()["fields"][0]
        assert statistics["added_shares"] == {"new": pytest.approx(FOLLOW_RATE * (0.5 + 1) / 2)}
        assert statistics["added_length"] == pytest.approx(FOLLOW_RATE * (0.5 + 2) / 2)

    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_encoded_documents_follow_refreshed_statistics(self, fields):
        """Statistics change between two scores of the same encoded corpus: other frequencies, another length."""
        retriever, other = fitted(CORPUS, fields=fields), fitted(CORPUS[:2], fields=fields)
        encoded = retriever.encode(CORPUS)
        before = retriever.score(QUERIES, encoded)
        retriever.load_state(other.state())
        np.testing.assert_array_equal(retriever.score(QUERIES, encoded), other.score(QUERIES, CORPUS))
        assert not np.array_equal(retriever.score(QUERIES, encoded), before)

    def test_index_fits_the_statistics(self):
        retriever = BM25Retriever()
        retriever.index(CORPUS)
        assert retriever.state() == fitted(CORPUS).state()

    def test_nothing_to_find(self):
        retriever = BM25Retriever()
        retriever.index(CORPUS)
        assert retriever.search(["", "the of", "halibut", "?!"], k=3) == [[], [], [], []]
        assert retriever.search([], k=3) == []

    def test_k_beyond_the_corpus(self):
        retriever = BM25Retriever()
        retriever.index(CORPUS)
        assert len(retriever.search(["fish vitamin statin empty"], k=1000)[0]) == 5
        with pytest.raises(InputError, match="at least 1"):
            retriever.search(["fish"], k=0)

    def test_one_document(self):
        retriever = BM25Retriever()
        retriever.index(CORPUS[:1])
        [[(document_id, score)], nothing] = retriever.search(["statin", "fish"], k=10)
        assert document_id == "d1" and score > 0 and nothing == []

    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_documents_without_words(self, fields, recwarn):
        retriever = BM25Retriever(fields=fields)
        retriever.index([Document("a", "", ""), Document("b", "", "the")])
        assert retriever.search(["the cod"], k=10) == [[]]
        assert not recwarn.list

    def test_ties_come_in_the_order_of_the_documents(self):
        retriever = BM25Retriever()
        retriever.index([Document(f"d{i}", "", "cod fig" if i % 3 else "cod") for i in range(50)])
        expected = [f"d{i}" for i in range(0, 50, 3)] + [f"d{i}" for i in range(50) if i % 3]
        for k in (1, 10, 17, 30, 50):
            assert [document_id for document_id, _ in retriever.search(["cod"], k=k)[0]] == expected[:k]

    @pytest.mark.parametrize("k", [1, 3, 60, 3000])
    def test_best_places_against_a_full_sort(self, k):
        rng = np.random.default_rng(k)
        for scores in (
            rng.integers(0, 4, 2000).astype(float),  # hardly anything but ties
            np.where(rng.random(2000) < 0.01, rng.random(2000), 0),
            rng.random(2000),
            np.r_[np.zeros(1999), 1.0],
            np.r_[1.0, np.zeros(1999)],  # all that a sample of every so many finds
            np.zeros(2000),
        ):
            expected = sorted(np.flatnonzero(scores), key=lambda place: -scores[place])[:k]
            assert best_places(scores, k, above=0.0).tolist() == expected

    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_any_number_of_threads_finds_the_same(self, fields, monkeypatch):
        documents, queries = random_texts(400, 30, 0), random_texts(150, 8, 1)
        retriever = BM25Retriever(fields=fields)
        retriever.index([Document(f"d{i}", text[:20], text) for i, text in enumerate(documents)])
        monkeypatch.setattr(bm25, "THREADS_FROM", 100)
        found = {}
        for threads in (1, 2, 7):
            monkeypatch.setattr(bm25, "_num_cores", lambda threads=threads: threads)
            found[threads] = retriever.search(["", *queries, "zyx"], k=20)
        assert found[1] == found[2] == found[7]
        assert found[1][0] == found[1][-1] == [] and all(map(len, found[1][1:-1]))
        assert found[1] == [retriever.search([query], k=20)[0] for query in ["", *queries, "zyx"]]

    def test_agrees_with_bm25s_of_the_same_index(self, tmp_path):
        retriever = BM25Retriever()
        retriever.index([Document(f"d{i}", "", text) for i, text in enumerate(random_texts(400, 30, 0))])
        retriever.save(tmp_path)
        queries = random_texts(100, 40, 1)  # with many words twice and more
        expected = bm25s.BM25.load(tmp_path / "field_0", show_progress=False).retrieve(
            [query.split() for query in queries], k=20, show_progress=False
        )
        found = [[score for _, score in hits] for hits in retriever.search(queries, k=20)]
        np.testing.assert_allclose(found, expected.scores, rtol=1e-12)

    def test_a_repeated_id_is_refused(self):
        with pytest.raises(InputError, match="'d1'"):
            BM25Retriever().index([CORPUS[0], CORPUS[0]])

    def test_an_index_is_needed_first(self, tmp_path):
        with pytest.raises(RuntimeError, match="index"):
            fitted(CORPUS).search(["fish"])
        with pytest.raises(RuntimeError, match="index"):
            fitted(CORPUS).save(tmp_path)


class TestSaveAndLoad:
    @pytest.mark.parametrize("options", [{}, {"k1": 0.9, "b": 0.4, "fields": "best"}, {"language": "german"}])
    def test_round_trip(self, options, tmp_path):
        retriever = BM25Retriever(**options)
        retriever.index(CORPUS)
        retriever.save(tmp_path / "index")
        loaded = BM25Retriever.load(tmp_path / "index")
        assert loaded.config == retriever.config
        assert loaded.search(QUERIES, k=5) == retriever.search(QUERIES, k=5)
        assert np.array_equal(loaded.score(QUERIES, CORPUS), retriever.score(QUERIES, CORPUS))

    def test_the_config_tells_settings_apart(self, tmp_path):
        retriever = BM25Retriever(k1=0.9)
        retriever.index(CORPUS)
        retriever.save(tmp_path)
        assert BM25Retriever.load(tmp_path).config != BM25Retriever().config
        assert json.loads((tmp_path / "retriever.json").read_text())["retriever"] == "bm25"

    def test_no_pickle_is_written(self, tmp_path):
        retriever = BM25Retriever()
        retriever.index(CORPUS)
        retriever.save(tmp_path)
        for path in filter(Path.is_file, tmp_path.rglob("*")):
            assert path.suffix in {".json", ".npy"}
            if path.suffix == ".npy":
                np.load(path, allow_pickle=False)

    @pytest.mark.parametrize("fields", ["flat", "best"])
    def test_the_arrays_of_a_loaded_index_stay_in_their_files(self, fields, tmp_path):
        retriever = BM25Retriever(fields=fields)
        retriever.index([Document(f"d{i}", text[:20], text) for i, text in enumerate(random_texts(400, 30, 0))])
        retriever.save(tmp_path)
        loaded = BM25Retriever.load(tmp_path)
        for field_index in loaded._indexes:
            assert all(isinstance(field_index.scores[name].base, np.memmap) for name in ("data", "indices", "indptr"))
        queries = random_texts(50, 8, 1)
        assert loaded.search(queries, k=400) == retriever.search(queries, k=400)
        assert loaded.state() == retriever.state()

    def test_an_index_may_be_replaced_while_it_is_searched(self, tmp_path):
        queries = random_texts(20, 8, 1)
        first, second = BM25Retriever(), BM25Retriever()
        first.index([Document(f"d{i}", "", text) for i, text in enumerate(random_texts(900, 30, 0))])
        second.index([Document("d", "", "word1 word2")])  # its files end long before those of the first
        first.save(tmp_path)
        loaded = BM25Retriever.load(tmp_path)
        loaded.save(tmp_path)  # onto the files that it reads
        assert BM25Retriever.load(tmp_path).search(queries, k=50) == first.search(queries, k=50)
        second.save(tmp_path)
        assert loaded.search(queries, k=50) == first.search(queries, k=50)
        assert BM25Retriever.load(tmp_path).search(queries, k=50) == second.search(queries, k=50)
        loaded.save(tmp_path / "copy")
        assert BM25Retriever.load(tmp_path / "copy").search(queries, k=50) == first.search(queries, k=50)
        assert not list(tmp_path.rglob(".*"))

    @pytest.mark.parametrize("content", ["[]", '{"retriever": "bm25", "k1": 1.2, "b": 0.75, "unknown": 1}', '{"k'])
    def test_settings_that_cannot_be_read_are_refused(self, content, tmp_path):
        retriever = BM25Retriever()
        retriever.index(CORPUS)
        retriever.save(tmp_path)
        (tmp_path / "retriever.json").write_text(content)
        with pytest.raises(InputError, match="is damaged"):
            load_retriever(tmp_path)

    @pytest.mark.parametrize("name", ["data.csc.index.npy", "indptr.csc.index.npy", "vocab.index.json", ""])
    def test_a_damaged_index_is_refused(self, name, tmp_path):
        retriever = BM25Retriever()
        retriever.index(CORPUS)
        retriever.save(tmp_path)
        path = tmp_path / "field_0" / name if name else tmp_path / "document_ids.json"
        content = path.read_bytes()
        for cut in (len(content) // 2, 0):
            path.write_bytes(content[:cut])
            with pytest.raises(InputError, match="is damaged .*; index the collection again"):
                load_retriever(tmp_path)
        path.unlink()
        with pytest.raises(InputError, match=f"is damaged .*{path.name}"):
            load_retriever(tmp_path)

    def test_an_unfinished_folder_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="retriever.json"):
            BM25Retriever.load(tmp_path)
        (tmp_path / "retriever.json").write_text('{"retriever": "dense"}')
        with pytest.raises(InputError, match="another retriever"):
            BM25Retriever.load(tmp_path)


@pytest.mark.parametrize("options", [{"k1": -1}, {"b": 1.5}, {"fields": "title"}, {"language": "klingon"}])
def test_bad_settings_are_refused(options):
    with pytest.raises(InputError):
        BM25Retriever(**options)


def test_imports_are_light_and_nothing_is_printed():
    code = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        "from coaug_trl.data import Document; from coaug_trl.retrieval import BM25Retriever\n"
        "r = BM25Retriever(); r.index([Document('a', '', 'cod')]); r.search(['', 'cod'], 1)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif("COAUG_NFCORPUS" not in os.environ, reason="COAUG_NFCORPUS does not name the NFCorpus folder")
@pytest.mark.parametrize("fields, over_all, over_hits", [("flat", 0.3212, 0.3368), ("best", 0.3277, 0.3436)])
def test_nfcorpus(fields, over_all, over_hits):
    folder = Path(os.environ["COAUG_NFCORPUS"])
    rows = map(json.loads, (folder / "corpus.jsonl").read_text("utf-8").splitlines())
    documents = [Document(row["_id"], row["title"], row["text"]) for row in rows]
    rows = map(json.loads, (folder / "queries.jsonl").read_text("utf-8").splitlines())
    queries = {row["_id"]: row["text"] for row in rows}
    qrels = {}
    for line in (folder / "qrels" / "test.tsv").read_text("utf-8").splitlines()[1:]:
        query_id, document_id, grade = line.split("\t")
        qrels.setdefault(query_id, {})[document_id] = int(grade)

    retriever = BM25Retriever(fields=fields)
    retriever.index(documents)
    hits = retriever.search([queries[query_id] for query_id in qrels], k=100)
    run = {query_id: dict(query_hits) for query_id, query_hits in zip(qrels, hits, strict=True)}
    means, per_query = evaluate_run(qrels, run)
    with_hits = [values["nDCG@10"] for query_id, values in per_query.items() if run[query_id]]
    assert (len(per_query), len(with_hits)) == (323, 308)
    assert means["nDCG@10"] == pytest.approx(over_all, abs=0.002)
    assert np.mean(with_hits) == pytest.approx(over_hits, abs=0.002)
