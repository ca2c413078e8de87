"""Dense retrieval: any sentence-transformers model, FAISS for the index, one matrix product in a training step."""

import hashlib
import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..data.document import Document, document_text
from ..utils.errors import InputError
from ..utils.files import read_json, write_json
from .base import INDEX_AGAIN, Retriever, check_depth, check_settings, read_config, select_nearest, unique_ids


try:
    import torch
    from sentence_transformers import SentenceTransformer

    # After torch: both bring an OpenMP runtime, and the other order has crashed.
    import faiss  # isort: skip
except ImportError as error:
    raise InputError(f'Dense retrieval needs more packages ({error}): pip install ".[dense]".') from None


logger = logging.getLogger(__name__)

# The English BGE models want an instruction before queries, and their published configurations do not have it.
BGE_ENGLISH = re.compile(r"bge-(small|base|large)-en")
BGE_QUERY_PROMPT = "Represent this sentence for searching relevant passages: "

# Of an index: the keys of [`DenseRetriever.config`].
SETTINGS = ("model", "weights", "query_prompt", "document_prompt", "index_factory", "search_parameters")
SHARD_SIZE = 1024  # texts embedded at a time: what an interruption loses at most
PROGRESS_FROM = 2000
NEAREST_CHUNK = 1 << 25  # scores held at a time: 128 MB, as each time all document embeddings are read
MAX_GPU_HITS = 2048  # of one query, by FAISS on a GPU


@dataclass(frozen=True)
class Embeddings:
    """
    Documents as a dense retriever reads them.

    Args:
        vectors, of shape `(texts, dimension)`: Normalised embeddings of the different texts, float32. Equal texts
            share one, so that a matrix product cannot round their scores apart.
        rows, of shape `(documents,)`: The row of each document.
    """

    vectors: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> Self:
        return Embeddings(self.vectors, self.rows[places])

    @classmethod
    def concatenate(cls, parts: "list[Self]") -> Self:
        offsets = np.cumsum([0, *(len(part.vectors) for part in parts[:-1])])
        return cls(
            np.concatenate([part.vectors for part in parts]),
            np.concatenate([part.rows + offset for part, offset in zip(parts, offsets, strict=True)]),
        )


class DenseRetriever(Retriever):
    """
    Inner product of normalised embeddings. Every document has a score for every query, an empty query too, whose
    embedding is that of the prompt alone.

    Args:
        model (`str`, *optional*, defaults to `"BAAI/bge-base-en-v1.5"`):
            Folder or Hub id of a sentence-transformers model.
        query_prompt (`str`, *optional*):
            Put before every query. Defaults to the model's own prompt for queries where its configuration has one, to
            BGE's instruction for English BGE models, and to none otherwise.
        document_prompt (`str`, *optional*):
            Put before every document. Defaults to the model's own where its configuration has one, and to none.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts embedded in one forward pass.
        index_factory (`str`, *optional*, defaults to `"Flat"`):
            FAISS' description of the index. `"Flat"` is exact; `"IVF4096,Flat"` and `"HNSW32,Flat"` are approximate and
            made for more than some 100,000 documents.
        search_parameters (`str`, *optional*):
            FAISS' search parameters, such as `"nprobe=64"`. Defaults to a quarter of the lists for IVF indexes, to
            `"efSearch=128"` for HNSW, and to FAISS' own otherwise.
        cache_dir (`str` or `Path`, *optional*):
            Folder where [`index`] keeps embeddings, so that it embeds only what is missing there: after an
            interruption, or for a changed corpus. [`score`] reads them but adds none, as rollouts do not come again.
        device (`str`, *optional*):
            Where to embed; defaults to CUDA if there is any. With faiss-gpu it is searched there too, where FAISS has
            this index for GPUs.
        weights (`str`, *optional*):
            Fingerprint that the model's weights must have, as in [`config`].

    Raises:
        `InputError`: the model cannot be loaded or has other weights, or FAISS does not know the index or parameters.

    Sources: [Sentence-BERT](https://huggingface.co/papers/1908.10084), [FAISS](https://huggingface.co/papers/2401.08281).
    """

    kind: ClassVar[str] = "dense"

    def __init__(
        self,
        model: str = "BAAI/bge-base-en-v1.5",
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        batch_size: int = 64,
        index_factory: str = "Flat",
        search_parameters: str | None = None,
        cache_dir: str | Path | None = None,
        device: str | None = None,
        weights: str | None = None,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size is the number of texts embedded at a time, at least 1, not {batch_size}.")
        self.model = str(model)
        try:
            self._encoder = SentenceTransformer(self.model, device=device)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{self.model}: no sentence-transformers model could be loaded: {error}") from None
        self.weights = _fingerprint(self._encoder)
        if weights not in (None, self.weights):
            raise InputError(
                f"The weights of {self.model} have the fingerprint {self.weights}, and {weights} is expected: bring "
                "back that version of the model, or train and index again."
            )
        own_prompts = self._encoder.prompts
        if query_prompt is None:
            query_prompt = own_prompts.get("query") or (BGE_QUERY_PROMPT if BGE_ENGLISH.search(self.model) else "")
        if document_prompt is None:
            document_prompt = own_prompts.get("document") or own_prompts.get("passage") or ""
        self.query_prompt, self.document_prompt = query_prompt, document_prompt
        self.batch_size = batch_size
        self.index_factory, self.search_parameters = index_factory, search_parameters
        self._cache = EmbeddingCache(cache_dir) if cache_dir else None
        self._dimension = self._encode([""], "").shape[1]
        self._new_index()  # a mistake in its description should show now, not when the corpus is embedded
        self._index: faiss.Index | None = None
        self._gpu_index: faiss.Index | None = None
        self._document_ids: list[list[str]] = []

    @property
    def config(self) -> dict[str, Any]:
        return {
            "retriever": "dense",
            "model": self.model,
            "weights": self.weights,
            "query_prompt": self.query_prompt,
            "document_prompt": self.document_prompt,
            "index_factory": self.index_factory,
            "search_parameters": self.search_parameters,
        }

    @property
    def encoder(self) -> SentenceTransformer:
        """The model that embeds."""
        return self._encoder

    # Scores of a training step

    def fit(self, documents: list[Document]) -> None:
        """Does nothing: scores depend on the model only."""

    def state(self) -> dict[str, Any]:
        return {"config": self.config}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["config"] != self.config:
            raise InputError(f"The saved state is that of {state['config']}, not of {self.config}.")

    def encode(self, documents: list[Document], keep: bool = False) -> "Embeddings":
        """Embeds documents, equal texts once; `keep` puts the embeddings into the cache, if there is one."""
        texts, rows = _distinct([document_text(document) for document in documents])
        return Embeddings(self._embed(texts, self.document_prompt, keep), np.array(rows, dtype=np.int64))

    def score(self, queries: list[str], documents: "list[Document] | Embeddings") -> np.ndarray:
        """
        Scores every query against every document.

        Args:
            queries (`list[str]`):
                Query texts.
            documents (`list[Document]` or [`Embeddings`]):
                Documents, indexed or not, or what [`encode`] made of them.

        Returns:
            `np.ndarray`: shape (queries, documents), float32, between −1 and 1. Equal texts have equal scores; what
            else is scored moves a value by rounding only.
        """
        encoded = documents if isinstance(documents, Embeddings) else self.encode(documents)
        texts, rows = _distinct(queries)
        scores = self._embed(texts, self.query_prompt) @ encoded.vectors.T
        return scores[np.ix_(rows, encoded.rows)]

    def nearest(
        self, queries: list[str], documents: Embeddings, k: int, left_out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As [`Retriever.nearest`]; queries are embedded at once, and more of them scored at a time than for BM25."""
        texts, rows = _distinct(queries)
        embedded = self._embed(texts, self.query_prompt)[rows]
        size = max(1, NEAREST_CHUNK // max(1, len(documents)))
        parts = (
            (embedded[first : first + size] @ documents.vectors.T)[:, documents.rows]
            for first in range(0, len(queries), size)
        )
        return select_nearest(parts, k, left_out)

    # Index and search

    def index(self, documents: list[Document]) -> None:
        """
        Embeds `documents` and builds their FAISS index.

        Args:
            documents (`list[Document]`):
                The corpus; ids must be unique.

        Raises:
            `InputError`: no documents, an id occurs twice, or there are too few documents to train the index on.
        """
        if not documents:
            raise InputError("There are no documents to index.")
        unique_ids(documents)
        # Equal texts share a row, so that their scores are equal and their order is that of the documents.
        texts, rows = _distinct([document_text(document) for document in documents])
        document_ids = [[] for _ in texts]
        for document, row in zip(documents, rows, strict=True):
            document_ids[row].append(document.id)
        embeddings = self._embed(texts, self.document_prompt, keep=True)
        index = self._new_index()
        try:
            index.train(embeddings)
        except RuntimeError as error:
            raise InputError(
                f"FAISS cannot train the index {self.index_factory!r} on {len(texts):,} different texts; use fewer "
                f"lists, or Flat. FAISS says: {error}"
            ) from None
        index.add(embeddings)
        self._take_index(index, document_ids)

    def search(self, queries: list[str], k: int = 10) -> list[list[tuple[str, float]]]:
        """
        Searches the index.

        Args:
            queries (`list[str]`):
                Query texts.
            k (`int`, *optional*, defaults to `10`):
                The most hits a query gets.

        Returns:
            `list[list[tuple[str, float]]]`: for each query its hits as (document id, score), best first, documents of
            equal text in the order of indexing. As many as `k` and the documents allow, or fewer where an approximate
            index finds fewer.

        Raises:
            `InputError`: `k` is less than 1.
            `RuntimeError`: nothing is indexed.
        """
        check_depth(k)
        if self._index is None:
            raise RuntimeError("There is nothing to search: call index(documents) or load(folder) first.")
        index = self._gpu_index if self._gpu_index is not None and k <= MAX_GPU_HITS else self._index
        results = []
        with tqdm(total=len(queries), desc="Searching", delay=2, leave=False) as progress:
            for first in range(0, len(queries), SHARD_SIZE):
                shard = queries[first : first + SHARD_SIZE]
                found = index.search(self._embed(shard, self.query_prompt), min(k, len(self._document_ids)))
                for scores, rows in zip(*(array.tolist() for array in found), strict=True):
                    hits = [
                        (document_id, score)
                        for score, row in zip(scores, rows, strict=True)
                        if row >= 0  # -1 fills up where an approximate index found less than k
                        for document_id in self._document_ids[row]
                    ]
                    results.append(hits[:k])
                progress.update(len(shard))
        return results

    def save(self, folder: str | Path) -> None:
        """
        Writes the index to `folder`: FAISS' own file, the document ids and the settings as JSON. The model is not
        copied; its name and fingerprint are in the settings.

        Args:
            folder (`str` or `Path`):
                The folder, made if it is not there. `retriever.json` is written last: without it a folder is unfinished.

        Raises:
            `RuntimeError`: nothing is indexed.
        """
        if self._index is None:
            raise RuntimeError("There is nothing to save: call index(documents) first.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "retriever.json").unlink(missing_ok=True)
        faiss.write_index(self._index, str(folder / "index.faiss"))
        write_json(folder / "document_ids.json", self._document_ids)
        write_json(folder / "retriever.json", self.config)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """
        Reads an index that [`save`] wrote, and the model it was made with.

        Args:
            folder (`str` or `Path`):
                The folder.

        Returns:
            `DenseRetriever`: with the settings of the folder; compare its [`config`] with what is expected.

        Raises:
            `InputError`: there is no finished dense index in the folder, or its model is not there or has changed.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.pop("retriever", None) != "dense":
            raise InputError(f"{folder} holds an index of another retriever than a dense one: see its retriever.json.")
        check_settings(folder, config, SETTINGS)
        retriever = cls(**config)
        document_ids = read_json(folder / "document_ids.json", INDEX_AGAIN, list)
        try:
            index = faiss.read_index(str(folder / "index.faiss"))
        except RuntimeError as error:
            raise InputError(
                f"{folder}: the index is damaged: index the collection again. FAISS says: {error}"
            ) from None
        if len(document_ids) != index.ntotal:
            raise InputError(
                f"{folder}: the index is damaged ({len(document_ids)} ids for {index.ntotal} texts); index the collection "
                "again."
            )
        retriever._take_index(index, document_ids)
        return retriever

    def _take_index(self, index: faiss.Index, document_ids: list[list[str]]) -> None:
        self._index, self._document_ids = index, document_ids
        self._gpu_index = _on_gpu(index, self._encoder.device)

    def _new_index(self) -> faiss.Index:
        """An empty index; resolves the search parameters if none were given."""
        try:
            index = faiss.index_factory(self._dimension, self.index_factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(f"FAISS does not know the index {self.index_factory!r}: {error}") from None
        if self.search_parameters is None:
            self.search_parameters = _careful_parameters(index)
        try:
            faiss.ParameterSpace().set_index_parameters(index, self.search_parameters)
        except RuntimeError as error:
            raise InputError(
                f"An index {self.index_factory!r} has no search parameters {self.search_parameters!r}: {error}"
            ) from None
        return index

    # Embeddings

    def _embed(self, texts: list[str], prompt: str, keep: bool = False) -> np.ndarray:
        """Embeddings, shape (texts, dimension), float32; from the cache where they are there."""
        embeddings = np.empty((len(texts), self._dimension), dtype=np.float32)
        keys, missing = [], range(len(texts))
        if self._cache:
            keys = [_sha256(self.weights, prompt, text) for text in texts]
            missing = self._cache.read(keys, embeddings)
        with tqdm(total=len(missing), desc="Embedding texts", disable=len(missing) <= PROGRESS_FROM) as progress:
            for first in range(0, len(missing), SHARD_SIZE):
                places = missing[first : first + SHARD_SIZE]
                embeddings[places] = self._encode([texts[place] for place in places], prompt)
                if self._cache and keep:
                    self._cache.write([keys[place] for place in places], embeddings[places])
                progress.update(len(places))
        return embeddings

    def _encode(self, texts: list[str], prompt: str) -> np.ndarray:
        return self._encoder.encode(
            texts, prompt=prompt, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
        )


class EmbeddingCache:
    """
    Embeddings in a folder, by key.

    A shard is two NumPy files, `NAME.npy` with the embeddings and `NAME.keys.npy` with their keys, written last. Its
    name is made of the keys: processes that write at the same time write the same files or different ones.

    Args:
        folder: The folder, made if it is not there; one for any number of models.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, tuple[Path, int]] = {}
        for keys_path in sorted(self.folder.glob("*.keys.npy")):
            path = keys_path.with_name(keys_path.name.replace(".keys.npy", ".npy"))
            try:
                keys, embeddings = np.load(keys_path), np.load(path, mmap_mode="r")
                whole = embeddings.ndim == 2 and keys.shape == (len(embeddings), 32)
            except (OSError, EOFError, ValueError):
                whole = False
            if whole:
                self._add(path, [key.tobytes() for key in keys])
            else:
                logger.warning(f"{path} or its keys are damaged: its texts are embedded again. Delete both files.")

    def read(self, keys: list[bytes], embeddings: np.ndarray) -> list[int]:
        """Fills the rows of `embeddings` whose keys are here, and returns the places of the others."""
        missing, shards = [], defaultdict(list)
        for place, key in enumerate(keys):
            if key in self._places:
                path, row = self._places[key]
                shards[path].append((place, row))
            else:
                missing.append(place)
        for path, found in shards.items():
            places, rows = map(list, zip(*found, strict=True))
            # Opened for each read: a large corpus has more shards than a process may have open files.
            embeddings[places] = np.load(path, mmap_mode="r")[rows]
        return missing

    def write(self, keys: list[bytes], embeddings: np.ndarray) -> None:
        """Adds a shard."""
        path = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.npy"
        _save_array(path, embeddings)
        _save_array(path.with_suffix(".keys.npy"), np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32))
        self._add(path, keys)

    def _add(self, path: Path, keys: list[bytes]) -> None:
        self._places.update((key, (path, row)) for row, key in enumerate(keys))


def _save_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _fingerprint(encoder: SentenceTransformer) -> str:
    """Of what decides an embedding: the weights, wherever they were loaded from, and the longest text in tokens."""
    digest = hashlib.sha256(str(encoder.max_seq_length).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _on_gpu(index: faiss.Index, device: torch.device) -> faiss.Index | None:
    """A copy on the encoder's GPU, with the same search parameters; none without faiss-gpu or for HNSW."""
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
        return None
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    except RuntimeError as error:
        logger.info(f"The index is searched on the CPU: FAISS cannot copy it to {device}: {error}")
        return None


def _careful_parameters(index: faiss.Index) -> str:
    """FAISS' own defaults are for speed: they look into one list of an IVF index, and cost nDCG with HNSW too."""
    inverted_file = faiss.try_extract_index_ivf(index)
    if inverted_file is not None:
        return f"nprobe={max(1, inverted_file.nlist // 4)}"
    return "efSearch=128" if isinstance(index, faiss.IndexHNSW) else ""


def _distinct(texts: list[str]) -> tuple[list[str], list[int]]:
    """The different texts, in the order of their first occurrence, and the place of each text among them."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(places), [places[text] for text in texts]
