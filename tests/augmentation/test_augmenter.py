import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from coaug_trl import Augmenter, BM25Retriever, Collection, Document, InputError, PromptSet
from coaug_trl.augmentation import side as augment
from coaug_trl.augmentation.augmenter import Augmentation
from coaug_trl.augmentation.engines.base import Completion
from coaug_trl.augmentation.engines.transformers import TransformersEngine
from coaug_trl.augmentation.folder import AugmentedCollection, side_texts
from coaug_trl.augmentation.side import AnsweredSide
from coaug_trl.policy.fingerprint import folder_hash
from coaug_trl.policy.prompts import extract_answer
from coaug_trl.policy.settings import GenerationSettings, PolicySettings


PROMPT_SET = PromptSet("sparse", "query:", "document:")
GENERATION = GenerationSettings(max_new_tokens=24, repetition_penalty=1.2)
ANSWER_FILES = ("queries.jsonl", "documents.jsonl")
ROOT = Path(__file__).parents[2]
CPU_2 = "recipes/accelerate_configs/cpu-2.yaml"


@pytest.fixture(scope="module")
def small(collection):
    """The dev split's 8 queries, and 12 of the documents."""
    return replace(collection.with_split("dev"), corpus=dict(list(collection.corpus.items())[:12]))


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


class CountingEngine(TransformersEngine):
    """Keeps the prompts it generates for, and can be interrupted before some of them as Ctrl-C interrupts."""

    interrupt_at = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generated = []

    def _start(self, prompts):
        if self.interrupt_at is not None and len(self.generated) >= self.interrupt_at:
            raise KeyboardInterrupt
        self.generated += self.tokenizer.batch_decode([ids for _, ids in prompts])
        return super()._start(prompts)


@pytest.fixture
def make_augmenter(model, tokenizer):
    def make(prompt_set=PROMPT_SET, generation=GENERATION, **kwargs):
        kwargs = {"batch_size": 5, "name": "tiny", "revision": "1"} | kwargs
        engine = CountingEngine(model, tokenizer, kwargs["batch_size"])
        return Augmenter(engine, tokenizer, PolicySettings(prompt_set, generation), **kwargs)

    return make


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def folder_content(folder):
    """
    Of the files that are read; shards differ by how the work was cut up, and a kill may leave a file under its
    temporary name. No work takes the same time twice.
    """
    paths = [path for path in Path(folder).iterdir() if path.is_file() and path.suffix != ".tmp"]
    return {path.name: re.sub(rb'"seconds": [\d.]+', b"", path.read_bytes()) for path in paths}


def user_text(prompt):
    return re.search(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant", prompt, re.DOTALL).group(1)


# Generation


def answer_alone(model, tokenizer, side, text):
    """Plain greedy generation for one text, without any batch."""
    messages = [{"role": "system", "content": f"{side}:"}, {"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, repetition_penalty=1.2
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("side", ["query", "document"])
def test_a_batch_of_different_lengths_gets_the_answers_each_text_gets_alone(
    make_augmenter, model, tokenizer, small, side
):
    texts = [text for each in ("query", "document") for _, text in side_texts(small, each)]
    texts[3] += " " + " ".join(texts)
    assert len({len(tokenizer(text).input_ids) for text in texts}) > 5
    alone = [answer_alone(model, tokenizer, side, text) for text in texts]
    assert len({extract_answer(completion) for completion in alone}) > 3
    augmentations = make_augmenter(batch_size=20).generate(side, texts)
    assert [augmentation.answer for augmentation in augmentations] == [extract_answer(text) for text in alone]
    assert [augmentation.complete for augmentation in augmentations] == ["</answer>" in text for text in alone]


def test_the_repetition_penalty_does_not_read_the_padding(model, tiny_model, small):
    # Many models are padded with a token that they also write; here it is the first visible one of the answers.
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    augmenter = Augmenter(model, tokenizer, PolicySettings(PROMPT_SET, GenerationSettings(24, 20.0)))
    texts = [*small.queries.values(), "a much longer text " * 20]
    completion = answer_alone(model, tokenizer, "query", texts[0])
    written = tokenizer.tokenize(completion)
    assert written[0] == "<answer>"
    tokenizer.pad_token = next(token for token in written[1:] if token != "Ġ")
    assert augmenter.generate("query", texts) == [augmenter.generate("query", [text])[0] for text in texts]


def test_the_models_own_sampling_settings_do_not_matter(make_augmenter, model, small):
    texts = list(small.queries.values())[:4]
    greedy = make_augmenter().generate("query", texts)
    before = model.generation_config.to_dict()
    try:
        model.generation_config.update(do_sample=True, temperature=3.0, top_k=5, top_p=0.5, num_beams=3)
        assert make_augmenter().generate("query", texts) == greedy
    finally:
        model.generation_config.update(**before)


def test_an_answer_ends_at_the_longest_length(make_augmenter, small):
    texts = list(small.queries.values())
    assert any(augmentation.complete for augmentation in make_augmenter().generate("query", texts))
    # The second token may already close an answer.
    cut_off = make_augmenter(generation=GenerationSettings(max_new_tokens=1)).generate("query", texts)
    assert cut_off == [Augmentation("", complete=False)] * len(texts)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>a</answer>", Augmentation("a", True)),
        ("<answer></answer>", Augmentation("", True)),
        ("<answer>a", Augmentation("", False)),
        ("</answer>a<answer>", Augmentation("", False)),
        ("<answer>a</answer> <answer>b", Augmentation("a", True)),
    ],
)
def test_an_answer_is_complete_if_its_tags_are(make_augmenter, completion, expected):
    augmenter = make_augmenter()
    augmenter.engine.complete = lambda prompts, *args: ((tag, Completion(completion, 1)) for tag, _ in prompts)
    assert augmenter.generate("query", ["text"]) == [expected]


def test_the_prompt_of_each_side_is_used(make_augmenter):
    augmenter = make_augmenter()
    augmenter.generate("query", ["salt"])
    augmenter.generate("document", ["salt"])
    assert augmenter.engine.generated == [
        f"<|im_start|>system\n{side}:<|im_end|>\n<|im_start|>user\nsalt<|im_end|>\n<|im_start|>assistant\n"
        for side in ("query", "document")
    ]


def test_long_documents_are_cut_before_the_model_reads_them_and_queries_are_not(make_augmenter, tokenizer):
    augmenter = make_augmenter(prompt_set=replace(PROMPT_SET, max_document_tokens=4))
    long, short = "wheat bread and stomach pain", "salt"
    assert [each.truncated for each in augmenter.generate("document", [long, short])] == [True, False]
    assert [each.truncated for each in augmenter.generate("query", [long])] == [False]
    # the longest prompt of a call is first
    read = [user_text(prompt) for prompt in augmenter.engine.generated]
    assert len(tokenizer(read[0], add_special_tokens=False).input_ids) == 4
    assert long.startswith(read[0])
    assert read[1:] == [short, long]


def test_a_model_without_a_chat_template_reads_plain_text(model, tiny_model, small):
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    augmenter = Augmenter(CountingEngine(model, plain), plain, PolicySettings(PROMPT_SET, GENERATION), name="tiny")
    assert len(augmenter.generate("query", list(small.queries.values()))) == len(small.queries)
    assert set(augmenter.engine.generated) == {f"query:\n\n{text}\n\n" for text in small.queries.values()}


def test_sizes_that_cannot_work_are_refused(make_augmenter):
    with pytest.raises(InputError, match="batch_size is 0; use at least 1"):
        make_augmenter(batch_size=0)
    with pytest.raises(InputError, match="max_new_tokens is 0; use at least 1"):
        GenerationSettings(max_new_tokens=0)
    with pytest.raises(InputError, match="repetition_penalty is 0.0; use a positive number"):
        GenerationSettings(repetition_penalty=0.0)


# A collection into a folder


def test_the_folder_holds_a_row_for_each_text_in_the_collections_order(make_augmenter, small, tmp_path):
    augmenter = make_augmenter()
    augmenter.augment_collection(small, tmp_path)
    for side, name in zip(("query", "document"), ANSWER_FILES, strict=True):
        texts = dict(side_texts(small, side))
        rows = read_rows(tmp_path / name)
        assert [list(row) for row in rows] == [["_id", "augmentation", "complete"]] * len(texts)
        assert [row["_id"] for row in rows] == list(texts)
        alone = make_augmenter(batch_size=1).generate(side, list(texts.values()))
        assert [row["augmentation"] for row in rows] == [augmentation.answer for augmentation in alone]
        assert [row["complete"] for row in rows] == [augmentation.complete for augmentation in alone]
    assert PromptSet.load(tmp_path) == PROMPT_SET


def test_the_manifest_says_where_the_answers_come_from(make_augmenter, small, tmp_path):
    prompt_set = replace(PROMPT_SET, max_document_tokens=16)
    augmenter = make_augmenter(prompt_set)
    manifest = augmenter.augment_collection(small, tmp_path)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"] == "tiny"
    assert manifest["revision"] == "1"
    assert manifest["prompt_hash"] == prompt_set.hash
    assert manifest["generation"] == {"max_new_tokens": 24, "repetition_penalty": 1.2}
    assert manifest["collection"] == "advice"
    assert {"coaug-trl", "transformers", "torch"} <= set(manifest["versions"])
    queries, documents = (read_rows(tmp_path / name) for name in ANSWER_FILES)
    costs = {side: counts.pop("cost") for side, counts in manifest["sides"].items()}
    assert all(costs[side]["tokens"] == augmenter.throughput[side].tokens > 0 for side in costs)
    assert manifest["sides"]["query"] == {
        "texts": 8,
        "empty": sum(row["augmentation"] == "" for row in queries),
        "incomplete": sum(not row["complete"] for row in queries),
        "truncated": 0,
        "splits": ["dev"],
    }
    _, num_cut = prompt_set.truncate([text for _, text in side_texts(small, "document")], make_augmenter().tokenizer)
    assert 0 < num_cut < 12
    assert manifest["sides"]["document"] == {
        "texts": 12,
        "empty": sum(row["augmentation"] == "" for row in documents),
        "incomplete": sum(not row["complete"] for row in documents),
        "truncated": num_cut,
    }


def test_one_side_can_be_augmented_and_the_other_later(make_augmenter, small, tmp_path):
    assert list(make_augmenter().augment_collection(small, tmp_path, ["query"])["sides"]) == ["query"]
    assert not (tmp_path / "documents.jsonl").exists()
    later = make_augmenter()
    assert set(later.augment_collection(small, tmp_path, ["document"])["sides"]) == {"query", "document"}
    assert len(later.engine.generated) == 12


@pytest.mark.parametrize("interrupt_at", [0, 5, 8, 13, 18])
def test_interrupted_work_is_taken_up_where_it_stopped(make_augmenter, small, tmp_path, interrupt_at):
    prompt_set = replace(PROMPT_SET, max_document_tokens=16)
    whole = make_augmenter(prompt_set)
    whole.augment_collection(small, tmp_path / "whole")

    interrupted = make_augmenter(prompt_set)
    interrupted.engine.interrupt_at = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        interrupted.augment_collection(small, tmp_path / "resumed")
    with pytest.raises(InputError, match="coaug augment"):
        AugmentedCollection.load(tmp_path / "resumed")

    resumed = make_augmenter(prompt_set)
    resumed.augment_collection(small, tmp_path / "resumed")
    assert len(interrupted.engine.generated) >= interrupt_at
    generated = Counter(interrupted.engine.generated + resumed.engine.generated)
    assert not Counter(whole.engine.generated) - generated
    # again only what was being written
    assert (generated - Counter(whole.engine.generated)).total() <= interrupted.engine.width
    assert folder_content(tmp_path / "resumed") == folder_content(tmp_path / "whole")


def test_the_manifest_counts_what_all_answers_cost_also_over_an_interruption(make_augmenter, small, tmp_path):
    interrupted, resumed = make_augmenter(), make_augmenter()
    interrupted.engine.interrupt_at = 7
    with pytest.raises(KeyboardInterrupt):
        interrupted.augment_collection(small, tmp_path, ["document"])
    manifest = resumed.augment_collection(small, tmp_path, ["document"])
    whole = make_augmenter()
    whole.augment_collection(small, tmp_path / "whole", ["document"])
    cost = manifest["sides"]["document"]["cost"]
    assert cost["tokens"] == whole.throughput["document"].tokens > resumed.throughput["document"].tokens
    assert cost["seconds"] >= 0
    # an earlier version did not write it down
    (shard, *_) = (tmp_path / "documents.shards").iterdir()
    rows = read_rows(shard)
    shard.unlink()
    content = "".join(
        json.dumps({k: v for k, v in row.items() if k not in ("tokens", "seconds")}) + "\n" for row in rows
    )
    (shard.parent / f"{hashlib.sha256(content.encode()).hexdigest()}.jsonl").write_text(content)
    assert "cost" not in resumed.augment_collection(small, tmp_path, ["document"])["sides"]["document"]


def test_a_second_call_changes_nothing(make_augmenter, small, tmp_path):
    prompt_set = replace(PROMPT_SET, max_document_tokens=16)
    first = make_augmenter(prompt_set).augment_collection(small, tmp_path)
    before = folder_content(tmp_path)
    again = make_augmenter(prompt_set)
    assert again.augment_collection(small, tmp_path) == first  # its cost, too
    assert again.engine.generated == []
    assert folder_content(tmp_path) == before


def test_only_changed_and_new_texts_are_augmented_again(make_augmenter, small, tmp_path):
    make_augmenter().augment_collection(small, tmp_path)
    ids = list(small.corpus)
    corpus = {id_: small.corpus[id_] for id_ in ids[1:]}
    corpus[ids[4]] = replace(corpus[ids[4]], text="Rewritten: salty snacks and brittle bones.")
    corpus["new"] = Document("new", "", "Birch trees and sneezing fits.")
    changed = replace(small, corpus=corpus)

    augmenter = make_augmenter()
    augmenter.augment_collection(changed, tmp_path)
    assert sorted(map(user_text, augmenter.engine.generated)) == [
        "Birch trees and sneezing fits.",
        "On statins\nRewritten: salty snacks and brittle bones.",
    ]
    make_augmenter().augment_collection(changed, tmp_path / "fresh")
    assert read_rows(tmp_path / "documents.jsonl") == read_rows(tmp_path / "fresh" / "documents.jsonl")


def test_queries_of_several_splits_share_a_folder(make_augmenter, collection, small, tmp_path):
    test_split = replace(collection.with_split("test"), corpus=small.corpus)
    make_augmenter().augment_collection(small, tmp_path, ["query"])
    manifest = make_augmenter().augment_collection(test_split, tmp_path, ["query"])
    assert manifest["sides"]["query"]["splits"] == ["dev", "test"]
    augmented = AugmentedCollection.load(tmp_path)
    assert list(augmented.queries(small)) == list(small.qrels)
    assert list(augmented.queries(test_split)) == list(test_split.qrels)
    again = make_augmenter()
    again.augment_collection(small, tmp_path, ["query"])
    assert again.engine.generated == []


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"revision": "2"}, "revision '1', and these would have '2'"),
        ({"prompt_set": replace(PROMPT_SET, query="question:")}, f"prompt_hash '{PROMPT_SET.hash}'"),
        ({"generation": GenerationSettings(30, 1.2)}, "'max_new_tokens': 30"),
        ({"generation": GenerationSettings(24, 1.1)}, "'repetition_penalty': 1.1"),
    ],
)
def test_a_folder_does_not_take_answers_of_another_making(make_augmenter, small, tmp_path, other, named):
    make_augmenter().augment_collection(small, tmp_path, ["query"])
    before = folder_content(tmp_path)
    with pytest.raises(InputError) as error:
        make_augmenter(**other).augment_collection(small, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert named in str(error.value)
    assert "choose another folder" in str(error.value)
    assert folder_content(tmp_path) == before


def test_a_model_is_known_by_its_weights_under_whatever_name(make_augmenter, small, tmp_path):
    first = make_augmenter().augment_collection(small, tmp_path, ["query"])
    moved = make_augmenter(name="user/another")
    second = moved.augment_collection(small, tmp_path)
    assert len(moved.engine.generated) == len(small.corpus)  # the queries had been augmented
    assert second["model"] == first["model"] == "tiny"
    assert second["sides"]["query"] == first["sides"]["query"]


def test_without_a_revision_a_model_is_known_by_its_name(make_augmenter, small, tmp_path):
    make_augmenter(revision=None).augment_collection(small, tmp_path, ["query"])
    with pytest.raises(InputError, match="model 'tiny', and these would have 'another'"):
        make_augmenter(name="another", revision=None).augment_collection(small, tmp_path)


def test_a_folder_does_not_take_another_collection(make_augmenter, small, tmp_path):
    make_augmenter().augment_collection(small, tmp_path, ["query"])
    with pytest.raises(InputError, match="collection 'advice', and these would have 'other'"):
        make_augmenter().augment_collection(replace(small, name="other"), tmp_path)


# A trained policy


@pytest.fixture
def policy(tiny_model, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_model, folder)
    PolicySettings(PROMPT_SET, GENERATION, BM25Retriever(k1=0.9).config).save(folder)
    return folder


def test_a_policy_brings_its_settings(policy, small, tmp_path):
    augmenter = Augmenter.from_pretrained(str(policy))
    assert augmenter.settings == PolicySettings(PROMPT_SET, GENERATION, BM25Retriever(k1=0.9).config)
    manifest = augmenter.augment_collection(small, tmp_path / "augmented", ["query"])
    assert manifest["model"] == str(policy)
    assert manifest["retriever"] == {
        "retriever": "bm25",
        "k1": 0.9,
        "b": 0.75,
        "language": "english",
        "fields": "flat",
    }
    # the same settings, given, are no contradiction
    assert Augmenter.from_pretrained(str(policy), PROMPT_SET, GENERATION).settings == augmenter.settings


def test_settings_that_contradict_a_policys_are_refused(policy):
    with pytest.raises(
        InputError,
        match=f"trained with the prompt set {PROMPT_SET.hash}, not .*differ in query, .*leave the prompt set out",
    ):
        Augmenter.from_pretrained(str(policy), prompt_set=PromptSet.default())
    with pytest.raises(
        InputError, match="max_new_tokens=24.*not.*max_new_tokens=99.*leave the generation settings out"
    ):
        Augmenter.from_pretrained(str(policy), generation=GenerationSettings(max_new_tokens=99))


def test_a_retriever_that_is_not_the_policys_is_refused(refused, coaug, policy, beir_folder, tmp_path):
    arguments = ["augment", "--model", policy, "--collection", beir_folder, "--output", tmp_path / "out"]
    assert f"--retriever is dense, and {policy} is a policy for bm25" in refused(*arguments, "--retriever", "dense")
    assert not (tmp_path / "out").exists()
    assert coaug(*arguments, "--retriever", "bm25", "--side", "query")[0] == 0


def test_a_model_not_trained_here_takes_the_given_settings_or_the_packages(tiny_model):
    assert PolicySettings.load(tiny_model) is None
    settings = Augmenter.from_pretrained(str(tiny_model)).settings
    assert settings == PolicySettings(PromptSet.default("sparse"), GenerationSettings(512, 1.2), {})
    given = Augmenter.from_pretrained(str(tiny_model), PROMPT_SET, GENERATION).settings
    assert given == PolicySettings(PROMPT_SET, GENERATION, {})


def test_the_revision_of_a_folder_changes_with_its_weights(policy, model):
    before = Augmenter.from_pretrained(str(policy)).revision
    assert Augmenter.from_pretrained(str(policy)).revision == before
    changed = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    changed.save_pretrained(policy)
    assert Augmenter.from_pretrained(str(policy)).revision != before


def test_the_revision_of_an_adapter_does_not_change_with_the_order_of_its_modules(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    revisions = set()
    for modules in (["q_proj", "v_proj"], ["v_proj", "q_proj"]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "target_modules": modules}))
        revisions.add(folder_hash(tmp_path))
    assert len(revisions) == 1
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "target_modules": modules}))
    assert folder_hash(tmp_path) not in revisions


def test_a_policys_modified_prompt_set_is_detected(policy):
    path = policy / "prompt_set.yaml"
    path.write_text(
        path.read_text(encoding="utf-8").replace("query: 'query:'", "query: 'question:'"), encoding="utf-8"
    )
    with pytest.raises(InputError, match=f"prompt_set.yaml has the hash .*trained with {PROMPT_SET.hash}"):
        PolicySettings.load(policy)
    path.unlink()
    with pytest.raises(InputError, match="prompt_set.yaml"):
        PolicySettings.load(policy)


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "{}", '{"prompt_hash": "x", "retriever": {}, "generation": {"new": 1}}'),
        *({"augment": "neither"}, {"augment": ["query"]}, {"retriever": "bm25"}, {"retriever": None}),
    ],
)
def test_a_policys_damaged_settings_are_refused_by_file(policy, content):
    if isinstance(content, dict):
        content = json.dumps(json.loads((policy / "coaug.json").read_text(encoding="utf-8")) | content)
    (policy / "coaug.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="coaug.json"):
        PolicySettings.load(policy)


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_place_without_a_model_is_refused_by_name(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(InputError, match="nothing: no model could be loaded from there"):
        Augmenter.from_pretrained(str(tmp_path / "nothing"))


# Reading the folder


@pytest.fixture(scope="module")
def augmented_folder(model, tokenizer, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("augmented")
    augmenter = Augmenter(model, tokenizer, PolicySettings(PROMPT_SET, GENERATION), name="tiny")
    augmenter.augment_collection(small, folder)
    return folder


@pytest.fixture
def own_folder(augmented_folder, tmp_path):
    return Path(shutil.copytree(augmented_folder, tmp_path / "own"))


def test_texts_and_answers_are_composed(augmented_folder, small):
    augmented = AugmentedCollection.load(augmented_folder)
    queries, documents = (
        {row["_id"]: row["augmentation"] for row in read_rows(augmented_folder / name)} for name in ANSWER_FILES
    )
    assert any(queries.values())
    assert any(documents.values())
    assert augmented.queries(small) == {
        id_: PROMPT_SET.compose_query(small.queries[id_], queries[id_]) for id_ in small.qrels
    }
    assert augmented.documents(small) == [
        PROMPT_SET.compose_document(document, documents[id_]) for id_, document in small.corpus.items()
    ]


def test_a_side_that_is_not_asked_for_stays_as_it_is(augmented_folder, small):
    queries_only = AugmentedCollection.load(augmented_folder, ["query"])
    assert queries_only.documents(small) == list(small.corpus.values())
    assert queries_only.queries(small) == AugmentedCollection.load(augmented_folder).queries(small)
    documents_only = AugmentedCollection.load(augmented_folder, ["document"])
    assert documents_only.queries(small) == {id_: small.queries[id_] for id_ in small.qrels}


def test_a_folder_without_augmentations_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no augmentations there \(manifest.json is missing\)"):
        AugmentedCollection.load(tmp_path / "nowhere")


def test_a_side_that_is_not_there_is_refused(own_folder):
    (own_folder / "queries.jsonl").unlink()
    shutil.rmtree(own_folder / "queries.shards")
    with pytest.raises(InputError, match="queries.jsonl is missing there; restore it"):
        AugmentedCollection.load(own_folder)
    manifest = json.loads((own_folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sides"]["query"]
    (own_folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match="there is no queries.jsonl yet"):
        AugmentedCollection.load(own_folder, ["query"])


def test_a_side_that_the_manifest_does_not_have_is_not_read(own_folder):
    """Such as one that another model made, which lies there still."""
    manifest = json.loads((own_folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sides"]["query"]
    (own_folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(own_folder / "queries.shards")
    assert AugmentedCollection.load(own_folder).answers.keys() == {"document"}


def test_a_side_begun_and_not_finished_is_refused_though_the_other_is_there(own_folder):
    (own_folder / "documents.jsonl").unlink()
    with pytest.raises(InputError, match="documents.jsonl was begun but not finished; run coaug augment again"):
        AugmentedCollection.load(own_folder)
    assert set(AugmentedCollection.load(own_folder, ["query"]).answers) == {"query"}


def test_missing_ids_are_counted_and_one_is_named(augmented_folder, collection, small):
    augmented = AugmentedCollection.load(augmented_folder)
    missing = [id_ for id_ in collection.corpus if id_ not in small.corpus]
    with pytest.raises(InputError) as error:
        augmented.documents(collection)
    assert f"lack {len(missing)} documents, such as {missing[0]!r}" in str(error.value)
    with pytest.raises(InputError, match="lack 8 queries, such as 'test-statins'.*coaug augment --side query"):
        augmented.queries(collection.with_split("test"))


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"_id": "x"}', '{"_id": "x", "augmentation": null, "complete": true}', "\xff"]
)
def test_a_damaged_line_is_refused_by_file_and_number_whoever_reads_it(own_folder, make_augmenter, small, line):
    path = own_folder / "documents.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n", encoding="latin-1")
    with pytest.raises(InputError, match="documents.jsonl, line 3: not a row"):
        AugmentedCollection.load(own_folder)
    # the shards have what the file had
    augmenter = make_augmenter(revision=None)
    augmenter.augment_collection(small, own_folder)
    assert augmenter.engine.generated == []
    assert path.read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_refused_by_name(own_folder, make_augmenter, small, content):
    (own_folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="manifest.json"):
        AugmentedCollection.load(own_folder)
    with pytest.raises(InputError, match="manifest.json"):
        make_augmenter().augment_collection(small, own_folder)


def test_a_modified_prompt_set_beside_augmentations_is_detected(own_folder):
    replace(PROMPT_SET, query_repeats=5).save(own_folder)
    with pytest.raises(InputError, match=f"the prompt set has the hash .*made with {PROMPT_SET.hash}"):
        AugmentedCollection.load(own_folder)


# The store


@pytest.fixture
def large_folder(beir_folder, tmp_path):
    """400 documents, and what the tiny model can be asked with."""
    folder = Path(shutil.copytree(beir_folder, tmp_path / "large"))
    with open(folder / "corpus.jsonl", "a", encoding="utf-8") as file:
        for number in range(360):
            file.write(json.dumps({"_id": f"more-{number}", "text": f"Salty snacks of the kind {number}."}) + "\n")
    PROMPT_SET.save(tmp_path)
    return folder


def augment_command(tiny_model, folder, output, *options):
    arguments = ["augment", "--model", tiny_model, "--collection", folder, "--side", "document", "--output", output]
    arguments += ["--prompt_set", folder.parent / "prompt_set.yaml", "--max_new_tokens", 8, "--batch_size", 4]
    arguments += ["--engine", "transformers"]
    return [str(argument) for argument in (*arguments, *options)]


def read_shards(folder):
    """Rows of all shards, each of which must be whole and have the SHA-256 of its name."""
    rows = []
    for path in folder.glob("*.jsonl"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        rows += read_rows(path)
    return rows


def test_a_process_killed_at_any_moment_loses_what_it_had_not_recorded(
    make_augmenter, large_folder, tmp_path, monkeypatch
):
    """Twenty kills; nothing recorded may be lost, repeated or torn, and the files come out the same."""
    monkeypatch.setattr(augment, "SHARD_TEXTS", 4)
    large = Collection.load(large_folder, "dev", stream=True)
    settings = {"batch_size": 4, "generation": GenerationSettings(8, 1.2)}
    make_augmenter(**settings).augment_collection(large, tmp_path / "whole", ["document"])
    draw = random.Random(0)
    shards = tmp_path / "killed" / "documents.shards"
    recorded, kills, seconds = {}, 0, 0.2
    while kills < 20:
        # A fork has the model already, so that it can be killed at its work rather than at its start.
        process = multiprocessing.get_context("fork").Process(
            target=make_augmenter(**settings).augment_collection, args=(large, tmp_path / "killed", ["document"])
        )
        process.start()
        process.join(draw.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        rows = read_shards(shards)
        keys = [row["key"] for row in rows]
        assert len(set(keys)) == len(keys)  # none was generated twice
        now = {row["key"]: row["augmentation"] for row in rows}
        assert recorded.items() <= now.items()
        if (tmp_path / "killed" / "documents.jsonl").exists():  # done before it was killed: from the beginning
            assert folder_content(tmp_path / "killed") == folder_content(tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")
            now = {}
        elif len(now) == len(recorded):  # a slow machine is given more time
            seconds *= 1.5
        recorded = now
    last = make_augmenter(**settings)
    last.augment_collection(large, tmp_path / "killed", ["document"])
    assert len(last.engine.generated) == 400 - len(recorded)
    assert folder_content(tmp_path / "killed") == folder_content(tmp_path / "whole")
    assert len(read_shards(shards)) == 400


def test_a_damaged_shard_is_named_and_what_it_held_generated_again(
    make_augmenter, small, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(augment, "SHARD_TEXTS", 5)
    make_augmenter().augment_collection(small, tmp_path, ["document"])
    before = folder_content(tmp_path)
    shards = sorted((tmp_path / "documents.shards").iterdir())
    assert len(shards) == 3
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:40] + b"?" + content[41:])
    capsys.readouterr()
    again = make_augmenter()
    again.augment_collection(small, tmp_path, ["document"])
    assert len(again.engine.generated) == content.count(b"\n")
    assert f"{shards[0]} is damaged" in capsys.readouterr().err
    assert shards[0].with_suffix(".damaged").is_file()
    assert folder_content(tmp_path) == before


def test_equal_texts_are_generated_once_and_order_does_not_matter(make_augmenter, small, tmp_path):
    make_augmenter().augment_collection(small, tmp_path, ["document"])
    documents = list(small.corpus.values())
    twin = replace(documents[3], id="twin")
    corpus = {document.id: document for document in [twin, *reversed(documents[2:])]}
    augmenter = make_augmenter()
    manifest = augmenter.augment_collection(replace(small, corpus=corpus), tmp_path, ["document"])
    assert augmenter.engine.generated == []
    assert manifest["sides"]["document"]["texts"] == 11
    rows = {row["_id"]: row for row in read_rows(tmp_path / "documents.jsonl")}
    assert list(rows) == list(corpus)
    assert rows["twin"]["augmentation"] == rows[documents[3].id]["augmentation"]

    fresh = make_augmenter()
    fresh.augment_collection(replace(small, corpus=corpus), tmp_path / "fresh", ["document"])
    assert len(fresh.engine.generated) == 10
    assert read_rows(tmp_path / "fresh" / "documents.jsonl") == list(rows.values())


def test_a_folder_of_an_earlier_version_is_refused(make_augmenter, small, tmp_path):
    make_augmenter().augment_collection(small, tmp_path, ["query"])
    (tmp_path / "documents.texts.jsonl").write_text("")
    with pytest.raises(InputError, match="made by an earlier version, as documents.texts.jsonl shows"):
        make_augmenter().augment_collection(small, tmp_path)


def test_incomplete_answers_are_tried_again_and_no_others(make_augmenter, small, tmp_path):
    # At this length some answers are cut, and some of those come out shorter when they are sampled.
    settings = {"generation": GenerationSettings(4, 1.2)}
    first = make_augmenter(**settings).augment_collection(small, tmp_path)["sides"]
    before = {name: {row["_id"]: row for row in read_rows(tmp_path / name)} for name in ANSWER_FILES}
    incomplete = sum(counts["incomplete"] for counts in first.values())
    assert 1 < incomplete < 20
    again = make_augmenter(**settings)
    sides = again.augment_collection(small, tmp_path, retry_incomplete=3)["sides"]
    assert len(again.engine.generated) >= incomplete
    assert sum(counts["retried"]["texts"] for counts in sides.values() if "retried" in counts) == incomplete
    repaired = sum(counts["retried"]["repaired"] for counts in sides.values() if "retried" in counts)
    assert repaired > 0
    assert sum(counts["incomplete"] for counts in sides.values()) == incomplete - repaired
    for name, rows in before.items():
        for row in read_rows(tmp_path / name):
            assert row == rows[row["_id"]] or (row["complete"] and not rows[row["_id"]]["complete"])
    # so often in all: the same command has nothing left to do, one that allows more has
    once_more = make_augmenter(**settings)
    assert once_more.augment_collection(small, tmp_path, retry_incomplete=3)["sides"] == sides
    assert once_more.engine.generated == []
    once_more.augment_collection(small, tmp_path, retry_incomplete=4)
    assert len(once_more.engine.generated) == incomplete - repaired


def test_a_streamed_corpus_gives_the_same_files(make_augmenter, beir_folder, collection, tmp_path):
    streamed = Collection.load(beir_folder, "dev", stream=True)
    assert not isinstance(streamed.corpus, dict)
    assert streamed.summary() == collection.with_split("dev").summary()
    make_augmenter().augment_collection(streamed, tmp_path / "streamed")
    make_augmenter().augment_collection(collection.with_split("dev"), tmp_path / "loaded")
    assert folder_content(tmp_path / "streamed") == folder_content(tmp_path / "loaded")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [line.replace("adult diets", "adult lives") for line in lines],
        lambda lines: [*lines, json.dumps({"_id": "new", "title": "", "text": "Birch trees."}) + "\n"],
        lambda lines: lines[:-1],
    ],
)
def test_a_collection_that_changes_meanwhile_is_noticed(make_augmenter, beir_folder, tmp_path, monkeypatch, change):
    folder = Path(shutil.copytree(beir_folder, tmp_path / "collection"))
    streamed = Collection.load(folder, "dev", stream=True)
    augmenter = make_augmenter()
    finish = AnsweredSide.write_answers

    def change_and_finish(*args):
        lines = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "corpus.jsonl").write_text("".join(change(lines)), encoding="utf-8")
        return finish(*args)

    monkeypatch.setattr(AnsweredSide, "write_answers", change_and_finish)
    with pytest.raises(InputError, match="has changed while it was augmented; run the"):
        augmenter.augment_collection(streamed, tmp_path / "out", ["document"])
    assert not (tmp_path / "out" / "documents.jsonl").exists()


def test_two_commands_may_augment_one_side_each(make_augmenter, small, tmp_path, monkeypatch):
    first, second = make_augmenter(), make_augmenter()
    finish = AnsweredSide.write_answers

    def finish_after_the_other(*args):
        monkeypatch.undo()
        second.augment_collection(small, tmp_path, ["query"])
        return finish(*args)

    monkeypatch.setattr(AnsweredSide, "write_answers", finish_after_the_other)
    first.augment_collection(small, tmp_path, ["document"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["sides"]) == {"query", "document"}


@pytest.mark.parametrize(
    "setting", [{"use_cache": False}, {"cache_implementation": "static"}, {"return_dict_in_generate": True}]
)
def test_generation_settings_saved_with_the_model_do_not_matter(make_augmenter, model, setting):
    texts = ["does espresso keep people awake?", "sunlight", "salty snacks and brittle bones"]
    expected = make_augmenter().generate("query", texts)
    before = {name: getattr(model.generation_config, name) for name in setting}
    model.generation_config.update(**setting)
    try:
        assert make_augmenter().generate("query", texts) == expected
    finally:
        model.generation_config.update(**before)


def test_processes_share_the_work(coaug, tiny_model, large_folder, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / CPU_2]
    arguments = augment_command(tiny_model, large_folder, tmp_path / "two")[1:]
    done = subprocess.run(
        [*map(str, launcher), str(ROOT / "scripts" / "augment.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("document: 400 texts") == 1  # one of them speaks
    rows = read_shards(tmp_path / "two" / "documents.shards")
    assert len(rows) == 400
    assert len({int(row["key"], 16) % 2 for row in rows}) == 2
    # one process has nothing left to do with what two have made
    before = folder_content(tmp_path / "two")
    code, printed, _ = coaug(*augment_command(tiny_model, large_folder, tmp_path / "two"))
    assert code == 0
    assert "document: 0 texts augmented" in printed
    assert folder_content(tmp_path / "two") == before
    assert coaug(*augment_command(tiny_model, large_folder, tmp_path / "one"))[0] == 0
    assert folder_content(tmp_path / "one") == before


def test_an_estimate_writes_nothing(coaug, tiny_model, large_folder, tmp_path):
    command = augment_command(tiny_model, large_folder, tmp_path / "out")
    code, printed, _ = coaug(*command, "--dry_run")
    assert code == 0
    assert "document: 400 texts, 400 to augment" in printed
    assert "400 to 3,200 tokens" in printed
    assert "4 texts took" in printed
    assert not (tmp_path / "out").exists()
    assert coaug(*command)[0] == 0
    code, printed, _ = coaug(*command, "--dry_run")
    assert "document: 400 texts, 0 to augment" in printed


def test_the_estimate_of_the_prompts_is_what_the_model_reads(make_augmenter, small, tmp_path):
    augmenter = make_augmenter()
    estimate = augmenter.estimate(small, tmp_path / "none", "document")
    augmenter = make_augmenter()
    augmenter.augment_collection(small, tmp_path, ["document"])
    tokens = sum(len(augmenter.tokenizer(prompt).input_ids) for prompt in augmenter.engine.generated)
    assert estimate.prompt_tokens == tokens
    assert estimate.sampled_prompts == 12
    size = (tmp_path / "documents.jsonl").stat().st_size
    size += sum(path.stat().st_size for path in (tmp_path / "documents.shards").iterdir())
    assert estimate.bytes == pytest.approx(size, rel=0.5)
    assert augmenter.throughput["document"].texts == 12


def test_an_adapter_is_loaded_with_its_base_model(tiny_model, small, tokenizer, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    texts = list(small.queries.values())
    adapter = Augmenter.from_pretrained(str(tmp_path / "adapter"), PROMPT_SET, GENERATION)
    merged = Augmenter(adapted.merge_and_unload(), tokenizer, PolicySettings(PROMPT_SET, GENERATION), name="merged")
    assert adapter.generate("query", texts) == merged.generate("query", texts)
    assert adapter.generate("query", texts) != Augmenter.from_pretrained(
        str(tiny_model), PROMPT_SET, GENERATION
    ).generate("query", texts)
    assert adapter.revision
