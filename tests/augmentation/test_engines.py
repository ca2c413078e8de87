"""A server of the OpenAI protocol that fails in the ways servers fail, with a real model behind it."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from coaug_trl import Augmenter, InputError, PromptSet
from coaug_trl.augmentation.engines import server as server_engine
from coaug_trl.augmentation.engines.server import ServerEngine
from coaug_trl.augmentation.engines.transformers import TransformersEngine
from coaug_trl.augmentation.folder import AugmentedCollection
from coaug_trl.policy.settings import GenerationSettings, PolicySettings


PROMPT_SET = PromptSet("sparse", "query:", "document:")
SETTINGS = PolicySettings(PROMPT_SET, GenerationSettings(24, 1.2))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model, padding_side="left")


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            fault = server.faults.pop(0) if server.faults else server.fault_from_then_on
        status, content = fault, {"error": "no"}
        if not fault:
            generation = GenerationSettings(request["max_tokens"], request["repetition_penalty"])
            with server.lock:
                ((_, completion),) = server.engine.complete([(0, request["prompt"])], generation)
            usage = {"completion_tokens": completion.num_tokens}
            status, content = 200, {"choices": [{"text": completion.text}], "usage": usage}
        with server.lock:  # before the client hears of it and sends the next one
            server.running -= 1
        if fault == "close":
            self.connection.close()
        else:
            self.reply(status, content)

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(model, tokenizer, monkeypatch):
    monkeypatch.setattr(server_engine, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(server_engine, "LONGEST_WAIT", 0.002)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.engine, server.models = TransformersEngine(model, tokenizer), ["tiny"]
        server.requests, server.faults, server.fault_from_then_on = [], [], None
        server.lock, server.running, server.most_running = threading.Lock(), 0, 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def augmenter(server, tokenizer):
    return Augmenter(ServerEngine(server.url, "tiny", 4), tokenizer, SETTINGS, name="tiny", revision="1")


@pytest.fixture(scope="module")
def expected(model, tokenizer, collection):
    return Augmenter(model, tokenizer, SETTINGS).generate("query", list(collection.queries.values()))


def test_a_server_answers_as_the_model_does_within_the_concurrency(server, augmenter, collection, expected):
    assert augmenter.generate("query", list(collection.queries.values())) == expected
    assert 1 < server.most_running <= 4
    assert {request["temperature"] for request in server.requests} == {0.0}


def test_faults_that_pass_are_waited_for(server, augmenter, collection, expected):
    server.faults = [429, 503, "close", 500, 408, 502] * 2
    assert augmenter.generate("query", list(collection.queries.values())) == expected
    assert len(server.requests) == len(expected) + 12


def test_a_server_that_stays_down_ends_the_work_and_loses_nothing(server, augmenter, collection, tmp_path):
    dev = collection.with_split("dev")
    augmenter.augment_collection(dev, tmp_path / "whole")
    server.requests.clear()
    server.faults, server.fault_from_then_on = [None] * 17, 503
    with pytest.raises(InputError, match="stays down .status 503, after 10 attempts.*the same command goes on"):
        augmenter.augment_collection(dev, tmp_path / "resumed")
    answered = {json.dumps(request["prompt"]) for request in server.requests[:17]}
    server.requests.clear()
    server.fault_from_then_on = None
    augmenter.augment_collection(dev, tmp_path / "resumed")
    assert len(server.requests) == 48 - 17
    assert not answered & {json.dumps(request["prompt"]) for request in server.requests}
    for name in ("queries.jsonl", "documents.jsonl", "manifest.json"):
        resumed, whole = ((tmp_path / folder / name).read_text(encoding="utf-8") for folder in ("resumed", "whole"))
        seconds = r'"seconds": [\d.]+'  # no work takes the same time twice
        assert re.sub(seconds, "", resumed) == re.sub(seconds, "", whole)


def test_a_request_that_the_server_refuses_is_not_repeated(server, augmenter):
    server.fault_from_then_on = 400
    with pytest.raises(InputError, match="refuses a prompt of .* tokens.*status 400"):
        augmenter.generate("query", ["salt"])
    assert len(server.requests) == 1


def test_what_the_server_serves_is_looked_at_first(server, tiny_model, capsys):
    server.models = ["a", "b"]
    with pytest.raises(InputError, match="serves a, b, and the model is tiny"):
        ServerEngine(server.url, "tiny")
    server.models = ["a"]
    assert ServerEngine(server.url + "/v1/", "tiny").model == "a"
    assert "serves a, which is taken to be tiny" in capsys.readouterr().err
    with pytest.raises(InputError, match="concurrency is 0"):
        ServerEngine(server.url, "a", 0)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost", "http://"])
def test_a_place_without_a_server_is_refused(url):
    with pytest.raises(InputError, match="no server with the OpenAI protocol answers there"):
        ServerEngine(url, "tiny")


def test_the_command_generates_by_a_server(coaug, refused, server, tiny_model, beir_folder, tmp_path):
    server.models = [str(tiny_model)]
    PROMPT_SET.save(tmp_path)
    common = ("augment", "--model", tiny_model, "--collection", beir_folder, "--max_new_tokens", 24)
    common += ("--prompt_set", tmp_path / "prompt_set.yaml")
    assert coaug(*common, "--server", server.url, "--output", tmp_path / "server")[0] == 0
    assert server.requests
    assert coaug(*common, "--engine", "transformers", "--output", tmp_path / "here")[0] == 0
    server_side, here = (AugmentedCollection.load(tmp_path / name) for name in ("server", "here"))
    assert server_side.answers == here.answers
    assert (server_side.manifest["engines"], here.manifest["engines"]) == (
        ["server, of the server"],
        ["transformers, float32"],
    )
    message = refused(*common, "--server", server.url, "--engine", "vllm", "--output", tmp_path / "both")
    assert "leave one out" in message


# Texts that leave a batch and others that join it


def completions_of(model, tokenizer, width, prompts, max_new_tokens=24):
    engine = TransformersEngine(model, tokenizer, width)
    completed = dict(engine.complete(enumerate(prompts), GenerationSettings(max_new_tokens, 1.2)))
    return [completed[place] for place in range(len(prompts))]


def prompts_of(collection, tokenizer):
    texts = [document.text for document in collection.corpus.values()] + list(collection.queries.values())
    return [tokenizer(" ".join(texts[place : place + 1 + place % 4])).input_ids for place in range(len(texts))]


def make_random_model(tokenizer, **settings):
    """Ends its answers after any of many tokens, so that they differ in length."""
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **size, **settings)
    config.eos_token_id = list(range(0, 600, 20))
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("width", [2, 5, 16, 100])
def test_what_is_written_does_not_depend_on_who_shares_the_batch(tokenizer, collection, width):
    model, prompts = make_random_model(tokenizer), prompts_of(collection, tokenizer)
    alone = completions_of(model, tokenizer, 1, prompts)
    assert len({completion.num_tokens for completion in alone}) > 4  # they leave at different times
    assert completions_of(model, tokenizer, width, prompts) == alone


def test_layers_that_keep_the_last_tokens_only(tokenizer, collection):
    """There no text can join another, and texts that have ended still leave."""
    sliding = dict(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2)
    model = make_random_model(tokenizer, **sliding)
    prompts = prompts_of(collection, tokenizer)[:24]
    alone = completions_of(model, tokenizer, 1, prompts)
    assert len({completion.num_tokens for completion in alone}) > 2
    assert completions_of(model, tokenizer, 7, prompts) == alone


def test_the_batch_is_kept_full(tokenizer, collection, monkeypatch):
    """Far fewer steps than batches that wait for their longest answers take."""
    model, steps = make_random_model(tokenizer), []
    forward = type(model).forward

    def counting(self, input_ids=None, **kwargs):
        steps.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    prompts, width = prompts_of(collection, tokenizer), 8
    lengths = [completion.num_tokens for completion in completions_of(model, tokenizer, 1, prompts, 64)]
    ordered = [lengths[place] for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))]
    waiting = sum(max(ordered[first : first + width]) for first in range(0, len(ordered), width))
    monkeypatch.setattr(type(model), "forward", counting)
    completions_of(model, tokenizer, width, prompts, 64)
    assert sum(steps) < 1.3 * sum(lengths) < 0.8 * width * waiting
