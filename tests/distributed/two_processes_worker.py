"""
What test_two_processes.py runs on each of two processes:

accelerate launch --config_file recipes/accelerate_configs/cpu-2.yaml two_processes_worker.py INPUT.json OUTPUT_DIR
"""

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainerState

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, Collection, DenseRetriever, PromptSet
from coaug_trl.data.groups import Group
from coaug_trl.rewards.joint import JointReward
from coaug_trl.rewards.pool import Corpus


class RecordingTrainer(CoAugTrainer):
    """Keeps this process's groups and advantages, and the advantages logged for both."""

    def __init__(self, *args, **kwargs):
        self.groups, self.advantages, self.logged = [], [], []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        self.groups.append([[group.position, group.queries, group.documents] for group in inputs])
        output = super()._generate_and_score_completions(inputs)
        self.advantages.append(output["advantages"].tolist())
        self.logged.append(list(self._logs["advantages"]))
        return output


class GivenAnswers(RecordingTrainer):
    """Writes the answer that is given for the text in a prompt."""

    def __init__(self, *args, answers=(), **kwargs):
        self.answers = answers
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        completions = []
        for prompt in self._tokenizer.batch_decode(prompt_ids):
            (answer,) = {answer for text, answer in self.answers if text in prompt}
            text = f"<answer>{answer}</answer>{self._tokenizer.eos_token}"
            completions.append(self._tokenizer(text, add_special_tokens=False).input_ids)
        return completions, None


class FailsOnTheSecondProcess(BM25Retriever):
    def score(self, queries, documents):
        if PartialState().process_index == 1:
            raise ZeroDivisionError("the second process alone")
        return super().score(queries, documents)


def build(given, output_dir, trainer=RecordingTrainer, retriever=None, **changes):
    collection = Collection.load(given["collection"])
    prompt_set = PromptSet(
        "sparse", "query:", "document:", max_document_tokens=changes.pop("max_document_tokens", 512)
    )
    args = CoAugConfig(output_dir=str(output_dir), **{**given["settings"], **changes})
    return trainer(
        given["model"],
        args,
        collection,
        retriever or BM25Retriever(),
        prompt_set,
        eval_collection=collection.with_split("dev"),
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def equal(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class CountingRetriever(DenseRetriever):
    """Counts the texts this process embeds."""

    count = 0

    def _encode(self, texts, prompt):
        self.count += len(texts)
        return super()._encode(texts, prompt)


def rewards(given, output_dir, process=0, num_processes=1) -> dict[str, list[float]]:
    """Rewards of this process's share of the saved completions, by retriever, pool and estimator."""
    collection = Collection.load(given["collection"])
    documents = list(collection.corpus.values())
    bm25, dense = BM25Retriever(), CountingRetriever(given["encoder"])
    bm25.fit(documents)
    groups = [Group(place, *map(tuple, fields[:2]), fields[2]) for place, fields in enumerate(given["groups"])]
    share = len(groups) // num_processes
    table = [row for row in given["completions"] if row["group"] // share == process]
    found = {}
    for retriever, pool, estimator in (
        *((bm25, pool, estimator) for pool in ("group", "batch", "corpus") for estimator in ("exact", "sampled")),
        (dense, "batch", "exact"),
        (dense, "corpus", "exact"),
    ):
        changes = {"candidate_pool": pool, "reward_estimator": estimator, "ndcg_k": 3}
        args = CoAugConfig(output_dir=str(output_dir), **{**given["settings"], **changes})
        corpus = Corpus(documents, retriever, args.seed) if pool == "corpus" else None
        dense.count = 0
        reward = JointReward(collection, retriever, PromptSet(retriever.kind, "query:", "document:"), args, corpus)
        found[f"{retriever.kind} {pool} {estimator}"] = reward(
            completions=[row["completion"] for row in table],
            group=[groups[row["group"]] for row in table],
            text_type=[row["text_type"] for row in table],
            text_id=[row["text_id"] for row in table],
            trainer_state=TrainerState(global_step=5),
            log_extra=lambda column, values: None,
        )
        if (retriever, pool) == (dense, "batch"):
            found["texts embedded"] = dense.count
    return found


def evaluate(given, output_dir) -> dict[str, float]:
    trainer = partial(GivenAnswers, answers=given["dev_answers"])
    return build(given, output_dir, trainer, eval_corpus_size=31).evaluate()


def train_and_resume(given, output_dir, steps, **changes) -> dict:
    trainer = build(given, output_dir / "whole", **given["resume"], **changes)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    save_file(after, output_dir / f"final_{trainer.args.process_index}.safetensors")
    resumed = {}
    for step in steps:
        again = build(given, output_dir / f"from-{step}", **given["resume"], **changes)
        again.train(resume_from_checkpoint=str(output_dir / "whole" / f"checkpoint-{step}"))
        first = len(trainer.groups) - len(again.groups)
        resumed[step] = [
            equal(weights(again), after),
            again.groups == trainer.groups[first:],
            again.retriever.state() == trainer.retriever.state(),
        ]
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    gradients = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    return {
        "unchanged": unchanged,
        "added": [statistics["added_shares"] for statistics in trainer.retriever.state()["fields"]],
        "gradients": gradients,
        "groups": trainer.groups,
        "advantages": trainer.advantages,
        "logged": trainer.logged,
        "resumed": resumed,
    }


def failures(given, output_dir) -> dict[str, str]:
    messages = {}
    for pool in ("group", "batch"):
        trainer = build(given, output_dir / pool, retriever=FailsOnTheSecondProcess(), candidate_pool=pool)
        try:
            trainer.train()
        except RuntimeError as error:
            messages[pool] = str(error)
    return messages


def main():
    given = json.loads(Path(sys.argv[1]).read_text())
    output_dir = Path(sys.argv[2])
    state = PartialState(cpu=True)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("coaug_trl").addHandler(handler)
    logging.getLogger("coaug_trl").setLevel(logging.INFO)

    results = {
        "num_processes": state.num_processes,
        "rewards": rewards(given, output_dir, state.process_index, state.num_processes),
        "evaluation": evaluate(given, output_dir / "evaluation"),
        "training": train_and_resume(
            given,
            output_dir / "training",
            [2, 3, 5, 6],
            max_steps=7,
            max_document_tokens=5,
            bm25_statistics="original",
        ),
        "iterations": train_and_resume(
            given,
            output_dir / "iterations",
            [1, 3],
            max_steps=5,
            num_iterations=2,
            updates_per_batch=2,
            bm25_statistics="running",
        ),
    }
    results["lines"] = lines
    results["failures"] = failures(given, output_dir / "failures")
    (output_dir / f"results_{state.process_index}.json").write_text(json.dumps(results))
    state.wait_for_everyone()
    state.destroy_process_group()
    os._exit(0)  # gloo's threads abort an interpreter that takes itself down now and then, when all is done


if __name__ == "__main__":
    main()
