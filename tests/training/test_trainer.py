"""The trainer: what TRL's loss gets, what is logged, dev evaluation, checkpoints, and the hooks of TRL it leans on."""

import inspect
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TOPICS, write_answers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import GRPOTrainer
from trl.generation import vllm_generation

from coaug_trl import Augmenter, BM25Retriever, CoAugConfig, CoAugTrainer, InputError, PromptSet
from coaug_trl.data.document import document_text
from coaug_trl.evaluation.measures import evaluate_run
from coaug_trl.policy.settings import GenerationSettings, PolicySettings


PROMPT_SET = PromptSet("sparse", "query:", "document:")
SCALES = {"query": 1.0, "relevant": 0.2, "irrelevant": 0.1}
MAX_LENGTH = 16
# 4 groups of 1 query and 5 documents, 3 rollouts: 72 completions, 2 optimizer steps of 3 accumulated batches each.
# An epoch is the 8 training queries: 2 generation batches, 4 optimizer steps.
DEFAULTS = {
    "groups_per_batch": 4,
    "group_size": 6,
    "num_relevant": 2,
    "num_generations": 3,
    "updates_per_batch": 2,
    "per_device_train_batch_size": 12,
    "per_device_eval_batch_size": 7,
    "max_completion_length": MAX_LENGTH,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "ndcg_k": 10,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "log_completions": True,
    "num_completions_to_print": 0,
    "disable_tqdm": True,
}


def teach_expansions(model_folder, collection, output_dir):
    """Makes a model that names for queries what they lack, for documents substances, so that greedy answers matter."""
    answers = []
    for topic, (substance, source, effect) in TOPICS.items():
        lacking = {f"train-{topic}": substance, f"dev-{topic}": effect, f"test-{topic}": source}
        answers += [("query", collection.queries[id_], lacking[id_]) for id_ in lacking if id_ in collection.queries]
        answers += [
            ("document", document_text(document), substance)
            for id_, document in collection.corpus.items()
            if id_.startswith(topic)
        ]
    return write_answers(model_folder, answers, output_dir)


class RecordingTrainer(CoAugTrainer):
    """Keeps what TRL hands over and what its loss is given."""

    def __init__(self, *args, **kwargs):
        self.outputs, self.loss_inputs = [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.outputs.append(
            {
                "groups": list(inputs),
                "rows": rows_of(output),
                "logged": list(self._logs["advantages"]),
                "rewards": torch.tensor(self._logs["rewards"]["joint_ndcg"]),
                "text_type": list(self._logs["extra"]["text_type"]),
                "keys": set(output),
            }
        )
        return output

    def _compute_loss(self, model, inputs):
        self.loss_inputs += rows_of(inputs)
        return super()._compute_loss(model, inputs)


class GivenDevAnswers(RecordingTrainer):
    """Writes given answers for the dev collection, right ones after the second step alone; its rollouts are its own."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        if num_generations > 1:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        completions = []
        for text in self._tokenizer.batch_decode(prompt_ids):
            named = next((t for t, (substance, *_) in TOPICS.items() if t in text or substance in text.lower()), "")
            answer = named if self.state.global_step == 2 else " ".join(TOPICS)
            completions.append(self._tokenizer(f"<answer>{answer}</answer>{self._tokenizer.eos_token}").input_ids)
        return completions, None


def rows_of(batch) -> list[tuple[tuple[int, ...], float]]:
    """(completion tokens, advantage) of each row."""
    lengths = batch["completion_mask"].sum(dim=1).tolist()
    return [
        (tuple(ids[:length].tolist()), advantage.item())
        for ids, length, advantage in zip(batch["completion_ids"], lengths, batch["advantages"], strict=True)
    ]


@pytest.fixture(scope="module")
def train_collection(collection):
    """The collection without its test queries, so that nothing can read them."""
    return replace(collection, queries={id_: text for id_, text in collection.queries.items() if "test" not in id_})


@pytest.fixture(scope="module")
def dev_collection(collection):
    dev = collection.with_split("dev")
    return replace(dev, queries={id_: text for id_, text in dev.queries.items() if id_ in dev.qrels})


@pytest.fixture(scope="module")
def expanding_model(tiny_model, train_collection, tmp_path_factory):
    return teach_expansions(tiny_model, train_collection, tmp_path_factory.mktemp("expanding"))


@pytest.fixture(scope="module")
def build(tiny_model, train_collection):
    """Builds a trainer on the tiny model."""

    def build(output_dir, trainer=RecordingTrainer, retriever=None, prompt_set=PROMPT_SET, model=None, **changes):
        names = ("eval_collection", "reward_funcs", "processing_class", "callbacks", "peft_config")
        given = {name: changes.pop(name) for name in names if name in changes}
        args = CoAugConfig(output_dir=str(output_dir), **{**DEFAULTS, **changes})
        return trainer(
            str(model or tiny_model), args, train_collection, retriever or BM25Retriever(), prompt_set, **given
        )

    return build


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def saved_weights(folder) -> dict[str, torch.Tensor]:
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def assert_equal_weights(found, expected):
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert found.keys() == expected.keys() and not different, f"not bit for bit equal: {different}"


def completions(trainer, step) -> pd.DataFrame:
    return pd.read_parquet(Path(trainer.args.output_dir) / "completions" / f"completions_{step:05d}.parquet")


def logged(trainer, key) -> dict[int, float]:
    return {log["step"]: log[key] for log in trainer.state.log_history if key in log}


# Training


@pytest.fixture(scope="module")
def run(build, tmp_path_factory):
    """Five steps with TRL's own advantages recorded beside those of the trainer; the fifth is in the second epoch."""
    trl_advantages = []
    original = GRPOTrainer._generate_and_score_completions

    def recorded(self, inputs):
        output = original(self, inputs)
        trl_advantages.append(output["advantages"].clone())
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", recorded)
        trainer = build(tmp_path_factory.mktemp("run"), max_steps=5, learning_rate=3e-3)
        trainer.before = weights(trainer.model)
        trainer.train()
    trainer.trl_advantages = trl_advantages
    return trainer


def test_training_changes_every_parameter(run):
    for name, before in run.before.items():
        assert not torch.equal(before, run.model.get_parameter(name)), f"Parameter {name} has not changed."
    assert all(np.isfinite(log["loss"]) for log in run.state.log_history if "loss" in log)


def test_the_loss_gets_the_logged_advantages(run):
    generated = [row for output in run.outputs for row in output["rows"]]
    # five optimizer steps use two generation batches whole, and half of the third
    assert sorted(run.loss_inputs[:144]) == sorted(generated[:144])
    assert set(run.loss_inputs[144:]) <= set(generated[144:]) and len(run.loss_inputs) == 180
    for output in run.outputs:
        assert [advantage for _, advantage in output["rows"]] == pytest.approx(output["logged"], abs=0)
        assert np.std(output["logged"]) > 0


def test_advantages_are_centred_rewards_scaled_by_text_type(run):
    for output, trl_advantages in zip(run.outputs, run.trl_advantages, strict=True):
        rewards = output["rewards"].view(-1, 3)
        centred = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
        scale = torch.tensor([SCALES[text_type] for text_type in output["text_type"]])
        torch.testing.assert_close(torch.tensor(output["logged"]), centred * scale, atol=1e-7, rtol=0)
        torch.testing.assert_close(torch.tensor(output["logged"]), trl_advantages * scale, atol=1e-7, rtol=0)


@pytest.mark.parametrize("mode", ["group", "batch"])
def test_other_normalizations_follow_their_formula(build, tmp_path, mode):
    trainer = build(tmp_path, max_steps=1, advantage_normalization=mode, text_type_scales=[2.0, 1.0, 0.5])
    trainer.train()
    (output,) = trainer.outputs
    rewards = output["rewards"].double()
    if mode == "group":
        texts = rewards.view(-1, 3)
        expected = ((texts - texts.mean(1, keepdim=True)) / (texts.std(1, keepdim=True) + 1e-4)).flatten()
    else:
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    scales = {"query": 2.0, "relevant": 1.0, "irrelevant": 0.5}
    expected *= torch.tensor([scales[text_type] for text_type in output["text_type"]])
    torch.testing.assert_close(torch.tensor(output["logged"]).double(), expected, atol=2e-3, rtol=0)


def test_groups_are_whole_and_come_in_the_sampler_order(run):
    positions = [[group.position for group in output["groups"]] for output in run.outputs]
    assert positions == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    first_epoch = [query for output in run.outputs[:2] for group in output["groups"] for query in group.queries]
    assert sorted(first_epoch) == sorted(run.train_collection.qrels)


def test_the_completions_table_names_every_text(run):
    table = completions(run, 1)
    assert len(table) == 72
    assert {"text_type", "text_id", "group", "answer", "joint_ndcg", "advantage"} <= set(table.columns)
    rows = [
        (group.position, text_type, text_id)
        for group in run.outputs[0]["groups"]
        for text_type, text_id in group.rows("both")
        for _ in range(3)
    ]
    assert list(zip(table["group"], table["text_type"], table["text_id"], strict=True)) == rows
    assert table["advantage"].tolist() == run.outputs[0]["logged"]
    assert table["joint_ndcg"].tolist() == run.outputs[0]["rewards"].tolist()
    corpus, queries = run.train_collection.corpus, run.train_collection.queries
    for row in table.itertuples():
        user = row.prompt[-1]["content"]
        assert user == (queries[row.text_id] if row.text_type == "query" else document_text(corpus[row.text_id]))
        content = row.completion[-1]["content"]
        opened = [text.split("</answer>") for text in content.split("<answer>")[1:]]
        assert row.answer == next((text[0].strip() for text in reversed(opened) if len(text) > 1), "")
    assert table["answer"].ne("").any()


def test_metrics_by_text_type_can_be_recomputed_from_the_table(run):
    for output, step in zip(run.outputs, (1, 3, 5), strict=True):
        table = completions(run, step)
        eos = run.processing_class.eos_token_id
        table["clipped"] = [ids[-1] != eos for ids, _ in output["rows"]]
        spread = table.groupby(["group", "text_id"])["joint_ndcg"].transform(
            lambda rewards: rewards.max() - rewards.min()
        )
        table["no_spread"] = spread < 1e-8
        table["words"] = table["answer"].str.split().str.len()
        for text_type, rows in table.groupby("text_type"):
            expected = {
                "reward": rows["joint_ndcg"].mean(),
                "advantage_std": rows["advantage"].std(),
                "zero_spread_share": rows["no_spread"].mean(),
                "answer_rate": rows["answer"].ne("").mean(),
                "answer_words": rows["words"].mean(),
                "distinct_words": rows["answer"].str.lower().str.split().explode().dropna().nunique()
                / max(rows["words"].sum(), 1),
                "clipped_ratio": rows["clipped"].mean(),
            }
            for name, value in expected.items():
                assert logged(run, f"{text_type}/{name}")[step] == pytest.approx(value, abs=1e-6), (text_type, name)
        assert logged(run, "completions/clipped_ratio")[step] == pytest.approx(table["clipped"].mean())
    assert set(completions(run, 1)["text_type"]) == set(SCALES)


def test_only_training_queries_are_read(run):
    queries = {query for output in run.outputs for group in output["groups"] for query in group.queries}
    assert queries == set(run.train_collection.qrels)


def test_extra_reward_functions_are_weighted_as_trl_does(build, tmp_path):
    seen = []

    def brevity(completions, group, text_type, text_id, **kwargs):
        seen.extend(zip([each.position for each in group], text_type, text_id, strict=True))
        return [1.0 / (1 + len(completion[0]["content"])) for completion in completions]

    def sometimes(completions, text_type, **kwargs):
        return [float(len(text_type)) if each == "query" else None for each in text_type]

    trainer = build(tmp_path, max_steps=1, reward_funcs=[brevity, sometimes], reward_weights=[0.5, 3.0, 1.0])
    trainer.train()
    table = completions(trainer, 1)
    assert seen == list(zip(table["group"], table["text_type"], table["text_id"], strict=True))
    total = 0.5 * table["joint_ndcg"] + 3.0 * table["brevity"] + table["sometimes"].fillna(0.0)
    centred = total - total.groupby([table["group"], table["text_id"]]).transform("mean")
    expected = centred * table["text_type"].map(SCALES)
    np.testing.assert_allclose(table["advantage"], expected, atol=1e-5)
    assert logged(trainer, "rewards/brevity/mean")[1] == pytest.approx(table["brevity"].mean(), abs=1e-6)
    query_rewards = total[table["text_type"] == "query"]
    assert logged(trainer, "query/reward")[1] == pytest.approx(query_rewards.mean(), rel=1e-5)


def test_one_extra_reward_function_needs_no_list(build, tmp_path):
    trainer = build(tmp_path, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions))
    assert len(trainer.reward_funcs) == 2


@pytest.mark.parametrize(
    ("augment", "text_types", "size"), [("query", {"query"}, 1), ("document", {"relevant", "irrelevant"}, 5)]
)
def test_one_side_is_trained(build, tmp_path, augment, text_types, size):
    trainer = build(tmp_path, augment=augment, per_device_train_batch_size=6, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    table = completions(trainer, 1)
    assert len(table) == 4 * size * 3 and set(table["text_type"]) == text_types
    assert all(not torch.equal(before[name], weights(trainer.model)[name]) for name in before)
    assert {key.split("/")[0] for log in trainer.state.log_history for key in log} & set(SCALES) == text_types


def test_a_tokenizer_without_a_chat_template_trains(build, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    trainer = build(tmp_path, max_steps=1, processing_class=tokenizer)
    trainer.train()
    table = completions(trainer, 1)
    assert table["prompt"][0] == f"query:\n\n{trainer.train_collection.queries[table['text_id'][0]]}\n\n"
    assert table["joint_ndcg"].between(0, 1).all()


def test_lora_changes_the_adapter_only(build, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(tmp_path, peft_config=adapter, learning_rate=0.1)
    before = weights(trainer.model)
    trainer.train()
    trainer.save_model()
    after = weights(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert PolicySettings.load(tmp_path) == trainer.settings


@pytest.mark.parametrize("learning_rate", [1e-6, 9e-6])
def test_bfloat16_weights_at_a_low_learning_rate_are_refused(build, tmp_path, learning_rate):
    with pytest.raises(InputError, match="dtype: float32.*learning_rate to at least 1e-5"):
        build(tmp_path, learning_rate=learning_rate, model_init_kwargs={"dtype": "bfloat16"})


def test_bfloat16_weights_at_a_higher_learning_rate_are_accepted(build, tmp_path):
    trainer = build(tmp_path, learning_rate=1e-5, model_init_kwargs={"dtype": "bfloat16"})
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    build(tmp_path, learning_rate=1e-6)  # float32


def test_a_prompt_set_of_another_kind_is_refused(build, tmp_path):
    with pytest.raises(InputError, match="prompt set is for dense retrievers and the retriever is sparse"):
        build(tmp_path, prompt_set=PromptSet("dense", "query:", "document:"))


def test_the_package_prompts_are_the_default(build, tmp_path):
    assert build(tmp_path, prompt_set=None).prompt_set == PromptSet.default("sparse")


def test_long_documents_are_cut_and_counted_in_one_line(build, dev_collection, tmp_path, caplog):
    prompt_set = replace(PROMPT_SET, max_document_tokens=5)
    trainer = build(tmp_path, prompt_set=prompt_set, eval_collection=dev_collection)
    tokenizer = trainer.processing_class

    def num_long(documents):
        return sum(len(tokenizer(document_text(document)).input_ids) > 5 for document in documents)

    with caplog.at_level(logging.INFO, logger="coaug_trl"):
        trainer.evaluate()
        trainer.train()
    lines = [record.message for record in caplog.records if "were cut" in record.message]
    corpus = trainer.train_collection.corpus
    in_batch = [corpus[id_] for group in trainer.outputs[0]["groups"] for id_ in group.documents]
    assert lines == [
        f"{num_long(corpus.values())} documents of the dev collection were cut to 5 tokens",
        f"{num_long(in_batch)} documents of a generation batch were cut to 5 tokens",
    ]
    table = completions(trainer, 1)
    for row in table.itertuples():
        if row.text_type != "query":
            read, whole = row.prompt[-1]["content"], document_text(corpus[row.text_id])
            assert len(tokenizer(read).input_ids) <= 5 and whole.startswith(read)


def test_the_same_seed_gives_the_same_run(build, tmp_path):
    final = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        trainer = build(tmp_path / name, seed=seed)
        trainer.train()
        final.append(weights(trainer.model))
    assert_equal_weights(final[1], final[0])
    assert any(not torch.equal(final[0][name], final[2][name]) for name in final[0])


# Evaluation on the dev collection


class RecordingRetriever(BM25Retriever):
    """Keeps which documents were indexed."""

    indexed = []

    def index(self, documents):
        self.indexed.append(documents)
        super().index(documents)


def independent_evaluation(trainer, dev_collection, augment="both"):
    """nDCG@10 on the dev collection by the inference code, one text at a time; and the documents it indexed."""
    settings = PolicySettings(PROMPT_SET, GenerationSettings(MAX_LENGTH, trainer.args.repetition_penalty))
    tokenizer = AutoTokenizer.from_pretrained(trainer.model.name_or_path, padding_side="left")
    augmenter = Augmenter(trainer.model, tokenizer, settings, batch_size=1)

    def answers(side, texts):
        return [augmentation.answer for augmentation in augmenter.generate(side, texts)]

    queries = {query_id: dev_collection.queries[query_id] for query_id in dev_collection.qrels}
    documents = list(dev_collection.corpus.values())
    if augment != "document":
        given = answers("query", list(queries.values()))
        queries = {
            query_id: f"{query}\n{answer}" if answer else query
            for (query_id, query), answer in zip(queries.items(), given, strict=True)
        }
    if augment != "query":
        given = answers("document", [document_text(document) for document in documents])
        documents = [
            replace(document, text=f"{document.text}\n{answer}") if answer else document
            for document, answer in zip(documents, given, strict=True)
        ]
    retriever = BM25Retriever()
    retriever.index(documents)
    hits = retriever.search(list(queries.values()), 100)
    run = {query_id: dict(found) for query_id, found in zip(queries, hits, strict=True)}
    return evaluate_run(dev_collection.qrels, run, ("nDCG@10",))[0]["nDCG@10"], documents


@pytest.mark.parametrize("augment", ["both", "query", "document"])
def test_dev_evaluation_equals_inference_and_retrieval(build, dev_collection, expanding_model, tmp_path, augment):
    trainer = build(
        tmp_path, augment=augment, per_device_train_batch_size=1, eval_collection=dev_collection, model=expanding_model
    )
    metrics = trainer.evaluate()
    expected, _ = independent_evaluation(trainer, dev_collection, augment)
    assert metrics["eval_nDCG@10"] == pytest.approx(expected, abs=1e-9)
    plain = BM25Retriever()
    plain.index(list(dev_collection.corpus.values()))
    hits = plain.search([dev_collection.queries[query_id] for query_id in dev_collection.qrels], 100)
    run = {query_id: dict(found) for query_id, found in zip(dev_collection.qrels, hits, strict=True)}
    without = evaluate_run(dev_collection.qrels, run, ("nDCG@10",))[0]["nDCG@10"]
    assert abs(expected - without) > 1e-3  # the answers matter


@pytest.mark.parametrize("refresh", [True, False])
def test_statistics_are_refreshed_only_if_asked_for(build, dev_collection, expanding_model, tmp_path, refresh):
    trainer = build(
        tmp_path,
        eval_collection=dev_collection,
        model=expanding_model,
        bm25_statistics="refreshed" if refresh else "original",
    )
    before = trainer.retriever.state()
    original = BM25Retriever()
    original.fit(list(dev_collection.corpus.values()))
    assert before == original.state()
    first, second = trainer.evaluate(), trainer.evaluate()
    augmented = BM25Retriever()
    augmented.fit(independent_evaluation(trainer, dev_collection)[1])
    assert augmented.state() != before
    assert trainer.retriever.state() == (augmented.state() if refresh else before)
    assert first["eval_nDCG@10"] == second["eval_nDCG@10"]
    if refresh:  # the second time the reward's statistics are those of the index
        assert second["eval_nDCG@10_reward_statistics"] == pytest.approx(second["eval_nDCG@10"])
    else:
        assert first["eval_nDCG@10_reward_statistics"] == second["eval_nDCG@10_reward_statistics"]


def test_statistics_of_another_collection_are_not_taken(build, dev_collection, expanding_model, tmp_path):
    trainer = build(tmp_path, eval_collection=replace(dev_collection, name="another"), model=expanding_model)
    before = trainer.retriever.state()
    trainer.evaluate()
    assert trainer.retriever.state() == before


def test_frozen_statistics_give_their_own_measure(build, dev_collection, expanding_model, tmp_path):
    trainer = build(tmp_path, eval_collection=dev_collection, model=expanding_model)
    metrics = trainer.evaluate()
    _, documents = independent_evaluation(trainer, dev_collection)
    queries = list(dev_collection.qrels)
    augmenter = Augmenter(
        trainer.model, trainer.processing_class, PolicySettings(PROMPT_SET, GenerationSettings(MAX_LENGTH, 1.2))
    )
    texts = [dev_collection.queries[query_id] for query_id in queries]
    answers = [augmentation.answer for augmentation in augmenter.generate("query", texts)]
    frozen = BM25Retriever()
    frozen.fit(list(dev_collection.corpus.values()))
    scores = frozen.score([f"{t}\n{a}" if a else t for t, a in zip(texts, answers, strict=True)], documents)
    run = {
        query_id: {d.id: float(s) for d, s in zip(documents, row, strict=True) if s > -np.inf}
        for query_id, row in zip(queries, scores, strict=True)
    }
    expected = evaluate_run(dev_collection.qrels, run, ("nDCG@10",))[0]["nDCG@10"]
    assert metrics["eval_nDCG@10_reward_statistics"] == pytest.approx(expected, abs=1e-9)


def test_a_smaller_dev_corpus_keeps_the_judged_documents(build, dev_collection, expanding_model, tmp_path):
    judged = {document_id for grades in dev_collection.qrels.values() for document_id in grades}
    drawn = {}
    for name, size, seed in (("a", 30, 1), ("b", 30, 1), ("c", 30, 2), ("few", 3, 1), ("all", 400, 1)):
        RecordingRetriever.indexed.clear()
        trainer = build(
            tmp_path / name,
            eval_collection=dev_collection,
            model=expanding_model,
            retriever=RecordingRetriever(),
            eval_corpus_size=size,
            seed=seed,
        )
        trainer.evaluate()
        trainer.evaluate()
        once, again = [[document.id for document in documents] for documents in RecordingRetriever.indexed]
        assert once == again
        drawn[name] = set(once)
    assert all(judged <= documents for documents in drawn.values())
    assert len(judged) == 24 and len(drawn["a"]) == 30
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert drawn["few"] == judged and len(drawn["all"]) == 40


def test_evaluation_does_not_disturb_training(build, dev_collection, expanding_model, tmp_path):
    plain = build(tmp_path / "plain", max_steps=3, model=expanding_model)
    plain.train()
    evaluated = build(
        tmp_path / "evaluated",
        max_steps=3,
        eval_collection=dev_collection,
        model=expanding_model,
        eval_strategy="steps",
        eval_steps=1,
        bm25_statistics="original",
    )
    evaluated.train()
    assert len(logged(evaluated, "eval_nDCG@10")) == 3
    assert_equal_weights(weights(evaluated.model), weights(plain.model))


def test_the_best_checkpoint_can_be_chosen_by_dev_ndcg(build, dev_collection, tmp_path):
    trainer = build(
        tmp_path,
        max_steps=4,
        learning_rate=0.02,
        eval_collection=dev_collection,
        trainer=GivenDevAnswers,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nDCG@10",
        greater_is_better=True,
    )
    trainer.train()
    values = logged(trainer, "eval_nDCG@10")
    assert len(values) == 4 and len(set(values.values())) > 1
    best_step = max(values, key=values.get)
    assert trainer.state.best_metric == max(values.values())
    best = Path(trainer.state.best_model_checkpoint)
    assert values[int(best.name.split("-")[1])] == values[best_step]
    assert_equal_weights(weights(trainer.model), saved_weights(best))


def test_evaluation_without_a_collection_is_refused(build, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        build(tmp_path).evaluate()


# Saving and resuming


def test_saved_folders_hold_the_settings_of_use(build, tmp_path):
    trainer = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, repetition_penalty=1.3)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        settings = PolicySettings.load(folder)
        assert settings.prompt_set == PROMPT_SET
        assert settings.generation == GenerationSettings(max_new_tokens=MAX_LENGTH, repetition_penalty=1.3)
        assert settings.retriever == BM25Retriever().config
        assert json.loads((folder / "coaug.json").read_text())["prompt_hash"] == PROMPT_SET.hash
        assert (folder / "prompt_set.yaml").is_file()
    augmenter = Augmenter.from_pretrained(str(tmp_path))
    assert len(augmenter.generate("query", ["is caffeine harmful"])) == 1


RESUME = {"learning_rate": 2e-3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
RESUMED_RUNS = {
    # six optimizer steps an epoch: from the middle of a batch, its end, and over the end of the epoch
    "three updates": {"updates_per_batch": 3, "per_device_train_batch_size": 12, "max_steps": 8},
    "two iterations": {"num_iterations": 2, "per_device_train_batch_size": 18, "max_steps": 6},
    "reference model": {
        "beta": 0.1,
        "mask_truncated_completions": True,
        "updates_per_batch": 4,
        "max_steps": 5,
        "per_device_train_batch_size": 9,
    },
}


@pytest.mark.parametrize("settings", RESUMED_RUNS.values(), ids=RESUMED_RUNS.keys())
def test_a_resumed_run_ends_with_the_same_weights(build, dev_collection, tmp_path, settings):
    whole = build(tmp_path / "whole", eval_collection=dev_collection, **RESUME, **settings)
    whole.train()
    steps = settings["max_steps"]
    assert min(logged(whole, "grad_norm").values()) > 0
    positions = [[group.position for group in output["groups"]] for output in whole.outputs]
    for step in range(1, steps):
        resumed = build(tmp_path / f"from-{step}", eval_collection=dev_collection, **RESUME, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == steps
        assert_equal_weights(weights(resumed.model), weights(whole.model))
        later = [[group.position for group in output["groups"]] for output in resumed.outputs]
        assert later == positions[len(positions) - len(later) :]
        assert logged(resumed, "eval_nDCG@10") == logged(whole, "eval_nDCG@10")
        assert resumed.retriever.state() == whole.retriever.state()


def test_a_checkpoint_within_a_batch_is_refused_by_other_batch_arithmetic(build, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    build(tmp_path / "run", **settings).train()
    other = {**settings, "max_steps": 3, "per_device_train_batch_size": 6}
    with pytest.raises(InputError, match="checkpoint-1 was saved within a generation batch"):
        build(tmp_path / "other", **other).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    # at the end of a batch nothing is left of it
    trainer = build(tmp_path / "other", **other)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [group.position for group in trainer.outputs[0]["groups"]] == [4, 5, 6, 7]


def test_a_checkpoint_without_its_rollouts_is_refused(build, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    build(tmp_path / "run", **settings).train()
    (tmp_path / "run" / "checkpoint-1" / "rollouts_0.safetensors").unlink()
    with pytest.raises(InputError, match="checkpoint-1, no whole checkpoint: it lacks rollouts_0.safetensors"):
        build(tmp_path / "other", **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_statistics_of_another_retriever_are_not_resumed(build, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    build(tmp_path / "run", **settings).train()
    trainer = build(tmp_path / "other", retriever=BM25Retriever(k1=0.9), **settings)
    with pytest.raises(InputError, match="saved BM25 statistics"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


# The hooks of TRL and transformers. A failure here says what to look at before the supported range is widened.


SIGNATURES = {
    (GRPOTrainer, "_get_train_sampler"): ["self", "dataset"],
    (GRPOTrainer, "_generate_and_score_completions"): ["self", "inputs"],
    (GRPOTrainer, "_prepare_inputs"): ["self", "generation_batch"],
    (GRPOTrainer, "_tokenize_prompts"): ["self", "prompts"],
    (GRPOTrainer, "_save_checkpoint"): ["self", "model", "trial"],
    (GRPOTrainer, "_load_optimizer_and_scheduler"): ["self", "checkpoint"],
    (Trainer, "_save"): ["self", "output_dir", "state_dict"],
    (Trainer, "init_hf_repo"): ["self", "token", "private"],
    (Trainer, "push_to_hub"): ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    (GRPOTrainer, "create_model_card"): ["self", "model_name", "dataset_name", "tags"],
    (Trainer, "_get_output_dir"): ["self", "trial"],
    (Trainer, "evaluation_loop"): [
        *("self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix")
    ],
}


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=[name for _, name in SIGNATURES])
def test_hooks_have_the_signatures_the_trainer_overrides(owner, name):
    method = getattr(owner, name, None)
    where = f"{owner.__module__}.{owner.__name__}.{name}"
    assert method is not None, f"{where} is gone"
    found = list(inspect.signature(method).parameters)
    assert found == SIGNATURES[owner, name], f"{where} takes {found} now; see where CoAugTrainer overrides or calls it"


def test_generation_takes_what_dev_evaluation_gives_it():
    parameters = inspect.signature(GRPOTrainer._generate_single_turn).parameters
    given = ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"]
    found = list(parameters)
    assert found[: len(given)] == given, f"GRPOTrainer._generate_single_turn takes {found} now; see DevEvaluator"
    more = [name for name in found[len(given) :] if parameters[name].default is inspect.Parameter.empty]
    assert not more, f"GRPOTrainer._generate_single_turn needs {more} now; see DevEvaluator"


def test_the_base_class_still_has_what_is_overridden():
    inherited = {name for name in vars(CoAugTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    called = {"_get_output_dir", "_prepare_inputs", "_tokenize_prompts", "init_hf_repo"}
    expected = {name for _, name in SIGNATURES} - called
    assert expected <= inherited, f"CoAugTrainer no longer overrides {expected - inherited}: mend this test"
    others = inherited - expected - {"_tag_names", "_name", "_paper", "_abc_impl"}
    assert not others, f"GRPOTrainer has {others} of its own now, which CoAugTrainer shadows"


def test_a_trainer_has_the_state_that_is_relied_on(build, tmp_path):
    trainer = build(tmp_path)
    for name in (
        *("_logs", "_metrics", "_buffered_inputs", "_step", "_tokenizer", "num_generations", "num_iterations"),
        *("generation_config", "generation_kwargs", "eos_token_ids", "reward_weights", "use_vllm", "model_wrapped"),
    ):
        assert hasattr(trainer, name), f"GRPOTrainer has no {name} any more"
    for name in ("steps_per_generation", "gradient_accumulation_steps", "generation_batch_size", "world_size"):
        assert isinstance(getattr(trainer.args, name), int), f"GRPOConfig.{name} is no number any more"
    missing = {"prompt", "completion", "rewards", "advantages", "extra"} - set(trainer._logs)
    assert not missing, f"GRPOTrainer._logs lacks {missing}"
    logs = trainer._logs
    for column in (logs["advantages"], logs["extra"]["text_type"], logs["rewards"]["joint_ndcg"]):
        assert column.maxlen == trainer.args.generation_batch_size, "GRPOTrainer._logs no longer keeps one batch"
    assert "train" in trainer._metrics, "GRPOTrainer._metrics has no part for training any more"
    generation = {"do_sample", "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "repetition_penalty"}
    missing = generation - set(trainer.generation_kwargs)
    assert not missing, f"GRPOTrainer.generation_kwargs lacks {missing}, which greedy evaluation sets"


def test_micro_batches_are_buffered(run):
    buffered = run._buffered_inputs
    assert len(buffered) == run.args.steps_per_generation, "GRPOTrainer._buffered_inputs are no micro-batches any more"


def test_the_output_of_scoring_has_the_keys_that_are_relied_on(run):
    for output in run.outputs:
        needed = {"advantages", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
        missing = needed - output["keys"]
        assert not missing, f"GRPOTrainer._generate_and_score_completions returns no {missing} any more"


def test_a_generation_batch_is_made_once_and_read_in_slices():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    for part in (
        "generate_every = self.args.steps_per_generation * self.num_iterations",
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
    ):
        assert part in source, f"GRPOTrainer._prepare_inputs has changed: {part!r} is gone; see GroupSampler, resuming"
    source = inspect.getsource(GRPOTrainer.get_train_dataloader)
    assert "self._get_train_sampler" in source, "GRPOTrainer.get_train_dataloader asks no _get_train_sampler any more"
    assert "self._train_batch_size * self.args.steps_per_generation" in source, "its batches have another size now"


def test_log_probabilities_can_be_computed_again():
    given = ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    found = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert found[: len(given)] == given, f"_get_per_token_logps_and_entropies takes {found} now; see FiniteGuard"


def test_gradients_are_clipped_before_the_callback_that_looks_at_them():
    source = inspect.getsource(Trainer._run_epoch)
    clip, look, step = (
        source.index(part) for part in ("_clip_grad_norm(", "on_pre_optimizer_step(", "optimizer.step()")
    )
    assert clip < look < step, "Trainer calls on_pre_optimizer_step elsewhere now; see FiniteGuard"


def test_scale_rewards_centres_and_divides_as_the_modes_say():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for part in (
        "advantages = rewards - mean_grouped_rewards",
        'if self.scale_rewards != "none"',
        "std_rewards + 1e-4",
    ):
        assert part in source, f"GRPOTrainer normalises otherwise now: {part!r} is gone; see advantage_normalization"


def test_checkpoints_are_rotated_where_the_limit_is_read():
    source = inspect.getsource(Trainer._save_checkpoint)
    for part in ("rotate_checkpoints(", "save_total_limit=self.args.save_total_limit"):
        assert part in source, f"Trainer._save_checkpoint has changed: {part!r} is gone; see CoAugTrainer"


def test_metrics_that_show_a_collapse_are_collected_in_one_place(run):
    values = {"entropy", "completions/mean_length", "query/answer_rate", "query/distinct_words"}
    missing = values - {key for log in run.state.log_history for key in log}
    assert not missing, f"GRPOTrainer logs no {missing} any more; see CollapseGuard"
    assert all(not column for column in run._metrics["train"].values()), "they are not cleared when they are logged"


def test_rewards_are_gathered_and_functions_get_their_columns():
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    for part in ("trainer_state", "log_extra", "gather(rewards_per_func)"):
        assert part in source, f"GRPOTrainer._calculate_rewards has changed: {part!r} is gone; see JointReward"


def test_plain_generation_reads_the_settings_that_evaluation_replaces():
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    for part in ("generation_kwargs=self.generation_kwargs", "generation_config=self.generation_config"):
        assert part in source, (
            f"GRPOTrainer._generate_single_turn has changed: {part!r} is gone; see _greedy_generation"
        )


def test_vllm_generation_reads_the_settings_that_evaluation_replaces():
    parameters = inspect.signature(vllm_generation.VLLMGeneration.__init__).parameters
    generate = inspect.getsource(vllm_generation.VLLMGeneration.generate)
    for name in ("temperature", "top_p", "top_k", "min_p"):
        assert name in parameters, f"VLLMGeneration takes no {name} any more; see DevEvaluator._greedy_generation"
        assert f"self.{name}" in generate, f"VLLMGeneration.generate no longer reads {name}; see _greedy_generation"


class TestCorpusPool:
    """Every query is ranked against all documents, those outside the batch with one text each."""

    @pytest.fixture(scope="class")
    def augmentations(self, expanding_model, train_collection, tmp_path_factory):
        """
        Made by an untrained policy, without the settings of a training; the answers are replaced by what all training
        queries ask for.
        """
        folder = tmp_path_factory.mktemp("augmentations")
        augmenter = Augmenter.from_pretrained(
            str(expanding_model), PROMPT_SET, GenerationSettings(MAX_LENGTH), batch_size=40
        )
        augmenter.augment_collection(train_collection, folder, ["document"])
        answer = " ".join(train_collection.queries[id_] for id_ in train_collection.qrels)
        rows = [{"_id": id_, "augmentation": answer, "complete": True} for id_ in train_collection.corpus]
        (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def test_rewards_rank_against_the_augmented_corpus(self, build, augmentations, expanding_model, tmp_path, caplog):
        """A corpus outside the batch that names what all queries ask for outranks the batch; the original does not."""
        rewards = {}
        for name, folder in (("original", None), ("augmented", str(augmentations))):
            caplog.clear()
            trainer = build(
                tmp_path / name,
                model=str(expanding_model),
                candidate_pool="corpus",
                augmentations=folder,
                groups_per_batch=2,
                updates_per_batch=1,
                max_steps=1,
            )
            assert ("augmentations" in caplog.text) == (folder is None)
            trainer.train()
            (output,) = trainer.outputs
            rewards[name] = output["rewards"]
            assert len(rewards[name]) == 2 * 6 * 3 and 0 <= rewards[name].min() and rewards[name].max() <= 1
        assert rewards["augmented"].mean() < 0.8 * rewards["original"].mean()

    def test_augmentations_of_other_settings_are_refused(self, build, augmentations, tmp_path):
        options = {"candidate_pool": "corpus", "augmentations": str(augmentations)}
        other = replace(PROMPT_SET, query="other:")
        with pytest.raises(InputError, match=f"prompt set {PROMPT_SET.hash}, and training is for {other.hash}"):
            build(tmp_path, prompt_set=other, **options)
        manifest = json.loads((augmentations / "manifest.json").read_text())
        elsewhere = Path(shutil.copytree(augmentations, tmp_path / "elsewhere"))
        (elsewhere / "manifest.json").write_text(json.dumps(manifest | {"collection": "another"}))
        with pytest.raises(InputError, match="made for the collection another, and training is for advice"):
            build(tmp_path, **options | {"augmentations": str(elsewhere)})
        manifest["retriever"] = BM25Retriever(fields="best").config
        (elsewhere / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="made for the retriever .*best.*, and training is for .*flat"):
            build(tmp_path, **options | {"augmentations": str(elsewhere)})
        with pytest.raises(InputError, match="no augmentations there"):
            build(tmp_path, **options | {"augmentations": str(tmp_path / "nowhere")})
