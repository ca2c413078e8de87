"""A Space on the Hub: an example that installs the package, and shows an index and a policy in the demo."""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..policy.download import BM25S_FILES, INDEX_FILES, MODEL_FILES, TOKENIZER_FILES
from ..policy.prompts import PROMPT_SET_FILE
from ..policy.settings import POLICY_FILE
from ..serving.demo import model_name
from ..serving.index import SearchIndex
from ..serving.judged import QRELS_FILE, QUERIES_FILE, JudgedQueries
from ..utils.errors import InputError
from ..utils.files import atomic_open, read_json
from ..utils.names import is_local
from .upload import DEMO_APP, check_weights, select_files


POLICY_FILES = (*MODEL_FILES, *TOKENIZER_FILES, POLICY_FILE, PROMPT_SET_FILE)
APP = """\
from pathlib import Path

from coaug_trl.serving.demo import Demo, JudgedQueries


here = Path(__file__).parent
demo = Demo.load({index}, {model}, JudgedQueries.read(here))
demo.start()
demo.wait()
"""
CARD = """\
---
{settings}---

# {title}

What a query finds as it is, beside what it finds with the words that a language model adds to it.

- index: {index}
- model: {model}
- judged queries: {judged}

It runs anywhere: `pip install -r requirements.txt`, then `python app.py`. Visitors are not told apart: whoever sees the
Space can keep its model busy.

Until coaug-trl {version} is on PyPI, put the wheel that `python -m build` makes beside this file, and name it in
requirements.txt: `coaug-trl[{extras}] @ https://huggingface.co/spaces/USER/NAME/resolve/main/coaug_trl-{version}-py3-none-any.whl`.

The code is under the Apache License 2.0; documents, queries and models are under licenses of their own.
"""


def write_space(
    folder: str | Path, index: str | Path, model: str | None = None, judged: JudgedQueries | None = None
) -> list[Path]:
    """
    Writes a folder that is a Space as it stands, and that runs anywhere by `python app.py`.

    It installs the version of the package that wrote it, so that a Space searches with the code that indexed.

    Args:
        folder: The folder: `app.py`, `requirements.txt`, `README.md` with the settings of the Space, `index/`,
            `model/` and, if there are any, judged queries. A Space that was written there is replaced.
        index: Index to search: a folder, which is copied, or a Hub id, which the Space loads.
        model: Policy that augments the queries, likewise.
        judged: Queries whose relevant documents are marked.

    Returns: the files of the Space.

    Raises `InputError`: The folder holds something else, the index cannot be searched with the model, or they need
        what does not come along: another folder of this machine, or weights that are not safetensors.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_space(folder):
        raise InputError(f"{folder} holds something other than a Space; choose another folder.")
    loaded = SearchIndex.load(index)
    _refuse_local(loaded.retriever.config.get("model"), f"The encoder of {index}", "index with one of the Hub")
    extras = "demo,dense" if loaded.retriever.kind == "dense" else "demo"
    files: dict[str, Path | bytes] = {}
    if loaded.hub_id is None:
        files |= _beneath("index", select_files(loaded.folder, (*INDEX_FILES, *BM25S_FILES)))
        for field in sorted(loaded.folder.glob("field_*")):
            files |= _beneath(f"index/{field.name}", select_files(field, BM25S_FILES))
    local = model is not None and Path(model).is_dir()
    if local:
        files |= _beneath("model", _policy_files(Path(model)))
    if model:
        augmenter = loaded.augmenter(model)  # refuses a model that the index was not made for
        described = f"{model_name(augmenter.name)} ({augmenter.revision}){', in `model/`' if local else ''}"
    files["app.py"] = APP.format(
        index=repr(loaded.hub_id) if loaded.hub_id else 'here / "index"',
        model='str(here / "model")' if local else repr(model),
    ).encode()
    files["requirements.txt"] = f"coaug-trl[{extras}]=={__version__}\n".encode()
    name, count = loaded.manifest["collection"], f"{loaded.manifest['num_documents']:,} documents"
    files["README.md"] = CARD.format(
        settings=_settings(name, [place for place in (loaded.hub_id, None if local else model) if place]),
        title=f"Search {name}",
        index=f"{loaded.hub_id or '`index/`'}, {count} of {name}",
        model=described if model else "none",
        judged=f"{len(judged.queries):,}, in `{QUERIES_FILE}` and `{QRELS_FILE}`" if judged else "none",
        version=__version__,
        extras=extras,
    ).encode()
    return _write(folder, files) + (judged.save(folder) if judged else [])


def _is_space(folder: Path) -> bool:
    """Whether a folder is one that was written here, and may be replaced."""
    app = folder / "app.py"
    return app.is_file() and DEMO_APP.search(app.read_text(encoding="utf-8", errors="replace")) is not None


def _policy_files(folder: Path) -> dict[str, Path | bytes]:
    """What a policy is loaded from, and nothing of its training."""
    check_weights(folder)
    base = read_json(folder / "adapter_config.json", missing={}).get("base_model_name_or_path")
    _refuse_local(base, f"The base model of {folder}", "merge the adapter into it, or train from one of the Hub")
    return select_files(folder, POLICY_FILES)


def _refuse_local(model: str | None, what: str, advice: str) -> None:
    if is_local(model):
        raise InputError(f"{what} is {model}, a folder of this machine, which a Space does not have; {advice}.")


def _beneath(name: str, files: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    return {f"{name}/{file}": content for file, content in files.items()}


def _settings(collection: str, models: list[str]) -> str:
    """Those of the Space, as YAML."""
    settings: dict[str, Any] = {
        "title": f"Search {collection}",
        "emoji": "🔎",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": version("gradio").partition("+")[0],
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "license": "apache-2.0",
    }
    if models:
        settings["models"] = models
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _write(folder: Path, files: dict[str, Path | bytes]) -> list[Path]:
    """Writes the files, in place of those of a Space that was written before, which up to 0.1 held the package."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_open(folder / "app.py") as file:  # first, so that an interrupted folder is known to be a Space
        file.write(files["app.py"].decode())
    for name in ("coaug_trl", "index", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (QUERIES_FILE, QRELS_FILE):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            with atomic_open(path) as file:
                file.write(content.decode())
    return [folder / name for name in files]
