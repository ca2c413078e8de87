"""The trainer's log-probabilities with penalize_log_probs are those of the sampler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from coaug_trl import BM25Retriever, CoAugConfig, CoAugTrainer, PromptSet
from coaug_trl.training import sampler_head
from coaug_trl.training.sampler_head import _first_places, add_sampler_head
from coaug_trl.utils.errors import InputError


TEMPERATURE, PENALTY = 1.2, 1.2


def tiny(**changes):
    torch.manual_seed(0)
    settings = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **(settings | changes)))
    with torch.no_grad():  # logits of random weights are all near 0
        model.lm_head.weight.mul_(30)
    return model


def by_processors(model, input_ids, attention_mask, labels):
    """Log-probabilities and entropies of labels, token by token, with what `generate` samples from."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(PENALTY), TemperatureLogitsWarper(TEMPERATURE)])
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    log_probs, entropies = torch.zeros(labels[:, 1:].shape), torch.zeros(labels[:, 1:].shape)
    for row in range(len(input_ids)):
        first = int(attention_mask[row].argmax())
        for place in range(input_ids.shape[1] - 1):
            if labels[row, place + 1] == -100:
                continue
            # Each token once: the gradient of the processor counts a token as often as it is given.
            seen = input_ids[row, first : place + 1].unique()[None]
            scores = processors(seen, logits[row : row + 1, place])
            each = scores.log_softmax(dim=1)[0]
            log_probs[row, place] = each[labels[row, place + 1]]
            entropies[row, place] = -(each.exp() * each).sum()
    return log_probs, entropies


def batch():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 50, (4, 40), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, padding in enumerate((0, 3, 8, 1)):  # on the left, as prompts are padded
        input_ids[row, :padding], attention_mask[row, :padding] = 7, 0
    attention_mask[2, 33:] = 0  # and on the right, as completions are
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :15] = -100
    return input_ids, attention_mask, labels


@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_are_those_of_the_samplers_own_distribution(monkeypatch, tied):
    monkeypatch.setattr(sampler_head, "TOKENS_AT_ONCE", 13)
    model = tiny(tie_word_embeddings=tied)
    input_ids, attention_mask, labels = batch()
    weights = torch.randn(labels[:, 1:].shape, generator=torch.Generator().manual_seed(2))

    expected = by_processors(model, input_ids, attention_mask, labels)
    ((expected[0] + 0.1 * expected[1]) * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    add_sampler_head(model, TEMPERATURE, PENALTY)
    output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy, expected[1], rtol=1e-5, atol=1e-5)
    ((output.log_probs + 0.1 * output.entropy) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_logits_never_exist_for_more_than_a_few_tokens(monkeypatch):
    class LargestTensor(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for each in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(each, torch.Tensor):
                    self.size = max(self.size, each.numel())
            return output

    monkeypatch.setattr(sampler_head, "TOKENS_AT_ONCE", 10)
    model = tiny(vocab_size=3000)
    add_sampler_head(model, TEMPERATURE, PENALTY)
    input_ids, attention_mask, labels = batch()
    assert (labels != -100).sum() > 5 * 10
    with LargestTensor() as largest:
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
        (output.log_probs.sum() + output.entropy.sum()).backward()
    assert largest.size == max(10 * 3000, model.lm_head.weight.numel())


def test_with_autocast_the_gradients_of_the_parts_add_up_in_the_precision_of_the_weights(monkeypatch):
    """In bfloat16 they would lose more, the more parts there are."""
    input_ids, attention_mask, labels = batch()
    gradients = {}
    for name, at_once in (("float32", 512), ("one part", 512), ("many parts", 2)):
        monkeypatch.setattr(sampler_head, "TOKENS_AT_ONCE", at_once)
        model = tiny(tie_word_embeddings=False)
        add_sampler_head(model, TEMPERATURE, PENALTY)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name != "float32"):
            output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
            loss = -output.log_probs.sum()
        loss.backward()
        gradients[name] = model.lm_head.weight.grad
    size = gradients["float32"].norm()
    errors = {name: ((gradient - gradients["float32"]).norm() / size).item() for name, gradient in gradients.items()}
    assert 1e-4 < errors["one part"] < 0.05
    assert errors["many parts"] < 1.2 * errors["one part"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=9, max_size=9), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_first_places_are_those_of_a_search_from_the_left(rows, padding):
    input_ids = torch.tensor(rows)
    valid = torch.ones_like(input_ids)
    valid[0, :padding] = 0
    tokens, first = _first_places(input_ids, valid)
    for row in range(len(rows)):
        for token, place in zip(tokens[row].tolist(), first[row].tolist(), strict=True):
            found = [other for other in range(9) if rows[row][other] == token and valid[row, other]]
            assert place == (found[0] if found else 9)


def test_a_batch_without_a_label_keeps_its_place_in_the_graph():
    model = tiny()
    add_sampler_head(model, TEMPERATURE, PENALTY)
    input_ids, attention_mask, labels = batch()
    labels[:] = -100
    output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    output.log_probs.sum().backward()
    assert all((parameter.grad == 0).all() for name, parameter in model.named_parameters() if "layers" in name)


def test_without_the_fused_head_the_model_is_as_before():
    model, other = tiny(), tiny()
    add_sampler_head(model, TEMPERATURE, PENALTY)
    input_ids, attention_mask, labels = batch()
    ours = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
    theirs = other(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)


def test_models_that_scale_their_logits_are_refused():
    model = tiny()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="qwen2 models with final_logit_softcapping.*penalize_log_probs to False"):
        add_sampler_head(model, TEMPERATURE, PENALTY)


def make_trainer(collection, model, folder, **changes):
    args = CoAugConfig(
        output_dir=str(folder),
        **dict(
            groups_per_batch=2,
            group_size=4,
            num_relevant=2,
            num_generations=3,
            updates_per_batch=2,
            per_device_train_batch_size=4,
            max_completion_length=16,
            temperature=TEMPERATURE,
            repetition_penalty=PENALTY,
            penalize_log_probs=True,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_steps=2,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        | changes,
    )
    prompt_set = PromptSet("sparse", "query:", "document:")
    return CoAugTrainer(str(model), args, collection, BM25Retriever(), prompt_set)


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_trainer_computes_what_generate_sampled_from(collection, tiny_model, tmp_path, use_peft):
    """Scores that `generate` itself reports for the tokens it drew, against the log-probabilities of the loss."""
    from peft import LoraConfig

    sampled = []
    trainer = make_trainer(collection, tiny_model, tmp_path)
    if use_peft:
        trainer = CoAugTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            trainer.args,
            collection,
            BM25Retriever(),
            PromptSet("sparse", "query:", "document:"),
            processing_class=trainer.processing_class,
            # an adapter that does something from the beginning
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
        )
    model = trainer.model.get_base_model() if use_peft else trainer.model
    generate = model.generate

    def recording(**kwargs):
        output = generate(**kwargs, return_dict_in_generate=True, output_scores=True)
        length = kwargs["input_ids"].shape[1]
        scores = torch.stack(output.scores, dim=1).log_softmax(dim=-1)
        sampled.append(scores.gather(2, output.sequences[:, length:, None]).squeeze(2))
        return output.sequences

    model.generate = recording
    computed, compute = [], trainer._get_per_token_logps_and_entropies

    def recording_logps(*args, **kwargs):
        computed.append((compute(*args, **kwargs), args[2][:, -args[3] :]))
        return computed[-1][0]

    trainer._get_per_token_logps_and_entropies = recording_logps
    trainer.train()
    # With two updates a batch, the log-probabilities of the whole batch are computed before the first.
    (logps, *_), mask = computed[0]
    assert logps.shape == sampled[0].shape
    difference = ((logps - sampled[0]) * mask).abs().max().item()
    assert difference < 1e-3
    assert (mask.sum(dim=1) > 1).any()


def test_without_the_option_the_log_probabilities_are_others(collection, tiny_model, tmp_path):
    """The difference the option makes, so that the test above could fail."""
    values = {}
    for penalize in (False, True):
        trainer = make_trainer(collection, tiny_model, tmp_path / str(penalize), penalize_log_probs=penalize)
        input_ids, attention_mask, _ = batch()
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, attention_mask, 25)
        values[penalize] = logps.detach().numpy()
    assert np.abs(values[True] - values[False]).max() > 0.1


def test_the_option_lets_the_correction_stay_on(tmp_path):
    settings = dict(output_dir=str(tmp_path), use_vllm=True, vllm_importance_sampling_correction=True, use_cpu=True)
    with pytest.raises(ValueError, match="or penalize_log_probs to True"):
        CoAugConfig(**settings)
    assert CoAugConfig(**settings, penalize_log_probs=True).vllm_importance_sampling_correction
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 is True with penalize_log_probs"):
        CoAugConfig(**settings, penalize_log_probs=True, cast_lm_head_to_fp32=True)
    with pytest.raises(ValueError, match="top_p=0.9"):
        CoAugConfig(**settings, penalize_log_probs=True, top_p=0.9)
