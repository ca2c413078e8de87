"""
Shows what the quickstart's training did to retrieval on the held-out test queries.

python scripts/quickstart_report.py --output_dir runs/quickstart

Augments the test queries and the corpus with the untrained and the trained policy, retrieves with and without, and
writes `metrics.json`, `reward.png` and one evaluation folder a system.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from coaug_trl import Augmenter, Collection, Document, PromptSet
from coaug_trl.augmentation.folder import AugmentedCollection, compose
from coaug_trl.data import vocabulary_gap
from coaug_trl.evaluation.folder import evaluation_manifest, judged_texts, save_evaluation
from coaug_trl.evaluation.measures import evaluate_run
from coaug_trl.evaluation.significance import compare
from coaug_trl.policy.settings import GenerationSettings, PolicySettings
from coaug_trl.publishing.cards import draw_curves
from coaug_trl.publishing.record import load_record
from coaug_trl.retrieval import Retriever, make_retriever
from coaug_trl.retrieval.base import retrieve
from coaug_trl.utils.files import write_json


MEASURE = "nDCG@10"
DEPTH = 1000
SIDES = {"queries only": ["query"], "documents only": ["document"], "both": ["query", "document"]}


def index_and_retrieve(
    retriever: Retriever, queries: dict[str, str], documents: list[Document]
) -> dict[str, dict[str, float]]:
    """Indexes documents and searches them."""
    retriever.index(documents)
    return retrieve(retriever, queries, DEPTH)


def evaluate(
    folder: Path, collection: Collection, augmented: AugmentedCollection | None, retriever: Retriever
) -> dict[str, float]:
    """Measures, with or without augmentations, into an evaluation folder; returns the value of each query."""
    queries, documents = compose(collection, augmented, retriever)
    run = index_and_retrieve(retriever, queries, documents)
    manifest = evaluation_manifest(collection, augmented, retriever.config, queries, documents, DEPTH, False)
    texts = judged_texts(collection, augmented.answers if augmented else None)
    save_evaluation(folder, run, collection.qrels, manifest, texts=texts)
    return {id_: values[MEASURE] for id_, values in evaluate_run(collection.qrels, run)[1].items()}


def evaluate_policy(
    name: str, augmenter: Augmenter, retriever: Retriever, collection: Collection, output_dir: Path
) -> dict[str, dict]:
    """Augments with a policy and measures each combination of sides; returns the values per query."""
    folder = output_dir / "augmentations" / name
    augmenter.augment_collection(collection, folder)
    return {
        label: evaluate(
            output_dir / "evaluations" / f"{name}-{label.replace(' ', '-')}",
            collection,
            AugmentedCollection.load(folder, sides),
            retriever,
        )
        for label, sides in SIDES.items()
    }


def ceiling(collection: Collection, prompt_set: PromptSet, retriever: Retriever) -> float:
    """nDCG@10 when every text is given one agreed term for each of its concepts."""
    answer = vocabulary_gap.canonical_answer
    queries = {
        id_: prompt_set.compose_query(collection.queries[id_], answer(collection.queries[id_]))
        for id_ in collection.qrels
    }
    documents = [
        prompt_set.compose_document(document, answer(document.text), retriever.answer_field)
        for document in collection.corpus.values()
    ]
    return evaluate_run(collection.qrels, index_and_retrieve(retriever, queries, documents), [MEASURE])[0][MEASURE]


def print_examples(console: Console, collection: Collection, folder: Path, before: dict, after: dict, count: int = 3):
    """Prints the test queries that gained most, each with what was added to it and to a relevant document."""
    untrained = AugmentedCollection.load(folder / "untrained")
    trained = AugmentedCollection.load(folder / "trained")
    gains = sorted(before, key=lambda id_: before[id_] - after[id_])
    console.print("\nThe test queries that gained most; words that query and document share are in capitals:")
    for query_id in gains[:count]:
        document_id = collection.relevant_documents(query_id)[0]
        query, document = collection.queries[query_id], collection.corpus[document_id].text
        console.print(f"\n{MEASURE} {before[query_id]:.2f} → {after[query_id]:.2f}")
        console.print(f"  query      {query}")
        console.print(f"  document   {document}")
        for label, augmented in (("untrained", untrained), ("trained", trained)):
            query_words = augmented.answers["query"][query_id].split()
            document_words = augmented.answers["document"][document_id].split()
            shared = {*query.split(), *query_words} & {*document.split(), *document_words}
            for side, words in (("query", query_words), ("document", document_words)):
                marked = " ".join(word.upper() if word in shared else word for word in dict.fromkeys(words))
                console.print(f"  {label:>9}  {side:>8} + {marked}", style="bold" if label == "trained" else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="Folder of the quickstart.")
    output_dir = parser.parse_args().output_dir
    disable_progress_bar()

    collection = Collection.load("vocabulary-gap", "test")
    settings = PolicySettings.load(output_dir / "trained")
    retriever = make_retriever(**settings.retriever)
    trained = Augmenter.from_pretrained(str(output_dir / "trained"), batch_size=128)
    untrained = Augmenter.from_pretrained(
        str(output_dir / "untrained"),
        settings.prompt_set,
        GenerationSettings(settings.generation.max_new_tokens, settings.generation.repetition_penalty),
        batch_size=128,
    )
    none = evaluate(output_dir / "evaluations" / "none", collection, None, retriever)
    systems = {
        name: evaluate_policy(name, augmenter, retriever, collection, output_dir)
        for name, augmenter in (("untrained", untrained), ("trained", trained))
    }
    test = compare(systems["trained"]["both"], systems["untrained"]["both"])

    mean = lambda values: sum(values.values()) / len(values)
    best = ceiling(collection, settings.prompt_set, retriever)
    metrics = {
        MEASURE: {"none": mean(none), **{name: mean(values["both"]) for name, values in systems.items()}},
        "by_side": {name: {label: mean(values[label]) for label in SIDES} for name, values in systems.items()},
        "ceiling": best,
        "p_value": test["p_t_test"],
        "comparison": test,
        "num_queries": test["num_queries"],
    }
    write_json(output_dir / "metrics.json", metrics)
    draw_curves(load_record(output_dir / "trained"), output_dir / "reward.png")

    console = Console(highlight=False, soft_wrap=True)
    searched = f"{'BM25' if retriever.kind == 'sparse' else 'dense retrieval'} over {len(collection.corpus)} documents"
    table = Table(title=f"{MEASURE} on {test['num_queries']} held-out test queries, {searched}")
    table.add_column("augmentation")
    for label in SIDES:
        table.add_column(label, justify="right")
    table.add_row("none", *[f"{mean(none):.3f}"] * 3)
    for name, values in systems.items():
        table.add_row(f"{name} policy", *[f"{mean(values[label]):.3f}" for label in SIDES])
    table.add_row("ceiling (one agreed term a concept)", "", "", f"{best:.3f}")
    console.print()
    console.print(table)
    console.print(
        f"trained − untrained (both sides): {test['mean_difference']:+.3f}, paired t-test p = {test['p_t_test']:.1g}, "
        f"randomisation test p = {test['p_randomization']:.1g}; {test['wins']} wins, {test['ties']} ties, "
        f"{test['losses']} losses"
    )
    print_examples(
        console, collection, output_dir / "augmentations", systems["untrained"]["both"], systems["trained"]["both"]
    )
    console.print(f"\n{output_dir / 'metrics.json'}, {output_dir / 'reward.png'}")


if __name__ == "__main__":
    main()
