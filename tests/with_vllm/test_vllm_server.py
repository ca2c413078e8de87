"""
Generation by a real vLLM server, as in `vllm_mode: server`. Sending it weights needs CUDA, so here it keeps those it
was started with, and the trainer's first step is what can be compared.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch


pytest.importorskip("vllm")

from test_vllm_training import SETTINGS, models  # noqa: E402, F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl.generation.vllm_client import VLLMClient  # noqa: E402

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, PromptSet  # noqa: E402


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_CI_ENV": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models["tied"])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enforce-eager"]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        assert process.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_training_step_on_completions_of_a_server(server, models, collection, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)  # NCCL, as are the weights sent
    args = CoAugConfig(
        output_dir=str(tmp_path),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server,
        use_cpu=True,
        bf16=False,
        penalize_log_probs=True,
        vllm_importance_sampling_correction=True,
        **SETTINGS | {"max_steps": 1, "groups_per_batch": 8, "temperature": 1.2, "repetition_penalty": 1.2},
    )
    trainer = CoAugTrainer(
        AutoModelForCausalLM.from_pretrained(models["tied"], dtype=torch.float32),
        args,
        collection,
        BM25Retriever(),
        PromptSet("sparse", "query:", "document:"),
        processing_class=AutoTokenizer.from_pretrained(models["tied"], padding_side="left"),
    )
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()

    (entry, *_) = trainer.state.log_history
    assert entry["reward"] > 0
    assert entry["query/answer_rate"] > 0
    assert entry["sampling/sampling_logp_difference/max"] < 1e-3
    assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-2)
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
