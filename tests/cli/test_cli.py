import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import teach_expansions

from coaug_trl import BM25Retriever, Collection, PromptSet, __version__
from coaug_trl.augmentation.folder import AugmentedCollection
from coaug_trl.cli import main as cli
from coaug_trl.evaluation.measures import evaluate_run
from coaug_trl.policy.settings import GenerationSettings, PolicySettings


PROMPT_SET = PromptSet("sparse", "query:", "document:")
EVALUATION_FILES = ["manifest.json", "metrics.json", "per_query.jsonl", "qrels.trec", "run.trec", "texts.jsonl"]


@pytest.fixture(scope="module")
def policy(tiny_model, collection, tmp_path_factory):
    """A model folder as training leaves it, for BM25 with k1 0.9."""
    folder = teach_expansions(tiny_model, collection, tmp_path_factory.mktemp("policies") / "policy")
    PolicySettings(PROMPT_SET, GenerationSettings(24, 1.2), BM25Retriever(k1=0.9).config).save(folder)
    return folder


@pytest.fixture(scope="module")
def augmentations(policy, beir_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("augmentations") / "policy"
    arguments = ["augment", "--model", policy, "--collection", beir_folder, "--output", folder]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return folder


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_run(folder):
    run = {}
    for line in (Path(folder) / "run.trec").read_text(encoding="utf-8").splitlines():
        query_id, _, document_id, _, score, _ = line.split()
        run.setdefault(query_id, {})[document_id] = float(score)
    return run


# The command itself


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_no_heavy_library(argument):
    done = run_python(
        "import sys, coaug_trl\n"
        "from coaug_trl.cli.main import main\n"
        "try:\n"
        f"    main([{argument!r}])\n"
        "except SystemExit as exit_:\n"
        "    assert exit_.code == 0\n"
        "    print(sorted({'torch', 'transformers', 'trl', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_the_package_loads_names_only_when_used():
    done = run_python(
        "import sys, coaug_trl\n"
        "assert 'CoAugTrainer' in dir(coaug_trl)\n"
        "from coaug_trl import Collection, PromptSet, InputError\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "try:\n"
        "    coaug_trl.Nothing\n"
        "except AttributeError as error:\n"
        "    print(error)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'coaug_trl' has no attribute 'Nothing'\n"


def test_version_is_the_packages(coaug):
    assert coaug("--version") == (0, f"coaug {__version__}\n", "")


def test_help_names_every_command_and_option(coaug):
    code, listed, _ = coaug("--help")
    assert code == 0
    for command in ("train", "augment", "index", "search", "evaluate", "compare"):
        assert command in listed
    for command, options in (
        ("augment", ["--model", "--collection", "--split", "--side", "--output", "--prompt_set", "--batch_size"]),
        ("evaluate", ["--collection", "--split", "--retriever", "--fields", "--augmentations", "--output", "--k"]),
        ("evaluate", ["--ignore_identical_ids"]),
        ("index", ["--collection", "--split", "--retriever", "--fields", "--augmentations", "--output"]),
        ("search", ["--index", "--model", "--k", "--json"]),
        ("compare", ["RUN_DIR", "--measures", "--format"]),
    ):
        code, listed, _ = coaug(command, "--help")
        assert code == 0
        for option in options:
            assert option in listed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["augmnet"],
        ["evaluate"],
        ["augment", "--model", "m"],
        ["evaluate", "--collection", "c", "--output", "o", "--k", "ten"],
        ["evaluate", "--collection", "c", "--output", "o", "--retriever", "elastic"],
        ["index", "--collection", "c"],
        ["search", "--index", "i"],
        ["compare"],
        ["compare", "a", "b", "--format", "html"],
    ],
)
def test_a_command_line_that_makes_no_sense_exits_with_usage(coaug, arguments):
    code, _, errors = coaug(*arguments)
    assert code == 2
    assert errors.startswith("usage: coaug")
    assert "Traceback" not in errors


def test_the_module_can_be_run(beir_folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "coaug_trl.cli.main",
            "evaluate",
            "--collection",
            beir_folder,
            "--split",
            "no",
            "--output",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == "error: advice has no split 'no': choose from dev, test, train\n"


def test_interruption_says_how_to_go_on(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert cli.run_command(interrupted, resumes=True) == 130
    assert (
        capsys.readouterr().err == "interrupted: the same command goes on from what has been saved, if anything has\n"
    )
    assert cli.run_command(interrupted) == 130  # nothing of it was saved
    assert capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_the_program_is_not_dressed_up_as_bad_input():
    for fault in (RuntimeError("fault"), OSError("no file named")):

        def command(fault=fault):
            raise fault

        with pytest.raises(type(fault)):
            cli.run_command(command)


# Evaluate


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([], {}),
        (["--fields", "best", "--k1", "0.6", "--b", "0.4"], {"fields": "best", "k1": 0.6, "b": 0.4}),
        (["--language", "german"], {"language": "german"}),
    ],
)
def test_evaluate_without_augmentations_is_the_retriever_on_the_collection(
    coaug, beir_folder, tmp_path, arguments, settings
):
    code, printed, _ = coaug("evaluate", "--collection", beir_folder, *arguments, "--output", tmp_path / "bm25")
    assert code == 0
    collection = Collection.load(beir_folder, "test")
    retriever = BM25Retriever(**settings)
    retriever.index(list(collection.corpus.values()))
    queries = {id_: collection.queries[id_] for id_ in collection.qrels}
    run = dict(zip(queries, map(dict, retriever.search(list(queries.values()), 1000)), strict=True))
    expected, per_query = evaluate_run(collection.qrels, run)

    assert sorted(path.name for path in (tmp_path / "bm25").iterdir()) == EVALUATION_FILES
    metrics = read_json(tmp_path / "bm25" / "metrics.json")
    assert set(metrics) == {*expected, "num_queries", "num_queries_without_hits", "retriever"}
    assert {name: metrics[name] for name in expected} == expected
    assert 0 < metrics["nDCG@10"] < 1
    assert metrics["num_queries"] == 8
    assert metrics["num_queries_without_hits"] == 0
    assert metrics["retriever"] == retriever.config
    rows = [json.loads(line) for line in (tmp_path / "bm25" / "per_query.jsonl").read_text().splitlines()]
    assert {row.pop("_id"): row for row in rows} == per_query
    for name, value in expected.items():
        assert f"{name}  {value:.4f}\n" in printed
    assert "over 8 judged queries" in printed


def test_the_written_run_gives_the_written_numbers(coaug, beir_folder, tmp_path):
    assert coaug("evaluate", "--collection", beir_folder, "--split", "train", "--k", 3, "--output", tmp_path)[0] == 0
    run = read_run(tmp_path)
    assert [len(hits) for hits in run.values()] == [3] * 8
    expected, _ = evaluate_run(Collection.load(beir_folder, "train").qrels, run)
    metrics = read_json(tmp_path / "metrics.json")
    assert {name: metrics[name] for name in expected} == expected
    manifest = read_json(tmp_path / "manifest.json")
    assert (manifest["collection"], manifest["split"], manifest["depth"]) == ("advice", "train", 3)
    assert manifest["augmentations"] is None
    assert manifest["augmented_sides"] == []


@pytest.mark.parametrize("side", ["both", "query", "document"])
def test_augment_then_evaluate(coaug, augmentations, beir_folder, tmp_path, side):
    code, _, errors = coaug(
        *("evaluate", "--collection", beir_folder, "--augmentations", augmentations, "--side", side),
        *("--output", tmp_path),
    )
    assert code == 0, errors
    collection = Collection.load(beir_folder, "test")
    augmented = AugmentedCollection.load(augmentations, ["query", "document"] if side == "both" else [side])
    retriever = BM25Retriever(k1=0.9)  # what the policy was trained for
    retriever.index(augmented.documents(collection))
    queries = augmented.queries(collection)
    run = dict(zip(queries, map(dict, retriever.search(list(queries.values()), 1000)), strict=True))
    expected, _ = evaluate_run(collection.qrels, run)
    metrics = read_json(tmp_path / "metrics.json")
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["retriever"] == retriever.config

    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["augmentations"] == read_json(augmentations / "manifest.json")
    assert manifest["augmented_sides"] == (["document", "query"] if side == "both" else [side])
    plain = BM25Retriever(k1=0.9)
    plain.index(list(collection.corpus.values()))
    texts = [collection.queries[id_] for id_ in collection.qrels]
    assert list(map(dict, plain.search(texts, 1000))) != list(run.values())


def write_collection(folder, documents, queries):
    """A BEIR folder in which the first document is relevant to every query, and so is the last."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        rows = [json.dumps({"_id": id_, "title": "", "text": text}) for id_, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    relevant = dict.fromkeys([next(iter(documents)), list(documents)[-1]])
    qrels = [f"{query_id}\t{document_id}\t1" for query_id in queries for document_id in relevant]
    lines = ["query-id\tcorpus-id\tscore", *qrels]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("k", [1, 3, 1000])
def test_ignore_identical_ids_drops_the_query_itself_and_fills_up(coaug, tmp_path, k):
    words = "salt sugar coffee statins gluten pollen running sunlight".split()
    documents = {f"d{i}": " ".join(words[j % 8] for j in range(i, i + 4)) for i in range(8)}
    # queries that are documents, and one that is not
    queries = {id_: documents[id_] for id_ in ("d0", "d3", "d7")} | {"q": "sugar and coffee"}
    evaluate = ("evaluate", "--collection", write_collection(tmp_path / "arguments", documents, queries))
    assert coaug(*evaluate, "--output", tmp_path / "all")[0] == 0
    assert coaug(*evaluate, "--output", tmp_path / "others", "--k", k, "--ignore_identical_ids")[0] == 0
    assert read_json(tmp_path / "all" / "manifest.json")["ignore_identical_ids"] is False
    assert read_json(tmp_path / "others" / "manifest.json")["ignore_identical_ids"] is True

    everything = read_run(tmp_path / "all")
    assert all(next(iter(everything[id_])) == id_ for id_ in ("d0", "d3", "d7"))
    expected = {}
    for query_id, hits in everything.items():
        others = sorted((-score, id_) for id_, score in hits.items() if id_ != query_id)
        expected[query_id] = [-score for score, _ in others][:k]
    found = read_run(tmp_path / "others")
    for query_id, hits in found.items():
        assert query_id not in hits
        # of equal scores any may come first, and a run file tells them apart by their last digit
        assert list(hits.values()) == pytest.approx(expected[query_id], rel=1e-5)
        for document_id, score in hits.items():
            assert score == pytest.approx(everything[query_id][document_id], rel=1e-5)
    assert found.keys() == everything.keys()


@pytest.mark.parametrize("options", [[], ["--ignore_identical_ids"], ["--fields", "best"]])
def test_one_document_and_queries_that_find_nothing(coaug, tmp_path, options):
    queries = {"q1": "salt", "q2": "", "q3": "the", "only": "salt"}
    collection = write_collection(tmp_path / "collection", {"only": "salt and sugar"}, queries)
    code, printed, _ = coaug("evaluate", "--collection", collection, "--k", 50, *options, "--output", tmp_path / "out")
    assert code == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    identical = "--ignore_identical_ids" in options
    assert metrics["num_queries"] == 4
    assert metrics["num_queries_without_hits"] == 2 + identical
    assert metrics["AP"] == (2 - identical) / 4
    assert f"of which {2 + identical} found nothing" in printed


# Augment


def test_augment_writes_the_folder_and_says_what_it_did(coaug, policy, beir_folder, tmp_path):
    arguments = ("augment", "--model", policy, "--collection", beir_folder, "--side", "query", "--output", tmp_path)
    code, printed, _ = coaug(*arguments, "--split", "dev", "--batch_size", 3)
    assert code == 0
    assert "advice (dev): 40 documents" in printed
    assert "query: 8 texts, " in printed
    assert f"{tmp_path / 'manifest.json'}\n" in printed
    assert not (tmp_path / "documents.jsonl").exists()
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["prompt_hash"] == PROMPT_SET.hash
    assert manifest["generation"] == {"max_new_tokens": 24, "repetition_penalty": 1.2}
    assert manifest["retriever"] == BM25Retriever(k1=0.9).config
    rows = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["_id"] for row in rows] == list(Collection.load(beir_folder, "dev").qrels)
    # once more: nothing is left to do, and nothing changes
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert coaug(*arguments, "--split", "dev")[0] == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_an_untrained_model_takes_its_settings_from_the_command_line(coaug, tiny_model, beir_folder, tmp_path):
    common = ("augment", "--model", tiny_model, "--collection", beir_folder, "--side", "query", "--max_new_tokens", 4)
    assert coaug(*common, "--retriever", "dense", "--output", tmp_path / "dense")[0] == 0
    manifest = read_json(tmp_path / "dense" / "manifest.json")
    assert manifest["prompt_hash"] == PromptSet.default("dense").hash
    assert manifest["generation"] == {"max_new_tokens": 4, "repetition_penalty": 1.2}
    assert manifest["retriever"] == {}

    PROMPT_SET.save(tmp_path)
    prompts = ("--prompt_set", tmp_path / "prompt_set.yaml")
    assert coaug(*common, *prompts, "--output", tmp_path / "own")[0] == 0
    manifest = read_json(tmp_path / "own" / "manifest.json")
    assert manifest["prompt_hash"] == PROMPT_SET.hash
    assert manifest["generation"] == {"max_new_tokens": 4, "repetition_penalty": 1.2}


def test_augmentations_of_an_untrained_model_can_be_evaluated_with_any_bm25(coaug, tiny_model, beir_folder, tmp_path):
    common = ("--collection", beir_folder, "--side", "query")
    augment = ("augment", "--model", tiny_model, "--max_new_tokens", 4, "--output", tmp_path / "augmented")
    assert coaug(*augment, *common)[0] == 0
    evaluate = ("evaluate", "--augmentations", tmp_path / "augmented", "--output", tmp_path / "evaluation")
    assert coaug(*evaluate, *common, "--k1", 0.5)[0] == 0
    assert read_json(tmp_path / "evaluation" / "metrics.json")["retriever"]["k1"] == 0.5


# Bad input


@pytest.mark.parametrize("command", ["augment", "evaluate"])
def test_a_collection_that_is_not_there_is_named(refused, policy, tmp_path, command):
    model = ("--model", policy) if command == "augment" else ()
    message = refused(command, *model, "--collection", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert str(tmp_path / "nowhere") in message
    assert not (tmp_path / "out").exists()


def test_a_misspelt_split_is_answered_with_those_there_are(refused, beir_folder, tmp_path):
    message = refused("evaluate", "--collection", beir_folder, "--split", "tset", "--output", tmp_path)
    assert "'tset'" in message
    for split in ("train", "dev", "test"):
        assert split in message


def test_a_corrupt_file_is_named_with_its_line(refused, beir_folder, tmp_path):
    folder = shutil.copytree(beir_folder, tmp_path / "corrupt")
    lines = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "corpus.jsonl").write_text("\n".join([*lines[:6], lines[6][:20], *lines[7:]]), encoding="utf-8")
    message = refused("evaluate", "--collection", folder, "--output", tmp_path / "out")
    assert f"{folder / 'corpus.jsonl'}, line 7" in message
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-30])
    assert "corpus.jsonl.gz" in refused("evaluate", "--collection", folder, "--output", tmp_path / "out")


@pytest.mark.parametrize("setting", [("--k1", "0.8"), ("--b", "0.5"), ("--fields", "best"), ("--language", "german")])
def test_another_retriever_than_the_policys_is_refused(refused, augmentations, beir_folder, tmp_path, setting):
    message = refused(
        *("evaluate", "--collection", beir_folder, "--augmentations", augmentations, "--output", tmp_path / "out"),
        *setting,
    )
    assert str(augmentations) in message
    assert "leave the retriever's settings out" in message
    assert not (tmp_path / "out").exists()


def test_the_policys_own_retriever_settings_may_be_given(coaug, augmentations, beir_folder, tmp_path):
    evaluate = ("evaluate", "--collection", beir_folder, "--augmentations", augmentations, "--output", tmp_path)
    assert coaug(*evaluate, "--k1", "0.9", "--fields", "flat")[0] == 0


def test_augmentations_for_a_dense_retriever_are_refused_by_bm25(refused, augmentations, beir_folder, tmp_path):
    folder = shutil.copytree(augmentations, tmp_path / "dense")
    evaluate = ("evaluate", "--collection", beir_folder, "--augmentations", folder, "--output", tmp_path / "out")
    # of a policy trained for one
    manifest = read_json(folder / "manifest.json") | {"retriever": {"retriever": "dense", "model": "encoder"}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    message = refused(*evaluate)
    assert "'encoder'" in message
    assert "bm25" in message
    # of an untrained model with the prompts for one
    dense = PromptSet("dense", "query:", "document:")
    dense.save(folder)
    manifest |= {"retriever": {}, "prompt_hash": dense.hash}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "prompts for dense retrievers, and the retriever is sparse" in refused(*evaluate)


def test_augmentations_of_another_collection_are_refused(refused, augmentations, beir_folder, tmp_path):
    other = shutil.copytree(beir_folder, tmp_path / "other")
    message = refused(
        "evaluate", "--collection", other, "--augmentations", augmentations, "--output", tmp_path / "out"
    )
    assert "belongs to the collection advice, not to other" in message


def test_augmentations_of_another_split_are_refused(refused, augmentations, beir_folder, tmp_path):
    message = refused(
        *("evaluate", "--collection", beir_folder, "--split", "dev", "--augmentations", augmentations),
        *("--output", tmp_path / "out"),
    )
    assert "lack 8 queries, such as 'dev-statins'" in message


def test_a_place_without_augmentations_is_named(refused, beir_folder, tmp_path):
    evaluate = ("evaluate", "--collection", beir_folder, "--output", tmp_path / "out")
    assert "no augmentations there" in refused(*evaluate, "--augmentations", tmp_path / "typo")


def test_settings_that_contradict_the_policys_are_refused(refused, policy, beir_folder, tmp_path):
    augment = ("augment", "--model", policy, "--collection", beir_folder, "--output", tmp_path / "out")
    assert "max_new_tokens=99" in refused(*augment, "--max_new_tokens", 99)
    PromptSet.default("dense").save(tmp_path)
    assert "leave the prompt set out" in refused(*augment, "--prompt_set", tmp_path / "prompt_set.yaml")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (("--batch_size", "0"), "batch_size is 0"),
        (("--max_new_tokens", "0"), "max_new_tokens is 0"),
        (("--prompt_set", "no-such.yaml"), "no-such.yaml"),
    ],
)
def test_augment_settings_that_cannot_work_are_refused(refused, tiny_model, beir_folder, tmp_path, setting, named):
    message = refused(
        "augment", "--model", tiny_model, "--collection", beir_folder, "--output", tmp_path / "out", *setting
    )
    assert named in message


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (("--k", "0"), "at least 1"),
        (("--k", "0", "--ignore_identical_ids"), "at least 1"),
        (("--b", "2"), "b=2"),
        (("--language", "klingon"), "'klingon'"),
    ],
)
def test_evaluate_settings_that_cannot_work_are_refused(refused, beir_folder, tmp_path, setting, named):
    assert named in refused("evaluate", "--collection", beir_folder, "--output", tmp_path / "out", *setting)


def test_a_place_without_a_model_is_named(refused, beir_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    augment = ("augment", "--collection", beir_folder, "--output", tmp_path / "out")
    assert str(tmp_path / "empty") in refused(*augment, "--model", tmp_path / "empty")
    assert str(tmp_path / "typo") in refused(*augment, "--model", tmp_path / "typo")


@pytest.mark.parametrize("command", ["augment", "evaluate"])
def test_an_output_that_is_a_file_is_named(refused, policy, beir_folder, tmp_path, command):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    model = ("--model", policy) if command == "augment" else ()
    message = refused(command, *model, "--collection", beir_folder, "--output", tmp_path / "taken")
    assert str(tmp_path / "taken") in message
