"""What goes to the Hub and comes back, against a server on loopback that speaks its API."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import hub_server
import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from coaug_trl import Augmenter, BM25Retriever, CoAugConfig, CoAugTrainer, InputError, PromptSet
from coaug_trl.augmentation.folder import AugmentedCollection
from coaug_trl.cli.train import push_run
from coaug_trl.policy.download import policy_folder
from coaug_trl.policy.fingerprint import fingerprint, folder_hash
from coaug_trl.policy.settings import GenerationSettings, PolicySettings, retriever_differences
from coaug_trl.publishing.record import load_record
from coaug_trl.publishing.upload import Upload, prepare, push, reserve, write_run_card
from coaug_trl.serving.index import SearchIndex
from coaug_trl.training.record import license_of
from coaug_trl.utils.files import write_json
from coaug_trl.utils.names import without_folders


PROMPT_SET = PromptSet("sparse", "query:", "document:")
GENERATION = GenerationSettings(24, 1.2)


@contextmanager
def reached(url, cache, user="me"):
    """The Hub is at `url`, as if `HF_ENDPOINT` and the rest had been set before Python was started."""
    disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setattr(datasets.config, "HF_ENDPOINT", url)
        patch.setattr(datasets.config, "HUB_DATASETS_URL", url + "/datasets/{repo_id}/resolve/{revision}/{path}")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        for module in (constants, datasets.config):
            patch.setattr(module, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        if user:
            patch.setenv("HF_TOKEN", f"token-{user}")
        else:
            patch.delenv("HF_TOKEN", raising=False)
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tiny_model, collection):
    """A run as training leaves it, with what must not go out beside it."""
    folder = tmp_path_factory.mktemp("runs") / "advice"
    shutil.copytree(tiny_model, folder)
    retriever = BM25Retriever()
    PolicySettings(PROMPT_SET, GENERATION, retriever.config).save(folder)
    write_json(
        folder / "training.json",
        {
            "base_model": str(tiny_model),
            "collection": "advice",
            "train_split": "train",
            "eval_split": "dev",
            "num_documents": 40,
            "num_train_queries": 8,
            "num_train_judgments": 24,
            "num_processes": 1,
            "device": "cpu",
            "arguments": {"learning_rate": 1e-5, "augmentations": str(folder / "untrained")},
        },
    )
    history = [{"step": step, "reward": step / 10, "query/reward": step / 5} for step in (1, 2, 3)]
    history.append({"step": 3, "eval_nDCG@10": 0.5})
    write_json(
        folder / "trainer_state.json", {"best_model_checkpoint": str(folder / "checkpoint-3"), "log_history": history}
    )
    for name in ("training_args.bin", "hard_negatives.json", ".README.md.tmp", "completions/1.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for others")
    shutil.copytree(tiny_model, folder / "checkpoint-3")
    torch.save({}, folder / "checkpoint-3" / "optimizer.pt")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, policy, beir_folder):
    """Augmentations, an index and an evaluation, made with the run's own folder."""
    from coaug_trl.cli.main import main

    root = tmp_path_factory.mktemp("made")
    augmentations, index = root / "augmentations", root / "index"
    collection = ["--collection", str(beir_folder)]
    for command in (
        ["augment", "--model", policy, *collection, "--output", augmentations],
        ["index", *collection, "--augmentations", augmentations, "--output", index],
        ["evaluate", *collection, "--augmentations", augmentations, "--output", policy / "evaluations" / "both"],
        ["evaluate", *collection, "--output", root / "elsewhere" / "none"],
    ):
        assert main(list(map(str, command))) == 0
    return root


@pytest.fixture(scope="module")
def server():
    hub = Hub().start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def pushed(server, policy, made, beir_folder, tmp_path_factory):
    """Run, augmentations and index on the Hub; tests only read them."""
    with reached(server.url, tmp_path_factory.mktemp("cache")):
        evaluations = [made / "elsewhere"]
        urls = [
            push(prepare(policy, "me/advice", evaluations), "me/advice"),
            push(prepare(made / "augmentations", "me/answers", collection=str(beir_folder)), "me/answers"),
            push(prepare(made / "index", "me/index"), "me/index"),
        ]
    assert urls[0].repo_url.url == f"{server.url}/me/advice"
    return server


@pytest.fixture
def hub(pushed, tmp_path):
    """The Hub as someone without anything in the cache sees it."""
    pushed.fail_after = pushed.fail = None
    pushed.uploads.clear()
    with reached(pushed.url, tmp_path / "cache"):
        yield pushed
    pushed.fail_after = pushed.fail = None


@pytest.fixture
def offline(monkeypatch):
    def unplug():
        for module in (constants, datasets.config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)

    return unplug


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# What goes out


def test_a_run_goes_out_without_pickles_and_what_else_lies_there(hub):
    assert sorted(hub.files("me/advice")) == [
        ".gitattributes",
        "README.md",
        "chat_template.jinja",
        "coaug.json",
        "config.json",
        "evaluations/both/manifest.json",
        "evaluations/both/metrics.json",
        "evaluations/both/per_query.jsonl",
        "evaluations/both/qrels.trec",
        "evaluations/both/run.trec",
        "evaluations/none/manifest.json",
        "evaluations/none/metrics.json",
        "evaluations/none/per_query.jsonl",
        "evaluations/none/qrels.trec",
        "evaluations/none/run.trec",
        "generation_config.json",
        "model.safetensors",
        "prompt_set.yaml",
        "reward.png",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "training.json",
    ]


@pytest.mark.parametrize("repository", [("model", "me/advice"), ("dataset", "me/answers"), ("model", "me/index")])
def test_nothing_that_went_out_says_where_it_was(hub, repository, tmp_path_factory, policy):
    kind, repo_id = repository
    for name, content in hub.files(repo_id, kind).items():
        for path in (tmp_path_factory.getbasetemp(), policy.parent, Path.home(), Path.cwd()):
            assert str(path).encode() not in content, (name, path)


def test_what_went_out_reads_as_the_run_did(hub, policy, made):
    here, there = load_record(policy, [made / "elsewhere"]), load_record(policy_of(hub, "me/advice", policy.parent))
    assert there.settings == here.settings
    assert there.history == here.history
    assert [each.system for each in there.evaluations] == [each.system for each in here.evaluations]
    assert there.training["base_model"] == "tiny"
    assert there.training["arguments"]["augmentations"] == "untrained"


def policy_of(hub, repo_id, parent):
    """All files of a repository in a folder, as git would give them."""
    folder = parent / "clone"
    for name, content in hub.files(repo_id).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# And comes back


def test_a_policy_comes_back_with_its_prompts_and_answers_as_before(hub, coaug, made, beir_folder, tmp_path, offline):
    arguments = ["--collection", beir_folder, "--output", tmp_path / "there"]
    code, printed, errors = coaug("augment", "--model", "me/advice", *arguments)
    assert code == 0, errors
    for name in ("queries.jsonl", "documents.jsonl", "prompt_set.yaml"):
        assert (tmp_path / "there" / name).read_bytes() == (made / "augmentations" / name).read_bytes()
    here, there = (
        json.loads((folder / "manifest.json").read_text()) for folder in (made / "augmentations", tmp_path / "there")
    )
    assert there["model"] == "me/advice"
    for manifest in (here, there):
        for counts in manifest["sides"].values():
            counts.pop("cost")  # time
    assert here["model_is_folder"]
    assert here | {"model": "me/advice", "model_is_folder": False} == there
    offline()
    augmenter = Augmenter.from_pretrained("me/advice")
    assert augmenter.settings.prompt_set == PROMPT_SET
    assert augmenter.settings.generation == GENERATION


def test_augmentations_of_the_folder_go_on_with_the_policy_of_the_hub(hub, coaug, made, beir_folder, tmp_path):
    shutil.copytree(made / "augmentations", tmp_path / "both")
    before = (tmp_path / "both" / "documents.jsonl").read_bytes()
    arguments = ["--collection", beir_folder, "--output", tmp_path / "both", "--split", "dev"]
    code, printed, errors = coaug("augment", "--model", "me/advice", *arguments)
    assert code == 0, errors
    assert "document: 0 texts augmented" in printed
    assert "query: 8 texts augmented" in printed
    assert (tmp_path / "both" / "documents.jsonl").read_bytes() == before
    assert len(rows(tmp_path / "both" / "queries.jsonl")) == 16


def test_an_index_comes_back_and_finds_the_same(hub, coaug, policy, made, offline):
    search = ["wheat bread and stomach pain", "--json"]
    code, here, errors = coaug("search", "--index", made / "index", "--model", policy, *search)
    assert code == 0, errors
    code, there, errors = coaug("search", "--index", "me/index", "--model", "me/advice", *search)
    assert code == 0, errors
    assert json.loads(there) == json.loads(here)
    assert json.loads(there)["hits"]
    offline()
    assert coaug("search", "--index", "me/index", "--model", "me/advice", *search)[1] == there


def test_bm25s_loads_the_index_on_its_own(hub, made):
    from bm25s.hf import BM25HF

    index = BM25HF.load_from_hub("me/index", show_progress=False)
    ours = SearchIndex.load(made / "index")
    terms = [ours.retriever.analyzer.terms(["salty snacks"])[0]]
    places, scores = index.retrieve(terms, k=3, show_progress=False)
    ids = json.loads(hub.files("me/index")["document_ids.json"])
    found = ours.retriever.search(["salty snacks"], 3)[0]
    np.testing.assert_allclose(scores[0], [score for _, score in found], rtol=1e-6)
    assert {ids[place] for place, score in zip(places[0], scores[0], strict=True) if score > scores[0].min()} <= {
        id_ for id_, _ in found
    }


def test_augmentations_come_back_as_a_dataset(hub, collection, made):
    documents = datasets.load_dataset("me/answers", "documents", split="train")
    queries = datasets.load_dataset("me/answers", "queries", split="train")
    assert documents.column_names == ["_id", "augmentation", "complete", "title", "text", "augmented_text"]
    assert queries.column_names == ["_id", "augmentation", "complete", "text", "augmented_text"]
    augmented = AugmentedCollection.load(made / "augmentations")
    test = collection.with_split("test")
    assert dict(zip(queries["_id"], queries["augmented_text"], strict=True)) == augmented.queries(test)
    texts = {document.id: f"{document.title}\n{document.text}" for document in augmented.documents(test)}
    assert dict(zip(documents["_id"], documents["augmented_text"], strict=True)) == texts
    assert {row["_id"]: row["text"] for row in documents} == {id_: row.text for id_, row in collection.corpus.items()}
    assert json.loads(hub.files("me/answers", "dataset")["manifest.json"])["sides"].keys() == {"query", "document"}


def test_augmentations_of_the_hub_are_evaluated_as_those_of_the_folder(hub, coaug, policy, beir_folder, tmp_path):
    arguments = ["--collection", beir_folder, "--augmentations", "me/answers", "--output", tmp_path / "out"]
    code, _, errors = coaug("evaluate", *arguments)
    assert code == 0, errors
    for name in ("metrics.json", "run.trec"):
        assert (tmp_path / "out" / name).read_bytes() == (policy / "evaluations" / "both" / name).read_bytes()


def test_the_baselines_take_a_policy_of_the_hub(hub, coaug, beir_folder, tmp_path):
    arguments = ["--collection", beir_folder, "--only", "none", "trained", "--output", tmp_path]
    code, printed, errors = coaug("baselines", "--policy", "me/advice", *arguments)
    assert code == 0, errors
    assert json.loads((tmp_path / "augmentations" / "trained" / "manifest.json").read_text())["model"] == "me/advice"


def test_an_adapter_comes_back_whoever_knows_its_settings(hub, tiny_model, tmp_path):
    """As a policy by the fingerprint of its weights, as any adapter by its commit."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "adapter")
    PolicySettings(PROMPT_SET, GENERATION, BM25Retriever().config).save(tmp_path / "adapter")
    upload = prepare(tmp_path / "adapter", "me/adapter")
    assert "the adapter's base model is" in upload.notes[0] and str(tiny_model) in upload.notes[0]
    config = json.loads(upload.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny"

    # With a base model that others can load.
    push(Upload("model", {path.name: path for path in tiny_model.iterdir()}), "me/base")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    write_json(tmp_path / "adapter" / "adapter_config.json", content | {"base_model_name_or_path": "me/base"})
    upload = prepare(tmp_path / "adapter", "me/adapter")
    assert not any("base model" in line for line in upload.notes)
    push(upload, "me/adapter")
    augmenter = Augmenter.from_pretrained("me/adapter")
    assert augmenter.revision == fingerprint(str(tmp_path / "adapter"))
    assert augmenter.generate("query", ["salt"]) == Augmenter.from_pretrained(str(tmp_path / "adapter")).generate(
        "query", ["salt"]
    )
    plain = {name: file for name, file in upload.files.items() if name not in ("coaug.json", "prompt_set.yaml")}
    commit = push(Upload("model", plain), "me/plain-adapter")
    untrained = Augmenter.from_pretrained("me/plain-adapter", PROMPT_SET, GENERATION)
    assert untrained.revision.startswith(f"{commit.oid}+")
    assert untrained.generate("query", ["salt"]) == augmenter.generate("query", ["salt"])


def test_a_model_without_settings_is_any_model_known_by_its_commit(hub, tiny_model):
    commit = push(Upload("model", {path.name: path for path in tiny_model.iterdir()}), "me/plain")
    assert policy_folder("me/plain") == "me/plain"
    augmenter = Augmenter.from_pretrained("me/plain", PROMPT_SET, GENERATION)
    assert (augmenter.revision, augmenter.settings.retriever) == (commit.oid, {})


def test_a_revision_is_a_branch_of_its_own(hub, policy, tmp_path):
    other = shutil.copytree(policy, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*", "evaluations"))
    settings = PolicySettings.load(other)
    replace(settings, generation=GenerationSettings(7, 1.0)).save(other)
    main = hub.repositories["model", "me/advice"].branches["main"]
    push(prepare(other, "me/advice"), "me/advice", revision="short")
    assert hub.repositories["model", "me/advice"].branches["main"] == main
    assert Augmenter.from_pretrained("me/advice", revision="short").settings.generation.max_new_tokens == 7
    assert Augmenter.from_pretrained("me/advice").settings.generation.max_new_tokens == 24
    with pytest.raises(InputError, match="me/index has no revision 'long'"):
        SearchIndex.load("me/index", "long")


# What does not fit


def test_search_refuses_another_retriever_and_other_prompts(hub, refused, policy, made, tmp_path):
    other = shutil.copytree(policy, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*", "evaluations"))
    settings = PolicySettings.load(policy)
    replace(settings, retriever=BM25Retriever(k1=0.9).config).save(other)
    push(prepare(other, "me/other-retriever"), "me/other-retriever")
    line = refused("search", "--index", "me/index", "--model", "me/other-retriever", "salt")
    assert "The policy me/other-retriever and the index me/index differ in their retriever" in line
    assert "k1 is 0.9 for the policy and 1.2 for the index" in line
    replace(settings, prompt_set=replace(PROMPT_SET, document="text:", query_repeats=2)).save(other)
    push(prepare(other, "me/other-prompts"), "me/other-prompts")
    line = refused("search", "--index", "me/index", "--model", "me/other-prompts", "salt")
    assert "they differ in document, query_repeats" in line


def test_names_that_are_nowhere_are_errors_in_one_line(hub, refused, beir_folder, tmp_path):
    assert "me/nothing: there is no index" in refused("search", "--index", "me/nothing", "salt")
    arguments = ["--collection", beir_folder, "--output", tmp_path / "out"]
    assert "me/nothing" in refused("augment", "--model", "me/nothing", *arguments)
    assert "me/nothing: no augmentations there" in refused("evaluate", "--augmentations", "me/nothing", *arguments)
    assert "no policy on the Hub" in refused("baselines", "--only", "trained", "--policy", "me/nothing", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_fails_is_not_a_hub_without_the_policy(hub, refused, beir_folder, tmp_path):
    hub.fail, hub.fail_with = "/coaug.json", 507
    line = refused("augment", "--model", "me/advice", "--collection", beir_folder, "--output", tmp_path / "out")
    assert "me/advice" in line and "507" in line


def test_push_says_what_it_takes(refused, policy, made, tmp_path):
    assert "there is no such folder" in refused("push", tmp_path / "none", "--repo_id", "me/x")
    assert "holds nothing to push: give the output_dir" in refused("push", tmp_path, "--repo_id", "me/x")
    assert "--repo_id is missing" in refused("push", policy)
    for name in ("x", "me/x/y", "me/a b", "me/--"):
        assert "is no USER/NAME" in refused("push", policy, "--repo_id", name)
    assert "leave --collection out" in refused("push", policy, "--repo_id", "me/x", "--collection", "y")
    assert "leave --evaluations out" in refused("push", made / "index", "--repo_id", "me/x", "--evaluations", "y")
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    line = refused("push", tmp_path / "run", "--repo_id", "me/x")
    assert f"push a checkpoint: coaug push {tmp_path / 'run' / 'checkpoint-3'}" in line
    PolicySettings(PROMPT_SET, GENERATION).save(tmp_path / "run")
    assert "holds no weights" in refused("push", tmp_path / "run", "--repo_id", "me/x")
    (tmp_path / "run" / "pytorch_model.bin").write_bytes(b"")
    assert "is a pickle, which does not go out" in refused("push", tmp_path / "run", "--repo_id", "me/x")
    write_json(
        tmp_path / "run" / "model.safetensors.index.json", {"weight_map": {"a": "model-00002-of-2.safetensors"}}
    )
    (tmp_path / "run" / "model-00001-of-2.safetensors").write_bytes(b"")
    assert "lacks model-00002-of-2.safetensors" in refused("push", tmp_path / "run", "--repo_id", "me/x")


def test_texts_go_out_with_their_own_collection_only(refused, made, tmp_path, beir_folder):
    other = shutil.copytree(beir_folder, tmp_path / "other")
    arguments = ["push", made / "augmentations", "--repo_id", "me/x", "--collection"]
    assert "belongs to the collection advice, not to other" in refused(*arguments, other)
    fewer = shutil.copytree(beir_folder, tmp_path / "fewer" / "advice")
    lines = (fewer / "corpus.jsonl").read_text().splitlines(keepends=True)
    (fewer / "corpus.jsonl").write_text("".join(lines[:-1]))
    qrels = fewer / "qrels" / "test.tsv"
    last = json.loads(lines[-1])["_id"]
    qrels.write_text("".join(line for line in qrels.read_text().splitlines(keepends=True) if last not in line))
    assert f"has document '{last}', which is not in advice (test)" in refused(*arguments, fewer)


# Pushing


def test_private_is_private_and_a_public_repository_does_not_become_it(hub, coaug, refused, policy, tmp_path):
    code, _, errors = coaug("push", policy, "--repo_id", "me/secret", "--private")
    assert code == 0, errors
    assert hub.repositories["model", "me/secret"].private
    assert "is there already and public" in refused("push", policy, "--repo_id", "me/advice", "--private")
    with reached(hub.url, tmp_path / "another", user="you"):
        assert policy_folder("me/secret") == "me/secret"
        with pytest.raises(InputError, match="me/secret"):
            Augmenter.from_pretrained("me/secret")


def test_who_may_not_push_is_told_so(hub, refused, policy, tmp_path, offline):
    assert "cannot be written to with this token" in refused("push", policy, "--repo_id", "you/advice")
    with reached(hub.url, tmp_path / "you", user="you"):
        assert "cannot be written to with this token" in refused("push", policy, "--repo_id", "me/advice")
    with reached(hub.url, tmp_path / "nobody", user=None):
        assert "hf auth login" in refused("push", policy, "--repo_id", "me/advice")
    with reached(hub.url, tmp_path / "expired"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "expired")
        assert "does not accept the token" in refused("push", policy, "--repo_id", "me/advice")
    with reached("http://127.0.0.1:9", tmp_path / "unplugged"):
        assert "the Hub was not reached" in refused("push", policy, "--repo_id", "me/advice")
    offline()
    assert "unset HF_HUB_OFFLINE" in refused("push", policy, "--repo_id", "me/advice")


@pytest.fixture
def fresh_hub(tmp_path):
    hub = Hub().start()
    with reached(hub.url, tmp_path / "cache"):
        yield hub
    hub.stop()


def test_a_push_that_failed_halfway_goes_on_without_what_has_arrived(fresh_hub, coaug, refused, policy):
    arguments = ["push", policy, "--repo_id", "me/advice"]
    fresh_hub.fail_after = 1
    line = refused(*arguments)
    assert "the Hub answers 507: the disk of the Hub is full" in line
    assert "the same command goes on" in line
    assert sorted(fresh_hub.files("me/advice")) == [".gitattributes"]  # nothing half there
    assert len(fresh_hub.uploads) == 1
    fresh_hub.fail_after, fresh_hub.fail = None, "/commit/"
    assert "the same command goes on" in refused(*arguments)
    assert len(fresh_hub.uploads) == 2
    fresh_hub.fail = None
    code, _, errors = coaug(*arguments)
    assert code == 0, errors
    assert len(fresh_hub.uploads) == len(set(fresh_hub.uploads)) == 2
    assert {"model.safetensors", "reward.png"} < fresh_hub.files("me/advice").keys()
    assert coaug(*arguments)[0] == 0  # again, with nothing to do
    assert len(fresh_hub.repositories["model", "me/advice"].messages) == 2
    assert len(fresh_hub.uploads) == 2


def test_a_dataset_that_failed_halfway_goes_on(fresh_hub, coaug, refused, made):
    arguments = ["push", made / "augmentations", "--repo_id", "me/answers"]
    fresh_hub.fail_after = 1
    assert "the same command goes on" in refused(*arguments)
    fresh_hub.fail_after = None
    code, _, errors = coaug(*arguments)
    assert code == 0, errors
    assert len(fresh_hub.uploads) == len(set(fresh_hub.uploads)) == 2
    assert datasets.load_dataset("me/answers", "queries", split="train").column_names == [
        "_id",
        "augmentation",
        "complete",
    ]


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new(hub, policy, tmp_path):
    earlier = shutil.copytree(policy, tmp_path / "earlier", ignore=shutil.ignore_patterns("checkpoint-*"))
    (earlier / "model.safetensors").rename(earlier / "model-00001-of-00001.safetensors")
    write_json(earlier / "model.safetensors.index.json", {"weight_map": {"all": "model-00001-of-00001.safetensors"}})
    push(prepare(earlier, "me/resharded"), "me/resharded")
    push(prepare(policy, "me/resharded"), "me/resharded")
    assert {name for name in hub.files("me/resharded") if "safetensors" in name} == {"model.safetensors"}
    assert Augmenter.from_pretrained("me/resharded").revision == folder_hash(policy)


def test_an_index_does_not_go_over_a_policy(hub, refused, made, policy):
    assert "me/advice holds a policy" in refused("push", made / "index", "--repo_id", "me/advice")
    assert "me/index holds an index" in refused("push", policy, "--repo_id", "me/index")


def test_a_dry_run_lists_files_and_card_and_touches_nothing(hub, coaug, policy, made, tmp_path, beir_folder):
    requests = sum(hub.requests.values())
    with reached(hub.url, tmp_path / "nobody", user=None):
        code, printed, errors = coaug("push", policy, "--repo_id", "me/dry", "--dry_run")
        assert code == 0, errors
        assert "model.safetensors" in printed and "nothing was uploaded" in printed
        assert "me/dry" in printed.split("---")[2]  # the snippet of the card
        assert "training_args.bin" not in printed and "optimizer.pt" not in printed
        arguments = ["push", made / "augmentations", "--repo_id", "me/dry", "--dry_run", "--json"]
        code, printed, errors = coaug(*arguments, "--collection", beir_folder)
        assert code == 0, errors
    assert set(json.loads(printed)["files"]) == {
        *(
            "README.md",
            "manifest.json",
            "prompt_set.yaml",
            "queries/train-00000-of-00001.parquet",
            "documents/train-00000-of-00001.parquet",
        )
    }
    assert sum(hub.requests.values()) == requests


def test_an_encoder_that_is_a_folder_is_named_without_its_path(policy, tmp_path):
    folder = shutil.copytree(policy, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "evaluations"))
    retriever = {"retriever": "dense", "model": "/home/someone/encoders/small", "weights": "0123"}
    PolicySettings(PromptSet.default("dense"), GENERATION, retriever).save(folder)
    upload = prepare(folder, "me/dense")
    assert json.loads(upload.files["coaug.json"])["retriever"] == retriever | {"model": "small"}
    assert any("encoder is /home/someone/encoders/small, a folder of this machine" in line for line in upload.notes)


def test_a_copy_of_an_encoder_is_the_same_retriever(tmp_path):
    ours = {"retriever": "dense", "model": "small", "weights": "0123", "query_prompt": ""}
    assert retriever_differences(ours | {"model": "/models/small"}, ours) == []
    assert retriever_differences(ours | {"model": "/models/small", "weights": "4567"}, ours) == ["model", "weights"]
    assert retriever_differences(ours | {"query_prompt": "query: "}, ours) == ["query_prompt"]
    assert retriever_differences({"retriever": "bm25", "k1": 1.2}, {"retriever": "bm25", "k1": 0.9}) == ["k1"]


def test_only_files_of_known_names_go_out(policy, tmp_path):
    folder = shutil.copytree(policy, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    others = ("embeddings.safetensors", "mine.model", "report.html.jinja", "mine.safetensors.index.json", "notes.json")
    for name in others:
        (folder / name).write_bytes(b"{}")
    assert prepare(folder, "me/x").files.keys() == prepare(policy, "me/x").files.keys()
    assert folder_hash(folder) == folder_hash(policy)


def test_rollouts_of_a_checkpoint_are_no_weights(policy, tmp_path):
    folder = shutil.copytree(policy, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copyfile(folder / "model.safetensors", folder / "rollouts_0.safetensors")
    assert folder_hash(folder) == folder_hash(policy)
    assert "rollouts_0.safetensors" not in prepare(folder, "me/x").files


def test_a_space_is_written_and_pushed(hub, coaug, made, tmp_path):
    space = tmp_path / "space"
    code, printed, errors = coaug("push", made / "index", "--space", space)
    assert code == 0, errors
    assert f"python {space / 'app.py'}" in printed
    code, _, errors = coaug("push", made / "index", "--space", space, "--repo_id", "me/space")
    assert code == 0, errors
    written = {path.relative_to(space).as_posix(): path.read_bytes() for path in space.rglob("*") if path.is_file()}
    assert written == {name: file for name, file in hub.files("me/space", "space").items() if name != ".gitattributes"}
    code, _, errors = coaug("push", "me/index", "--space", space, "--repo_id", "me/space")
    assert code == 0, errors
    assert not any(name.startswith("index/") for name in hub.files("me/space", "space"))


OLD_APP = "from pathlib import Path\n\nfrom coaug_trl.demo import Demo, JudgedQueries\n"  # of version 0.1


@pytest.mark.parametrize("app, replaced", [(OLD_APP, True), ("import gradio\n", False)])
def test_a_space_of_the_old_form_is_replaced_and_another_app_is_not(hub, coaug, made, tmp_path, app, replaced):
    repo_id = f"me/{'old' if replaced else 'other'}"
    huggingface_hub.HfApi().create_repo(repo_id, repo_type="space", space_sdk="gradio")
    old = {"app.py": app, "requirements.txt": "gradio", "coaug_trl/__init__.py": "", "coaug_trl/demo.py": ""}
    for name, content in old.items():
        huggingface_hub.HfApi().upload_file(
            path_or_fileobj=content.encode(), path_in_repo=name, repo_id=repo_id, repo_type="space"
        )
    code, _, errors = coaug("push", made / "index", "--space", tmp_path / "space", "--repo_id", repo_id)
    files = hub.files(repo_id, "space")
    if replaced:
        assert code == 0, errors
        assert not any(name.startswith("coaug_trl/") for name in files)
    else:
        assert code != 0 and "another app" in errors
        assert files["app.py"] == app.encode()


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ({"a": ["../../x", "./y/", "file:///a/b"], "b": "org/a/b"}, {"a": ["x", "y", "b"], "b": "org/a/b"}),
        ({"model": "runs/mine", "model_is_folder": True}, {"model": "mine", "model_is_folder": True}),
        ({"model": "runs/a/mine"}, {"model": "mine"}),
        ({"model": "org/name", "collection": "irds:beir/nfcorpus/test"}, None),
        ({"a": "/home/me/model", "b": ["~/x/y", "C:\\models\\z"]}, {"a": "model", "b": ["y", "z"]}),
        ({"tokenizer_file": "/a/tokenizer.json"}, {"tokenizer_file": "tokenizer.json"}),
        ({"pad_token": "/a/b", "added_tokens_decoder": {"1": {"content": "/c"}}}, None),
        ({"a": "org/name", "b": "1/2", "c": "/", "d": "https://a/b", "e": "see\n/etc/hosts", "f": 1.5}, None),
    ],
)
def test_paths_are_told_from_other_strings(content, left):
    assert without_folders(content) == (left or content)


# What would mix


def test_fewer_sides_leave_nothing_of_the_others(hub, made, tmp_path):
    push(prepare(made / "augmentations", "me/sides"), "me/sides")
    fewer = shutil.copytree(made / "augmentations", tmp_path / "fewer", ignore=shutil.ignore_patterns("*.shards"))
    manifest = json.loads((fewer / "manifest.json").read_text())
    del manifest["sides"]["query"]
    write_json(fewer / "manifest.json", manifest)
    push(prepare(fewer, "me/sides"), "me/sides")
    assert not any(name.startswith("queries/") for name in hub.files("me/sides", "dataset"))
    assert datasets.get_dataset_config_names("me/sides") == ["documents"]
    assert AugmentedCollection.load("me/sides").answers.keys() == {"document"}
    (fewer / "documents.jsonl").unlink()
    with pytest.raises(InputError, match=r"documents\.jsonl is missing there"):
        AugmentedCollection.load(fewer)


def test_an_interrupted_push_of_a_dataset_changes_nothing(fresh_hub, made, tmp_path):
    push(prepare(made / "augmentations", "me/answers"), "me/answers")
    before = fresh_hub.files("me/answers", "dataset")
    other = shutil.copytree(made / "augmentations", tmp_path / "other")
    for name in ("queries.jsonl", "documents.jsonl"):
        lines = [json.dumps(row | {"augmentation": "new"}) + "\n" for row in rows(other / name)]
        (other / name).write_text("".join(lines))
    fresh_hub.fail_after = len(fresh_hub.uploads) + 1
    with pytest.raises(InputError, match="goes on"):
        push(prepare(other, "me/answers"), "me/answers")
    assert fresh_hub.files("me/answers", "dataset") == before
    fresh_hub.fail_after = None
    push(prepare(other, "me/answers"), "me/answers")
    assert set(datasets.load_dataset("me/answers", "queries", split="train")["augmentation"]) == {"new"}


def test_files_of_an_earlier_run_go(hub, policy, made, tmp_path):
    push(prepare(policy, "me/again", [made / "elsewhere"]), "me/again")
    left_out = ("checkpoint-*", "evaluations", "chat_template.jinja", "trainer_state.json")
    other = shutil.copytree(policy, tmp_path / "other", ignore=shutil.ignore_patterns(*left_out))
    upload = prepare(other, "me/again")
    push(upload, "me/again")
    assert set(hub.files("me/again")) == {".gitattributes", "README.md", *upload.files}


def test_what_someone_else_put_there_is_not_overwritten(hub, policy, made):
    card = b"---\nlicense: mit\n---\nMine."
    theirs = {"README.md": card, "pytorch_model.bin": b"0", "config.json": b"{}"}
    push(Upload("model", theirs), "me/bert")
    with pytest.raises(InputError, match=r"me/bert holds config\.json, which no coaug push put there"):
        push(prepare(policy, "me/bert"), "me/bert")
    push(Upload("dataset", {"README.md": card, "data.csv": b"a\n"}), "me/csv")
    with pytest.raises(InputError, match=r"me/csv holds data\.csv"):
        push(prepare(made / "augmentations", "me/csv"), "me/csv")
    huggingface_hub.HfApi().create_repo("me/empty")
    assert push(prepare(policy, "me/empty"), "me/empty").oid


def test_a_flat_index_replaces_one_of_two_fields(hub, coaug, made, beir_folder, tmp_path):
    index = ["index", "--collection", beir_folder, "--output", tmp_path / "best", "--fields", "best"]
    assert coaug(*index)[0] == 0
    push(prepare(tmp_path / "best", "me/fields"), "me/fields")
    assert any(name.startswith("field_1/") for name in hub.files("me/fields"))
    push(prepare(made / "index", "me/fields"), "me/fields")
    assert set(hub.files("me/fields")) - {"README.md"} == set(hub.files("me/index")) - {"README.md"}


def test_a_folder_wins_over_a_repository_of_its_name(hub, policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(policy, tmp_path / "me" / "advice", ignore=shutil.ignore_patterns("checkpoint-*", "evaluations"))
    settings = PolicySettings.load("me/advice")
    replace(settings, generation=GenerationSettings(7, 1.0)).save("me/advice")
    assert policy_folder("me/advice") == "me/advice"
    assert Augmenter.from_pretrained("me/advice").settings.generation.max_new_tokens == 7


def test_a_space_is_pushed_without_what_else_lies_there(hub, coaug, made, beir_folder, tmp_path):
    space = tmp_path / "space"
    arguments = ["push", made / "index", "--space", space, "--repo_id", "me/judged"]
    assert coaug(*arguments, "--collection", beir_folder)[0] == 0
    assert "queries.jsonl" in hub.files("me/judged", "space")
    for name in (".venv/pyvenv.cfg", ".gradio/log.csv", "notes.txt", ".git/config"):
        (space / name).parent.mkdir(exist_ok=True)
        (space / name).write_text("secret")
    code, _, errors = coaug(*arguments)
    assert code == 0, errors
    files = hub.files("me/judged", "space")
    assert not {"notes.txt", ".venv/pyvenv.cfg", ".gradio/log.csv", ".git/config"} & files.keys()
    assert not {"queries.jsonl", "qrels.trec"} & files.keys()  # of the push before
    _, printed, _ = coaug(*arguments, "--dry_run", "--json")
    assert set(json.loads(printed)["files"]) | {".gitattributes"} == set(files)


# Names, and where they lead


@pytest.mark.parametrize("name", ["me/a--b", "é/ü", "me/x.", "me/x/", "me/a b", "x/y/z"])
def test_names_that_no_repository_has_end_in_one_line(hub, refused, beir_folder, tmp_path, name):
    arguments = ["--collection", beir_folder, "--output", tmp_path / "out"]
    assert name.rstrip("/") in refused("augment", "--model", name, *arguments)
    assert "there is no index" in refused("search", "--index", name, "salt")
    assert "no augmentations there" in refused("evaluate", "--augmentations", name, *arguments)


def test_a_connection_that_drops_is_told_in_one_line(hub, refused, beir_folder, tmp_path, monkeypatch):
    def drop(self):
        self.close_connection = True  # without an answer

    for method in ("do_GET", "do_HEAD"):
        monkeypatch.setattr(hub_server._Handler, method, drop)
    arguments = ["--collection", beir_folder, "--output", tmp_path / "out"]
    line = refused("augment", "--model", "me/advice", *arguments)
    assert "me/advice cannot be read: the Hub was not reached" in line


def test_relative_folders_are_no_names_of_the_hub(hub, coaug, policy, beir_folder, tmp_path, monkeypatch):
    """`runs/untrained` reads like a repository, and would be a link to someone else's."""
    ignored = shutil.ignore_patterns("checkpoint-*", "evaluations")
    shutil.copytree(policy, tmp_path / "runs" / "untrained", ignore=ignored)
    monkeypatch.chdir(tmp_path)
    collection = ["--collection", beir_folder]
    assert coaug("augment", "--model", "runs/untrained", *collection, "--output", "added")[0] == 0
    assert coaug("index", *collection, "--augmentations", "added", "--output", "index")[0] == 0
    shutil.rmtree("runs")
    for folder in ("added", "index"):
        upload = prepare(folder, "me/x")
        assert b"runs/untrained" not in upload.files["manifest.json"]
        assert "runs/untrained" not in str(upload.card) and "`untrained`" in str(upload.card)


def test_a_client_error_is_not_to_be_tried_again(fresh_hub, refused, policy):
    fresh_hub.fail, fresh_hub.fail_with = "/preupload/", 400
    line = refused("push", policy, "--repo_id", "me/advice")
    assert "the Hub answers 400" in line and "goes on" not in line
    fresh_hub.fail = None
    line = refused("push", policy, "--repo_id", "me/advice", "--revision", "a b")
    assert "Invalid reference name" in line and "goes on" not in line


def test_damaged_tables_are_refused(hub, refused, made, beir_folder, tmp_path):
    upload = prepare(made / "augmentations", "me/damaged")
    ids = [row["_id"] for row in rows(made / "augmentations" / "queries.jsonl")]
    for columns in ({"_id": ids}, {"_id": ids, "augmentation": [7] * len(ids), "complete": [True] * len(ids)}):
        table = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), table)
        place = "queries/train-00000-of-00001.parquet"
        push(replace(upload, files=upload.files | {place: table.getvalue()}), "me/damaged")
        arguments = ["--collection", beir_folder, "--augmentations", "me/damaged", "--output", tmp_path / "out"]
        assert "not rows of _id, augmentation, complete" in refused("evaluate", *arguments)


# Adapters


def test_an_adapter_is_known_with_its_base_model(hub, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    PolicySettings(PROMPT_SET, GENERATION, BM25Retriever().config).save(adapter)
    before = fingerprint(str(adapter))
    assert before == f"{folder_hash(adapter)}+{folder_hash(base)}"
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.5)
    other.save_pretrained(base)
    assert fingerprint(str(adapter)) != before
    # Its own part does not change with where the base lies.
    push(prepare(adapter, "me/lora"), "me/lora")
    assert folder_hash(policy_of(hub, "me/lora", tmp_path)) == folder_hash(adapter)
    commit = push(Upload("model", {path.name: path for path in tiny_model.iterdir()}), "me/lora-base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": "me/lora-base"})
    assert fingerprint(str(adapter)) == f"{folder_hash(adapter)}+{commit.oid}"
    assert before.startswith(folder_hash(adapter))


# Licence


def test_the_licence_of_a_base_model_on_the_hub_is_kept(hub, tiny_model):
    card = b"---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n"
    push(Upload("model", {"config.json": tiny_model / "config.json", "README.md": card}), "me/licensed")
    assert license_of("me/licensed") == {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "LICENSE",
    }
    assert license_of("me/nowhere") == license_of(str(tiny_model)) == license_of(None) == {}


# The trainer


def make_trainer(output_dir, collection, tiny_model):
    args = CoAugConfig(
        output_dir=str(output_dir),
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_private_repo=True,
        groups_per_batch=2,
        group_size=4,
        num_relevant=2,
        num_generations=2,
        updates_per_batch=1,
        per_device_train_batch_size=16,
        max_completion_length=8,
        max_steps=1,
        logging_steps=1,
        save_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return CoAugTrainer(str(tiny_model), args, collection, BM25Retriever(), PROMPT_SET, card_writer=write_run_card)


def test_the_trainer_pushes_what_the_command_would(hub, collection, tiny_model, tmp_path):
    trainer = make_trainer(tmp_path / "run", collection, tiny_model)
    trainer.train()
    repository = hub.repositories["model", "me/trained"]
    assert repository.private
    assert repository.messages == ["initial commit"]
    commit = trainer.push_to_hub(tags=["knees"])
    assert commit.oid == repository.branches["main"]
    assert repository.messages[1:] == ["End of training"]
    assert not any("optimizer" in name or name.endswith(".bin") for name in hub.files("me/trained"))
    files = hub.files("me/trained")
    upload = prepare(tmp_path / "run", "me/trained")
    assert set(files) == {".gitattributes", "README.md", *upload.files}
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert "knees" in card.data.tags
    assert card.text == upload.card.text
    assert Augmenter.from_pretrained("me/trained").revision == folder_hash(tmp_path / "run")


def test_a_hub_that_fails_does_not_end_a_training(fresh_hub, collection, tiny_model, tmp_path):
    trainer = make_trainer(tmp_path / "run", collection, tiny_model)
    fresh_hub.fail = "/commit/"
    trainer.train()
    trainer.save_model(_internal_call=True)
    with pytest.raises(InputError, match=r"not pushed; coaug push .*run --repo_id me/trained goes on\. .* 507"):
        push_run(trainer)
    fresh_hub.fail = None
    assert push(prepare(tmp_path / "run", "me/trained"), "me/trained").oid


def test_a_private_run_does_not_begin_with_a_public_repository(fresh_hub):
    huggingface_hub.HfApi().create_repo("me/trained", private=False)
    with pytest.raises(InputError, match="me/trained is there already and public"):
        reserve("me/trained", private=True)


def test_a_run_that_could_not_be_pushed_does_not_begin(hub, tmp_path):
    with reached(hub.url, tmp_path / "nobody", user=None), pytest.raises(InputError, match="hf auth login"):
        reserve("me/trained", private=None)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushing_while_training_is_refused(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"hub_strategy is '{strategy}'.* set hub_strategy to 'end'"):
        CoAugConfig(str(tmp_path / "run"), push_to_hub=True, hub_strategy=strategy, use_cpu=True, bf16=False)


# As it is started


def test_the_command_speaks_to_the_hub_that_the_environment_names(fresh_hub, policy):
    environment = os.environ | {"HF_ENDPOINT": fresh_hub.url, "HF_TOKEN": "token-me", "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-m", "coaug_trl.cli.main", "push", policy, "--repo_id", "me/advice", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"{fresh_hub.url}/me/advice" in done.stdout
    assert "note:" in done.stderr or done.stderr == ""
    assert "model.safetensors" in fresh_hub.files("me/advice")
