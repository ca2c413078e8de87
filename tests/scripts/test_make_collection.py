"""From CSV files to a collection."""

import csv
import sys
from pathlib import Path

import pytest

from coaug_trl import Collection


ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "docs/sample"
sys.path.insert(0, str(ROOT / "scripts"))

from make_collection import SPLITS, main  # noqa: E402


DOCUMENTS = "id,text\nd1,one\nd2,two\nd3,three\n"
JUDGMENTS = "query,document_id\nfirst,d1\nsecond,d2\nthird,d3\n"


@pytest.fixture
def make(tmp_path, capsys):
    """Runs the script on the contents of two files; returns its exit code, what it printed, and the folder."""

    def run(documents=DOCUMENTS, judgments=JUDGMENTS, *options, output="made"):
        for name, content in (("documents", documents), ("judgments", judgments)):
            content = content if isinstance(content, bytes) else content.encode()
            (tmp_path / f"{name}.csv").write_bytes(content)
        paths = [f"--{name}={tmp_path / name}.csv" for name in ("documents", "judgments")]
        code = main([*paths, f"--output={tmp_path / output}", *options])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, tmp_path / output

    return run


def load(folder):
    return {split: Collection.load(folder, split) for split in SPLITS}


def test_the_sample_becomes_a_collection(make):
    documents, judgments = (SAMPLE / f"{name}.csv" for name in ("documents", "judgments"))
    code, out, _, folder = make(documents.read_bytes(), judgments.read_bytes())
    assert code == 0
    splits = load(folder)
    assert [len(splits[split].qrels) for split in SPLITS] == [14, 5, 5]
    assert "made (train): 40 documents (0 empty), 14 judged queries" in out

    with open(judgments, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {
        (collection.queries[query_id], document_id, str(relevance))
        for collection in splits.values()
        for query_id, judged in collection.qrels.items()
        for document_id, relevance in judged.items()
    }
    assert found == {(row["query"], row["document_id"], row["relevance"]) for row in rows}


def test_every_query_is_in_one_split_and_the_seed_decides_in_which(make):
    judgments = "query,document_id\n" + "".join(f"query {number},d{number % 3 + 1}\n" for number in range(30))
    drawn = []
    for seed, output in ((1, "a"), (1, "b"), (2, "c")):
        folder = make(DOCUMENTS, judgments, f"--seed={seed}", "--dev_share=0.1", "--test_share=0.5", output=output)[3]
        splits = load(folder)
        assert [len(splits[split].qrels) for split in SPLITS] == [12, 3, 15]
        assert len(set().union(*(splits[split].qrels for split in SPLITS))) == 30
        drawn.append({split: list(splits[split].qrels) for split in SPLITS})
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_spreadsheets_write_is_read(make):
    documents = (
        "\ufeffid,text,title,author\r\n"
        '007,"He said ""no"",\r\nthen left.","A, B",me\r\n'
        "\r\n"
        " d2 ,zwei Wörter,,me\r\n"
        f"d3,{'long ' * 60_000},T,me\r\n"
    )
    judgments = (
        'query_id,query,document_id,relevance\r\nA1,"a ""query""",007,2\r\nA1,"a ""query""",d2,0\r\n'
        "A2,b,d2,1\r\nA3,c,d3,1\r\n"
    )
    code, _, err, folder = make(documents, judgments)
    assert code == 0, err
    collection = Collection.load(folder)
    assert list(collection.corpus) == ["007", "d2", "d3"]
    assert collection.corpus["007"].text == 'He said "no",\r\nthen left.'
    assert (collection.corpus["007"].title, collection.corpus["d2"].title) == ("A, B", "")
    assert collection.queries == {"A1": 'a "query"', "A2": "b", "A3": "c"}
    qrels = {id_: judged for each in load(folder).values() for id_, judged in each.qrels.items()}
    assert qrels == {"A1": {"007": 2, "d2": 0}, "A2": {"d2": 1}, "A3": {"d3": 1}}


def test_queries_without_relevant_documents_go_to_train(make):
    judgments = "query,document_id,relevance\nnothing,d1,0\nfirst,d1,1\nsecond,d2,1\nthird,d3,1\n"
    splits = load(make(DOCUMENTS, judgments)[3])
    assert [splits[split].num_queries_without_relevant for split in SPLITS] == [1, 0, 0]


@pytest.mark.parametrize(
    ("documents", "judgments", "message"),
    [
        ("", JUDGMENTS, "documents.csv, line 1: the column 'id' is missing: the header has none"),
        ("name,text\nd1,one\n", JUDGMENTS, "line 1: the column 'id' is missing: the header has name, text"),
        (
            "id;text\nd1;one\n",
            JUDGMENTS,
            "documents.csv, line 1: the separator seems to be ';': save the file with commas",
        ),
        (DOCUMENTS, JUDGMENTS.replace(",", "\t"), "judgments.csv, line 1: the separator seems to be '\\t'"),
        ("id,text,id\nd1,one,x\n", JUDGMENTS, "line 1: a column is there twice"),
        ("id,text\n", JUDGMENTS, "documents.csv has no documents"),
        (DOCUMENTS + "d1,again\n", JUDGMENTS, "documents.csv, line 5: the document id 'd1' is already taken"),
        ('id,text\nd1,"a\nb"\nd1,c\n', JUDGMENTS, "documents.csv, line 4: the document id 'd1'"),
        (DOCUMENTS + "d4,a,b\n", JUDGMENTS, "documents.csv, line 5: 3 fields, but the header has 2"),
        (DOCUMENTS + "a b,text\n", JUDGMENTS, "line 5: `id` is 'a b'"),
        (DOCUMENTS + ",text\n", JUDGMENTS, "line 5: `id` is ''"),
        (DOCUMENTS + 'd4,"open\n', JUDGMENTS, "documents.csv, line 5: not CSV"),
        (DOCUMENTS.encode() + b"d4,\xff\n", JUDGMENTS, "documents.csv, line 5: not UTF-8"),
        (b"\xff" + DOCUMENTS.encode(), JUDGMENTS, "documents.csv, line 1: not UTF-8"),
        (DOCUMENTS.encode("utf-16"), JUDGMENTS, "documents.csv, line 1: not UTF-8"),
        (DOCUMENTS, JUDGMENTS.encode() + b"x" * 100_000 + b"\nf\xfcr,d1\n", "judgments.csv, line 6: not UTF-8"),
        (DOCUMENTS, "query,document\n", "judgments.csv, line 1: the column 'document_id' is missing"),
        (DOCUMENTS, JUDGMENTS + "fourth,d9\n", "judgments.csv, line 5: the document 'd9' is not among the documents"),
        (DOCUMENTS, JUDGMENTS + " ,d1\n", "judgments.csv, line 5: the query is empty"),
        (DOCUMENTS, "query,document_id\nfirst,d1\n", "judgments.csv: 1 queries have a relevant document"),
        (DOCUMENTS, "query,document_id,relevance\na,d1,yes\n", "line 2: the relevance is 'yes'"),
        (
            DOCUMENTS,
            "query,document_id,relevance\na,d1,1\na,d1,2\n",
            "line 3: query 'q1' and document 'd1' are judged",
        ),
        (
            DOCUMENTS,
            "query,document_id,query_id\na,d1,1\nb,d1,1\n",
            "line 3: the query '1' is 'b' here and 'a' before",
        ),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(make, documents, judgments, message, tmp_path):
    code, _, err, _ = make(documents, judgments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.csv", "judgments.csv"]


def test_shares_that_leave_nothing_are_refused(make):
    assert "leave no query to train on" in make(DOCUMENTS, JUDGMENTS, "--test_share=0.9")[2]
    assert "dev_share is 0; use a share" in make(DOCUMENTS, JUDGMENTS, "--dev_share=0")[2]


def test_an_existing_folder_is_left_alone(make, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine", encoding="utf-8")
    code, _, err, folder = make()
    assert code == 2 and "is there already" in err and "corpus.jsonl" in err
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("missing", ["documents", "judgments"])
def test_a_missing_file_is_named(tmp_path, capsys, missing):
    paths = {name: SAMPLE / f"{name}.csv" for name in ("documents", "judgments")} | {missing: tmp_path / "none.csv"}
    code = main([*(f"--{name}={path}" for name, path in paths.items()), f"--output={tmp_path / 'made'}"])
    assert code == 2
    assert "none.csv: No such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
