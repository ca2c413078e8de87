"""
What test_parallel.py runs on each of two processes, with DDP or FSDP2, and once by itself:

accelerate launch --config_file CONFIG parallel_worker.py INPUT.json OUTPUT_DIR
"""

import hashlib
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import DistributedType
from peft import LoraConfig
from safetensors.torch import save_file

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, Collection, PromptSet


KINDS = {
    # A plain step along the gradient of all completions: sums over processes can be told to the last digits.
    "full": {"adapter": False, "optim": "sgd", "learning_rate": 0.5, "updates_per_batch": 1, "max_steps": 1},
    # An adapter's first matrices have no gradient before its second ones have left zero.
    "adapter": {"adapter": True, "learning_rate": 1e-2, "updates_per_batch": 3, "max_steps": 3},
}


class GivenCompletions(CoAugTrainer):
    """A trainer whose rollouts are a function of prompt and place, however many processes there are."""

    def __init__(self, *args, words=(), **kwargs):
        self.words, self.groups, self.rewards = words, [], []
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self):
        # accelerate turns FSDP on for accelerators alone. PyTorch shards over gloo as well.
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        if not self.words:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        seen, completions = Counter(), []
        for ids in map(tuple, prompt_ids):
            draw = random.Random(hashlib.sha256(repr((ids, seen[ids] % num_generations)).encode()).hexdigest())
            seen[ids] += 1  # a text may be in several groups, which are not all of one process
            answer = " ".join(draw.choices(self.words, k=draw.choice([0, 2, 4])))
            text = f"<answer>{answer}</answer>{self._tokenizer.eos_token}"
            completions.append(self._tokenizer(text, add_special_tokens=False).input_ids)
        return completions, None

    def _generate_and_score_completions(self, inputs):
        self.groups.append([[group.position, list(group.queries), list(group.documents)] for group in inputs])
        output = super()._generate_and_score_completions(inputs)
        self.rewards.append(list(self._logs["rewards"]["joint_ndcg"]))  # of all processes, in their order
        return output


def train(given, output_dir, adapter=False, words=True, resume=None, **changes):
    """Trains, saves the model into `output_dir`, and returns the trainer."""
    collection = Collection.load(given["collection"])
    trainer = GivenCompletions(
        given["model"],
        CoAugConfig(output_dir=str(output_dir), **{**given["settings"], **changes}),
        collection,
        BM25Retriever(),
        PromptSet("sparse", "query:", "document:"),
        eval_collection=collection.with_split("dev"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
        words=given["words"] if words else (),
    )
    if trainer.accelerator.num_processes == 1:
        start = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(start, Path(output_dir) / "start.safetensors")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output_dir))
    return trainer


def train_as_given(given, output_dir, name):
    """Trains one of [`KINDS`] on given completions into a folder of its name."""
    changes = dict(KINDS[name])
    return train(given, output_dir / name, changes.pop("adapter"), **changes)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 may have divided."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def local_bytes(parameters) -> int:
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in parameters)


def run(given, output_dir) -> dict:
    results = {}
    for name in KINDS:
        folder = output_dir / name
        trainer = train_as_given(given, output_dir, name)
        parameters = dict(trainer.model.named_parameters())
        weights = {key: full(parameter) for key, parameter in parameters.items()}
        if trainer.accelerator.is_main_process:
            save_file({key: value.contiguous() for key, value in weights.items()}, folder / "final.safetensors")
        results[name] = {
            "distributed_type": str(trainer.accelerator.distributed_type),
            "trained": [key for key, parameter in parameters.items() if parameter.requires_grad],
            "trained_bytes": sum(weights[key].nbytes for key, p in parameters.items() if p.requires_grad),
            "local_bytes": local_bytes(parameters.values()),
            "all_bytes": sum(tensor.nbytes for tensor in weights.values()),
            "optimizer_bytes": local_bytes(
                tensor for state in trainer.optimizer.state.values() for key, tensor in state.items() if key != "step"
            ),
            "groups": trainer.groups,
            "rewards": trainer.rewards,
            "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        }
    results["resumed"] = resumed(given, output_dir)
    return results


def resumed(given, output_dir) -> dict:
    """Whether a run that is taken up within a generation batch ends with the same weights, on generated completions."""
    changes = {"words": False, "updates_per_batch": 3, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = train(given, output_dir / "whole", **changes)
    again = train(given, output_dir / "again", resume=str(output_dir / "whole" / "checkpoint-1"), **changes)
    after = [{key: full(p) for key, p in trainer.model.named_parameters()} for trainer in (whole, again)]
    return {
        "same weights": all(torch.equal(after[0][key], after[1][key]) for key in after[0]),
        "batches": [len(trainer.groups) for trainer in (whole, again)],
    }


def main():
    given = json.loads(Path(sys.argv[1]).read_text())
    output_dir = Path(sys.argv[2])
    state = PartialState(cpu=True)
    results = run(given, output_dir)
    (output_dir / f"results_{state.process_index}.json").write_text(json.dumps(results))
    state.wait_for_everyone()
    state.destroy_process_group()
    os._exit(0)  # gloo's threads abort an interpreter that takes itself down now and then, when all is done


if __name__ == "__main__":
    main()
