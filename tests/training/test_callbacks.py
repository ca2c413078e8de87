"""Guards: runs that are made to go wrong, each in its way, stop, keep their checkpoints and say why."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from test_trainer import DEFAULTS, PROMPT_SET, assert_equal_weights, logged, saved_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer
from coaug_trl.cli.main import main
from coaug_trl.training.callbacks import RATIO, CollapseGuard, FiniteGuard
from coaug_trl.utils.errors import TrainingStopped


SETTINGS = {
    **DEFAULTS,
    "log_completions": False,
    "updates_per_batch": 2,
    "learning_rate": 2e-3,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def build(tiny_model, collection):
    def build(output_dir, trainer=CoAugTrainer, model=None, retriever=None, **changes):
        names = ("eval_collection", "reward_funcs", "callbacks")
        given = {name: changes.pop(name) for name in names if name in changes}
        args = CoAugConfig(output_dir=str(output_dir), **{**SETTINGS, **changes})
        return trainer(str(model or tiny_model), args, collection, retriever or BM25Retriever(), PROMPT_SET, **given)

    return build


def stop(trainer) -> str:
    """What a run says that has to stop itself; it must be one line."""
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def read_rows(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class AfterStep(TrainerCallback):
    """Does something to the model when a step has ended and its checkpoint is saved."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_save(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.act(model)


def break_weights(model):
    model.model.norm.weight[0] = torch.nan


# NaN and Inf


def test_nan_in_a_generation_batch_stops_and_saves_the_rows(build, tmp_path):
    trainer = build(tmp_path, callbacks=[AfterStep(1, break_weights)])
    message = stop(trainer)
    path = tmp_path / "not_finite_step_2_process_0.jsonl"
    assert message.startswith("Training stopped at step 2: NaN or Inf in log_probs (36 rows, in ")
    assert str(path) in message and f"The last whole one is {tmp_path / 'checkpoint-1'}. Train on" in message
    rows = read_rows(path)
    assert len(rows) == 36 and {len(row["log_probs"]) for row in rows} != {1}
    texts = [*trainer.train_collection.queries.values(), *[d.text for d in trainer.train_collection.corpus.values()]]
    for row in rows:
        assert set(row["log_probs"]) == {"nan"} and all(
            isinstance(value, float) for value in row["old_per_token_logps"]
        )
        assert isinstance(row["advantage"], float) and any(text in row["prompt"] for text in texts)
    assert any("<answer>" in row["completion"] for row in rows)


def test_nan_between_generation_batches_names_the_weights(build, tmp_path):
    message = stop(build(tmp_path, callbacks=[AfterStep(2, break_weights)]))
    assert message.startswith(
        "Training stopped after step 2: 1 weights are NaN or Inf, the first of them in model.norm"
    )
    assert f"The last whole one is {tmp_path / 'checkpoint-2'}. Train on" in message


def test_a_gradient_that_is_not_finite_changes_no_weight(build, tmp_path):
    trainer = build(tmp_path)
    weight = trainer.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * torch.inf if trainer.state.global_step == 1 else gradient)
    message = stop(trainer)
    assert (
        message.startswith("Training stopped at step 2: the gradient's norm is ")
        and "no weight was changed" in message
    )
    assert_equal_weights(weights(trainer.model), saved_weights(tmp_path / "checkpoint-1"))


def test_an_overflow_in_float16_is_left_to_what_scales_the_loss(build, tmp_path, monkeypatch):
    trainer = build(tmp_path)
    guard = next(each for each in trainer.callback_handler.callbacks if isinstance(each, FiniteGuard))
    # DeepSpeed scales the loss itself, and accelerate then has no scaler
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    assert trainer.accelerator.scaler is None
    trainer.model.model.norm.weight.grad = torch.full_like(trainer.model.model.norm.weight, torch.inf)
    guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


def test_an_infinite_reward_names_its_function_and_the_batch(build, tmp_path):
    def endless(completions, trainer_state, text_type, **kwargs):
        bad = trainer_state.global_step == 2
        return [float("inf") if bad and index == 7 else 0.0 for index in range(len(completions))]

    with pytest.raises(RuntimeError, match=r"reward inf for completion 7 \(reward function endless, step 3, groups"):
        build(tmp_path, reward_funcs=endless, max_steps=6).train()


def test_a_command_that_diverges_ends_with_code_1_and_keeps_its_model(
    beir_folder, tiny_model, tmp_path, capfd, caplog
):
    run = tmp_path / "run"
    settings = {key: value for key, value in SETTINGS.items() if key != "num_completions_to_print"}
    settings |= {"model_name_or_path": str(tiny_model), "collection": str(beir_folder), "output_dir": str(run)}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(path), "--save_strategy", "no"]) == 0
    kept = saved_weights(run)
    capfd.readouterr()
    code = main(["train", "--config", str(path), "--learning_rate", "1e38"])  # the weights overflow
    printed = capfd.readouterr().err
    assert code == 1 and "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if "Training stopped" in line]
    assert f"The last whole one is {run / 'checkpoint-'}" in line
    assert_equal_weights(saved_weights(run), kept)


# Collapse


@pytest.fixture(scope="module")
def parrot(tiny_model, collection, tmp_path_factory):
    """A model that says one word to everything."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts = [
        tokenizer.apply_chat_template(
            PROMPT_SET.prompt(side, text, tokenizer), add_generation_prompt=True, tokenize=False
        )
        for side, text in [("query", query) for query in collection.queries.values()]
        + [("document", f"{document.title} {document.text}") for document in collection.corpus.values()]
    ]
    answer = f"<answer> salt salt salt</answer>{tokenizer.eos_token}"
    batch = tokenizer([prompt + answer for prompt in prompts], return_tensors="pt", padding=True)
    labels = batch.input_ids.clone()
    labels[:, : -len(tokenizer(answer).input_ids)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("parrot")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Learning goes on as slowly as can be, so that the model stays what it is; no repetition penalty, which it would break.
STUCK = {
    "save_strategy": "no",
    "learning_rate": 1e-9,
    "repetition_penalty": 1.0,
    "temperature": 0.5,
    "max_steps": 6,
}


@pytest.fixture
def thresholds(monkeypatch):
    """Sets the guard's thresholds; what is not named is never crossed."""

    def thresholds(num_steps=3, **given):
        monkeypatch.setattr(CollapseGuard, "NUM_STEPS", num_steps)
        measures = dict.fromkeys(CollapseGuard.THRESHOLDS, -1.0)
        monkeypatch.setattr(
            CollapseGuard, "THRESHOLDS", measures | {name.replace("__", "/"): value for name, value in given.items()}
        )

    return thresholds


@pytest.mark.parametrize(
    ("given", "measure"),
    [
        ({"entropy": 0.05}, "entropy below 0.05"),
        ({"distinct_words": 0.05}, "distinct_words below 0.05"),
        ({"completions__mean_length": 30.0}, "completions/mean_length below 30"),
    ],
)
def test_a_model_that_says_one_thing_has_collapsed(build, parrot, thresholds, tmp_path, given, measure):
    thresholds(**given)
    message = stop(build(tmp_path, model=parrot, **STUCK))
    assert message.startswith(f"Training stopped after step 3: the policy has collapsed, with {measure} (now ")
    assert "since step 1. There is no checkpoint from before" in message


def test_the_guard_can_be_switched_off(build, parrot, thresholds, tmp_path):
    thresholds(entropy=0.05)
    build(tmp_path, model=parrot, **STUCK | {"collapse_guard": False, "max_steps": 4}).train()


def test_a_reward_for_empty_answers_ends_in_a_stop_that_names_the_checkpoint_before(build, thresholds, tmp_path):
    thresholds(num_steps=5, answer_rate=0.02)

    def brevity(completions, **kwargs):
        return [-float(len(completion[0]["content"])) for completion in completions]

    trainer = build(
        tmp_path,
        reward_funcs=brevity,
        reward_weights=[0.0, 1.0],
        text_type_scales=[1.0, 1.0, 1.0],
        learning_rate=1e-3,
        max_steps=80,
        updates_per_batch=1,
    )
    message = stop(trainer)
    rates = {
        step: max(
            logged(trainer, f"{text_type}/answer_rate")[step] for text_type in ("query", "relevant", "irrelevant")
        )
        for step in logged(trainer, "query/answer_rate")
    }
    assert rates[1] > 0.5 and "answer_rate below 0.02 (now " in message
    # the checkpoint it names was saved while there were answers
    first = int(message.split("since step ")[1].split(".")[0])
    assert f"The last whole one before that is {tmp_path / f'checkpoint-{first - 1}'}. " in message
    assert rates[first - 1] >= 0.02 > rates[first]


def test_a_healthy_run_is_not_stopped(build, monkeypatch, tmp_path):
    monkeypatch.setattr(CollapseGuard, "NUM_STEPS", 1)
    trainer = build(tmp_path, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_ratio_out_of_range_is_said_once_until_it_comes_back(build, tmp_path, caplog):
    ratios = [1.0, 0.4, 0.3, 0.9, 2.5, 2.6]

    class WithRatio(CoAugTrainer):
        """As it is measured with vLLM."""

        def _generate_and_score_completions(self, inputs):
            self._metrics["train"][RATIO].append(ratios[self.state.global_step])
            return super()._generate_and_score_completions(inputs)

    trainer = build(tmp_path, WithRatio, updates_per_batch=1, max_steps=6, save_strategy="no")
    with caplog.at_level(logging.WARNING, logger="coaug_trl"):
        trainer.train()
    assert trainer.state.global_step == 6
    lines = [record.message for record in caplog.records if "importance ratio" in record.message]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 5"]
    assert "is 0.4, outside [0.5, 2]" in lines[0] and "is 2.5, outside [0.5, 2]" in lines[1]


class WithSampler(CoAugTrainer):
    """As with vLLM: what generates says how probable each token was, by a computation of its own."""

    ratio = 1.0

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        log_probs = []
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            chosen = (logits / self.temperature).log_softmax(dim=1)[range(len(completion)), completion]
            log_probs.append((chosen - math.log(self.ratio) / len(completion)).tolist())
        return completion_ids, log_probs


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_the_ratio_is_measured_without_a_correction(build, tmp_path, caplog, ratio):
    class Differs(WithSampler):
        pass

    Differs.ratio = ratio
    trainer = build(tmp_path, Differs, repetition_penalty=1.0, save_strategy="no")
    trainer.train()
    assert [*logged(trainer, RATIO).values()] == pytest.approx([ratio] * 2, rel=1e-3)
    assert ("mean importance ratio between trainer and vLLM is 0.3, " in caplog.text) == (ratio == 0.3)


@pytest.mark.parametrize(
    "changes",
    [{"repetition_penalty": 1.2}, {"top_p": 0.9}, {"updates_per_batch": 1}],
    ids=["penalty", "top_p", "one update"],
)
def test_a_ratio_that_cannot_be_known_is_not_logged(build, tmp_path, caplog, changes):
    changes = {"repetition_penalty": 1.0, "max_steps": 2, "save_strategy": "no", **changes}
    trainer = build(tmp_path, WithSampler, **changes)
    trainer.train()
    assert not logged(trainer, RATIO) and "importance ratio" not in caplog.text


# Rewards that fail


def test_an_asynchronous_reward_works_on_one_process(build, tmp_path):
    async def later(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = build(tmp_path, reward_funcs=later, max_steps=1, save_strategy="no")
    trainer.train()
    assert logged(trainer, "rewards/later/mean") == {1: 1.0}


class OutOfMemory(BM25Retriever):
    def score(self, queries, documents):
        raise torch.OutOfMemoryError("the encoder needs 40 GiB")


def test_a_failing_retriever_names_the_batch(build, tmp_path):
    for pool in ("group", "batch"):
        trainer = build(tmp_path, retriever=OutOfMemory(), candidate_pool=pool)
        first = trainer.train_dataset[0]
        with pytest.raises(RuntimeError) as failure:
            trainer.train()
        names = ", ".join([*first.queries, *first.documents][:3])
        assert str(failure.value) == (
            "process 0: OutOfMemoryError: the encoder needs 40 GiB "
            f"(joint_ndcg, step 1, groups 0 to 3, first texts {names})"
        )
        assert isinstance(failure.value.__cause__, torch.OutOfMemoryError)


class Short:
    """A callable object that gives too few rewards."""

    def __call__(self, completions, **kwargs):
        return [0.0]


def test_a_failing_reward_function_keeps_its_name_and_names_the_batch(build, tmp_path):
    def wrong(completions, **kwargs):
        return ["much"] * len(completions)

    for reward, name, message in (
        (wrong, "wrong", "ValueError: could not convert"),
        (Short(), "Short", "1 rewards for 72"),
    ):
        trainer = build(tmp_path, reward_funcs=reward)
        assert trainer.reward_func_names == ["joint_ndcg", name]
        with pytest.raises(
            RuntimeError, match=rf"process 0: .*{message}.* \(reward function {name}, step 1, groups 0 to 3"
        ):
            trainer.train()
