"""
The documentation: it builds, its links lead somewhere, its commands and its code run, what it quotes is there.

`bash` blocks of the getting-started page are run as they stand, with a tiny model; `sh` blocks and those of the other
pages are parsed. `python` blocks are run, and print what the `text` block behind them says; `py` blocks are compiled.
"""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from coaug_trl.cli.main import main, make_parser


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
TEXTS = [*PAGES, *FRONT, ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# So that the commands of the page train a tiny model for two steps on a CPU.
TINY = (
    "--use_vllm false --dtype float32 --bf16 false --use_cpu true --groups_per_batch 2 --group_size 6 --num_relevant 3 "
    "--num_generations 2 --updates_per_batch 1 --per_device_train_batch_size 24 --max_completion_length 8 "
    "--max_steps 2 --eval_strategy no --save_strategy no --load_best_model_at_end false --lora_r 4 --report_to none"
)


def blocks(path: Path, *languages: str) -> list[str]:
    """The code blocks of a page in some languages."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [textwrap.dedent(code) for _, language, code in found if language in languages]


def commands(block: str) -> list[list[str]]:
    """The commands of a block, split as a shell does."""
    lines = block.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := shlex.split(line, comments=True))]


# The site


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    for page in PAGES:
        assert (site / page.with_suffix(".html").name).stat().st_size > 5_000


def test_pages_name_nothing_that_would_be_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//[^"]+"', html), page.name
        assert not re.findall(r'<link(?![^>]*rel="canonical")[^>]* href="(?:https?:)?//[^"]+"', html), page.name


def test_formulas_are_mathml(site):
    html = (site / "the-reward.html").read_text(encoding="utf-8")
    assert html.count("<math") > 10
    assert "arithmatex" not in html


@pytest.mark.parametrize("name", [page.stem for page in PAGES])
def test_a_page_in_a_browser(name, site, chromium):
    for width, scheme in ((1280, "light"), (360, "dark")):
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        problems, requests = [], []
        page.on("console", lambda message, seen=problems: seen.append(message.text))
        page.on("pageerror", lambda error, seen=problems: seen.append(str(error)))
        page.on("request", lambda request, seen=requests: seen.append(request.url))
        page.goto((site / f"{name}.html").as_uri())
        assert problems == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"wider than {width}"
        is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert is_dark == (scheme == "dark")
        context.close()


def test_the_search_works_from_disk(site, chromium):
    page = chromium.new_page()
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.click(".md-search__input")
    page.keyboard.type("poisson")
    page.wait_for_selector(".md-search-result__link")
    assert "the-reward.html" in page.locator(".md-search-result__link").first.get_attribute("href")
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def rooms() -> set[str]:
    return {path.parent.name for path in (ROOT / "coaug_trl").glob("*/__init__.py")}


def test_the_drawing_shows_every_room():
    drawn = re.findall(r">(\w+)/", (DOCS / "assets/architecture.svg").read_text(encoding="utf-8"))
    assert set(drawn) == rooms()


def test_the_reference_describes_every_public_name(site):
    import coaug_trl
    from coaug_trl import retrieval, rewards

    html = (site / "api.html").read_text(encoding="utf-8")
    names = {*coaug_trl.__all__, *rewards.__all__, *retrieval.__all__}
    described = {name.rpartition(".")[2] for name in re.findall(r'id="(coaug_trl[\w.]+)"', html)}
    assert names <= described
    # Sections of docstrings have become lists, and references links or code.
    assert "Args:" not in html and "[`" not in html and "[<code>" not in html
    assert 'href="#coaug_trl.CoAugConfig"' in html


@pytest.mark.parametrize("path", FRONT, ids=lambda path: path.name)
def test_links_of_the_front_pages_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / link.partition("#")[0]).exists(), link


# Commands and code


def all_commands():
    for path in (*FRONT, *PAGES):
        for block in blocks(path, "bash", "sh"):
            for command in commands(block):
                yield pytest.param(command, id=f"{path.stem}: {' '.join(command)[:60]}")


@pytest.mark.parametrize("command", all_commands())
def test_commands_are_ones_that_exist(command, tmp_path):
    """Options are read by the real parsers; recipes, scripts and configurations are there."""
    for argument in command:
        if argument.startswith(("recipes/", "scripts/", "docs/")):
            assert (ROOT / argument).exists(), argument
    while command and command[0] in ("accelerate", "launch", "python"):
        command = command[1:]
    if command[0].startswith("--"):  # of accelerate
        command = command[next(place for place, part in enumerate(command) if part.endswith(".py")) :]
    program, *options = command
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [option for option in options if "=" not in option]
        assert all(re.search(rf"^{target}\b.*:", makefile, re.MULTILINE) for target in targets), targets
        return
    scripts = {"scripts/train.py": "train", "scripts/augment.py": "augment"}
    if program in scripts:
        program, options = "coaug", [scripts[program], *options]
    if program != "coaug" or options == ["--version"]:
        assert program in ("pip", "coaug", "scripts/make_collection.py")
        return
    if options[:1] == ["train"]:
        from coaug_trl.training.recipe import parse_arguments

        options = ["recipes/nfcorpus/qwen2.5-7b-bm25.yaml" if option == "RECIPE" else option for option in options[1:]]
        options[options.index("--config") + 1] = str(ROOT / options[options.index("--config") + 1])
        parse_arguments(
            [*options, "--use_cpu", "true", "--bf16", "false"]
        )  # names, values, and whether they go together
        return
    if options == ["..."]:
        return
    # Names that stand for files and numbers are read as strings.
    parsed, others = make_parser().parse_known_args([option for option in options if option != "..."])
    assert others == [], others


@pytest.fixture(scope="module")
def walk(tmp_path_factory, tiny_model):
    """Runs the commands of the getting-started page, in order; returns the folder and what each printed."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_collection import main as make_collection

    folder = tmp_path_factory.mktemp("walk")
    for name in ("docs", "recipes", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    printed = []
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks(DOCS / "getting-started.md", "bash"):
            for program, *options in commands(block):
                output, errors = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                    if program == "python":
                        assert options.pop(0) == "scripts/make_collection.py"
                        code = make_collection(options)
                    else:
                        assert program == "coaug"
                        if options[0] == "train":
                            options += ["--model_name_or_path", str(tiny_model), *TINY.split()]
                        code = main(options)
                assert code == 0, f"{' '.join(options)}: {output.getvalue()}\n{errors.getvalue()[-2000:]}"
                printed.append((options, output.getvalue()))
    finally:
        os.chdir(before)
    return folder, printed


def test_getting_started_runs(walk):
    folder, printed = walk
    shown = {options[0]: output for options, output in printed}
    # The page shows what the first command prints, word for word.
    assert blocks(DOCS / "getting-started.md", "text")[0] == printed[0][1]
    assert "1 generation batch = " in "".join(output for _, output in printed)
    assert "40 documents indexed, with augmentations" in shown["index"]
    assert "salty food and the heart" in shown["search"]
    assert "nDCG@10" in shown["compare"]
    for made in (
        "coaug.json",
        "report.html",
        "augmentations/manifest.json",
        "trained/metrics.json",
        "rm3/evaluations/rm3/metrics.json",
    ):
        assert (folder / "runs/mine" / made).is_file(), made


def test_getting_started_compares_like_with_like(walk):
    """The evaluation without augmentations has the fields that the policy was trained with."""
    printed = next(output for options, output in walk[1] if options[0] == "compare")
    assert "not alike" not in printed
    metrics = [
        yaml.safe_load((walk[0] / f"runs/mine/{name}/metrics.json").read_text()) for name in ("none", "trained")
    ]
    assert metrics[0]["retriever"] == metrics[1]["retriever"]


def test_documents_that_are_added_later_alone_are_generated_for(walk, monkeypatch, capsys):
    monkeypatch.chdir(walk[0])
    with open("my_collection/corpus.jsonl", "a", encoding="utf-8") as file:
        file.write('{"_id": "salt-9", "title": "", "text": "Zucchini ripen in the sun."}\n')
    section = (DOCS / "getting-started.md").read_text(encoding="utf-8").partition("## 8. When documents change")[2]
    augment, index = commands(BLOCK.search(section)[3])
    assert main(augment[1:]) == 0 and main(index[1:]) == 0
    printed = capsys.readouterr().out
    assert "41 documents indexed" in printed
    assert "document: 1 texts augmented" in printed and "query: 0 texts augmented" in printed


def test_python_of_getting_started_runs(walk, monkeypatch):
    monkeypatch.chdir(walk[0])
    (code,) = blocks(DOCS / "getting-started.md", "python")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "getting-started.md", "exec"), {})
    assert "salt" in output.getvalue()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != "getting-started"], ids=lambda page: page.stem
)
def test_python_blocks_print_what_the_page_says(page):
    names, printed = {}, None
    for _, language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, page.name, "exec"), names)
            printed = output.getvalue()
        elif language == "text" and printed is not None:
            assert code == printed
            printed = None


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_python_that_is_not_run_compiles(path):
    for code in blocks(path, "py"):
        compile(code, path.name, "exec")


def test_python_of_the_readme_runs(tmp_path, tiny_model, monkeypatch, capsys):
    """In fewer steps, without the quickstart's model."""
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/untrained").symlink_to(tiny_model)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "README.md", "python")[0]
    assert "max_steps=8" in code
    few = "max_steps=1, group_size=8, report_to='none', disable_tqdm=True"
    exec(compile(code.replace("max_steps=8", few), "README.md", "exec"), {})
    assert re.search(r"^0\.\d+$|^0\.0$", capsys.readouterr().out.strip().splitlines()[-1])
    assert (tmp_path / "runs/example/coaug.json").is_file()


def test_an_adapter_is_merged_as_the_page_says(tmp_path, tiny_model, monkeypatch):
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from coaug_trl import InputError
    from coaug_trl.training.recipe import parse_arguments

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "runs/mine")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "runs/mine")
    monkeypatch.chdir(tmp_path)
    options = ["--config", str(ROOT / "recipes/nfcorpus/qwen2.5-0.5b-bm25.yaml"), "--use_cpu=true", "--bf16=false"]
    with pytest.raises(InputError, match="merge it first"):
        parse_arguments([*options, "--model_name_or_path", "runs/mine"])
    (code,) = blocks(DOCS / "troubleshooting.md", "py")
    exec(compile(code, "troubleshooting.md", "exec"), {})
    parse_arguments([*options, "--model_name_or_path", "runs/merged"])
    merged = AutoModelForCausalLM.from_pretrained("runs/merged")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained("runs/merged").chat_template


def test_the_prompt_set_of_the_page_is_one(tmp_path):
    from coaug_trl import PromptSet

    (content,) = blocks(DOCS / "adapting.md", "yaml")
    (tmp_path / "my_prompts.yaml").write_text(content, encoding="utf-8")
    prompt_set = PromptSet.load(tmp_path / "my_prompts.yaml")
    assert set(yaml.safe_load(content)) == {field.name for field in fields(PromptSet)}
    assert (prompt_set.query_rule, prompt_set.document_rule, prompt_set.max_document_tokens) == (
        *("append", "append"),
        1024,
    )


def test_languages_that_have_stop_words_are_named():
    import Stemmer

    from coaug_trl.retrieval.analyzer import Analyzer

    (named,) = re.findall(r"Stop words are left out in ([\w\s,]+), in\s+others", (DOCS / "adapting.md").read_text())
    languages = {language for language in Stemmer.algorithms() if Analyzer(language).stopwords}
    assert set(re.split(r",\s+|\s+and\s+", named.lower())) == languages


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_extras_are_those_of_the_package(path):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"[\"`](?:\.|coaug-trl)\[([\w,-]+)\]", path.read_text(encoding="utf-8"))
    assert {extra for each in named for extra in each.split(",")} - {"x"} <= set(extras)


@pytest.fixture(scope="module")
def known_options():
    """Options of each command of `coaug`, of `coaug train`, and of the scripts together."""
    from trl import ModelConfig

    from coaug_trl import CoAugConfig
    from coaug_trl.training.recipe import CoAugScriptArguments

    def options_of(parser):
        found = {option for action in parser._actions for option in action.option_strings}
        subparsers = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        return found.union(*(options_of(each) for choices in subparsers for each in choices.values()))

    (commands_,) = (action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    known = {name: options_of(parser) for name, parser in commands_.items()}
    dataclasses = (CoAugScriptArguments, CoAugConfig, ModelConfig)
    known["train"] = {f"--{field.name}" for each in dataclasses for field in fields(each)} | {"--config"}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py"))
    known["scripts"] = set(re.findall(r'add_argument\(\s*"(--\w+)"', scripts))
    return known


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_code_within_the_text_names_what_exists(path, known_options):
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    anywhere = set().union(*known_options.values(), {"--version", "--help", "--quiet", "--json", "--config_file"})
    for code in re.findall(r"`([^`]+)`", text):
        first, *others = code.split()
        if first.startswith(("scripts/", "recipes/", "docs/", "tests/", "coaug_trl/", "notebooks/")):
            assert (ROOT / first).exists(), code
        options = {part.partition("=")[0] for part in (first, *others) if re.match(r"--\w", part)}
        if first == "coaug" and others and others[0] in known_options:
            assert options <= known_options[others[0]] | {"--quiet", "--json", "--help"}, code
        elif first == "coaug" and others:
            assert others[0] in ("--version", "COMMAND"), code
        elif first in ("coaug", "make", "python") or first.startswith(("--", "scripts/")):
            assert options <= anywhere, code


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_lines_are_not_longer_than_those_of_the_code(path):
    lines = re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in lines.splitlines() if len(line) > 119 and not line.startswith("|")] == []


# The notebook


def read_notebook():
    import nbformat

    return nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)


def test_the_notebook_is_valid_and_holds_no_outputs():
    import nbformat

    notebook = read_notebook()
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, cell.id, "exec")
            assert cell.outputs == [] and cell.execution_count is None
        for link in re.findall(r"\]\((\.\./[^)]+)\)", cell.source):
            assert (ROOT / "notebooks" / link).exists(), link


@pytest.mark.slow
def test_the_notebook_runs_and_training_helps():
    import nbclient

    notebook = read_notebook()
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    none, untrained, trained = (
        float(re.search(rf"^{name} +nDCG@10 ([\d.]+)", printed, re.MULTILINE)[1])
        for name in ("none", "untrained", "trained")
    )
    assert none < untrained < trained - 0.1


# What the pages say of the code


def messages() -> list[str]:
    """Every string of the package that is no docstring, as one text each, with … for what is filled in."""
    from transformers import training_args

    found = []
    files = [*(ROOT / "coaug_trl").rglob("*.py"), ROOT / "scripts/make_collection.py", Path(training_args.__file__)]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_messages_are_those_of_the_code():
    strings = messages()
    quoted = blocks(DOCS / "troubleshooting.md", "text")
    assert len(quoted) > 20
    for message in quoted:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(string) for string in strings), message


def test_settings_and_metrics_that_troubleshooting_names_exist():
    from trl import ModelConfig

    from coaug_trl import CoAugConfig

    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    known = {field.name for each in (CoAugConfig, ModelConfig) for field in fields(each)}
    for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:: [^`]*)?`", text):
        assert name in known | {"answer_rate", "zero_spread_share", "clipped_ratio", "max_document_tokens"}, name


def test_recipes_of_the_table_have_the_memory_it_states():
    rows = re.findall(
        r"^\| (.*?) \| (\S+) \| `(\S+)` \| (.*?) \| (\d+) GiB \|$", (DOCS / "choosing-a-recipe.md").read_text(), re.M
    )
    folder = ROOT / "recipes/nfcorpus"
    assert sorted(row[2] for row in rows) == sorted(path.stem for path in folder.glob("*.yaml"))
    for gpus, model, name, _, least in rows:
        path = folder / f"{name}.yaml"
        head = " ".join(line.lstrip("# ") for line in path.read_text().split("\n\n")[0].splitlines())
        assert model in yaml.safe_load(path.read_text())["model_name_or_path"]
        assert re.search(rf"(takes|Estimated, not run:) {least} GiB", head), name
        assert re.search(rf"Meant for .*\b{gpus.split()[-2]} GB", head), name


def test_recipes_that_pages_name_exist():
    for page in (*PAGES, *FRONT):
        for name in re.findall(r"`(recipes/[\w./-]+\.yaml)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)) == rooms()


def rows_of(path: Path, heading: str) -> dict[str, list[str]]:
    """The first table under a heading: the cells of each row by its first cell, without emphasis."""
    section = path.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0]
    rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {cells[0].partition("`")[0]: cells[1:] for cells in rows}


def test_figures_that_are_repeated_are_those_of_the_results():
    results = DOCS / "results.md"
    text = results.read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    seeds = rows_of(results, "The quickstart, three seeds")
    none, ceiling = re.search(r"nDCG@10 is (0\.\d+)\.\s+The ceiling[^.]*\sis\s+(0\.\d+)\.", text).groups()

    untrained, trained, difference, p, wins, queries, documents = seeds["42"]
    shown = {
        name.strip(): values.split("│") for name, values in re.findall(r"^│ ([^│]+)│(.*)│$", readme, re.MULTILINE)
    }
    cells = {name: [value.strip() for value in values] for name, values in shown.items()}
    assert cells["none"] == [none] * 3
    assert cells["untrained policy"][2] == untrained
    assert cells["trained policy"] == [queries, documents, trained]
    assert cells["ceiling (one agreed term a concept)"][2] == ceiling
    wins, ties, losses = wins.split(" / ")
    assert f"{difference}, paired t-test p = {p}, " in readme
    assert f"{wins} wins, {ties} ties, {losses} losses" in readme

    overview = rows_of(DOCS / "index.md", "What it did")
    assert overview["no augmentation"] == [none] * 3
    assert overview["untrained model"] == [seeds[seed][0] for seed in ("42", "43", "44")]
    assert overview["trained"] == [seeds[seed][1] for seed in ("42", "43", "44")]

    dense = rows_of(results, "The dense quickstart, three seeds")
    measured = rows_of(ROOT / "README.md", "What was measured")
    none_dense = re.search(r"Without augmentation it is (0\.\d+)", text)[1]
    for name, table, start in (("BM25", seeds, none), ("MiniLM", dense, none_dense)):
        row = measured[f"quickstart, {name} ({start} without a model)"]
        assert row == [", ".join(table[seed][column] for seed in ("42", "43", "44")) for column in (0, 1)]
    choosing = re.sub(r"\s+", " ", (DOCS / "choosing-a-recipe.md").read_text(encoding="utf-8"))
    for table in (seeds, dense):
        assert "→ " + ", ".join(table[seed][1] for seed in ("42", "43", "44")) in choosing

    bm25, rm3 = rows_of(results, "BM25 on NFCorpus"), re.search(r"\| best \| RM3 \| ([\d.]+) ", text)[1]
    evaluation = rows_of(DOCS / "evaluation.md", "What BM25 on NFCorpus is")
    assert [evaluation["flat"], evaluation["best"]] == [bm25["flat"], bm25["best"]]
    assert f"has {rm3} over all 323" in re.sub(r"\s+", " ", (DOCS / "evaluation.md").read_text(encoding="utf-8"))
    flat = re.sub(r"\s+", " ", readme)
    assert f"with one field, with two, and RM3 | nDCG@10 {bm25['flat'][0]}, {bm25['best'][0]}, {rm3} |" in flat

    cost = rows_of(results, "The reward")
    exact, sampled, loops = (
        cost[name][2] for name in ("coaug_trl, exact", "coaug_trl, 512 samples", "plain Python loops, 512 samples")
    )
    page = re.sub(r"\s+", " ", (DOCS / "the-reward.md").read_text(encoding="utf-8"))
    assert f"{exact} exact, {sampled} with 512 samples, {loops} with 512 samples in plain Python" in page
    assert f"exact rewards of a batch of 2,560 completions, one core | {exact} |" in flat
    assert f"the same batch in plain Python with 512 samples, one core | {loops} |" in flat


def test_citation_and_changelog_are_of_this_version():
    from coaug_trl import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2506.18670"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}] - {citation['date-released']}" in changelog
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()[0]
