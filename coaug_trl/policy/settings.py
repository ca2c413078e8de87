"""What must be the same in training, augmentation, evaluation and search, saved beside the model's weights."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..utils.errors import InputError
from ..utils.files import read_json, write_json
from .prompts import PROMPT_SET_FILE, PromptSet


POLICY_FILE = "coaug.json"
_PACKAGES = ("coaug-trl", "trl", "transformers", "peft", "torch", "bm25s", "sentence-transformers", "ir-measures")


@dataclass(frozen=True)
class GenerationSettings:
    """
    How a policy generates when it is used rather than trained: greedily.

    Args:
        max_new_tokens: Longest completion, in tokens.
        repetition_penalty: As in training; 1.0 is none.

    Raises `InputError`: A value that cannot work.
    """

    max_new_tokens: int = 512
    repetition_penalty: float = 1.2

    def __post_init__(self):
        if self.max_new_tokens is None or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; use at least 1, such as 512.")
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; use a positive number, 1.0 for none.")


@dataclass(frozen=True)
class PolicySettings:
    """
    The settings a trained policy is used with.

    Args:
        prompt_set: Prompts and composition.
        generation: Settings of generation.
        retriever: Configuration of the retriever it was trained for; empty for an untrained model.
        augment: Side it was trained on: `"both"`, `"query"` or `"document"`.
    """

    prompt_set: PromptSet
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    retriever: dict[str, Any] = field(default_factory=dict)
    augment: str = "both"

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides it was trained on."""
        return ("query", "document") if self.augment == "both" else (self.augment,)

    def save(self, folder: str | Path) -> None:
        """Writes `coaug.json` and `prompt_set.yaml` into a model folder."""
        self.prompt_set.save(folder)
        content = {
            "prompt_hash": self.prompt_set.hash,
            "generation": asdict(self.generation),
            "retriever": self.retriever,
            "augment": self.augment,
            "versions": package_versions(),
        }
        write_json(Path(folder) / POLICY_FILE, content)

    @classmethod
    def load(cls, folder: str | Path) -> "PolicySettings | None":
        """
        Reads the settings of a model folder; `None` if there are none, as for a model that was not trained here.

        Raises `InputError`: The files of the folder are damaged or do not belong together.
        """
        path = Path(folder) / POLICY_FILE
        if not path.is_file():
            return None
        prompt_set = PromptSet.load(Path(folder))
        content = read_json(path)
        try:
            prompt_hash, retriever = content["prompt_hash"], content["retriever"]
            generation = GenerationSettings(**content["generation"])
            augment = content.get("augment", "both")  # policies of version 0.1.0 do not say
            if not isinstance(retriever, dict) or augment not in ("both", "query", "document"):
                raise ValueError(f"retriever is {retriever!r}, augment is {augment!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the settings of a policy ({error!r}); restore the file.") from None
        if prompt_set.hash != prompt_hash:
            raise InputError(
                f"{folder}: {PROMPT_SET_FILE} has the hash {prompt_set.hash}, but the policy was trained with "
                f"{prompt_hash}. Restore the file, or train with the new prompt set."
            )
        return cls(prompt_set, generation, retriever, augment)

    def refuse_mismatch(
        self,
        said: str,
        labels: tuple[str, str],
        advice: str,
        *,
        prompt_set: PromptSet | None = None,
        generation: dict[str, Any] | None = None,
        retriever: dict[str, Any] | None = None,
    ) -> None:
        """
        Refuses settings that are not these. What is left out, or unknown here, is not compared.

        Args:
            said: What the message begins with.
            labels: What it calls these settings and the others, such as `("the policy", "the index")`.
            advice: What it ends with.
            prompt_set: The other prompt set.
            generation: The other generation settings.
            retriever: The other retriever's configuration.

        Raises `InputError`: They differ.
        """
        names, ours, theirs = [], asdict(self.generation) | self.retriever, (generation or {}) | (retriever or {})
        if retriever and self.retriever:
            names += retriever_differences(self.retriever, retriever)
        if generation is not None:
            own = asdict(self.generation)
            names += [name for name in own | generation if own.get(name) != generation.get(name)]
        faults = [
            f"{name} is {ours.get(name)} for {labels[0]} and {theirs.get(name)} for {labels[1]}" for name in names
        ]
        if prompt_set is not None and prompt_set.hash != self.prompt_set.hash:
            faults.append(
                f"the prompt set is {self.prompt_set.hash} for {labels[0]} and {prompt_set.hash} for {labels[1]}, they "
                f"differ in {', '.join(self.prompt_set.differences(prompt_set))}"
            )
        if faults:
            raise InputError(f"{said}: {', '.join(faults)}; {advice}.")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a source tree that is not installed
            versions[package] = "not installed"
    return versions


def retriever_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """
    The settings in which two retrievers' configurations differ.

    An encoder is known by the fingerprint of its weights, where both have one: its folder may have another name on
    another machine.

    Args:
        theirs: A [`~coaug_trl.retrieval.Retriever.config`].
        ours: Another one.

    Returns: names of settings, in the order of the first configuration; empty if they are the same retriever.
    """
    same_encoder = theirs.get("weights") is not None and theirs.get("weights") == ours.get("weights")
    return [
        name for name in theirs | ours if theirs.get(name) != ours.get(name) and not (name == "model" and same_encoder)
    ]
