"""Evaluation on the dev collection: greedy augmentation, an index of the augmented corpus, and nDCG."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from trl import GRPOTrainer

from ..data.document import Document, document_text
from ..evaluation.measures import evaluate_run
from ..policy.prompts import extract_answer
from ..retrieval.base import retrieve
from ..utils.distributed import merge_shares, own_share
from .prompts import make_prompts


EVAL_DEPTH = 100


class DevEvaluator:
    """
    Measures the policy of a trainer as it would be used: it augments the dev collection greedily, indexes and
    retrieves, over every judged query.

    Args:
        trainer: Has the policy, the retriever and the dev collection.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def evaluate(self) -> dict[str, float]:
        """
        Augments, retrieves and measures, on all processes together.

        Returns: `nDCG@k` from an index of the augmented corpus, as deployment builds it, and for BM25
            `nDCG@k_reward_statistics` with the statistics that the reward used until now.
        """
        trainer, args = self.trainer, self.trainer.args
        queries, documents = self._augmented()
        deployed = copy.copy(trainer.retriever)
        deployed.index(documents)
        measure, depth = f"nDCG@{args.ndcg_k}", max(EVAL_DEPTH, args.ndcg_k)
        ignore = args.ignore_identical_ids
        runs = {measure: retrieve(deployed, queries, depth, ignore)}
        if trainer.retriever.kind == "sparse":  # dense scores take no statistics from the corpus
            ranked = trainer.retriever.rank(list(queries.values()), documents, depth + ignore)
            runs[f"{measure}_reward_statistics"] = {
                query_id: {id_: score for id_, score in hits if not (ignore and id_ == query_id)}
                for query_id, hits in zip(queries, ranked, strict=True)
            }
            # Statistics of another corpus would say nothing of the words of this one.
            same = trainer.eval_collection.name == trainer.train_collection.name
            if same and args.bm25_statistics == "refreshed":
                trainer.retriever.load_state(deployed.state())
        qrels = trainer.eval_collection.qrels
        return {name: evaluate_run(qrels, run, (measure,))[0][measure] for name, run in runs.items()}

    def _augmented(self) -> tuple[dict[str, str], list[Document]]:
        trainer = self.trainer
        collection, prompt_set = trainer.eval_collection, trainer.prompt_set
        queries = {query_id: collection.queries[query_id] for query_id in collection.qrels}
        documents = self._documents()
        if trainer.args.augment != "document":
            answers = self.augment("query", list(queries.values()))
            queries = {
                query_id: prompt_set.compose_query(query, answer)
                for (query_id, query), answer in zip(queries.items(), answers, strict=True)
            }
        if trainer.args.augment != "query":
            answers = self.augment("document", [document_text(document) for document in documents])
            documents = [
                prompt_set.compose_document(document, answer, trainer.retriever.answer_field)
                for document, answer in zip(documents, answers, strict=True)
            ]
        return queries, documents

    def _documents(self) -> list[Document]:
        collection, size = self.trainer.eval_collection, self.trainer.args.eval_corpus_size
        if size is None or size >= len(collection.corpus):
            return list(collection.corpus.values())
        judged = {document_id for grades in collection.qrels.values() for document_id in grades}
        others = [document_id for document_id in collection.corpus if document_id not in judged]
        generator = torch.Generator().manual_seed(self.trainer.args.seed)
        drawn = torch.randperm(len(others), generator=generator)[: max(0, size - len(judged))].tolist()
        kept = judged | {others[index] for index in drawn}
        return [document for document_id, document in collection.corpus.items() if document_id in kept]

    def augment(self, side: str, texts: list[str]) -> list[str]:
        """
        Answers of the current policy, generated as after training, shared among processes.

        Args:
            side: `"query"` or `"document"`.
            texts: The same texts on every process.

        Returns: one answer a text, empty where there was none.
        """
        trainer = self.trainer
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        sides, sorted_texts = [side] * len(texts), [texts[index] for index in by_length]
        prompts, num_cut = make_prompts(sides, sorted_texts, trainer.prompt_set, trainer._tokenizer)
        trainer.say_cut(num_cut, "the dev collection")
        prompts = own_share(prompts)
        answers = []
        batch_size = trainer.args.per_device_eval_batch_size
        with self._greedy_generation():
            for first in tqdm(
                range(0, len(prompts), batch_size),
                desc=f"Augmenting {len(texts)} {'queries' if side == 'query' else 'documents'}",
                disable=trainer.args.disable_tqdm or not trainer.accelerator.is_main_process,
                leave=False,
            ):
                prompt_ids, images, fields = trainer._tokenize_prompts(prompts[first : first + batch_size])
                completion_ids, _ = trainer._generate_single_turn(prompt_ids, images, fields, num_generations=1)
                completions = trainer._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
                answers += [extract_answer(completion) for completion in completions]
        in_order = [""] * len(texts)
        for index, answer in zip(by_length, merge_shares(answers, len(texts)), strict=True):
            in_order[index] = answer
        return in_order

    @contextmanager
    def _greedy_generation(self) -> Iterator[None]:
        """TRL's own generation, but greedy: the settings a trained policy is used with."""
        trainer = self.trainer
        if trainer.use_vllm:
            engine, greedy = trainer.vllm_generation, {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": None}
        else:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
            kwargs = {**trainer.generation_kwargs, **sampling}
            config = type(trainer.generation_config)(**kwargs, disable_compile=True)
            engine, greedy = trainer, {"generation_kwargs": kwargs, "generation_config": config}
        before = {name: getattr(engine, name) for name in greedy}
        for name, value in greedy.items():
            setattr(engine, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(engine, name, value)
