"""
Augmenting with the real vLLM engine and with a real vLLM server: the same answers as with transformers.

Run by `make test-vllm` in an environment with vLLM for CPU; elsewhere these tests are skipped.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


pytest.importorskip("vllm")

from conftest import make_tiny_model, teach_answers  # noqa: E402

from coaug_trl import PromptSet  # noqa: E402
from coaug_trl.data.document import document_text  # noqa: E402


SCRIPT = Path(__file__).parents[2] / "scripts" / "augment.py"
CPU_2 = Path(__file__).parents[2] / "recipes/accelerate_configs/cpu-2.yaml"
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
FILES = ("queries.jsonl", "documents.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory, collection):
    """Heads of the smallest size that vLLM's CPU attention has."""
    texts = [document_text(document) for document in collection.corpus.values()] + list(collection.queries.values())
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", texts * 3, hidden_size=64)
    return teach_answers(folder, texts, steps=300, learning_rate=2e-3)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "adapter"
    torch.manual_seed(0)
    peft_model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft_model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def augment(beir_folder, tmp_path_factory):
    """Runs the command in a process of its own, since an engine takes the one it is in; returns the rows by file."""

    def run(name, model, *options, launcher=(), timeout=300):
        folder = tmp_path_factory.mktemp(name)
        prompt_set = PromptSet("sparse", "query:", "document:")
        prompt_set.save(folder)
        command = [sys.executable, *map(str, launcher), str(SCRIPT), "--model", str(model)]
        command += ["--collection", str(beir_folder), "--output", str(folder / "out"), "--max_new_tokens", "24"]
        command += ["--prompt_set", str(folder / "prompt_set.yaml"), *options]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-5000:]
        return {name: read_rows(folder / "out" / name) for name in FILES}

    return run


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def by_transformers(augment, model):
    rows = augment("transformers", model, "--engine", "transformers")
    assert len({row["augmentation"] for row in rows["documents.jsonl"]}) > 1
    return rows


def test_vllm_writes_what_transformers_writes(augment, model, by_transformers):
    assert augment("vllm", model, "--engine", "vllm") == by_transformers


def test_each_of_two_processes_has_its_own_engine(augment, model, by_transformers):
    launcher = ("-m", "accelerate.commands.launch", "--config_file", CPU_2)
    assert augment("two", model, launcher=launcher) == by_transformers  # vLLM is what is taken where it is installed


def test_vllm_loads_an_adapter_with_its_base_model(augment, adapter, by_transformers):
    rows = augment("adapter", adapter, "--engine", "transformers")
    assert rows != by_transformers
    assert augment("adapter-vllm", adapter, "--engine", "vllm") == rows


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_a_vllm_server_writes_what_transformers_writes(augment, model, by_transformers, server):
    assert augment("server", model, "--server", server) == by_transformers
