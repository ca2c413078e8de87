"""A recipe and a command line in, a trainer out."""

import difflib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..data.collection import Collection
from ..policy.prompts import PromptSet
from ..retrieval import Retriever, make_retriever
from ..utils.errors import InputError
from ..utils.terminal import is_json, is_quiet, say
from .checkpoints import last_whole_checkpoint
from .config import CoAugConfig
from .trainer import CoAugTrainer


logger = logging.getLogger(__name__)
# With all fields argparse's own usage would be 200 lines before each error.
USAGE = "coaug train --config RECIPE [--field value ...]"
DTYPES = ("float32", "bfloat16", "float16", "auto")
# Shown beside the progress bar; all metrics are in trainer_state.json and go to report_to.
SHOWN = {"reward": "reward", "query/answer_rate": "answers", "entropy": "entropy"}


@dataclass
class CoAugScriptArguments:
    """
    What is trained on, and for which retriever.

    Args:
        collection: BEIR folder, Hub id, `irds:NAME` for ir_datasets, or `vocabulary-gap`.
        train_split: Split to train on.
        eval_split: Split of the evaluations during training; used if `eval_strategy` is not `"no"`. Never the test
            split.
        retriever: Retriever whose ranking is the reward.
        fields: BM25: title and text as one field (`"flat"`) or two (`"best"`).
        k1: BM25: saturation of repeated words.
        b: BM25: normalisation by length.
        language: BM25: Snowball stemmer.
        encoder: Dense: sentence-transformers model.
        embedding_cache: Dense: folder where embeddings of the collection's documents are kept for later runs.
        prompt_set: YAML file with the prompts; defaults to the package's for the retriever's kind.
        dry_run: Print what the run would do and the memory it would need, build everything but the model, and exit.
        gpu_memory_gib: Memory of the GPU to fit on, in GiB, for `dry_run`; defaults to that of the GPU that is there.
    """

    collection: str = field(metadata={"help": "BEIR folder, Hub id, irds:NAME, or vocabulary-gap."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="dev", metadata={"help": "Split of evaluations during training; never 'test'."})
    retriever: str = field(default="bm25", metadata={"help": "Retriever of the reward.", "choices": ["bm25", "dense"]})
    fields: str = field(
        default="flat", metadata={"help": "BM25: title and text as one field or two.", "choices": ["flat", "best"]}
    )
    k1: float = field(default=1.2, metadata={"help": "BM25: saturation of repeated words."})
    b: float = field(default=0.75, metadata={"help": "BM25: normalisation by length."})
    language: str = field(default="english", metadata={"help": "BM25: Snowball stemmer."})
    encoder: str = field(default="BAAI/bge-base-en-v1.5", metadata={"help": "Dense: sentence-transformers model."})
    embedding_cache: str | None = field(default=None, metadata={"help": "Dense: where embeddings are kept."})
    prompt_set: str | None = field(default=None, metadata={"help": "YAML file with the prompts."})
    dry_run: bool = field(default=False, metadata={"help": "Print plan and memory without a model, and exit."})
    gpu_memory_gib: float | None = field(
        default=None, metadata={"help": "Dry run: memory of the GPU to fit on, in GiB; default: the one there is."}
    )

    def __post_init__(self):
        if self.eval_split == "test" or self.train_split == "test":
            raise InputError("The test split is for coaug evaluate alone; train on 'train' and evaluate on 'dev'.")
        if self.retriever not in ("bm25", "dense"):  # argparse does not check the values of a recipe
            raise InputError(f"retriever is {self.retriever!r}; use bm25 or dense.")
        if self.gpu_memory_gib is not None and not 0 < self.gpu_memory_gib < math.inf:
            raise InputError(f"gpu_memory_gib is {self.gpu_memory_gib}; use the GPU's memory in GiB, such as 24.")


def given_checkpoint(training_args: CoAugConfig) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` names; `None` to go on from the last whole one, if there is one.

    Raises `InputError`: It is true and there is none, or false.
    """
    given = training_args.resume_from_checkpoint
    # A recipe gives a boolean, the command line a string.
    asked = {"true": True, "false": False}.get(str(given).lower())
    if asked is None:
        return given
    output_dir = training_args.output_dir
    if not asked:
        raise InputError(
            f"resume_from_checkpoint is {given}, but a run goes on from the last whole checkpoint of its output_dir "
            f"({output_dir}), if there is one; leave it out, or choose another output_dir to start afresh."
        )
    if last_whole_checkpoint(output_dir, quiet=True) is None:
        raise InputError(f"resume_from_checkpoint is {given}, but {output_dir} has no whole checkpoint; leave it out.")
    training_args.resume_from_checkpoint = None  # which is the same
    return None


def make_parts(
    script_args: CoAugScriptArguments, training_args: CoAugConfig, model_args: ModelConfig
) -> tuple[Collection, Collection | None, Retriever, PromptSet, PreTrainedTokenizerBase]:
    """
    Builds what a run needs besides its model.

    Args:
        script_args: What is trained on.
        training_args: Configuration.
        model_args: The model, for its tokenizer.

    Returns: training collection, evaluation collection (`None` without evaluations), retriever, prompt set and
        tokenizer.

    Raises `InputError`: One of them cannot be loaded.
    """
    train_collection = Collection.load(script_args.collection, script_args.train_split)
    eval_collection = None
    if training_args.eval_strategy != "no":
        eval_collection = train_collection.with_split(script_args.eval_split)
    if script_args.retriever == "bm25":
        names = ("k1", "b", "language", "fields")
        retriever = make_retriever("bm25", **{name: getattr(script_args, name) for name in names})
    else:
        retriever = make_retriever("dense", model=script_args.encoder, cache_dir=script_args.embedding_cache)
    prompt_set = (
        PromptSet.load(script_args.prompt_set) if script_args.prompt_set else PromptSet.default(retriever.kind)
    )
    return train_collection, eval_collection, retriever, prompt_set, load_tokenizer(training_args, model_args)


def make_trainer(
    script_args: CoAugScriptArguments,
    training_args: CoAugConfig,
    model_args: ModelConfig,
    card_writer: Callable | None = None,
) -> CoAugTrainer:
    """
    Builds the trainer of a run, with its model.

    Args:
        script_args: What is trained on.
        training_args: Configuration; gets the `model_init_kwargs` that follow from `model_args`.
        model_args: The model.
        card_writer: As [`~coaug_trl.CoAugTrainer`] takes it.

    Returns: the trainer, before its first step.

    Raises `InputError`: A setting or an input file has to be mended.
    """
    set_seed(training_args.seed)
    train_collection, eval_collection, retriever, prompt_set, tokenizer = make_parts(
        script_args, training_args, model_args
    )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    try:
        trainer = CoAugTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_collection=train_collection,
            retriever=retriever,
            prompt_set=prompt_set,
            eval_collection=eval_collection,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            card_writer=card_writer,
            quantization_config=get_quantization_config(model_args),
        )
    except ImportError as error:  # vLLM, bitsandbytes, flash-attn
        raise InputError(f"A package that the settings need is missing: {error}") from error
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback)
    if is_quiet() or is_json():
        trainer.remove_callback(PrinterCallback)
    return trainer


class CompactProgressCallback(ProgressCallback):
    """The trainer's progress bar, with a few metrics beside it rather than all of them, line after line, above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[key]:.3f}" for key, name in SHOWN.items() if logs.get(key) is not None}
            if shown:
                self.training_bar.set_postfix(shown)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        key = f"eval_nDCG@{args.ndcg_k}"
        if state.is_world_process_zero and self.training_bar is not None and key in (metrics or {}):
            with self.training_bar.external_write_mode():
                say(f"step {state.global_step}: {key} = {metrics[key]:.4f}")


def parse_arguments(arguments: list[str] | None = None) -> tuple[CoAugScriptArguments, CoAugConfig, ModelConfig]:
    """
    Reads recipe and command line.

    Raises `InputError`: The recipe is not there or not YAML, or a setting has a value that cannot work.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = TrlParser((CoAugScriptArguments, CoAugConfig, ModelConfig), prog="coaug train", usage=USAGE)
    if arguments[-1:] == ["--config"]:
        raise InputError("--config names no recipe; give one, such as recipes/nfcorpus/qwen2.5-7b-bm25.yaml.")
    if "--dry_run" in arguments and not torch.cuda.is_available():
        arguments = [*arguments, "--use_cpu", "true"]  # what is planned is for another machine
    try:
        _refuse_unknown_options(arguments, parser)
        if "--config" in arguments:
            _refuse_unknown_fields(arguments[arguments.index("--config") + 1], parser)
        script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise InputError(str(error)) from None
    except TypeError as error:  # a list or nothing where YAML should have a number
        raise InputError(f"A field has a value of the wrong kind: {error}") from None
    if model_args.model_name_or_path is None:
        raise InputError(
            "model_name_or_path is missing; give a folder or a Hub id, such as Qwen/Qwen2.5-0.5B-Instruct."
        )
    if (Path(model_args.model_name_or_path) / "adapter_config.json").is_file():
        raise InputError(
            f"{model_args.model_name_or_path} is an adapter, and training begins from whole weights; merge it first: "
            f'python -c "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('
            f"'{model_args.model_name_or_path}').merge_and_unload().save_pretrained('MERGED')\", copy its tokenizer "
            "files there, and give that folder."
        )
    if model_args.dtype not in DTYPES:
        raise InputError(f"dtype is {model_args.dtype!r}; use one of {', '.join(DTYPES)}.")
    attention = model_args.attn_implementation
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attention is not None and attention not in known and "/" not in attention:  # with a slash, a kernel of the Hub
        raise InputError(f"attn_implementation is {attention!r}; use one of {', '.join(known)}, or leave it out.")
    if training_args.use_vllm and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise InputError(
            "use_vllm is True with a quantized model, whose weights cannot be handed to vLLM; set use_vllm to False, or "
            "leave out load_in_4bit and load_in_8bit."
        )
    return script_args, training_args, model_args


def _refuse_unknown_fields(recipe: str, parser: TrlParser) -> None:
    """TRL's parser finds a misspelt field only after the values of the others, which may make no sense without it."""
    if not Path(recipe).is_file():
        raise InputError(
            f"{recipe}: there is no such recipe; give one, such as recipes/nfcorpus/qwen2.5-7b-bm25.yaml."
        )
    content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    known = {field.name for dataclass_type in parser.dataclass_types for field in fields(dataclass_type)} | {"env"}
    for name in content if isinstance(content, dict) else ():
        if name not in known:
            raise InputError(f"{recipe}: there is no field {name!r}{_similar(name, known)}")


def _refuse_unknown_options(arguments: list[str], parser: TrlParser) -> None:
    known = {option for action in parser._actions for option in action.option_strings} | {"--config"}
    for argument in arguments:
        option = argument.partition("=")[0]
        # argparse takes an option that begins like a single one for that one
        if option.startswith("--") and not any(name.startswith(option) for name in known):
            raise InputError(f"there is no option {option}{_similar(option, known)}")


def _similar(name: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {similar[0]}?" if similar else "") + " (see coaug train --help)"


def load_tokenizer(training_args: CoAugConfig, model_args: ModelConfig):
    """
    Loads the tokenizer of the model.

    Raises `InputError`: There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            padding_side="left",
            truncation_side="left",
            trust_remote_code=training_args.trust_remote_code,
        )
    except OSError as error:
        raise InputError(
            f"{model_args.model_name_or_path}: no tokenizer could be loaded from there: {error}"
        ) from None


def set_up_logging() -> None:
    """Prints what this package has to say; hides deprecations that only the authors of libraries can act on."""
    logging.basicConfig(format="%(message)s")
    # Every process runs this; one of them speaks.
    level = logging.ERROR if int(os.environ.get("RANK", 0)) else logging.WARNING if is_quiet() else logging.INFO
    logging.getLogger("coaug_trl").setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning)


def check_trackers(report_to: Iterable[str]) -> None:
    """
    Refuses trackers that cannot be reported to, before the work begins.

    Args:
        report_to: Their names, as in [`~transformers.TrainingArguments`].

    Raises `InputError`: One is unknown or not installed.
    """
    for name in report_to:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise InputError(f"report_to is {name!r}: {error}") from None
        try:
            callback()
        except (ImportError, RuntimeError):
            raise InputError(
                f"report_to is {name!r}, which is not installed: pip install {name}, or set report_to to none."
            ) from None
