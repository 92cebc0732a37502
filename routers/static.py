"""A static encoder: the mean of its tokens' vectors. Needs numpy and a tokenizer, and a hundredth of MiniLM's time."""

import asyncio
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experts.errors import ConfigError
from routers.encoders import Vector

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AT_ONCE = 32
"""Texts that are encoded where they are asked for; more go to a thread."""


class WordLlama:
    """WordLlama's vectors, 256 wide, out of its package's files: the package looks for them in the wrong folder.

    Any white space counts as one space. Its tokenizer has tokens for line breaks and for runs of spaces, and a mean of
    tokens would follow whoever lays the text out.
    """

    NAME = "wordllama"
    READ_CHARS = 8_000
    width = 256
    runtime = "numpy, single spaces"

    def __init__(self) -> None:
        self.name = self.NAME
        self._folder = _locate()

    async def encode(self, texts: Sequence[str]) -> Vector:
        if len(texts) > _AT_ONCE:
            return await asyncio.to_thread(self._encode, texts)
        return self._encode(texts)

    async def count_tokens(self, texts: Sequence[str]) -> int:
        return sum(len(ids) for ids in self._ids(texts))

    def _encode(self, texts: Sequence[str]) -> Vector:
        vectors = np.zeros((len(texts), self.width), np.float32)
        for vector, ids in zip(vectors, self._ids(texts), strict=True):
            if ids:
                vector[:] = self._vectors[ids].mean(axis=0, dtype=np.float32)
        lengths: Vector = np.linalg.norm(vectors, axis=1, keepdims=True)
        # A text without a token has no direction; any unit vector does, as long as it is always the same.
        vectors[lengths[:, 0] == 0, 0] = lengths[lengths == 0] = 1.0
        unit: Vector = vectors / lengths
        return unit

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        readable = [" ".join(text[: self.READ_CHARS].split()).encode("utf-8", "replace").decode() for text in texts]
        return [found.ids for found in self._tokenizer.encode_batch(readable, add_special_tokens=False)]

    @cached_property
    def _vectors(self) -> Vector:
        from safetensors.numpy import load_file

        vectors: Vector = load_file(self._folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
        return vectors

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))


def _locate() -> Path:
    package = importlib.util.find_spec("wordllama")
    for place in (package.submodule_search_locations or ()) if package else ():
        if (Path(place) / "weights" / "l2_supercat_256.safetensors").is_file():
            return Path(place)
    raise ConfigError("The encoder 'wordllama' comes in the package of that name: pip install wordllama.")
