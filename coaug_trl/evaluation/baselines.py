"""The field's expansion methods with one model: prompted expansions of queries and documents, and RM3."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ..augmentation.augmenter import Augmenter
from ..augmentation.folder import SIDES, AugmentedCollection, compose, describe_side
from ..data.collection import Collection
from ..policy.download import policy_folder
from ..policy.prompts import PromptSet
from ..policy.settings import GenerationSettings, PolicySettings
from ..retrieval import Retriever
from ..retrieval.base import retrieve
from ..retrieval.rm3 import RM3
from ..utils.errors import InputError
from ..utils.files import atomic_open
from ..utils.terminal import note, say
from .comparison import Comparison, compare_folders
from .folder import TEXTS_FILE, evaluation_manifest, judged_texts, load_evaluation, save_evaluation
from .measures import MEASURES, parse_measures


COMPARISON_FILE = "comparison.md"


class System(NamedTuple):
    """
    A system of the table.

    Args:
        augmentations: Folder of its augmentations, and where the package has one, name of its prompt set; `None` for a
            system without a model.
        sides: Sides it augments.
        kinds: Kinds of retriever it is for.
    """

    augmentations: str | None
    sides: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("sparse", "dense")


SYSTEMS = {
    "none": System(None),
    "untrained-query": System("untrained", ("query",)),
    "untrained-document": System("untrained", ("document",)),
    "untrained-both": System("untrained", SIDES),
    "query2doc": System("query2doc", ("query",)),
    "hyde": System("hyde", ("query",), ("dense",)),
    "pseudo-document": System("pseudo-document", ("query",)),
    "doc2query": System("doc2query", ("document",)),
    "rm3": System(None, kinds=("sparse",)),
    "trained": System("trained", SIDES),
}


class HyDE:
    """
    Searches a dense index with passages in place of queries, embedded as documents are.

    Published, the embeddings of several sampled passages and of the query are averaged. Here there is one passage,
    generated greedily as for the other systems, and the query has no part in it. A query for which the model wrote no
    passage is searched as it is, also with the prompt of documents.

    Args:
        retriever: With an index when [`search`] is called.

    Source: [Gao et al. 2022](https://huggingface.co/papers/2212.10496), section 3.2.
    """

    def __init__(self, retriever: Retriever):
        self.retriever = retriever

    @property
    def config(self) -> dict[str, Any]:
        return self.retriever.config | {"query_prompt": self.retriever.document_prompt}

    def search(self, queries: list[str], k: int = 10) -> list[list[tuple[str, float]]]:
        """As [`~coaug_trl.retrieval.base.Retriever.search`]."""
        searcher = copy.copy(self.retriever)  # the same encoder and index
        searcher.query_prompt = searcher.document_prompt
        return searcher.search(queries, k)


@dataclass(frozen=True)
class Models:
    """
    The language models that write the expansions.

    Args:
        model: Folder or Hub id of the one that all prompts are given to.
        policy: Folder or Hub id of a trained policy, for the system `trained`. The untrained model is then given the
            policy's prompts, so that training is all they differ in.
        generation: Generation settings of the model; the policy has its own, which the untrained systems share if none
            are given.
        batch_size: Texts generated for at once.
        revision: Revision of the model on the Hub.
    """

    model: str | None = None
    policy: str | None = None
    generation: GenerationSettings | None = None
    batch_size: int = 32
    revision: str | None = None


def run_baselines(
    systems: dict[str, System],
    collection: Collection,
    retriever: Retriever,
    output_dir: str | Path,
    models: Models,
    k: int = 1000,
    ignore_identical_ids: bool = False,
    measures: Iterable[str] = MEASURES,
) -> Comparison | None:
    """
    Augments, retrieves and measures with each system, then compares them pair by pair.

    What is done is kept: answers are generated once, the documents of several systems are indexed once, and an
    evaluation that is there and was made of the same texts with the same settings stays. A line is printed for each
    step.

    Args:
        systems: What [`choose_systems`] chose for the same retriever, model and policy.
        collection: Its judged queries and its documents.
        retriever: What all systems retrieve with; a policy must have been trained for it.
        output_dir: The folder: `augmentations/NAME`, `evaluations/NAME` and `comparison.md`.
        models: What writes the expansions.
        k: Depth of the runs.
        ignore_identical_ids: As in [`~coaug_trl.retrieval.base.retrieve`].
        measures: As in [`~coaug_trl.evaluation.folder.save_evaluation`].

    Returns: [`~coaug_trl.evaluation.comparison.Comparison`] or `None`: of the systems in the order of the table, which
        `comparison.md` holds too; `None` for a single one.

    Raises `InputError`: the folder holds augmentations of another model, prompt set or collection.
    """
    output_dir, measures = Path(output_dir), list(parse_measures(measures).values())
    augment_systems(systems, collection, retriever.kind, output_dir, models)
    evaluate_systems(systems, collection, retriever, output_dir, k, ignore_identical_ids, measures)
    if len(systems) == 1:
        return None
    comparison = compare_folders([output_dir / "evaluations" / name for name in systems], measures)
    with atomic_open(output_dir / COMPARISON_FILE) as file:
        file.write(comparison.render("markdown") + "\n")
    return comparison


def choose_systems(
    retriever: Retriever, model: str | None, policy: str | None, only: Sequence[str] = ()
) -> dict[str, System]:
    """
    The systems to run.

    Args:
        retriever: What they retrieve with.
        model: As in [`Models`].
        policy: Likewise.
        only: Names of systems; defaults to all that this retriever allows, `trained` only where there is a policy.

    Returns: by name, in the order of the table.

    Raises `InputError`: a system is unknown, not for this kind of retriever, or lacks its model.
    """
    for name in only:
        _check_system(name, retriever, policy)
    systems = {
        name: system
        for name, system in SYSTEMS.items()
        if (name in only if only else retriever.kind in system.kinds and (name != "trained" or policy is not None))
    }
    prompted = [name for name, system in systems.items() if system.augmentations and name != "trained"]
    if prompted and model is None:
        raise InputError(
            f"The system {prompted[0]} needs a language model: give it as --model, or choose others by --only."
        )
    if prompted and _settings_of(model):
        raise InputError(
            f"{model} is a policy trained here, which answers to its own prompts only; give the model it was trained "
            "from as --model, and the policy as --policy."
        )
    if "trained" in systems:
        systems["trained"] = systems["trained"]._replace(sides=_trained_sides(policy, retriever))
    return systems


def _check_system(name: str, retriever: Retriever, policy: str | None) -> None:
    if name not in SYSTEMS:
        raise InputError(f"There is no system {name!r}; choose from {', '.join(SYSTEMS)}.")
    if retriever.kind not in SYSTEMS[name].kinds:
        raise InputError(
            f"The system {name} is for {SYSTEMS[name].kinds[0]} retrievers, and this one is {retriever.kind}; "
            "leave it out."
        )
    if name == "trained" and policy is None:
        raise InputError("The system trained needs a policy: give its folder as --policy.")


def _trained_sides(policy: str, retriever: Retriever) -> tuple[str, ...]:
    """The sides that a policy was trained on, for this retriever."""
    trained = _settings_of(policy)
    if trained is None:
        raise InputError(
            f"{policy} is no folder of a policy trained here, and no policy on the Hub; give one that coaug train "
            "has written."
        )
    trained.prompt_set.check_kind(retriever.kind, policy)
    said = f"{policy} was trained for {trained.retriever}"
    labels, advice = ("the policy", "this call"), "use the retriever it was trained for"
    trained.refuse_mismatch(said, labels, advice, retriever=retriever.config)
    return trained.sides


def _settings_of(model: str) -> PolicySettings | None:
    return PolicySettings.load(policy_folder(model))


def prompt_set_of(name: str, kind: str) -> PromptSet:
    """
    The prompt set of a prompted system.

    Args:
        name: Its folder of augmentations in [`SYSTEMS`].
        kind: Kind of retriever, `"sparse"` or `"dense"`.

    Returns: for that kind. A query is repeated for sparse retrievers only, where its words are to outweigh those of a
        passage; an embedding has no such counts (Query2doc, section 2).
    """
    if name == "untrained":
        return PromptSet.default(kind)
    prompt_set = PromptSet.load(resources.files("coaug_trl.policy") / "prompt_sets" / "baselines" / f"{name}.yaml")
    return replace(prompt_set, kind=kind, query_repeats=prompt_set.query_repeats if kind == "sparse" else 1)


def augment_systems(
    systems: dict[str, System], collection: Collection, kind: str, output_dir: Path, models: Models
) -> None:
    """Generates what the systems need and is not there yet; the model is loaded once, then the policy."""
    wanted: dict[str, list[str]] = {}
    for system in systems.values():
        if system.augmentations:
            sides = wanted.setdefault(system.augmentations, [])
            sides += [side for side in system.sides if side not in sides]
    trained_sides = wanted.pop("trained", None)
    trained, batch_size = _settings_of(models.policy) if models.policy else None, models.batch_size
    if wanted:
        loaded = Augmenter.from_pretrained(
            models.model, PromptSet.default(kind), models.generation, batch_size=batch_size, revision=models.revision
        )
        for name, sides in wanted.items():
            settings = PolicySettings(prompt_set_of(name, kind), loaded.settings.generation)
            if name == "untrained" and trained and trained.prompt_set.sides == SIDES:
                settings = PolicySettings(trained.prompt_set, models.generation or trained.generation)
            augmenter = Augmenter(
                loaded.engine, loaded.tokenizer, settings, batch_size, name=loaded.name, revision=loaded.revision
            )
            _augment(augmenter, name, sides, collection, output_dir)
        del loaded, augmenter  # makes room for the policy
    if trained_sides:
        augmenter = Augmenter.from_pretrained(models.policy, batch_size=batch_size)
        _augment(augmenter, "trained", trained_sides, collection, output_dir)


def _augment(augmenter: Augmenter, name: str, sides: Iterable[str], collection: Collection, output_dir: Path) -> None:
    manifest = augmenter.augment_collection(collection, output_dir / "augmentations" / name, sides)
    for side in sides:
        counts = manifest["sides"][side]
        say(f"{name}, {describe_side(side, counts)}")
        if counts["incomplete"] > counts["texts"] / 2:
            note(
                f"most answers of {name} are incomplete, so that it hardly differs from no augmentation; with a model "
                "that can answer, allow more tokens by --max_new_tokens"
            )


def evaluate_systems(
    systems: dict[str, System],
    collection: Collection,
    retriever: Retriever,
    output_dir: Path,
    k: int = 1000,
    ignore_identical_ids: bool = False,
    measures: Sequence[str] = MEASURES,
) -> None:
    """Retrieves and measures where no evaluation of the same texts and settings is there."""
    indexed = None
    # Systems that search the same documents follow each other.
    for name, system in sorted(systems.items(), key=_documents_of):
        folder = output_dir / "evaluations" / name
        augmented = _load(system, output_dir) if system.augmentations else None
        queries, documents = compose(collection, augmented, retriever)
        searcher = {"hyde": HyDE(retriever), "rm3": RM3(retriever, documents)}.get(name, retriever)
        manifest = evaluation_manifest(
            collection, augmented, searcher.config, queries, documents, k, ignore_identical_ids
        )
        metrics = _finished(folder, manifest, measures)
        done = "kept"
        if metrics is None:
            if indexed != manifest["hashes"]["documents"]:
                retriever.index(documents)
                indexed = manifest["hashes"]["documents"]
            run = retrieve(searcher, queries, k, ignore_identical_ids)
            texts = judged_texts(collection, augmented.answers if augmented else None)
            metrics = save_evaluation(folder, run, collection.qrels, manifest, measures, texts)
            done = "evaluated"
        say(f"{name} {done}: {', '.join(f'{measure} {metrics[measure]:.4f}' for measure in measures)}")


def _documents_of(item: tuple[str, System]) -> str:
    """Folder of the augmentations that the documents of a named system have; empty for none."""
    _, system = item
    return system.augmentations if "document" in system.sides else ""


def _load(system: System, output_dir: Path) -> AugmentedCollection:
    augmented = AugmentedCollection.load(output_dir / "augmentations" / system.augmentations, system.sides)
    # The other side, of another system, has no part in this evaluation.
    sides = {side: augmented.manifest["sides"][side] for side in system.sides}
    return replace(augmented, manifest=augmented.manifest | {"sides": sides})


def _finished(folder: Path, manifest: dict[str, Any], measures: Sequence[str]) -> dict[str, Any] | None:
    """The metrics of an evaluation made as the manifest says, `None` if there is none."""
    try:
        evaluation = load_evaluation(folder)
    except InputError:  # not there, or interrupted while it was written
        return None
    known = set(measures) <= set(evaluation.measures) and (folder / TEXTS_FILE).is_file()
    return evaluation.metrics if known and evaluation.manifest == manifest else None
