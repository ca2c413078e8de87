"""Cards: what they state is what was measured, they are valid on the Hub, and what they quote stays text."""

import ast
import importlib
import json
import re
import shlex
from dataclasses import replace

import pytest
import yaml
from hub_server import wrong_metadata
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, PromptSet
from coaug_trl.augmentation.folder import AugmentedCollection
from coaug_trl.cli.main import make_parser
from coaug_trl.evaluation.comparison import compare_folders
from coaug_trl.policy.settings import GenerationSettings, PolicySettings
from coaug_trl.publishing.cards import augmentations_card, draw_curves, index_card, model_card
from coaug_trl.publishing.record import RunRecord, load_record
from coaug_trl.publishing.upload import CURVES_FILE
from coaug_trl.serving.index import SearchIndex
from coaug_trl.training.record import describe_training


REPO = "alice/advice-coaug"


@pytest.fixture(scope="module")
def run(tmp_path_factory, collection, beir_folder, tiny_model):
    """A policy trained for two steps, with evaluations of it, of what it began with, and without augmentations."""
    from coaug_trl.cli.main import main

    folder = tmp_path_factory.mktemp("runs") / "advice"
    args = CoAugConfig(
        str(folder),
        groups_per_batch=4,
        group_size=6,
        num_relevant=2,
        num_generations=3,
        updates_per_batch=2,
        per_device_train_batch_size=12,
        max_completion_length=12,
        max_steps=2,
        learning_rate=2e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = CoAugTrainer(
        str(tiny_model), args, collection, BM25Retriever(), eval_collection=collection.with_split("dev")
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    generation = ["--max_new_tokens", 12, "--batch_size", 64]
    for name, model, options in (("trained", folder, generation[2:]), ("before", tiny_model, generation)):
        augment = ["augment", "--model", model, "--collection", beir_folder, "--output", folder / f"added/{name}"]
        assert main([*map(str, [*augment, *options])]) == 0
    for name, added, side in (
        ("none", None, "both"),
        ("before", "before", "both"),
        ("queries", "trained", "query"),
        ("both", "trained", "both"),
    ):
        options = ["--augmentations", folder / f"added/{added}", "--side", side] if added else []
        evaluate = ["evaluate", "--collection", beir_folder, "--output", folder / f"evaluations/{name}", *options]
        assert main([*map(str, evaluate)]) == 0
    return folder


@pytest.fixture(scope="module")
def record(run) -> RunRecord:
    return load_record(run)


@pytest.fixture(scope="module")
def card(record) -> ModelCard:
    return model_card(record, REPO)


def section(card, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.text, flags=re.MULTILINE | re.DOTALL)[1]


def table(text: str, place: int = 0) -> list[list[str]]:
    """The cells of a table of a section, its header first."""
    blocks = [block for block in text.split("\n\n") if block.lstrip().startswith("|")]
    lines = blocks[place].strip().splitlines()
    return [[cell.strip(" *") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (lines[0], *lines[2:])]


def html(text: str) -> str:
    """Markdown as a browser gets it, raw HTML and all."""
    return MarkdownIt("commonmark").enable("table").render(text)


def code_blocks(card, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card.text, flags=re.MULTILINE | re.DOTALL)


# The model


def test_results_are_those_that_compare_gives(run, card):
    folders = [run / "evaluations" / name for name in ("none", "before", "queries", "both")]
    comparison = compare_folders(folders)
    header, *rows = table(section(card, "Results"))
    assert [row[:2] for row in rows] == [
        ["none", "nothing"],
        ["before", "queries and documents"],
        ["this model", "queries"],
        ["this model", "queries and documents"],
    ]
    for measure in comparison.values:
        column = header.index(measure)
        assert [row[column] for row in rows] == [f"{mean:.4f}" for mean in comparison.means(measure)]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [row[header.index("queries")] for row in rows] == ["8"] * 4
    hits = [str(each["num_queries_without_hits"]) for each in metrics]
    assert [row[header.index("without hits")] for row in rows] == hits

    _, *tests = table(section(card, "Results"), 1)
    pairs = [pair for pair in comparison.pairs if pair.measure == "nDCG@10" and pair.later == 3]
    assert len(tests) == len(pairs) == 3
    for row, pair in zip(tests, pairs, strict=True):
        assert row[1:3] == [f"{pair.mean_difference:+.4f}", f"{pair.wins}/{pair.ties}/{pair.losses}"]
        for text, p in zip(row[3:], (pair.p_t_test_holm, pair.p_randomization_holm), strict=True):
            assert float(text.strip("\\<")) == pytest.approx(max(p, 0.0001), abs=1e-4)
    first, *_, last = comparison.means("nDCG@10")
    assert f"nDCG@10 on advice (test): {last:.4f}, against {first:.4f} without augmentation" in card.text


def test_the_model_index_comes_back_as_it_went(run, card, tmp_path):
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict()
    assert again.content == card.content
    metadata = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "advice-coaug"
    metrics = json.loads((run / "evaluations/both/metrics.json").read_text())
    names = {
        "ndcg_at_10": "nDCG@10",
        "ndcg_at_100": "nDCG@100",
        "recall_at_100": "R@100",
        "mrr_at_10": "RR@10",
        "map": "AP",
    }
    assert {each.metric_type: each.metric_value for each in results} == {
        hub: metrics[ours] for hub, ours in names.items()
    }
    assert {(each.task_type, each.dataset_type, each.dataset_split) for each in results} == {
        ("text-retrieval", "advice", "test")
    }


def test_metadata_of_a_model_that_began_in_a_folder(card):
    data = card.data
    assert data.base_model is None and data.datasets is None and data.license is None
    assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
    assert {"trl", "coaug", "information-retrieval", "query-expansion", "document-expansion", "bm25"} < set(data.tags)
    assert "arxiv:2506.18670" in data.tags


def test_metadata_of_an_adapter_of_a_model_of_the_hub(run, record, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    training = record.training | {
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "base_model_is_folder": False,
        "collection": "BeIR/nfcorpus",
    }
    settings = replace(record.settings, augment="query")
    data = model_card(RunRecord(folder, settings, training, [], []), REPO).data
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen2.5-0.5B-Instruct", "adapter")
    assert data.datasets == ["BeIR/nfcorpus"] and data.library_name == "peft"
    assert "query-expansion" in data.tags and "document-expansion" not in data.tags
    # runs/mine has the form of a Hub id, but training saw that it was a folder
    local = training | {"base_model": "runs/mine", "base_model_is_folder": True}
    assert model_card(RunRecord(folder, settings, local, [], []), REPO).data.base_model is None


def test_the_figures_of_training(card, record):
    rows = dict(table(section(card, "Training"))[1:])
    assert rows["optimizer steps"] == "2"
    assert rows["completions"] == "72"  # 4 groups × 6 texts × 3 rollouts, which two steps share
    assert rows["tokens, prompts and completions"] == f"{int(record.last('num_tokens')):,}"
    assert rows["mean reward, last logged"] == f"{record.last('reward'):.4f}"
    assert rows["nDCG@10 on the dev split, last"] == f"{record.last('eval_nDCG@10'):.4f}"
    assert rows["processes"] == "1 (cpu)"
    (arguments,) = code_blocks(card, "yaml")
    arguments = yaml.safe_load(arguments)
    assert arguments["learning_rate"] == 2e-3 and arguments["max_steps"] == 2 and arguments["groups_per_batch"] == 4
    assert not {"temperature", "output_dir", "generation_batch_size"} & arguments.keys()
    assert dict(table(section(card, "Data"))[1:])["documents"] == "40"


def test_the_time_of_steps_is_counted_over_interruptions(record):
    """Each entry has the mean time of the steps since the one before, whenever that was."""
    history = [{"step": 10, "step_time": 2.0}, {"step": 12, "eval_loss": 0.0}, {"step": 20, "step_time": 3.0}]
    history.append({"step": 25, "step_time": 1.0, "train_runtime": 5.0})
    record = replace(record, history=history, evaluations=[])
    assert record.step_seconds == 10 * 2 + 10 * 3 + 5 * 1
    assert dict(table(section(model_card(record, REPO), "Training"))[1:])["completions"] == f"{13 * 72}"


def test_nothing_of_this_machine_is_in_the_card(card, run, tiny_model, beir_folder, record):
    parents = [path for folder in (run, tiny_model, beir_folder) for path in list(folder.parents)[:-1]]
    for path in [run, tiny_model, beir_folder, *parents]:
        assert str(path) not in card.content
    encoder = str(tiny_model / "encoder")
    training = record.training | {"arguments": {"augmentations": str(run / "added"), "vllm": {"model": encoder}}}
    settings = PolicySettings(PromptSet.default("dense"), retriever={"retriever": "dense", "model": encoder})
    content = model_card(replace(record, training=training, settings=settings, evaluations=[]), REPO).content
    assert str(tiny_model.parent) not in content and str(run) not in content
    assert "augmentations: added" in content and "`encoder`" in content


def test_the_licence_is_that_of_the_base_model(record, tmp_path):
    training = record.training | {"base_model": str(tmp_path)}
    record = replace(record, training=training, evaluations=[])
    assert model_card(record, REPO).data.license is None
    assert "The licence of the base model applies" in section(model_card(record, REPO), "Licence")
    metadata = {"license": "other", "license_name": "qwen-research", "license_link": "https://example.org/terms"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# Base\n")
    card = model_card(record, REPO)
    assert {name: card.data.get(name) for name in metadata} == metadata
    assert "`qwen-research`" in section(card, "Licence")
    (tmp_path / "README.md").write_text("---\n: [\n---\n# Damaged\n")
    assert model_card(record, REPO).data.license is None


def test_the_licence_that_training_saw_is_stated(record):
    stated = {"license": "other", "license_name": "qwen-research", "license_link": "https://example.org/terms"}
    hub = {"base_model": "Qwen/Qwen2.5-0.5B", "base_model_is_folder": False, "base_license": stated}
    card = model_card(replace(record, training=record.training | hub, evaluations=[]), REPO)
    assert {name: card.data.get(name) for name in stated} == stated
    assert "`qwen-research`" in section(card, "Licence")


def test_no_secret_and_no_default_is_kept_of_the_arguments(collection, tmp_path):
    kwargs = {"dtype": "float32", "token": "hf_kwarg", "more": [{"api_key": "key", "note": "use hf_inner"}]}
    (tmp_path / "added").mkdir()
    args = CoAugConfig(
        str(tmp_path / "run"),
        hub_token="hf_argument",
        model_init_kwargs=kwargs,
        vllm_server_host="alice.example.org",
        augmentations=f"{tmp_path}/added/",
        candidate_pool="corpus",
        label_names=[],
        learning_rate=2e-3,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    training = describe_training(args, collection, None, "runs/untrained", "cpu")
    arguments = training["arguments"]
    assert arguments["model_init_kwargs"] == {"dtype": "float32", "more": [{}]}
    assert arguments["augmentations"] == "added" and arguments["learning_rate"] == 2e-3
    assert not {"output_dir", "hub_token", "vllm_server_host", "label_names"} & arguments.keys()
    assert not [value for value in arguments.values() if value in (None, [], {})]
    for secret in ("hf_", "key", "alice", str(tmp_path)):
        assert secret not in json.dumps(training)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("irds:beir/nfcorpus/test", "irds-beir-nfcorpus-test"),
        ("my notes", "my-notes"),
        ("BeIR/nfcorpus", "BeIR/nfcorpus"),
        ("ü", "collection"),
    ],
)
def test_the_hub_takes_the_metadata_whatever_the_collection_is_called(record, name, place):
    evaluations = [
        replace(each, evaluation=replace(each.evaluation, manifest=each.evaluation.manifest | {"collection": name}))
        for each in record.evaluations
    ]
    record = replace(record, training=record.training | {"collection": name}, evaluations=evaluations[-1:])
    card = model_card(record, REPO)
    assert {each.dataset_type for each in card.data.eval_results} == {place}
    assert {each.dataset_name for each in card.data.eval_results} == {f"{name} (test)"}
    assert list(wrong_metadata(yaml.safe_load(card.content.split("---\n")[1]))) == []


def test_values_on_queries_that_training_saw_are_no_results(record):
    def seen(**training):
        card = model_card(replace(record, training=record.training | training), REPO)
        return card.data.eval_results is None and "without augmentation, over" not in card.text, card

    none, card = seen(train_split="test")
    assert none
    assert "no result, since the model was trained on these queries" in section(card, "Results")
    assert "The values on advice (test) are no result" in section(card, "Limits")
    assert "was not measured on held-out queries" in section(card, "Limits")
    assert not seen(eval_split="test")[0]  # watched, not chosen by
    none, card = seen(eval_split="test", arguments={"load_best_model_at_end": True})
    assert none and "the checkpoint was chosen by these queries" in section(card, "Limits")
    assert not seen(train_split="test", collection="another")[0]


HOSTILE = "a |b`` <script>alert(1)</script>\n# [x](http://y) ![z](w) **c** | ---\n```\n</details>"


def test_what_is_quoted_stays_text(record, tmp_path):
    """Prompts, names and settings that look like markup are shown as they are."""
    settings = PolicySettings(
        PromptSet("sparse", f"Write.\n{HOSTILE}", "~~~\n```python\n" + HOSTILE),
        GenerationSettings(12),
        {"retriever": "bm25", "language": HOSTILE},
    )
    training = record.training | {
        "collection": HOSTILE,
        "train_split": HOSTILE,
        "device": HOSTILE,
        "base_model": f"models/{HOSTILE}",
        "arguments": {"chat_template": HOSTILE},
    }
    evaluations = [
        replace(
            each,
            folder=tmp_path / "x|<b>y" if each.system == "other" else each.folder,
            evaluation=replace(each.evaluation, manifest=each.evaluation.manifest | {"collection": HOSTILE}),
        )
        for each in record.evaluations
        if each.system != "policy"
    ]
    card = model_card(replace(record, settings=settings, training=training, evaluations=evaluations), REPO)
    page = html(card.text).replace('<img src="reward.png"', "")
    for tag in ("<script", "<details", "</details", "<b>", "<img", 'href="http://y"'):
        assert tag not in page, tag
    assert page.count("<h1") == 1
    assert [line for line in card.text.splitlines() if line.startswith("# ")][0] == "# advice-coaug"
    for side in ("query", "document"):
        assert getattr(settings.prompt_set, side) in card.text  # to the letter
    for place in range(2):  # no pipe makes a column more
        cells = table(section(card, ("Training", "Data")[place]))
        assert {len(row) for row in cells} == {2}
    ModelCard(card.content)  # and the metadata is still read


def test_sections_without_content_say_so(record):
    bare = RunRecord(record.folder, record.settings, {}, [], [])
    card = model_card(bare, REPO)
    assert "model-index" not in card.data.to_dict()
    assert section(card, "Results").strip().count("\n") == 0
    assert section(card, "Training").strip() == "The run left no record of its training."
    assert section(card, "Data").strip() == "The run left no record of its data."
    assert "was not measured" in section(card, "Limits")
    assert CURVES_FILE not in card.text
    ModelCard(card.content)


def test_a_single_evaluation_is_not_compared(record):
    (policy,) = [each for each in record.evaluations if each.folder.name == "both"]
    card = model_card(replace(record, evaluations=[policy]), REPO)
    assert len(table(section(card, "Results"))) == 2
    assert " p " not in section(card, "Results") and "without augmentation" not in card.text
    assert len(card.data.eval_results) == 5


@pytest.mark.parametrize("augment", ["both", "query", "document"])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_the_snippets_can_run(record, augment, kind):
    retriever = {"retriever": "dense", "model": "a/b"} if kind == "dense" else BM25Retriever(fields="best").config
    settings = PolicySettings(PromptSet.default(kind), retriever=retriever, augment=augment)
    card = model_card(replace(record, settings=settings, evaluations=[]), REPO)
    (snippet,) = code_blocks(card, "python")
    check_python(snippet)
    commands = [line for block in code_blocks(card, "bash") for line in block.splitlines() if "coaug " in line]
    options = [make_parser().parse_args(shlex.split(command)[1:]) for command in commands]
    assert [each.command for each in options] == ["augment"] * (augment != "query") + ["index", "search"]
    index, search = options[-2:]
    assert index.retriever == retriever["retriever"]
    assert search.model == (None if augment == "document" else REPO)
    if augment == "query":  # nothing else says how the policy's retriever was set
        assert (index.fields, index.encoder) == (retriever.get("fields"), retriever.get("model"))


def check_python(snippet: str) -> None:
    """The names a snippet imports are there, and it calls no method that is not."""
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_snippet_runs(card, run):
    """With the folder in place of the repository, which the Hub's tests are about."""
    (snippet,) = code_blocks(card, "python")
    scope = {}
    exec(snippet.replace(REPO, str(run)), scope)
    assert scope["augmentation"].answer is not None


# The curves


def test_curves_are_drawn(record, tmp_path):
    assert draw_curves(record, tmp_path / CURVES_FILE)
    with Image.open(tmp_path / CURVES_FILE) as image:
        assert image.format == "PNG" and image.width > 800
    assert f"({CURVES_FILE})" in model_card(record, REPO).text
    assert not draw_curves(replace(record, history=[]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_text_types_have_curves_of_their_own_where_they_differ(record, tmp_path):
    def history(apart):
        return [
            {
                "step": step,
                "reward": 0.5,
                "query/reward": 0.5 + apart,
                "relevant/reward": 0.5,
                "irrelevant/reward": 0.5,
            }
            for step in range(1, 20)
        ]

    pictures = []
    for apart in (0.0, 0.001, 0.3):
        draw_curves(replace(record, history=history(apart)), tmp_path / f"{apart}.png")
        pictures.append((tmp_path / f"{apart}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


# Augmentations and indexes


def test_the_card_of_augmentations(run):
    manifest = json.loads((run / "added/trained/manifest.json").read_text())
    card = augmentations_card(manifest, "alice/advice-added", with_texts=False)
    again = DatasetCard(card.content)
    assert again.data.to_dict() == card.data.to_dict()
    assert card.data.size_categories == ["n<1K"]
    contents = {row[0]: row[1] for row in table(section(card, "Contents"))[1:]}
    assert contents == {"queries": "8", "documents": "40"}
    made = dict(table(section(card, "How it was made"))[1:])
    assert made["prompt_hash"] == manifest["prompt_hash"] and made["revision"] == manifest["revision"]
    assert str(run.parent) not in card.content and "`advice`" in card.text
    (snippet,) = code_blocks(card, "python")
    check_python(snippet)
    (command,) = code_blocks(card, "bash")
    assert make_parser().parse_args(shlex.split(command)[1:]).augmentations == "alice/advice-added"
    assert "augmented_text" not in card.text
    assert "augmented_text" in augmentations_card(manifest, "alice/advice-added", with_texts=True).text


def test_the_card_of_an_index(run, collection, tmp_path):
    augmented = AugmentedCollection.load(run / "added/trained", ["document"])
    index = SearchIndex.build(collection, augmented, BM25Retriever(), tmp_path / "index")
    manifest = index.manifest | {"collection": HOSTILE}
    card = index_card(manifest, "alice/advice-index")
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert card.data.library_name == "bm25s" and "bm25" in card.data.tags
    assert "<script" not in html(card.text) and str(run.parent) not in card.content
    assert dict(table(section(card, "Contents"))[1:])["documents"] == "40"
    install, command = code_blocks(card, "bash")[0].splitlines()
    assert make_parser().parse_args(shlex.split(command)[1:]).index == "alice/advice-index"

    # bm25s itself finds what the index finds
    (snippet,) = code_blocks(card, "python")
    check_python(snippet)
    query = "does wheat bread cause stomach pain?"
    loader = f"BM25HF.load({str(tmp_path / 'index/field_0')!r})"
    if not (tmp_path / "index/field_0").is_dir():
        loader = f"BM25HF.load({str(tmp_path / 'index')!r})"
    snippet = snippet.replace('BM25HF.load_from_hub("alice/advice-index")', loader).replace(
        "what to search for", query
    )
    scope = {}
    exec(snippet, scope)
    ids = json.loads((tmp_path / "index/document_ids.json").read_text())
    (hits,) = index.retriever.search([query], 10)
    scores = dict(hits)
    found = [(ids[place], score) for place, score in zip(scope["places"][0], scope["scores"][0], strict=True)]
    assert [score for _, score in found[:3]] == pytest.approx([score for _, score in hits[:3]], rel=1e-4)
    assert scores.keys() >= {id_ for id_, _ in found[:3]}


def test_an_index_without_augmentations_needs_no_model(collection, tmp_path):
    index = SearchIndex.build(collection, None, BM25Retriever(fields="best"), tmp_path / "index")
    card = index_card(index.manifest, "alice/advice-index")
    assert "--model" not in card.text and "How it was made" not in card.text
    assert code_blocks(card, "python") == []  # bm25s alone has no two fields
