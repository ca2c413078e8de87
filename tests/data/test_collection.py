import gzip
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coaug_trl.data.collection import Collection
from coaug_trl.data.document import Document
from coaug_trl.utils.errors import InputError


CORPUS = """\
{"_id": "d1", "title": "Statins", "text": "Statins lower cholesterol."}
{"_id": "d2", "text": "Red yeast rice acts like a statin."}
{"_id": "007", "title": null, "text": "Ein Spion\\u2028liest 日本語."}
{"_id": "d4", "title": " ", "text": ""}
"""
QUERIES = """\
{"_id": "q1", "text": "blood fat medicine", "metadata": {"url": "x"}}
{"_id": "2", "text": "spy"}
{"_id": "q3", "text": "nothing fits"}
"""
HEADER = "query-id\tcorpus-id\tscore\n"
TRAIN = HEADER + "q1\td2\t2\nq1\td1\t1\nq1\t007\t0\nq3\td1\t0\n"
TEST = HEADER + "2\t007\t1\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(CORPUS, encoding="utf-8")
    (folder / "queries.jsonl").write_text(QUERIES, encoding="utf-8")
    (folder / "qrels" / "train.tsv").write_text(TRAIN, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(TEST, encoding="utf-8")
    return folder


def error_message(name_or_path, split="train"):
    with pytest.raises(InputError) as error:
        Collection.load(name_or_path, split)
    return str(error.value)


def assert_is_tiny(collection):
    """The collection of the constants above, its train split."""
    assert collection.corpus == {
        "d1": Document("d1", "Statins", "Statins lower cholesterol."),
        "d2": Document("d2", "", "Red yeast rice acts like a statin."),
        "007": Document("007", "", "Ein Spion\u2028liest 日本語."),
        "d4": Document("d4", " ", ""),
    }
    assert collection.queries == {"q1": "blood fat medicine", "2": "spy", "q3": "nothing fits"}
    assert collection.qrels == {"q1": {"d2": 2, "d1": 1, "007": 0}, "q3": {"d1": 0}}
    assert collection.split == "train"


class TestBeirFolder:
    def test_reads_everything_in_file_order(self, folder):
        collection = Collection.load(folder)
        assert_is_tiny(collection)
        assert collection.name == "tiny"
        assert collection.splits == ("test", "train")
        assert list(collection.corpus) == ["d1", "d2", "007", "d4"]
        assert list(collection.qrels["q1"]) == ["d2", "d1", "007"]
        assert collection.relevant_documents("q1") == ["d2", "d1"]
        assert collection.relevant_documents("q3") == collection.relevant_documents("never judged") == []

    def test_counts_what_is_empty_or_has_nothing_relevant(self, folder):
        collection = Collection.load(folder)
        assert collection.num_empty_documents == 1
        assert collection.queries_with_relevant == ["q1"]
        assert collection.num_queries_without_relevant == 1
        assert collection.summary() == (
            "tiny (train): 4 documents (1 empty), 2 judged queries (1 without a relevant document), 2 relevant pairs"
        )

    def test_with_split_reads_only_judgments(self, folder):
        train = Collection.load(folder)
        (folder / "corpus.jsonl").unlink()
        (folder / "queries.jsonl").unlink()
        test = train.with_split("test")
        assert test.split == "test"
        assert test.qrels == {"2": {"007": 1}}
        assert test.corpus is train.corpus
        assert test.queries is train.queries
        assert test.queries_with_relevant == ["2"]
        assert test.with_split("train") == train

    def test_gzipped_files(self, folder):
        for path in [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "train.tsv"]:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        collection = Collection.load(folder)
        assert_is_tiny(collection)
        assert collection.splits == ("test", "train")

    def test_blank_lines_and_windows_line_ends(self, folder):
        for path in [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "train.tsv"]:
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n  \n")
        assert_is_tiny(Collection.load(folder))

    def test_last_line_without_line_end(self, folder):
        for path in [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "train.tsv"]:
            path.write_bytes(path.read_bytes().rstrip(b"\n"))
        assert_is_tiny(Collection.load(folder))

    def test_path_in_other_forms(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(folder.parent))
        for path in [str(folder), f"{folder}/", ".", "../tiny", "~/tiny"]:
            assert Collection.load(path).name == "tiny"
        # What could be a Hub id as well is a folder if there is one.
        monkeypatch.chdir(folder.parent.parent)
        assert Collection.load(f"{folder.parent.name}/tiny").name == "tiny"

    def test_printing_does_not_print_the_corpus(self, folder):
        assert "cholesterol" not in repr(Collection.load(folder))

    # An id is any text without blanks, and a text is any text.
    ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda id: [id] == id.split()
    )
    texts = st.text(st.characters(exclude_categories=["Cs"]))

    @settings(max_examples=50, deadline=None)
    @given(
        corpus=st.dictionaries(ids, st.tuples(texts, texts), min_size=1, max_size=5),
        queries=st.dictionaries(ids, texts, min_size=1, max_size=4),
        ascii_only=st.booleans(),
        data=st.data(),
    )
    def test_whatever_is_written_is_read(self, corpus, queries, ascii_only, data):
        pairs = st.tuples(st.sampled_from(sorted(queries)), st.sampled_from(sorted(corpus)))
        judgments = data.draw(st.dictionaries(pairs, st.integers(0, 4), min_size=1))
        judgments[next(iter(judgments))] = 1
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "qrels").mkdir()
            with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
                for id, (title, text) in corpus.items():
                    json.dump({"_id": id, "title": title, "text": text}, file, ensure_ascii=ascii_only)
                    file.write("\n")
            with open(folder / "queries.jsonl", "w", encoding="utf-8") as file:
                for id, text in queries.items():
                    json.dump({"_id": id, "text": text}, file, ensure_ascii=ascii_only)
                    file.write("\n")
            rows = "".join(f"{query}\t{document}\t{score}\n" for (query, document), score in judgments.items())
            (folder / "qrels" / "train.tsv").write_bytes((HEADER + rows).encode())
            collection = Collection.load(folder)
        assert collection.corpus == {id: Document(id, title, text) for id, (title, text) in corpus.items()}
        assert collection.queries == queries
        assert {(q, d): score for q, judged in collection.qrels.items() for d, score in judged.items()} == judgments


class TestBadInput:
    """Every fault is an [`InputError`] that says where it is and what to do."""

    @pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
    def test_missing_file(self, folder, name):
        (folder / name).unlink()
        message = error_message(folder)
        assert f"{folder / name} is missing" in message
        assert f"{name}.gz" in message

    @pytest.mark.parametrize("remains", [True, False])
    def test_no_judgments_at_all(self, folder, remains):
        for path in (folder / "qrels").iterdir():
            path.unlink()
        if not remains:
            (folder / "qrels").rmdir()
        assert f"{folder / 'qrels'} holds no SPLIT.tsv" in error_message(folder)

    def test_missing_split_names_those_that_exist(self, folder):
        expected = "tiny has no split 'dev': choose from test, train"
        assert error_message(folder, "dev") == expected
        with pytest.raises(InputError, match=expected):
            Collection.load(folder).with_split("dev")

    @pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
    @pytest.mark.parametrize(
        "line, expected",
        [
            ('{"_id": "x", "text": "a"', "not JSON"),
            ("text", "not JSON"),
            ('["x", "a"]', "not an object"),
            ("null", "not an object"),
            ('{"text": "a"}', "`_id` is missing"),
            ('{"_id": "x7"}', "_id 'x7': `text` is missing"),
            ('{"_id": 7, "text": "a"}', "`_id` is 7, but must be a string: put it in quotes"),
            ('{"_id": null, "text": "a"}', "`_id` is None, but must be a string"),
            ('{"_id": "x7", "text": ["a"]}', "_id 'x7': `text` is ['a'], but must be a string"),
            ('{"_id": "x7", "text": null}', "_id 'x7': `text` is None, but must be a string"),
            ('{"_id": "", "text": "a"}', "the id '' is empty or contains a blank"),
            ('{"_id": "x 7", "text": "a"}', "the id 'x 7' is empty or contains a blank"),
            ('{"_id": "x7", "text": "half of an emoji: \\ud83d"}', "_id 'x7': `text` is not valid Unicode"),
        ],
    )
    def test_bad_line(self, folder, name, line, expected):
        first, *others = (folder / name).read_text(encoding="utf-8").split("\n")
        (folder / name).write_text("\n".join([first, line, *others]), encoding="utf-8")
        message = error_message(folder)
        assert message.startswith(f"{folder / name}, line 2")
        assert expected in message

    def test_title_of_wrong_type(self, folder):
        (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": 3, "text": "a"}\n')
        assert f"{folder / 'corpus.jsonl'}, line 1, _id 'd1': `title` is 3, but must be a string" in error_message(
            folder
        )

    @pytest.mark.parametrize(
        "name, line, expected",
        [
            ("corpus.jsonl", '{"_id": "d2", "text": "again"}\n', "line 5: the document id 'd2' is already taken"),
            ("queries.jsonl", '{"_id": "2", "text": "again"}\n', "line 4: the query id '2' is already taken"),
        ],
    )
    def test_duplicate_id(self, folder, name, line, expected):
        with open(folder / name, "a") as file:
            file.write(line)
        assert f"{folder / name}, {expected}" in error_message(folder)

    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_empty_corpus(self, folder, content):
        (folder / "corpus.jsonl").write_text(content)
        assert f"{folder / 'corpus.jsonl'} is empty" in error_message(folder)

    @pytest.mark.parametrize(
        "rows, expected",
        [
            ("q1\td2\t2\nq1\td1\t1\n", "line 1: the header is missing"),
            ("q1\td2\t2.0\n", "line 1: the header is missing"),
            ("q1 0 d2 2\nq1 0 d1 1\n", "line 1: four columns, as in TREC qrels"),
            ("q1\t0\td2\t2\n", "line 1: four columns, as in TREC qrels"),
            ("query-id,corpus-id,score\nq1,d2,2\n", "line 1: wrong number of columns, 1"),
            (HEADER + "q1\td2\t2\nq1\td1\n", "line 3: wrong number of columns, 2"),
            (HEADER + "q1\t0\td2\t2\n", "line 2: four columns, as in TREC qrels"),
            (HEADER + "q9\td2\t2\n", "line 2: the query 'q9' is not among the queries"),
            (HEADER + "q1\td2\t2\n\nq1\td9\t1\n", "line 4: the document 'd9' (judged for query 'q1') is not in the"),
            (HEADER + "q1\t7\t1\n", "line 2: the document '7' (judged for query 'q1') is not in the corpus"),
            (HEADER + "q1\td2\t-1\n", "line 2: the relevance of document 'd2' to query 'q1' is '-1'"),
            (HEADER + "q1\td2\t1.5\n", "line 2: the relevance of document 'd2' to query 'q1' is '1.5'"),
            (HEADER + "q1\td2\tyes\n", "line 2: the relevance of document 'd2' to query 'q1' is 'yes'"),
            (HEADER + "q1\td2\t\n", "line 2: the relevance of document 'd2' to query 'q1' is ''"),
            (
                HEADER + "q1\td2\t2\nq1\td1\t1\nq1\td2\t1\n",
                "line 4: query 'q1' and document 'd2' are judged 1 here and 2 before: keep one",
            ),
        ],
    )
    def test_bad_judgment(self, folder, rows, expected):
        path = folder / "qrels" / "train.tsv"
        path.write_text(rows)
        assert f"{path}, {expected}" in error_message(folder)

    def test_the_same_judgment_twice_is_one(self, folder):
        (folder / "qrels" / "train.tsv").write_text(HEADER + "q1\td2\t2\nq1\td2\t2\n")
        assert Collection.load(folder).qrels == {"q1": {"d2": 2}}

    @pytest.mark.parametrize("rows", ["", HEADER, HEADER + "q1\td2\t0\n"])
    def test_no_relevant_pair(self, folder, rows):
        (folder / "qrels" / "train.tsv").write_text(rows)
        assert "tiny: the split 'train' has no relevant pair" in error_message(folder)

    @pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
    def test_not_utf8(self, folder, name):
        lines = (folder / name).read_bytes().split(b"\n")
        lines[1] = "naïve".encode("latin-1")
        (folder / name).write_bytes(b"\n".join(lines))
        assert f"{folder / name}, line 2: not UTF-8" in error_message(folder)

    @pytest.mark.parametrize("damage", ["cut off", "bits changed", "not compressed"])
    def test_damaged_gzip(self, folder, damage):
        plain = (folder / "corpus.jsonl").read_bytes()
        (folder / "corpus.jsonl").unlink()
        compressed = gzip.compress(plain)
        content = {
            "cut off": compressed[:-20],
            "bits changed": compressed[:20] + bytes(20) + compressed[40:],
            "not compressed": plain,
        }[damage]
        (folder / "corpus.jsonl.gz").write_bytes(content)
        message = error_message(folder)
        assert f"{folder / 'corpus.jsonl.gz'}, after line " in message
        assert "damaged gzip file" in message

    @pytest.mark.parametrize("name", ["/no/such/folder", "./no/folder", "no-slash", "one/two/three", "../gone", ""])
    def test_no_such_collection(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        # The empty string is the working folder, which is no collection.
        message = error_message(name)
        for accepted in ["a BEIR folder", "ORG/NAME", "irds:NAME", "vocabulary-gap"]:
            assert accepted in message

    def test_a_file_is_no_collection(self, folder):
        assert f"{folder / 'corpus.jsonl'} is not a folder" in error_message(folder / "corpus.jsonl")

    def test_with_split_of_a_collection_made_by_hand(self):
        corpus = {"d": Document("d", "", "text")}
        collection = Collection("mine", "train", corpus, {"q": "text"}, {"q": {"d": 1}}, ("train",))
        assert collection.with_split("train") is collection
        with pytest.raises(InputError, match="mine was not loaded from anywhere"):
            collection.with_split("test")


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        """A folder in the place of the Hub: all but the address is the real `load_dataset`."""
        import datasets

        hub = tmp_path / "hub"
        repository = hub / "BeIR" / "tiny"
        repository.mkdir(parents=True)
        (repository / "README.md").write_text(
            "---\nconfigs:\n"
            "- config_name: corpus\n  data_files: [{split: corpus, path: corpus.jsonl}]\n"
            "- config_name: queries\n  data_files: [{split: queries, path: queries.jsonl}]\n---\n"
        )
        (repository / "corpus.jsonl").write_text(CORPUS, encoding="utf-8")
        (repository / "queries.jsonl").write_text(QUERIES, encoding="utf-8")
        qrels = hub / "BeIR" / "tiny-qrels"
        qrels.mkdir()
        for split, rows in [("train", TRAIN), ("dev", TEST), ("test", TEST)]:
            (qrels / f"{split}.tsv").write_text(rows)
        load_dataset = datasets.load_dataset
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda path, *args, **kwargs: load_dataset(
                str(hub / path), *args, cache_dir=str(tmp_path / "cache"), **kwargs
            ),
        )
        return hub

    def test_reads_everything(self, hub):
        collection = Collection.load("BeIR/tiny")
        assert_is_tiny(collection)
        assert collection.name == "BeIR/tiny"
        assert collection.splits == ("train", "dev", "test")
        dev = collection.with_split("dev")
        assert dev.qrels == {"2": {"007": 1}}
        assert dev.corpus is collection.corpus

    def test_integer_ids_become_strings(self, hub):
        (hub / "BeIR" / "tiny" / "corpus.jsonl").write_text('{"_id": 31, "text": "a"}\n{"_id": 4, "text": "b"}\n')
        (hub / "BeIR" / "tiny" / "queries.jsonl").write_text('{"_id": 31, "text": "c"}\n')
        for path in (hub / "BeIR" / "tiny-qrels").iterdir():
            path.write_text(HEADER + "31\t4\t1\n31\t31\t-1\n")
        collection = Collection.load("BeIR/tiny", "test")
        assert list(collection.corpus) == ["31", "4"]
        assert collection.queries == {"31": "c"}
        # TREC-COVID on the Hub has judgments of -1.
        assert collection.qrels == {"31": {"4": 1, "31": 0}}

    def test_missing_split(self, hub):
        assert error_message("BeIR/tiny", "validation") == (
            "BeIR/tiny has no split 'validation': choose from train, dev, test"
        )

    def test_faults_name_config_and_row(self, hub):
        with open(hub / "BeIR" / "tiny" / "corpus.jsonl", "a") as file:
            file.write('{"_id": "d2", "title": "", "text": "again"}\n')
        assert "BeIR/tiny, config corpus, row 4: the document id 'd2' is already taken" in error_message("BeIR/tiny")

    def test_faults_in_judgments_name_split_and_row(self, hub):
        (hub / "BeIR" / "tiny-qrels" / "test.tsv").write_text(HEADER + "q1\td1\t1\nq1\tgone\t1\n")
        assert "BeIR/tiny-qrels, split test, row 1: the document 'gone'" in error_message("BeIR/tiny", "test")

    def test_judgments_with_other_columns(self, hub):
        for path in (hub / "BeIR" / "tiny-qrels").iterdir():
            path.write_text("query\tdocument\tlabel\nq1\td1\t1\n")
        message = error_message("BeIR/tiny")
        assert "cannot load BeIR/tiny-qrels from the Hub" in message
        assert "query-id" in message

    def test_parquet_with_integers(self, hub):
        import datasets

        for path in (hub / "BeIR" / "tiny-qrels").iterdir():
            path.unlink()
        qrels = datasets.Dataset.from_dict({"query-id": [2, 2], "corpus-id": ["007", "d1"], "score": [1, 0]})
        qrels.to_parquet(hub / "BeIR" / "tiny-qrels" / "test-00000-of-00001.parquet")
        assert Collection.load("BeIR/tiny", "test").qrels == {"2": {"007": 1, "d1": 0}}

    def test_other_layout(self, hub):
        (hub / "BeIR" / "tiny" / "README.md").unlink()
        assert "cannot load BeIR/tiny, corpus from the Hub" in error_message("BeIR/tiny")

    def test_unknown_dataset(self, hub):
        message = error_message("BeIR/unknown")
        assert "cannot load BeIR/unknown-qrels from the Hub" in message
        assert "no folder BeIR/unknown here either" in message

    def test_hub_out_of_reach(self, monkeypatch, tmp_path):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        message = error_message("BeIR/nfcorpus")
        assert "cannot load BeIR/nfcorpus-qrels from the Hub" in message
        assert "a collection is a BEIR folder" in message


class FakeIrDataset:
    """What ir_datasets offers of a dataset, without its downloads."""

    def __init__(self, docs=None, queries=None, qrels=None):
        self.docs, self.queries, self.qrels = docs, queries, qrels

    def has_queries(self):
        return self.queries is not None

    def has_qrels(self):
        return self.qrels is not None

    def docs_iter(self):
        return iter(self.docs)

    def queries_iter(self):
        return iter(self.queries)

    def qrels_iter(self):
        return iter(self.qrels)


class TestIrDatasets:
    @pytest.fixture
    def fakes(self, monkeypatch):
        """Datasets to load instead of the real ones; the registry of names is the real one."""
        import ir_datasets

        fakes = {}
        monkeypatch.setattr(ir_datasets, "load", lambda name: fakes.get(name, FakeIrDataset()))
        return fakes

    @pytest.fixture
    def nfcorpus(self, fakes):
        from ir_datasets.datasets.beir import BeirTitleDoc
        from ir_datasets.formats import GenericQuery, TrecQrel

        docs = [BeirTitleDoc("1", "one text", "One"), BeirTitleDoc("2", "two text", "")]
        queries = [GenericQuery("10", "first"), GenericQuery("20", "second")]
        fakes["beir/nfcorpus"] = FakeIrDataset(docs, queries)
        fakes["beir/nfcorpus/train"] = FakeIrDataset(docs, queries[:1], [TrecQrel("10", "1", 2, "0")])
        fakes["beir/nfcorpus/test"] = FakeIrDataset(
            docs, queries[1:], [TrecQrel("20", "2", 1, "0"), TrecQrel("20", "1", -1, "0")]
        )

    def test_splits_are_names_below(self, nfcorpus):
        train = Collection.load("irds:beir/nfcorpus")
        assert train.name == "irds:beir/nfcorpus"
        assert sorted(train.splits) == ["test", "train"]
        assert train.corpus == {"1": Document("1", "One", "one text"), "2": Document("2", "", "two text")}
        assert train.queries == {"10": "first", "20": "second"}
        assert train.qrels == {"10": {"1": 2}}
        test = train.with_split("test")
        assert test.qrels == {"20": {"2": 1, "1": 0}}
        assert test.corpus is train.corpus
        assert test.queries is train.queries

    def test_name_of_a_split(self, nfcorpus):
        collection = Collection.load("irds:beir/nfcorpus/test", "test")
        assert collection.splits == ("test",)
        assert collection.qrels == {"20": {"2": 1, "1": 0}}
        assert error_message("irds:beir/nfcorpus/test") == (
            "irds:beir/nfcorpus/test has no split 'train': choose from test"
        )

    def test_queries_kept_by_split(self, fakes):
        from ir_datasets.formats import GenericDoc, GenericQuery, TrecQrel

        docs = [GenericDoc("1", "one"), GenericDoc("2", "two")]
        fakes["msmarco-passage"] = FakeIrDataset(docs)
        fakes["msmarco-passage/train"] = FakeIrDataset(docs, [GenericQuery("a", "A")], [TrecQrel("a", "1", 1, "0")])
        fakes["msmarco-passage/dev"] = FakeIrDataset(docs, [GenericQuery("b", "B")], [TrecQrel("b", "2", 1, "0")])
        train = Collection.load("irds:msmarco-passage")
        assert train.queries == {"a": "A"}
        assert train.corpus["1"] == Document("1", "", "one")
        dev = train.with_split("dev")
        assert dev.queries == {"b": "B"}
        assert dev.corpus is train.corpus

    def test_documents_and_queries_of_several_fields(self, fakes):
        from ir_datasets.datasets.cord19 import Cord19Doc
        from ir_datasets.formats import TrecQrel, TrecQuery

        fakes["vaswani"] = FakeIrDataset(
            [Cord19Doc("1", "A title", "10.1/x", "2020", "An abstract.")],
            [TrecQuery("10", "keywords", "A sentence.", "A narrative.")],
            [TrecQrel("10", "1", 1, "0")],
        )
        collection = Collection.load("irds:vaswani", "vaswani")
        assert collection.corpus["1"].title == ""
        assert collection.corpus["1"].text.split() == ["A", "title", "An", "abstract."]
        assert collection.queries == {"10": "keywords"}

    def test_faults_name_the_place(self, nfcorpus, fakes):
        docs = fakes["beir/nfcorpus"].docs
        docs.append(docs[0])
        assert "irds:beir/nfcorpus, document 2: the document id '1' is already taken" in error_message(
            "irds:beir/nfcorpus"
        )

    def test_no_judgments(self, fakes):
        assert "irds:vaswani has no relevance judgments" in error_message("irds:vaswani")

    def test_unknown_name(self):
        assert "ir_datasets knows no 'beir/unknown'" in error_message("irds:beir/unknown")

    @pytest.mark.parametrize("error", [ConnectionError("no route"), RuntimeError("All download sources failed")])
    def test_download_fails(self, nfcorpus, fakes, error):
        def docs_iter():
            raise error

        fakes["beir/nfcorpus"].docs_iter = docs_iter
        assert error_message("irds:beir/nfcorpus") == f"ir_datasets cannot read irds:beir/nfcorpus: {error}"

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ir_datasets", None)
        assert 'pip install ".[irds]"' in error_message("irds:vaswani")


def test_vocabulary_gap():
    train = Collection.load("vocabulary-gap")
    assert train.name == "vocabulary-gap"
    assert train.queries_with_relevant
    assert {"train", "test"} <= set(train.splits)
    test = train.with_split("test")
    assert not set(train.qrels) & set(test.qrels)
    assert Collection.load("vocabulary-gap", "test") == test


@pytest.mark.skipif("COAUG_NFCORPUS" not in os.environ, reason="COAUG_NFCORPUS does not name BEIR's NFCorpus folder")
@pytest.mark.parametrize("split, queries, pairs", [("train", 2590, 110575), ("dev", 324, 11385), ("test", 323, 12334)])
def test_nfcorpus(split, queries, pairs):
    collection = Collection.load(os.environ["COAUG_NFCORPUS"], split)
    assert len(collection.corpus) == 3633
    assert len(collection.queries) == 3237
    assert len(collection.queries_with_relevant) == queries
    assert sum(map(len, collection.qrels.values())) == pairs


# A corpus that stays where it is


def test_a_streamed_corpus_is_the_corpus(beir_folder, collection):
    streamed = Collection.load(beir_folder, "train", stream=True)
    assert len(streamed.corpus) == len(collection.corpus)
    assert list(streamed.corpus) == list(collection.corpus)
    assert dict(streamed.corpus.items()) == collection.corpus
    assert all(document_id in streamed.corpus for document_id in collection.corpus)
    assert "nothing" not in streamed.corpus
    assert streamed.qrels == collection.qrels
    assert streamed.with_split("test").qrels == collection.with_split("test").qrels


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"_id": "salt-1", "text": "again"}', "the document id 'salt-1' is already taken"),
        ('{"_id": "x"}', "`text` is missing"),
        ("{", "not JSON"),
    ],
)
def test_a_streamed_corpus_is_checked_as_a_loaded_one(beir_folder, tmp_path, line, named):
    folder = Path(shutil.copytree(beir_folder, tmp_path / "collection"))
    with open(folder / "corpus.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    messages = []
    for stream in (False, True):
        with pytest.raises(InputError, match=named) as error:
            Collection.load(folder, stream=stream)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "corpus.jsonl, line 41" in messages[0]
