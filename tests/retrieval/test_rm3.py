import math
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coaug_trl import BM25Retriever, Collection, Document, InputError
from coaug_trl.evaluation.measures import evaluate_run
from coaug_trl.retrieval.base import retrieve
from coaug_trl.retrieval.rm3 import RM3


# Two consonants: the analyzer leaves such words as they are.
WORDS = [first + second for first in "bcdfg" for second in "klmnp"]
K1, B = 1.2, 0.75


def random_documents(seed, number=60):
    """Documents of words that are rare enough to be added, most of them."""
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(8, 8 + len(WORDS))
    texts = [" ".join(draw.choice(WORDS, draw.integers(1, 6), p=share / share.sum())) for _ in range(number)]
    return [Document(f"d{number}", "", text) for number, text in enumerate(texts)]


def bm25(weights, texts):
    """Lucene's BM25 for weighted words, written out."""
    average = sum(len(text.split()) for text in texts) / len(texts)
    scores = []
    for text in texts:
        counts = Counter(text.split())
        norm = K1 * (1 - B + B * counts.total() / average)
        scores.append(0.0)
        for word, weight in weights.items():
            frequency = sum(word in other.split() for other in texts)
            if counts[word]:
                idf = math.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
                scores[-1] += weight * idf * counts[word] / (counts[word] + norm)
    return scores


def rm3(query, texts, feedback_documents, feedback_terms, original_weight):
    """RM3 from its formula: the weight of each word, and the score of each document."""
    words = query.split()
    scores = bm25(Counter(words), texts)
    order = sorted((place for place in range(len(texts)) if scores[place] > 0), key=lambda place: -scores[place])
    may_be_added = {word for word in WORDS if sum(word in text.split() for text in texts) <= len(texts) / 10}
    relevance = Counter()
    for place in order[:feedback_documents]:
        vector = [word for word in texts[place].split() if word in may_be_added]
        for word in set(vector):
            relevance[word] += vector.count(word) / len(vector) * scores[place]
    best = dict(sorted(relevance.items(), key=lambda item: (-item[1], item[0]))[:feedback_terms])
    if not best:
        return dict(Counter(words)), scores
    model = {
        word: original_weight * words.count(word) / len(words)
        + (1 - original_weight) * best.get(word, 0) / sum(best.values())
        for word in {*words, *best}
    }
    weights = {word: len(words) * probability for word, probability in model.items()}
    return weights, bm25(weights, texts)


def indexed(documents, **options):
    retriever = BM25Retriever(**options)
    retriever.index(documents)
    return retriever


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("documents_fed_back", "terms", "weight"), [(10, 10, 0.5), (3, 4, 0.2), (1, 1, 0.0)])
def test_agrees_with_the_formula(seed, documents_fed_back, terms, weight):
    documents = random_documents(seed)
    texts = [document.text for document in documents]
    queries = ["bk", "fm gp", "gl gl fn", "bk zz", *WORDS[10:]]
    system = RM3(indexed(documents), documents, documents_fed_back, terms, weight)
    changed = 0
    for query, weights, hits in zip(queries, system.expand(queries), system.search(queries, 100), strict=True):
        expected_weights, expected = rm3(query, texts, documents_fed_back, terms, weight)
        assert {word: weight for word, weight in weights.items() if weight} == pytest.approx(
            {word: weight for word, weight in expected_weights.items() if weight}
        )
        found = dict(hits)
        assert found == pytest.approx({f"d{place}": score for place, score in enumerate(expected) if score > 0})
        assert list(found.values()) == sorted(found.values(), reverse=True)
        changed += weights != Counter(query.split())
    assert changed > 1


@pytest.mark.parametrize("fields", ["flat", "best"])
def test_the_weight_of_the_query_alone_gives_bm25s_ranking(collection, fields):
    documents, queries = list(collection.corpus.values()), list(collection.queries.values())
    retriever = indexed(documents, fields=fields)
    expected = retriever.search(queries, 40)
    assert RM3(retriever, documents, original_weight=1.0).search(queries, 40) == expected
    assert RM3(retriever, documents).search(queries, 40) != expected


def test_documents_without_a_word_of_the_query_are_found_by_those_added():
    fillers = [Document(f"f{number}", "", f"filler{number}") for number in range(30)]
    documents = [
        Document("a", "", "statin cholesterol"),
        Document("b", "", "cholesterol heart"),
        *fillers,
    ]
    retriever = indexed(documents)
    assert [document_id for document_id, _ in retriever.search(["statin"])[0]] == ["a"]
    assert [document_id for document_id, _ in RM3(retriever, documents).search(["statin"])[0]] == ["a", "b"]


@settings(max_examples=30, deadline=None)
@given(
    queries=st.lists(st.lists(st.sampled_from([*WORDS, "zz"]), max_size=5).map(" ".join), min_size=1, max_size=4),
    weight=st.floats(0, 1),
    terms=st.integers(1, 5),
)
def test_the_weights_sum_to_the_number_of_words(queries, weight, terms):
    documents = random_documents(0)
    system = RM3(indexed(documents), documents, feedback_terms=terms, original_weight=weight)
    for query, weights in zip(queries, system.expand(queries), strict=True):
        assert sum(weights.values()) == pytest.approx(len(query.split()))
        assert len(weights) <= len(set(query.split())) + terms


def test_frequent_and_odd_words_are_not_added():
    documents = [Document(f"d{number}", "", f"x{number} often") for number in range(20)]
    documents.append(Document("hit", "", "wanted often often a q o'neil pneumonoultramicroscopic rare 2008"))
    [weights] = RM3(indexed(documents), documents).expand(["wanted"])
    assert weights == pytest.approx({"want": 0.5 + 0.5 / 3, "rare": 0.5 / 3, "2008": 0.5 / 3})


def test_best_fields_are_scored_one_by_one_and_combined(collection):
    documents, query = list(collection.corpus.values()), "sodium pressure"
    system = RM3(indexed(documents, fields="best"), documents)
    [weights] = system.expand([query])
    by_field = []
    for field in ("title", "text"):
        texts = [Document(document.id, "", getattr(document, field)) for document in documents]
        retriever, scores = indexed(texts), Counter()
        state = retriever.state()["fields"][0]["document_frequencies"]
        for term, weight in weights.items():
            if term in state:
                # the term's own posting list: stems are not all stems of themselves
                original = next(
                    word for text in texts for word in text.text.split() if analyse(retriever, word) == term
                )
                for document_id, score in retriever.search([original], 40)[0]:
                    scores[document_id] += weight * score
        by_field.append(scores)
    expected = {
        document.id: max(scores) + 0.5 * min(scores)
        for document in documents
        if any(scores := [each[document.id] for each in by_field])
    }
    assert dict(system.search([query], 40)[0]) == pytest.approx(expected)


def analyse(retriever, word):
    """The term of a word, seen from outside."""
    other = BM25Retriever()
    other.fit([Document("d", "", word)])
    return next(iter(other.state()["fields"][0]["document_frequencies"]), None)


def test_nothing_to_find_stays_nothing(collection):
    documents = list(collection.corpus.values())
    system = RM3(indexed(documents), documents)
    assert system.search(["", "the of", "halibut", "?!"], 3) == [[], [], [], []]
    assert system.search([], 3) == []
    assert system.expand(["halibut halibut"]) == [{"halibut": 2}]


def test_the_settings_stand_in_the_config_and_bad_ones_are_refused():
    retriever = BM25Retriever(k1=0.9)
    config = RM3(retriever, [], feedback_terms=20).config
    assert config["rm3"] == {"feedback_documents": 10, "feedback_terms": 20, "original_weight": 0.5}
    assert config | retriever.config == config
    for options in ({"feedback_documents": 0}, {"feedback_terms": 0}, {"original_weight": 1.5}):
        with pytest.raises(InputError, match="RM3 needs"):
            RM3(retriever, [], **options)
    with pytest.raises(InputError, match="at least 1"):
        RM3(retriever, []).search(["fish"], 0)


@pytest.mark.skipif("COAUG_NFCORPUS" not in os.environ, reason="COAUG_NFCORPUS does not name the NFCorpus folder")
def test_nfcorpus():
    collection = Collection.load(os.environ["COAUG_NFCORPUS"], "test")
    documents = list(collection.corpus.values())
    queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
    retriever = indexed(documents)
    means = {}
    for name, system in (("bm25", retriever), ("rm3", RM3(retriever, documents))):
        means[name], _ = evaluate_run(collection.qrels, retrieve(system, queries), ["nDCG@10", "R@100"])
    assert means["bm25"] == pytest.approx({"nDCG@10": 0.3221, "R@100": 0.2460}, abs=0.002)
    assert means["rm3"] == pytest.approx({"nDCG@10": 0.3455, "R@100": 0.3181}, abs=0.002)
