"""
What test_vllm_training.py runs on one or two processes: two optimizer steps with vLLM in the training process.

python colocate_worker.py INPUT.json OUTPUT_DIR
"""

import json
import os
import sys
import zlib
from functools import partial
from pathlib import Path

import torch
import trl.generation.vllm_generation as vllm_generation
from accelerate import PartialState
from accelerate.utils import is_peft_model
from cpu_engine import register
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, Collection, PromptSet


def main(input_path: str, output_dir: str) -> None:
    given = json.loads(Path(input_path).read_text())
    register()
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype=given["dtype"])
    trainer = make_trainer(given, output_dir)
    sync, synced = trainer.vllm_generation.sync_weights, []

    def sync_weights():
        if not (given["stale"] and synced):
            sync()
        synced.append(trainer.state.global_step)

    trainer.vllm_generation.sync_weights = sync_weights
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changes = [(parameter - before[name]).abs().max().item() for name, parameter in trainer.model.named_parameters()]
    trainer.vllm_generation.sync_weights()
    result = {
        "synced": synced,
        "change": max(changes),
        **engine_error(trainer),
        "log": [entry for entry in trainer.state.log_history if "reward" in entry],
        "eval": trainer.evaluate() if trainer.eval_collection else None,
    }
    rank = PartialState().process_index
    (Path(output_dir) / f"result_{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # gloo and the engine may abort at exit, when all is done


def varied(completions: list, **kwargs) -> list[float]:
    """Differs from completion to completion, so that the weights change whatever a tiny model happens to write."""
    return [zlib.crc32(json.dumps(completion).encode()) / 2**32 for completion in completions]


def make_trainer(given: dict, output_dir: str) -> CoAugTrainer:
    collection = Collection.load(given["collection"])
    args = CoAugConfig(
        output_dir=output_dir,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=256,
        use_cpu=True,
        bf16=False,
        **given["settings"],
    )
    # In float32, as recipes load the weights of a full training; the engine chooses bfloat16 unless told otherwise.
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    return CoAugTrainer(
        model,
        args,
        collection,
        BM25Retriever(),
        PromptSet("sparse", "query:", "document:"),
        eval_collection=collection.with_split("dev") if args.eval_strategy != "no" else None,
        reward_funcs=varied,
        processing_class=AutoTokenizer.from_pretrained(given["model"], padding_side="left"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if given["lora"]
        else None,
    )


def engine_error(trainer: CoAugTrainer) -> dict[str, float]:
    """
    Largest difference of log-probabilities, of greedy completions, between the engine and the trained model; and what
    bfloat16 alone does to those of the model.
    """
    tokenizer = trainer.processing_class
    prompts = [tokenizer(text).input_ids for text in ("does wheat bread cause stomach pain?", "a review of caffeine")]
    engine = trainer.vllm_generation
    engine.temperature, engine.repetition_penalty = 1.0, 1.0
    _, completions, log_probs, _ = engine.generate(prompts, None, num_generations=1)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    error = rounding = 0.0
    rounded = AutoModelForCausalLM.from_config(model.config)
    if not is_peft_model(model):
        rounded.load_state_dict(model.state_dict())
    rounded = rounded.eval().to(torch.bfloat16)
    for prompt, completion, values in zip(prompts, completions, log_probs, strict=True):
        expected = log_probs_of(model, prompt, completion)
        error = max(error, (expected - torch.tensor([value[0] for value in values])).abs().max().item())
        rounding = max(rounding, (expected - log_probs_of(rounded, prompt, completion)).abs().max().item())
    return {"error": error, "rounding": rounding}


@torch.no_grad()
def log_probs_of(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    log_probs = logits.log_softmax(dim=1)[len(prompt) - 1 : -1]
    return log_probs.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
