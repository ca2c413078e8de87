import json
import re
import shutil

import pytest

from coaug_trl import Augmenter, BM25Retriever, Collection, PromptSet
from coaug_trl.cli import main as cli
from coaug_trl.policy.settings import GenerationSettings, PolicySettings
from coaug_trl.serving import index as search


PROMPT_SET = PromptSet("sparse", "query:", "document:", query_repeats=2)
GENERATION = GenerationSettings(24, 1.2)
RETRIEVER = BM25Retriever(k1=0.9, fields="best")
QUERIES = ["does wheat bread cause stomach pain?", "vitamin D", "hay fever and sneezing"]


def make_policy(folder, tiny_model, prompt_set=PROMPT_SET, retriever=RETRIEVER):
    """A model folder as training leaves it."""
    shutil.copytree(tiny_model, folder)
    PolicySettings(prompt_set, GENERATION, retriever.config).save(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tiny_model, tmp_path_factory):
    return make_policy(tmp_path_factory.mktemp("policies") / "policy", tiny_model)


@pytest.fixture(scope="module")
def augmentations(policy, beir_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("augmentations") / "policy"
    command = ["augment", "--model", policy, "--collection", beir_folder, "--output", folder]
    assert cli.main([str(argument) for argument in command]) == 0
    return folder


@pytest.fixture(scope="module")
def index(augmentations, beir_folder, tmp_path_factory):
    """Of augmented documents."""
    folder = tmp_path_factory.mktemp("indexes") / "augmented"
    command = ["index", "--collection", beir_folder, "--augmentations", augmentations, "--output", folder]
    assert cli.main([str(argument) for argument in command]) == 0
    return folder


@pytest.fixture(scope="module")
def plain_index(beir_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes") / "plain"
    assert cli.main(["index", "--collection", str(beir_folder), "--output", str(folder)]) == 0
    return folder


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def hits_of(line):
    return [(hit["_id"], hit["score"]) for hit in json.loads(line)["hits"]]


# Index


def test_an_index_says_what_it_was_made_of(coaug, augmentations, index, beir_folder):
    manifest = read_json(index / "manifest.json")
    assert manifest["finished"] is True
    assert (manifest["collection"], manifest["num_documents"]) == ("advice", 40)
    assert manifest["retriever"] == RETRIEVER.config  # what the policy was trained for
    assert manifest["augmentations"] == read_json(augmentations / "manifest.json")
    assert "bm25s" in manifest["versions"]
    assert PromptSet.load(index) == PROMPT_SET
    # the documents that are shown are the originals
    rows = [json.loads(line) for line in (index / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus = Collection.load(beir_folder).corpus.values()
    assert rows == [{"_id": document.id, "title": document.title, "text": document.text} for document in corpus]


@pytest.mark.parametrize("augmented", [False, True])
def test_search_ranks_as_evaluate_does(coaug, augmentations, beir_folder, tmp_path, augmented):
    common = ["--collection", beir_folder, "--split", "test"]
    settings = ["--augmentations", augmentations] if augmented else ["--k1", "0.7", "--fields", "best"]
    side = ["--side", "document"] if augmented else []
    assert coaug("evaluate", *common, *settings, *side, "--k", 20, "--output", tmp_path / "evaluation")[0] == 0
    assert coaug("index", *common, *settings, "--output", tmp_path / "index")[0] == 0
    collection = Collection.load(beir_folder, "test")
    queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
    code, printed, _ = coaug("search", "--index", tmp_path / "index", "--k", 20, "--json", *queries.values())
    assert code == 0
    found = {query_id: dict(hits_of(line)) for query_id, line in zip(queries, printed.splitlines(), strict=True)}
    run = {}
    for line in (tmp_path / "evaluation" / "run.trec").read_text(encoding="utf-8").splitlines():
        query_id, _, document_id, _, score, _ = line.split()
        run.setdefault(query_id, {})[document_id] = float(score)
    assert found.keys() == run.keys()
    for query_id, scores in run.items():
        # run.trec has single precision, and breaks ties in its own way
        assert found[query_id] == pytest.approx(scores, rel=1e-5)


def test_an_index_needs_no_particular_split(coaug, beir_folder, tmp_path):
    folder = shutil.copytree(beir_folder, tmp_path / "collection")
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").unlink()
    code, printed, _ = coaug("index", "--collection", folder, "--output", tmp_path / "index")
    assert code == 0
    assert "collection (dev): 40 documents" in printed
    assert f"40 documents indexed, without augmentations; {tmp_path / 'index'}\n" in printed
    assert not (tmp_path / "index" / "prompt_set.yaml").exists()


def test_an_index_may_be_made_again_in_its_folder(coaug, augmentations, beir_folder, tmp_path):
    output = ("--collection", beir_folder, "--output", tmp_path)
    assert coaug("index", *output, "--augmentations", augmentations)[0] == 0
    assert coaug("index", *output, "--k1", 0.4)[0] == 0
    assert read_json(tmp_path / "manifest.json")["retriever"] == BM25Retriever(k1=0.4).config
    assert not (tmp_path / "prompt_set.yaml").exists()


@pytest.mark.parametrize("place", [(BM25Retriever, "save"), (search, "write_jsonl"), (PromptSet, "save")])
def test_an_interrupted_index_is_refused(
    coaug, refused, augmentations, index, beir_folder, tmp_path, monkeypatch, place
):
    folder = shutil.copytree(index, tmp_path / "index")  # a whole one, which the interrupted command replaces
    command = ("index", "--collection", beir_folder, "--augmentations", augmentations, "--output", folder)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupt)
        assert coaug(*command)[0] == 130
    assert "begun but not finished; make it with coaug index" in refused("search", "--index", folder, "sodium")
    assert coaug(*command)[0] == 0
    assert coaug("search", "--index", folder, "sodium")[0] == 0


def test_what_is_not_an_index_is_not_overwritten(refused, augmentations, beir_folder, policy):
    for folder in (augmentations, beir_folder, policy):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        message = refused("index", "--collection", beir_folder, "--output", folder)
        assert f"{folder} holds something other than an index" in message
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_index_checks_the_augmentations_as_evaluate_does(refused, augmentations, beir_folder, tmp_path):
    command = ("index", "--augmentations", augmentations, "--output", tmp_path / "index")
    assert "leave the retriever's settings out" in refused(*command, "--collection", beir_folder, "--k1", 2)
    other = shutil.copytree(beir_folder, tmp_path / "other")
    assert "belongs to the collection advice, not to other" in refused(*command, "--collection", other)
    queries = shutil.copytree(augmentations, tmp_path / "queries")
    (queries / "documents.jsonl").unlink()
    shutil.rmtree(queries / "documents.shards")
    manifest = read_json(queries / "manifest.json")
    del manifest["sides"]["document"]
    (queries / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    command = ("index", "--augmentations", queries, "--output", tmp_path / "index")
    assert "there is no documents.jsonl yet" in refused(*command, "--collection", beir_folder)
    assert not (tmp_path / "index").exists()


# Search


def test_search_with_a_policy_is_augmenter_and_retriever(coaug, index, augmentations, policy, beir_folder):
    from coaug_trl.augmentation.folder import AugmentedCollection

    augmenter = Augmenter.from_pretrained(str(policy))
    answers = [augmentation.answer for augmentation in augmenter.generate("query", QUERIES)]
    assert any(answers)
    retriever = BM25Retriever(k1=0.9, fields="best")
    collection = Collection.load(beir_folder)
    retriever.index(AugmentedCollection.load(augmentations, ["document"]).documents(collection, "title"))
    texts = [PROMPT_SET.compose_query(query, answer) for query, answer in zip(QUERIES, answers, strict=True)]
    expected = retriever.search(texts, 4)

    code, printed, errors = coaug("search", "--index", index, "--model", policy, "--k", 4, "--json", *QUERIES)
    assert code == 0
    assert "note:" not in errors
    lines = printed.splitlines()
    assert [json.loads(line)["query"] for line in lines] == QUERIES
    assert [json.loads(line)["augmentation"] for line in lines] == answers
    assert [hits_of(line) for line in lines] == expected
    for hit in json.loads(lines[0])["hits"]:
        document = collection.corpus[hit["_id"]]
        assert (hit["title"], hit["text"]) == (document.title, document.text)
    assert [hit["rank"] for hit in json.loads(lines[0])["hits"]] == [1, 2, 3, 4]

    code, printed, _ = coaug("search", "--index", index, "--model", policy, "--k", 4, *QUERIES)
    assert code == 0
    for query, answer, hits in zip(QUERIES, answers, expected, strict=True):
        block = printed[printed.index(f"{query}\n") :].split("\n\n")[0].splitlines()
        assert block[1] == (f"  + {' '.join(answer.split())}" if answer else "  (nothing added)")
        for rank, ((document_id, score), line) in enumerate(zip(hits, block[2:], strict=True), start=1):
            assert line.split()[:3] == [str(rank), f"{score:.4f}", document_id]
            assert collection.corpus[document_id].title in line


def test_search_without_a_policy(coaug, plain_index, beir_folder):
    retriever = BM25Retriever()
    retriever.index(list(Collection.load(beir_folder).corpus.values()))
    code, printed, errors = coaug("search", "--index", plain_index, "--json", "salty snacks", "xyzzy")
    assert (code, errors) == (0, "")
    found, nothing = map(json.loads, printed.splitlines())
    assert hits_of(json.dumps(found)) == retriever.search(["salty snacks"])[0]
    assert found["augmentation"] is None
    assert nothing == {"query": "xyzzy", "augmentation": None, "hits": []}
    assert coaug("search", "--index", plain_index, "xyzzy")[1] == "xyzzy\n  nothing found\n\n"


def test_an_index_without_augmentations_takes_any_prompt_set(coaug, plain_index, tiny_model, tmp_path):
    policy = make_policy(tmp_path / "policy", tiny_model, retriever=BM25Retriever())
    code, printed, _ = coaug("search", "--index", plain_index, "--model", policy, "--json", *QUERIES)
    assert code == 0
    answers = Augmenter.from_pretrained(str(policy)).generate("query", QUERIES)
    assert [json.loads(line)["augmentation"] for line in printed.splitlines()] == [a.answer for a in answers]


def test_an_untrained_model_takes_the_settings_of_the_index(coaug, index, tiny_model, policy):
    common = ("search", "--index", index, "--json", *QUERIES)
    code, printed, errors = coaug(*common, "--model", tiny_model)
    assert code == 0
    # the weights are those of the policy, so the answers are the same with the same prompts and settings
    assert "note:" not in errors
    assert printed == coaug(*common, "--model", policy)[1]


def test_another_model_than_the_documents_were_augmented_by_is_noted(coaug, index, tmp_path):
    from conftest import make_tiny_model

    other = make_tiny_model(tmp_path / "other", QUERIES)
    code, _, errors = coaug("search", "--index", index, "--model", other, "sodium")
    assert code == 0
    assert "note: the queries are augmented by" in errors
    assert str(other) in errors


def test_another_prompt_set_than_the_indexs_is_refused(refused, index, tiny_model, tmp_path):
    other = PromptSet("sparse", "another query:", "document:")
    policy = make_policy(tmp_path / "policy", tiny_model, prompt_set=other)
    message = refused("search", "--index", index, "--model", policy, "sodium")
    for named in (str(policy), str(index), other.hash, PROMPT_SET.hash):
        assert named in message


def test_another_retriever_than_the_indexs_is_refused(refused, plain_index, policy):
    message = refused("search", "--index", plain_index, "--model", policy, "sodium")
    for named in (str(policy), str(plain_index)):
        assert named in message
    assert "k1 is 0.9 for the policy and 1.2 for the index" in message
    assert "fields is best for the policy and flat for the index" in message
    assert "language" not in message


def test_other_generation_settings_than_the_documents_are_refused(refused, index, policy, tmp_path):
    other = shutil.copytree(policy, tmp_path / "policy")
    PolicySettings(PROMPT_SET, GenerationSettings(12, 1.2), RETRIEVER.config).save(other)
    message = refused("search", "--index", index, "--model", other, "sodium")
    assert "max_new_tokens is 12 for the queries and 24 for the documents" in message
    assert "repetition_penalty" not in message


def test_prompts_for_another_kind_of_retriever_are_refused(refused, plain_index, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "dense")
    PolicySettings(PromptSet.default("dense"), GENERATION).save(folder)
    message = refused("search", "--index", plain_index, "--model", folder, "sodium")
    assert "prompts for dense retrievers" in message and "sparse" in message


@pytest.mark.parametrize("query", ["", " \t\n", "caf\udce9"])
def test_queries_that_cannot_be_searched_are_refused(refused, plain_index, query):
    message = refused("search", "--index", plain_index, "sodium", query)
    assert "is empty" in message or "not UTF-8" in message


def test_places_without_an_index_are_named(refused, plain_index, augmentations, tmp_path):
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for folder in (tmp_path / "typo", tmp_path, file, augmentations):
        assert f"{folder}: there is no index; make it with coaug index" in refused("search", "--index", folder, "x")
    assert "typo" in refused("search", "--index", plain_index, "--model", tmp_path / "typo", "x")


def test_settings_that_cannot_work_are_refused(refused, plain_index):
    assert "at least 1" in refused("search", "--index", plain_index, "--k", 0, "sodium")


@pytest.mark.parametrize(
    "name",
    [
        "documents.jsonl",
        "document_ids.json",
        "statistics.json",
        "field_0/data.csc.index.npy",
        "field_0/indices.csc.index.npy",
        "field_0/indptr.csc.index.npy",
        "field_0/vocab.index.json",
    ],
)
def test_a_file_cut_short_is_refused(refused, plain_index, tmp_path, name):
    folder = shutil.copytree(plain_index, tmp_path / "index")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert "damaged" in refused("search", "--index", folder, "--k", 40, "review of volunteers and parents in trial")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", lambda content: {"finished": True}),
        ("manifest.json", lambda content: content | {"augmentations": {}}),
        ("manifest.json", lambda content: content | {"retriever": "bm25"}),
        ("manifest.json", lambda content: content | {"retriever": content["retriever"] | {"k1": 99}}),
        ("retriever.json", lambda content: content | {"cache_dir": "elsewhere"}),
        ("retriever.json", lambda content: [content]),
        ("document_ids.json", lambda content: content[:3]),
    ],
)
def test_files_that_do_not_belong_together_are_refused(refused, plain_index, tmp_path, monkeypatch, name, change):
    folder = shutil.copytree(plain_index, tmp_path / "index")
    (folder / name).write_text(json.dumps(change(read_json(folder / name))), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    message = refused("search", "--index", folder, "sodium")
    assert "index the co" in message and str(folder) in message
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_texts_without_blanks_or_titles_are_shown(coaug, tmp_path):
    (tmp_path / "qrels").mkdir()
    text = "ein " + "ä" * 500
    rows = [{"_id": "d1", "text": text}, {"_id": "d2", "title": "nur\nTitel ein", "text": ""}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "ein"}\n', encoding="utf-8")
    (tmp_path / "qrels" / "all.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n", encoding="utf-8")
    assert coaug("index", "--collection", tmp_path, "--output", tmp_path / "index")[0] == 0
    code, printed, _ = coaug("search", "--index", tmp_path / "index", "ein")
    assert code == 0
    shown = {line.split()[2]: line.split(maxsplit=3)[3] for line in printed.splitlines()[1:] if line}
    assert shown["d2"] == "nur Titel ein"
    assert shown["d1"].startswith("ein äää") and shown["d1"].endswith("ä…")
    # in JSON the text is whole
    printed = coaug("search", "--index", tmp_path / "index", "ein", "--json")[1]
    assert text in [hit["text"] for hit in json.loads(printed)["hits"]]


def test_timing_is_printed_beside_the_same_hits(coaug, policy, index):
    command = ("search", "--index", index, "--model", policy, "--k", 3, *QUERIES)
    code, plain, _ = coaug(*command)
    assert code == 0
    code, timed, _ = coaug(*command, "--timing")
    assert code == 0
    assert timed.startswith(plain)
    loaded, header, *rows = timed[len(plain) :].splitlines()
    assert re.fullmatch(r"loaded in [0-9.]+ s, a first query included; then, for one query at a time:", loaded)
    assert header.split() == ["ms", "augment", "search", "total"]
    assert [row.split()[0] for row in rows] == ["median", "p95"]
    code, printed, errors = coaug(*command[:-2], "--timing", "--json")
    assert code == 0
    (line,) = map(json.loads, printed.splitlines())
    seconds = line["seconds"]
    assert seconds["augment"] > 0 and seconds["search"] > 0
    assert seconds["total"] == seconds["augment"] + seconds["search"]
    assert errors.splitlines()[-1].split()[0] == "query"


def test_without_a_policy_only_the_search_takes_time(coaug, plain_index):
    code, printed, _ = coaug("search", "--index", plain_index, "--timing", "vitamin D")
    assert code == 0
    _, augment, search, total = printed.splitlines()[-1].split()
    assert float(augment) == 0
    assert float(search) == pytest.approx(float(total), abs=0.11)  # as rounded
