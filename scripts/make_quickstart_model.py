"""
Makes the policy the quickstart starts from: a tiny word-level Llama model that knows the synonyms of the
vocabulary-gap collection, as a pretrained model would, but has no convention for which of them to use.

python scripts/make_quickstart_model.py --output_dir runs/quickstart/untrained
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils.logging import disable_progress_bar

from coaug_trl import Collection, PromptSet
from coaug_trl.data import vocabulary_gap


PROMPT_SET = Path(__file__).parent.parent / "recipes" / "quickstart" / "prompt_set.yaml"
SPECIAL = ["<pad>", "<eos>", "<unk>", "<answer>", "</answer>"]


def make_tokenizer(prompt_set: PromptSet) -> PreTrainedTokenizerFast:
    """One token a word, for the words of the collection and the prompts."""
    words = SPECIAL + vocabulary_gap.vocabulary()
    words += sorted(set(f"{prompt_set.query} {prompt_set.document}".split()) - set(words))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model with random weights. Not a Qwen2 one, because AutoTokenizer would give that another tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def random_synonyms(text: str, generator: np.random.Generator) -> str:
    """For each concept of a text one or two of its terms, drawn evenly."""
    words = []
    for concept in vocabulary_gap.concepts_in(text):
        words += generator.choice(vocabulary_gap.CONCEPTS[concept], generator.integers(1, 3), replace=False).tolist()
    return " ".join(words)


def warm_start(model, tokenizer, prompt_set: PromptSet, steps: int, batch_size: int, seed: int) -> float:
    """Trains the model to answer with random synonyms; returns the mean loss of the last tenth of the steps."""
    collection = Collection.load("vocabulary-gap")
    texts = [("document", document.text) for document in collection.corpus.values()]
    texts += [("query", collection.queries[query_id]) for query_id in collection.qrels] * 2
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    losses = []
    for _ in tqdm(range(steps), desc="Teaching the tiny model its synonyms"):
        chosen = [texts[index] for index in generator.integers(len(texts), size=batch_size)]
        prompts = [prompt_set.prompt(side, text, tokenizer) for side, text in chosen]
        answers = [f"<answer> {random_synonyms(text, generator)} </answer> <eos>" for _, text in chosen]
        whole = tokenizer(
            [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
            return_tensors="pt",
            padding=True,
        )
        labels = whole.input_ids.clone()
        for row, answer in enumerate(answers):
            labels[row, : -len(answer.split())] = -100
        loss = model(input_ids=whole.input_ids, attention_mask=whole.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses[-max(1, steps // 10) :]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder for model and tokenizer.")
    parser.add_argument("--steps", type=int, default=500, help="Training steps.")
    parser.add_argument("--batch_size", type=int, default=64, help="Texts a step.")
    parser.add_argument("--seed", type=int, default=42, help="Seed.")
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    disable_progress_bar()
    prompt_set = PromptSet.load(PROMPT_SET)
    tokenizer = make_tokenizer(prompt_set)
    model = make_model(tokenizer)
    loss = warm_start(model, tokenizer, prompt_set, arguments.steps, arguments.batch_size, arguments.seed)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{arguments.output_dir}: {model.num_parameters():,} parameters, loss {loss:.3f}")


if __name__ == "__main__":
    main()
