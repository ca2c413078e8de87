import json
import re
from dataclasses import asdict, fields, replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from coaug_trl import Document, InputError, PromptSet
from coaug_trl.data.document import document_text
from coaug_trl.policy.prompts import extract_answer, has_answer


SPARSE = PromptSet("sparse", "query:", "document:")
DENSE = PromptSet("dense", "query:", "document:")
DOCUMENT = Document("d1", "A title", "The text.")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>one, two</answer>", "one, two"),
        ("<think>hm</think>\n<answer>\n one\n two \n</answer> and more", "one\n two"),
        ("<answer>first</answer> no, <answer>second</answer>", "second"),
        ("<think>I write <answer>draft</answer></think><answer>final</answer>", "final"),
        ("<think>I write <answer>draft</answer></think> the end", "draft"),
        ("<answer>never closed <answer>closed</answer>", "closed"),
        ("<answer>outer <answer>inner</answer> rest</answer>", "inner"),
        ("<answer>done</answer> <answer>cut off", "done"),
        ("<answer>first</answer> <answer></answer>", ""),
        ("<answer> \n </answer>", ""),
        ("<answer>unclosed", ""),
        ("unopened</answer>", ""),
        ("</answer>the wrong way round<answer>", ""),
        ("<ANSWER>other tags</ANSWER>", ""),
        ("", ""),
    ],
)
def test_the_answer_is_the_text_of_the_last_complete_tags(completion, answer):
    assert extract_answer(completion) == answer


pieces = st.lists(
    st.sampled_from(["<answer>", "</answer>", "a", " b ", "\n", "<think>", "</think>", "<"]), max_size=12
)


@given(pieces)
def test_an_answer_holds_no_opening_tag_and_ends_at_the_first_closing_one(pieces):
    completion = "".join(pieces)
    answer = extract_answer(completion)
    assert "<answer>" not in answer
    assert "</answer>" not in answer
    # scanning by hand: the last closing tag with an opening tag between it and the closing tag before
    expected, opened = None, None
    for match in re.finditer("</?answer>", completion):
        if match[0] == "<answer>":
            opened = match.end()
        elif opened is not None:
            expected, opened = completion[opened : match.start()].strip(), None
    assert answer == (expected or "")
    assert has_answer(completion) == (expected is not None)


def test_extraction_of_many_unclosed_tags_is_not_quadratic():
    assert extract_answer("<answer>a" * 200_000) == ""


def test_a_query_is_followed_by_its_answer():
    for prompt_set in (SPARSE, DENSE):
        assert prompt_set.compose_query("salt", "sodium") == "salt\nsodium"
        assert prompt_set.compose_query("salt", "") == "salt"


def test_query_repeats_weighs_an_augmented_query_only():
    repeated = replace(SPARSE, query_repeats=3)
    assert repeated.compose_query("salt", "sodium") == "salt\nsalt\nsalt\nsodium"
    assert repeated.compose_query("salt", "") == "salt"


def test_a_sparse_answer_follows_the_text_and_a_dense_one_precedes_it():
    assert SPARSE.compose_document(DOCUMENT, "words") == Document("d1", "A title", "The text.\nwords")
    assert DENSE.compose_document(DOCUMENT, "A summary.") == Document("d1", "A title", "A summary.\nThe text.")
    assert SPARSE.compose_document(DOCUMENT, "words", "title") == Document("d1", "A title\nwords", "The text.")


def test_rules_say_where_an_answer_goes():
    replacing = replace(DENSE, query_rule="replace", query_repeats=3)
    assert replacing.compose_query("salt", "Salt is sodium chloride.") == "Salt is sodium chloride."
    assert replacing.compose_query("salt", "") == "salt"
    following, preceding = Document("d1", "A title", "The text.\nadded"), Document("d1", "A title", "added\nThe text.")
    for prompt_set in (SPARSE, DENSE):
        assert replace(prompt_set, document_rule="append").compose_document(DOCUMENT, "added") == following
        assert replace(prompt_set, document_rule="prepend").compose_document(DOCUMENT, "added") == preceding
        assert replace(prompt_set, document_rule="append").compose_document(DOCUMENT, "") == DOCUMENT


def test_a_prompt_set_may_be_for_one_side(tokenizer):
    queries, documents = PromptSet("sparse", "query:", None), PromptSet("sparse", None, "document:")
    assert (SPARSE.sides, queries.sides, documents.sides) == (("query", "document"), ("query",), ("document",))
    SPARSE.check_sides(["query", "document"])
    queries.check_sides(["query"])
    documents.check_sides([])
    assert queries.prompt("query", "salt", tokenizer)[0]["content"] == "query:"
    for prompt_set, side, other in ((queries, "document", "query"), (documents, "query", "document")):
        message = f"no prompt for {side} texts, only for {other} texts"
        with pytest.raises(InputError, match=message):
            prompt_set.check_sides(["query", "document"])
        with pytest.raises(InputError, match=message):
            prompt_set.prompt(side, "salt", tokenizer)


@pytest.mark.parametrize("prompt_set", [SPARSE, DENSE])
def test_nothing_is_added_where_answer_or_text_is_empty(prompt_set):
    assert prompt_set.compose_document(DOCUMENT, "") == DOCUMENT
    assert prompt_set.compose_document(Document("d1", "A title", ""), "words") == Document("d1", "A title", "words")


def test_the_model_reads_title_and_text():
    assert document_text(DOCUMENT) == "A title\nThe text."
    assert document_text(Document("d1", "", "The text.")) == "The text."
    assert document_text(Document("d1", "A title", "")) == "A title"


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_packages_prompts_ask_for_reasoning_and_an_answer(kind):
    prompt_set = PromptSet.default(kind)
    assert prompt_set.kind == kind
    for prompt in (prompt_set.query, prompt_set.document):
        for tag in ("<think>", "</think>", "<answer>", "</answer>"):
            assert tag in prompt
    assert prompt_set.query != prompt_set.document


def test_the_packages_prompts_differ_by_retriever_and_default_to_sparse():
    assert PromptSet.default() == PromptSet.default("sparse") != PromptSet.default("dense")
    with pytest.raises(InputError, match="'bm25'.*'sparse' or 'dense'"):
        PromptSet.default("bm25")


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), min_size=1, max_size=60).filter(
    str.strip
)
prompt_sets = st.builds(
    PromptSet,
    st.sampled_from(["sparse", "dense"]),
    texts | st.none(),
    texts,
    st.integers(1, 9),
    st.integers(1, 4096),
    st.sampled_from(["append", "replace"]),
    st.sampled_from([None, "append", "prepend"]),
)


@settings(deadline=None)
@given(prompt_sets)
def test_a_prompt_set_is_read_as_it_was_written(tmp_path_factory, prompt_set):
    folder = tmp_path_factory.mktemp("prompt_set")
    prompt_set.save(folder)
    assert PromptSet.load(folder) == prompt_set
    assert PromptSet.load(str(folder / "prompt_set.yaml")).hash == prompt_set.hash


@given(prompt_sets, prompt_sets)
def test_prompt_sets_have_the_same_hash_if_and_only_if_they_are_equal(one, other):
    assert (one.hash == other.hash) == (one == other)


@pytest.mark.parametrize("name", [field.name for field in fields(PromptSet)])
def test_the_hash_changes_with_every_field(name):
    changed = {
        "kind": "dense",
        "query": "query: ",
        "document": "Document:",
        "query_repeats": 2,
        "max_document_tokens": 9,
        "query_rule": "replace",
        "document_rule": "append",
    }
    assert replace(SPARSE, **{name: changed[name]}).hash != SPARSE.hash


def test_the_hash_is_the_same_in_every_process_and_version():
    # Saved policies and augmentations refer to them: a new field must leave them as they are.
    assert SPARSE.hash == "d1d1c21c5642e743"
    assert PromptSet.default("sparse").hash == "35fed7d87595557f"
    assert PromptSet.default("dense").hash == "a51a1053cba950f5"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("kind: [unclosed", "not a YAML file"),
        ("just a sentence", "a sentence"),
        ("", "None"),
        ("kind: sparse\nquery: q\ndocument: d\nqueries: 3\n", "queries"),
        ("kind: sparse\nquery: q\ndocument: d\n3: x\nb: y\n", "'3'"),
        ("kind: sparse\nquery: q\n", "document is missing; a side without a prompt is written as null"),
        ("kind: sparse\nquery: null\ndocument: null\n", "query and document are both null"),
        (
            "kind: sparse\nquery: q\ndocument: d\nquery_rule: prepend\n",
            "query_rule is 'prepend'; use append or replace",
        ),
        ("kind: sparse\nquery: q\ndocument: d\nquery_rule: null\n", "query_rule is None"),
        ("kind: sparse\nquery: q\ndocument: d\ndocument_rule: [append]\n", "document_rule is ['append']"),
        ("query: q\n", "document, kind is missing"),
        ("kind: bm25\nquery: q\ndocument: d\n", "kind is 'bm25'"),
        ("kind: [sparse]\nquery: q\ndocument: d\n", "kind is"),
        ("kind: sparse\nquery: 7\ndocument: d\n", "query is 7"),
        ("kind: sparse\nquery: q\ndocument: ''\n", "document is ''"),
        ("kind: sparse\nquery: q\ndocument: d\nquery_repeats: 0\n", "query_repeats is 0"),
        ("kind: sparse\nquery: q\ndocument: d\nquery_repeats: '2'\n", "query_repeats is '2'"),
        ("kind: sparse\nquery: q\ndocument: d\nmax_document_tokens: true\n", "max_document_tokens is True"),
        ("kind: sparse\nquery: q\ndocument: d\nmax_document_tokens: 1.5\n", "max_document_tokens is 1.5"),
    ],
)
def test_a_file_that_is_no_prompt_set_is_refused_by_name_and_field(tmp_path, content, named):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        PromptSet.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert named in str(error.value)


def test_a_missing_or_binary_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nothing.yaml"):
        PromptSet.load(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="prompt_set.yaml"):
        PromptSet.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="binary.yaml"):
        PromptSet.load(tmp_path / "binary.yaml")


def test_a_saved_prompt_set_can_be_read_and_edited_by_hand(tmp_path):
    PromptSet.default().save(tmp_path)
    content = yaml.safe_load((tmp_path / "prompt_set.yaml").read_text(encoding="utf-8"))
    assert content == asdict(PromptSet.default())


def test_chat_models_get_messages_and_others_plain_text(tokenizer):
    assert SPARSE.prompt("query", "salt", tokenizer) == [
        {"role": "system", "content": "query:"},
        {"role": "user", "content": "salt"},
    ]
    assert SPARSE.prompt("document", "salt", tokenizer)[0]["content"] == "document:"
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    assert SPARSE.prompt("query", "salt", plain) == "query:\n\nsalt\n\n"
    assert json.dumps(SPARSE.prompt("document", "{% salt %}", plain)) == '"document:\\n\\n{% salt %}\\n\\n"'


words = st.lists(st.sampled_from("salt sodium espresso Patients who is, volunteers. 日本 naïve".split()), max_size=40)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(words.map(" ".join), min_size=1, max_size=6), limit=st.integers(1, 30))
def test_documents_are_cut_to_the_allowed_tokens_and_shorter_ones_left_alone(tokenizer, texts, limit):
    prompt_set = replace(SPARSE, max_document_tokens=limit)
    cut, num_cut = prompt_set.truncate(texts, tokenizer)
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    assert num_cut == sum(length > limit for length in lengths)
    for text, result, length in zip(texts, cut, lengths, strict=True):
        assert text.startswith(result)
        if length <= limit:
            assert result == text
        elif text.isascii():
            assert len(tokenizer(result, add_special_tokens=False).input_ids) == limit
        else:  # a letter of several tokens is kept whole
            assert limit <= len(tokenizer(result, add_special_tokens=False).input_ids) <= limit + 3
