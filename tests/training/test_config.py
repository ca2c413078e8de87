import copy
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig, TrlParser

from coaug_trl import BM25Retriever, CoAugConfig, InputError
from coaug_trl.training.rules import check_rules
from coaug_trl.training.trainer import check_best_metric


def make_config(**kwargs):
    return CoAugConfig(output_dir="unused", bf16=False, report_to="none", **kwargs)


def test_an_output_folder_is_all_it_takes():
    config = CoAugConfig(output_dir="unused")
    assert config.bf16 == is_torch_bf16_gpu_available()
    assert CoAugConfig(output_dir="unused", bf16=False).bf16 is False
    assert CoAugConfig(output_dir="unused", use_cpu=True).bf16 is False


def refusal(**kwargs):
    with pytest.raises(ValueError) as error:
        make_config(**kwargs)
    return str(error.value)


def suggestions(message):
    """The numbers an error suggests: `… use 3 or 5.`"""
    return [int(number) for number in re.findall(r"\d+", message.rpartition("; use ")[2])]


def test_only_the_output_folder_is_needed_and_the_rest_is_the_papers():
    config = make_config()
    # arXiv 2506.18670, sections 3.2 to 3.4 and appendix B.1
    assert config.temperature == 1.2
    assert config.repetition_penalty == 1.2
    assert config.num_generations == 5
    assert (config.queries_per_group, config.group_size, config.num_relevant) == (1, 16, 5)
    assert config.groups_per_batch * config.group_size == 512
    assert config.groups_per_batch * config.group_size // config.updates_per_batch == 128
    assert config.text_type_scales == [1.0, 0.2, 0.1]
    assert config.advantage_normalization == "center"
    assert config.beta == 0.0
    assert config.learning_rate == 1e-6
    assert config.num_reward_samples == 512
    assert config.ndcg_k == 10
    assert config.augment == "both"
    # where the defaults leave the paper
    assert (config.candidate_pool, config.reward_estimator, config.relevant_weight) == ("batch", "exact", 10)
    assert config.scale_rewards == "none"
    assert config.num_generations_eval == 1
    assert config.vllm_importance_sampling_correction is False
    assert config.bm25_statistics == "running"
    assert make_config(candidate_pool="group").bm25_statistics == "original"
    assert config.eval_corpus_size is None
    assert (config.num_hard_negatives, config.hard_negative_ranks) == (0, [10, 100])


def test_the_default_batch_is_as_documented():
    config = make_config()
    assert config.generation_batch_size == 2560
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 4 == 2560
    assert config.batch_summary == (
        "1 generation batch = 32 groups × 16 texts × 5 rollouts = 2,560 completions, 4 optimizer steps"
    )
    assert make_config(updates_per_batch=1).batch_summary.endswith(", 1 optimizer step")


@pytest.mark.parametrize(("augment", "rows"), [("both", 12), ("query", 2), ("document", 10)])
def test_only_the_augmented_sides_texts_are_generated_for(augment, rows):
    config = make_config(
        augment=augment,
        queries_per_group=2,
        group_size=12,
        groups_per_batch=8,
        num_relevant=3,
        per_device_train_batch_size=4,
    )
    assert config.rows_per_group == rows
    assert config.generation_batch_size == 8 * rows * 5
    assert f"8 groups × {rows} texts × 5 rollouts = {8 * rows * 5} completions" in config.batch_summary


@pytest.fixture(scope="module")
def default_config():
    return make_config()


def derive(config, num_processes, **kwargs):
    """The batch arithmetic for a number of processes, which only a launcher can give to a whole configuration."""
    derived = copy.copy(config)
    unset = {"generation_batch_size": None, "steps_per_generation": None, "gradient_accumulation_steps": 1}
    for name, value in (unset | kwargs).items():
        setattr(derived, name, value)
    check_rules(derived)
    derived._derive_batches(num_processes)
    return derived


@pytest.mark.parametrize("changes", [{"load_best_model_at_end": True}, {"save_strategy": "best"}])
def test_checkpoints_are_compared_by_the_measure_of_evaluations(changes):
    config = make_config(**{"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "ndcg_k": 20, **changes})
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_nDCG@20", True)
    assert make_config().metric_for_best_model is None  # nobody asks for the best


def test_a_measure_of_bm25_compares_no_checkpoints_of_a_dense_retriever():
    config = make_config(metric_for_best_model="eval_nDCG@10_reward_statistics")
    check_best_metric(BM25Retriever(), config)
    with pytest.raises(InputError, match="_reward_statistics', which is measured with BM25 alone; use eval_nDCG@10,"):
        check_best_metric(SimpleNamespace(kind="dense"), config)


batches = st.fixed_dictionaries(
    {
        "augment": st.sampled_from(["both", "query", "document"]),
        "queries_per_group": st.integers(1, 2),
        "group_size": st.integers(6, 20),
        "num_relevant": st.integers(1, 2),
        "groups_per_batch": st.integers(1, 40),
        "num_generations": st.integers(2, 8),
        "updates_per_batch": st.integers(1, 8),
        "per_device_train_batch_size": st.integers(1, 40),
    }
)


@settings(deadline=None, max_examples=300)
@given(num_processes=st.integers(1, 8), kwargs=batches)
def test_following_the_errors_advice_ends_in_batches_that_multiply_out(default_config, num_processes, kwargs):
    kwargs = dict(kwargs)
    for _ in range(4):  # each of the three sizes is mended at most once
        try:
            config = derive(default_config, num_processes, **kwargs)
            break
        except ValueError as error:
            message = str(error)
            name = message.split()[0]
            assert name in ("groups_per_batch", "updates_per_batch", "per_device_train_batch_size")
            assert message.startswith(f"{name} is {kwargs[name]}, ")
            assert suggestions(message)
            assert kwargs[name] not in suggestions(message)
            kwargs[name] = suggestions(message)[0]
    rows = {
        "both": config.group_size,
        "query": config.queries_per_group,
        "document": config.group_size - config.queries_per_group,
    }[config.augment]
    completions = config.groups_per_batch * rows * config.num_generations
    assert config.generation_batch_size == completions
    assert config.groups_per_batch % num_processes == 0
    assert config.gradient_accumulation_steps >= 1
    # The completions of one read of the loader: one generation batch, as GRPOConfig derives it.
    per_step = config.per_device_train_batch_size * num_processes
    assert completions % per_step == 0
    assert completions // per_step == config.updates_per_batch * config.gradient_accumulation_steps


@settings(deadline=None, max_examples=200)
@given(num_processes=st.integers(1, 8), kwargs=batches)
def test_every_suggestion_mends_the_setting_it_is_made_for(default_config, num_processes, kwargs):
    message = None
    try:
        derive(default_config, num_processes, **kwargs)
    except ValueError as error:
        message = str(error)
    assume(message is not None)
    name = message.split()[0]
    for value in suggestions(message):
        try:
            derive(default_config, num_processes, **{**kwargs, name: value})
        except ValueError as error:
            assert not str(error).startswith(name)


def test_the_derived_sizes_agree_with_trls():
    config = make_config(groups_per_batch=6, group_size=10, num_generations=4, updates_per_batch=3)
    assert config.generation_batch_size == 240
    assert config.steps_per_generation == 30
    assert config.gradient_accumulation_steps == 10


def test_processes_that_cannot_share_the_groups_evenly_are_told_what_they_could(default_config):
    with pytest.raises(
        ValueError, match=r"groups_per_batch is 32, which 3 processes cannot share evenly; use 30 or 33\."
    ):
        derive(default_config, 3)
    assert derive(default_config, 3, groups_per_batch=33, per_device_train_batch_size=11).generation_batch_size == 2640
    with pytest.raises(ValueError, match=r"groups_per_batch is 2, which 8 processes .* use 8\."):
        derive(default_config, 8, groups_per_batch=2)


@pytest.mark.parametrize(
    ("kwargs", "named", "mended"),
    [
        ({"queries_per_group": 0}, "queries_per_group is 0; use at least 1", {"queries_per_group": 1}),
        ({"num_relevant": 0}, "num_relevant is 0; use at least 1", {"num_relevant": 1}),
        ({"groups_per_batch": 0}, "groups_per_batch is 0; use at least 1", {"groups_per_batch": 1, "group_size": 32}),
        ({"updates_per_batch": -1}, "updates_per_batch is -1; use at least 1", {"updates_per_batch": 1}),
        ({"ndcg_k": 0}, "ndcg_k is 0; use at least 1", {"ndcg_k": 1}),
        (
            {"max_completion_length": 0},
            "max_completion_length is 0; use at least 1",
            {"max_completion_length": 1},
        ),
        ({"vllm_mode": "servr"}, "vllm_mode is 'servr'; use one of server, colocate", {"vllm_mode": "server"}),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size is 0; use at least 1",
            {"per_device_train_batch_size": 1},
        ),
        (
            {"augment": "documents"},
            "augment is 'documents'; use one of both, query, document",
            {"augment": "document"},
        ),
        (
            {"candidate_pool": "all"},
            "candidate_pool is 'all'; use one of group, batch, corpus",
            {"candidate_pool": "corpus"},
        ),
        (
            {"augmentations": "folder"},
            "augmentations is 'folder' with candidate_pool='batch'",
            {"augmentations": "folder", "candidate_pool": "corpus"},
        ),
        (
            {"augmentations": "folder", "candidate_pool": "corpus", "augment": "query"},
            "set candidate_pool to 'corpus' and augment to 'both' or 'document'",
            {"augmentations": "folder", "candidate_pool": "corpus", "augment": "document"},
        ),
        (
            {"reward_estimator": "mc"},
            "reward_estimator is 'mc'; use one of exact, sampled",
            {"reward_estimator": "sampled"},
        ),
        (
            {"advantage_normalization": "none"},
            "advantage_normalization is 'none'; use one of center, group, batch",
            {"advantage_normalization": "batch"},
        ),
        (
            {"group_size": 11, "queries_per_group": 2},
            "group_size is 11, too small for queries_per_group=2 with num_relevant=5; use at least 12",
            {"group_size": 12},
        ),
        (
            {"reward_estimator": "sampled", "num_reward_samples": 0},
            "num_reward_samples is 0; use at least 1, such as 512",
            {"num_reward_samples": 512},
        ),
        ({"relevant_weight": -1.0}, "relevant_weight is -1.0; use 0 or more, such as 10", {"relevant_weight": 0.0}),
        (
            {"metric_for_best_model": "eval_nDCG@10", "ndcg_k": 20},
            "metric_for_best_model is 'eval_nDCG@10', but evaluations measure eval_nDCG@20 (ndcg_k is 20); use that",
            {"metric_for_best_model": "eval_nDCG@20", "ndcg_k": 20},
        ),
        (
            {"metric_for_best_model": "loss"},
            "metric_for_best_model is 'loss', but evaluations measure eval_nDCG@10 (ndcg_k is 10); use that, or leave",
            {"metric_for_best_model": "nDCG@10_reward_statistics"},
        ),
        ({"eval_corpus_size": 0}, "eval_corpus_size is 0; use at least 1, or leave it out", {"eval_corpus_size": 1}),
        (
            {"num_hard_negatives": -1},
            "num_hard_negatives is -1, but group_size=16 leaves room for 10",
            {"num_hard_negatives": 0},
        ),
        (
            {"num_hard_negatives": 5, "group_size": 16, "queries_per_group": 2},
            "num_hard_negatives is 5, but group_size=16 leaves room for 4 beside queries_per_group=2 and "
            "num_relevant=5; use 0 to 4.",
            {"num_hard_negatives": 4},
        ),
        (
            {"num_hard_negatives": 2, "group_size": 6},
            "num_hard_negatives is 2, but group_size=6 leaves room for 0 beside queries_per_group=1 and "
            "num_relevant=5; use a larger group_size, or 0.",
            {"group_size": 8},
        ),
        (
            {"hard_negative_ranks": [100, 10]},
            "hard_negative_ranks is [100, 10]; use a first and a last rank, counted from 1, such as 10 100.",
            {"hard_negative_ranks": [10, 100]},
        ),
        (
            {"bm25_statistics": "running", "candidate_pool": "group"},
            "bm25_statistics is 'running' with candidate_pool='group'",
            {"bm25_statistics": "running", "candidate_pool": "corpus"},
        ),
        (
            {"bm25_statistics": "frozen"},
            "bm25_statistics is 'frozen'; use one of running, refreshed, original",
            {"bm25_statistics": "original"},
        ),
        (
            {"running_statistics": True},
            "running_statistics is now bm25_statistics; set it to 'running', 'refreshed' or 'original'",
            {"running_statistics": None},
        ),
        (
            {"refresh_statistics": False},
            "refresh_statistics is now bm25_statistics; set it to 'running', 'refreshed' or 'original'",
            {"refresh_statistics": None},
        ),
        (
            {"hard_negative_ranks": [1.0, 10]},
            "hard_negative_ranks is [1.0, 10]; use a first and a last rank, counted from 1",
            {"hard_negative_ranks": [1, 10]},
        ),
        (
            {"hard_negative_ranks": [0, 10]},
            "hard_negative_ranks is [0, 10]; use a first and a last rank, counted from 1",
            {"hard_negative_ranks": [1, 10]},
        ),
        (
            {"hard_negative_ranks": [100]},
            "hard_negative_ranks is [100]; use a first and a last rank, counted from 1",
            {"hard_negative_ranks": [100, 100]},
        ),
        (
            {"text_type_scales": [1.0, 0.2]},
            "text_type_scales is [1.0, 0.2]; use three factors of 0 or more",
            {"text_type_scales": [1.0, 0.2, 0.1]},
        ),
        (
            {"text_type_scales": [1.0, -0.2, 0.1]},
            "text_type_scales is [1.0, -0.2, 0.1]; use three factors of 0 or more",
            {"text_type_scales": [1.0, 0.0, 0.1]},
        ),
        ({"num_generations": 1}, "num_generations is 1: ", {"num_generations": 2}),
        ({"num_generations": None}, "num_generations is None: ", {"num_generations": 5}),
        (
            {"num_generations_eval": 4},
            "num_generations_eval is 4; dev evaluation is greedy, use 1",
            {"num_generations_eval": 1},
        ),
        ({"num_generations_eval": None}, "num_generations_eval is None; ", {"num_generations_eval": 1}),
        ({"text_type_scales": [0.0, 0.0, 0.0]}, "every advantage would be 0", {"text_type_scales": [0.0, 0.2, 0.0]}),
        (
            {"augment": "document", "text_type_scales": [1.0, 0.0, 0.0]},
            "text_type_scales is [1.0, 0.0, 0.0] with augment='document': every advantage would be 0",
            {"text_type_scales": [0.0, 0.0, 0.1]},
        ),
        (
            {"augment": "query", "text_type_scales": [0.0, 1.0, 1.0]},
            "text_type_scales is [0.0, 1.0, 1.0] with augment='query': every advantage would be 0",
            {"text_type_scales": [1.0, 0.0, 0.0]},
        ),
        (
            {"learning_rate": 0.0},
            "learning_rate is 0: no weight would change; use a positive one",
            {"learning_rate": 1e-6},
        ),
        ({"temperature": 0.0}, "temperature is 0.0: all rollouts of a text would be the same", {"temperature": 1.2}),
        (
            {"use_transformers_continuous_batching": True},
            "repetition_penalty is 1.2 with use_transformers_continuous_batching",
            {"repetition_penalty": 1.0},
        ),
        (
            {"use_transformers_paged": True},
            "repetition_penalty is 1.2 with use_transformers_continuous_batching",
            {"repetition_penalty": 1.0},
        ),
        (
            {"per_device_train_batch_size": 7},
            "per_device_train_batch_size is 7, which does not divide the 640 completions that each process has in an "
            "optimizer step (32 groups × 16 texts × 5 rollouts / 4 updates / 1 processes); use 5 or 8.",
            {"per_device_train_batch_size": 8},
        ),
        (
            {"updates_per_batch": 3},
            "updates_per_batch is 3, which does not divide the 2,560 completions that each process has of a generation "
            "batch; use 2 or 4.",
            {"updates_per_batch": 2},
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_setting_that_cannot_work_is_refused_and_its_mended_value_accepted(kwargs, named, mended):
    message = refusal(**kwargs)
    assert named in message
    make_config(**{**kwargs, **mended})


@pytest.mark.parametrize("value", ["group", "batch", True])
def test_trls_scaling_of_rewards_is_refused_in_favour_of_advantage_normalization(value):
    message = refusal(scale_rewards=value)
    assert f"scale_rewards is {value!r}" in message
    assert "set advantage_normalization to 'center', 'group' or 'batch'" in message
    for normalization, scaling in (("center", "none"), ("group", "group"), ("batch", "none")):
        config = make_config(advantage_normalization=normalization)
        assert config.scale_rewards == scaling
        assert make_config(advantage_normalization=normalization, scale_rewards=scaling).scale_rewards == scaling
    for off in ("none", False):
        assert make_config(scale_rewards=off).scale_rewards == "none"


def test_trls_aggregation_of_rewards_is_refused():
    message = refusal(multi_objective_aggregation="normalize_then_sum")
    assert "multi_objective_aggregation is 'normalize_then_sum'" in message
    assert "Leave both out" in message


@pytest.mark.parametrize(
    ("name", "derived"),
    [("generation_batch_size", 2560), ("steps_per_generation", 320), ("gradient_accumulation_steps", 80)],
)
def test_derived_sizes_are_refused_with_the_value_they_have(name, derived):
    message = refusal(**{name: 40})
    assert f"{name} is 40, but it follows from" in message
    assert f"give {derived}; leave it out" in message
    assert getattr(make_config(**{name: derived}), name) == getattr(make_config(), name) == derived


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({}, "repetition_penalty=1.2"),
        ({"repetition_penalty": 1.0, "top_p": 0.9}, "top_p=0.9"),
        ({"repetition_penalty": 1.0, "top_k": 20}, "top_k=20"),
        ({"repetition_penalty": 1.0, "min_p": 0.05}, "min_p=0.05"),
        ({"top_k": 20}, "repetition_penalty=1.2, top_k=20"),
    ],
)
def test_vllms_correction_is_refused_beside_what_changes_its_probabilities(kwargs, named):
    message = refusal(use_vllm=True, vllm_importance_sampling_correction=True, **kwargs)
    assert f"vllm_importance_sampling_correction is True with {named}:" in message
    assert "Set vllm_importance_sampling_correction to False" in message
    assert make_config(use_vllm=True, **kwargs).use_vllm
    # without vLLM the correction does nothing
    make_config(vllm_importance_sampling_correction=True, **kwargs)


def test_vllms_correction_is_allowed_where_nothing_changes_its_probabilities():
    config = make_config(use_vllm=True, vllm_importance_sampling_correction=True, repetition_penalty=1.0)
    assert config.vllm_importance_sampling_correction is True


def own_fields():
    return [field for field in fields(CoAugConfig) if field.name in CoAugConfig.__annotations__]


def test_every_own_field_has_help_and_is_documented():
    assert len(own_fields()) > 15
    trl_fields = {field.name for field in fields(GRPOConfig)}
    for field in own_fields():
        assert len(field.metadata["help"]) > 10, field.name
        assert field.name in CoAugConfig.__doc__, field.name
        if field.name not in trl_fields:
            assert f"{field.name} (`" in CoAugConfig.__doc__, field.name


@pytest.mark.parametrize(
    "kwargs", [{}, {"augment": "query", "text_type_scales": [1.0, 0.5, 0.0], "updates_per_batch": 2}]
)
def test_a_saved_configuration_can_be_read_again(kwargs):
    config = make_config(**kwargs)
    saved = config.to_dict()
    assert CoAugConfig(**saved).to_dict() == saved


def parse(*arguments):
    return TrlParser((CoAugConfig,)).parse_args_and_config(
        ["--output_dir", "unused", "--bf16", "False", "--report_to", "none", *arguments]
    )[0]


def test_the_command_line_gives_every_field():
    config = parse(
        *("--num_hard_negatives", "3", "--hard_negative_ranks", "1", "50"),
        *("--text_type_scales", "1", "0.2", "0.1", "--groups_per_batch", "4", "--augment", "query"),
        *(
            "--per_device_train_batch_size",
            "5",
            "--relevant_weight",
            "0",
            "--eval_corpus_size",
            "100",
            "--bm25_statistics",
            "refreshed",
        ),
    )
    assert config.text_type_scales == [1.0, 0.2, 0.1]
    assert (config.num_hard_negatives, config.hard_negative_ranks) == (3, [1, 50])
    assert config.groups_per_batch == 4
    assert config.augment == "query"
    assert config.relevant_weight == 0.0
    assert config.eval_corpus_size == 100
    assert config.bm25_statistics == "refreshed"
    assert parse().to_dict() == make_config().to_dict()


def test_a_recipe_gives_every_field(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "text_type_scales: [1.0, 0.5, 0.0]\nscale_rewards: none\nupdates_per_batch: 2\n", encoding="utf-8"
    )
    config = parse("--config", str(recipe), "--updates_per_batch", "1")
    assert config.text_type_scales == [1.0, 0.5, 0.0]
    assert config.updates_per_batch == 1


def test_help_lists_every_own_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        TrlParser((CoAugConfig,)).parse_args_and_config(["--help"])
    assert exit_.value.code == 0
    listed = capsys.readouterr().out
    for field in own_fields():
        assert f"--{field.name}" in listed


def test_the_command_line_refuses_a_choice_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--candidate_pool", "everything")
    assert exit_.value.code == 2
    assert "candidate_pool" in capsys.readouterr().err
