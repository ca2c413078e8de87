"""
A generated collection in which queries and documents mean the same in different words.

Documents speak of medical concepts in technical terms, queries in lay terms, so a keyword search finds next to
nothing; a policy that knows the synonyms of a concept finds everything once both sides settle on the same ones.
Every word is a whole word of English, so that what a policy learns can be read.
"""

from itertools import combinations

import numpy as np

from .document import Document


# Concept: three technical terms, as documents use them, and three lay terms, as queries use them.
CONCEPTS = {
    "heart": ("cardiac", "coronary", "myocardial", "heart", "heartbeat", "chest"),
    "kidney": ("renal", "nephritic", "glomerular", "kidney", "urine", "bladder"),
    "liver": ("hepatic", "biliary", "cirrhotic", "liver", "jaundice", "gallbladder"),
    "lung": ("pulmonary", "bronchial", "alveolar", "lung", "breath", "cough"),
    "brain": ("cerebral", "neural", "cortical", "brain", "memory", "mind"),
    "skin": ("dermal", "cutaneous", "epidermal", "skin", "rash", "itch"),
    "stomach": ("gastric", "peptic", "duodenal", "stomach", "belly", "tummy"),
    "bone": ("osseous", "skeletal", "vertebral", "bone", "spine", "joint"),
    "sugar": ("glycemic", "diabetic", "insulin", "sugar", "sweets", "candy"),
    "cancer": ("oncologic", "malignant", "neoplastic", "cancer", "tumor", "lump"),
    "eye": ("ocular", "retinal", "ophthalmic", "eye", "vision", "sight"),
    "sleep": ("insomnia", "somnolent", "circadian", "sleep", "bedtime", "nap"),
}
NUM_TECHNICAL = 3
FILLER = (
    "study patient trial group report result year clinic effect risk change level sample method review data outcome "
    "history measure follow"
).split()
QUESTION = "what how help cause best way does my problem advice".split()

NUM_DOCUMENTS = 300
CONCEPTS_PER_DOCUMENT = 4
CONCEPTS_PER_QUERY = 3
QUERIES_PER_SPLIT = {"train": 100, "dev": 16, "test": 100}
# How often a query uses a technical term after all.
TECHNICAL_SHARE = 0.2


def generate(seed: int = 0) -> tuple[dict[str, Document], dict[str, str], dict[str, dict[str, dict[str, int]]]]:
    """
    Generates the collection.

    A query names three concepts; a document is relevant if it speaks of all of them. No two queries name the same
    three, so nothing of a test query is seen in training but its concepts.

    Args:
        seed: Seed of all draws.

    Returns: corpus by document id, query texts by query id, and judgments by split, query id and document id.
    """
    generator = np.random.default_rng(seed)
    concepts = list(CONCEPTS)
    corpus, concepts_of = {}, {}
    for number in range(NUM_DOCUMENTS):
        document_id = f"d{number:03d}"
        chosen = [concepts[index] for index in generator.choice(len(concepts), CONCEPTS_PER_DOCUMENT, replace=False)]
        words = [_form(generator, concept, technical=True) for concept in chosen]
        words += generator.choice(FILLER, 4, replace=False).tolist()
        corpus[document_id] = Document(document_id, "", " ".join(generator.permutation(words).tolist()))
        concepts_of[document_id] = set(chosen)

    triples = [
        triple
        for triple in combinations(concepts, CONCEPTS_PER_QUERY)
        if any(set(triple) <= found for found in concepts_of.values())
    ]
    order = iter(generator.permutation(len(triples)))
    queries, qrels = {}, {}
    for split, count in QUERIES_PER_SPLIT.items():
        qrels[split] = {}
        for number in range(count):
            query_id = f"{split}{number:03d}"
            triple = triples[next(order)]
            words = [_form(generator, concept, generator.random() < TECHNICAL_SHARE) for concept in triple]
            words += generator.choice(QUESTION, 2, replace=False).tolist()
            queries[query_id] = " ".join(generator.permutation(words).tolist())
            relevant = [document_id for document_id, found in concepts_of.items() if set(triple) <= found]
            qrels[split][query_id] = dict.fromkeys(relevant, 1)
    return corpus, queries, qrels


def concepts_in(text: str) -> list[str]:
    """The concepts that the words of a text stand for, in their order, each once."""
    concept_of = {form: concept for concept, forms in CONCEPTS.items() for form in forms}
    return list(dict.fromkeys(concept_of[word] for word in text.split() if word in concept_of))


def canonical_answer(text: str) -> str:
    """The augmentation that shows the collection's ceiling: one agreed term for each concept of a text."""
    return " ".join(CONCEPTS[concept][0] for concept in concepts_in(text))


def vocabulary() -> list[str]:
    """Every word the collection can contain."""
    return sorted({form for forms in CONCEPTS.values() for form in forms} | set(FILLER) | set(QUESTION))


def _form(generator: np.random.Generator, concept: str, technical: bool) -> str:
    first = 0 if technical else NUM_TECHNICAL
    return CONCEPTS[concept][first + generator.integers(NUM_TECHNICAL)]
