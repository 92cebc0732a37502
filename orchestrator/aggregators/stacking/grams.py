"""The wording of options and questions as hashed grams: words alone and in pairs, runs of two to four characters.

Each kind has half of the columns, and each text weighs as much as any other, however long it is. numpy alone, for it
runs in the service. Legend: Q questions, O options, C cells (an option of a question, the questions one after another),
G grams of all cells in a row, N columns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self
from zlib import crc32

import numpy as np

from routers.records import Array

HALF = 2**15
"""Columns of each kind; what falls into one column is told apart no more."""
COLUMNS = 2 * HALF
_READ_CHARS = 2000
_RUNS = (2, 3, 4)
_WORD = re.compile(r"\w+|[^\w\s]")
_MIX = np.uint32(2654435761)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grams:
    """``columns_G`` of the cells in a row; ``counts_C`` says how many a cell has."""

    columns_G: Array
    counts_C: Array

    @classmethod
    def of(cls, options: Sequence[Sequence[str]], width: int) -> Self:
        """``width`` cells a question; those beyond its options are empty."""
        return cls._of([grams_of(text) for texts in options for text in [*texts, *[""] * (width - len(texts))]])

    @classmethod
    def of_questions(cls, questions: Sequence[str]) -> Self:
        """Words alone and in pairs, a cell a question."""
        return cls._of([_words(text[: 2 * _READ_CHARS].lower()).astype(np.uint16) for text in questions])

    @classmethod
    def _of(cls, cells: Sequence[Array]) -> Self:
        return cls(columns_G=np.concatenate(cells), counts_C=np.array([len(cell) for cell in cells], np.int32))

    @property
    def cells_G(self) -> Array:
        return np.repeat(np.arange(len(self.counts_C)), self.counts_C)

    @property
    def values_G(self) -> Array:
        """Each kind of a cell has length 1."""
        kinds_G = 2 * self.cells_G + (self.columns_G >= HALF)
        values: Array = (np.bincount(kinds_G)[kinds_G] ** -0.5).astype(np.float32)
        return values

    def matrix(self, values_G: Array) -> Any:
        """(C, N), sparse."""
        from scipy.sparse import csr_array

        ends = np.concatenate([[0], np.cumsum(self.counts_C)])
        return csr_array((values_G, self.columns_G.astype(np.int32), ends), (len(self.counts_C), COLUMNS))

    def where(self, kept_C: Array) -> Self:
        kept_G = np.repeat(kept_C, self.counts_C)
        return type(self)(columns_G=self.columns_G[kept_G], counts_C=self.counts_C[kept_C])

    def take(self, rows: Array, width: int) -> Self:
        """The cells of these questions, in this order."""
        cells = (rows[:, None] * width + np.arange(width)).ravel()
        counts, ends = self.counts_C[cells], np.cumsum(self.counts_C)
        starts = (ends - self.counts_C)[cells]
        places = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return type(self)(columns_G=self.columns_G[places], counts_C=counts)

    def weigh(self, weights_N: Array) -> Array:
        """The sum of its grams' weights, by cell."""
        total: Array = np.bincount(self.cells_G, weights_N[self.columns_G] * self.values_G, len(self.counts_C))
        return total


class Weighed:
    """Grams as rows of length 1, those that few have weighing more (tf-idf); one that all have weighs ``least``."""

    def __init__(self, grams: Grams, least: float = 1.0) -> None:
        cells = max(len(grams.counts_C), 1)
        self._idf_N = np.log((1 + cells) / (1 + np.bincount(grams.columns_G, minlength=COLUMNS))) + least
        self.matrix = self.like(grams)

    @cached_property
    def turned(self) -> Any:
        return self.matrix.T.tocsr()

    def like(self, grams: Grams) -> Any:
        weights_G, cells_G = grams.values_G * self._idf_N[grams.columns_G], grams.cells_G
        lengths_C = np.sqrt(np.bincount(cells_G, weights_G**2, len(grams.counts_C)))
        # Of length 0 is what has but grams that all have, and they weigh nothing.
        return grams.matrix((weights_G / np.maximum(lengths_C, 1e-9)[cells_G]).astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the options of questions look like: options.py's numbers, their wording, and the questions' own."""

    traits_QOT: Array
    grams: Grams
    asked: Grams

    def __len__(self) -> int:
        return len(self.traits_QOT)

    def take(self, rows: Array) -> Self:
        rows = np.asarray(rows)
        grams = self.grams.take(rows, self.traits_QOT.shape[1])
        return type(self)(traits_QOT=self.traits_QOT[rows], grams=grams, asked=self.asked.take(rows, 1))


def grams_of(text: str) -> Array:
    """Columns of one option."""
    lowered = text[:_READ_CHARS].lower()
    columns: Array = np.concatenate([_words(lowered), _runs(lowered)]).astype(np.uint16)
    return columns


def _words(text: str) -> Array:
    words = _WORD.findall(text)
    said = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    return np.array(sorted({crc32(gram.encode(errors="replace")) % HALF for gram in said}), np.uint32)


def _runs(text: str) -> Array:
    """By a rolling product, for all places at once."""
    if not text:
        return np.zeros(0, np.uint32)
    codes = np.frombuffer(f" {text} ".encode("utf-32-le", errors="replace"), np.uint32)
    found = []
    for size in _RUNS:
        run = np.full(max(len(codes) - size + 1, 0), size, np.uint32)
        for place in range(size):
            run = (run ^ codes[place : place + len(run)]) * _MIX
            run ^= run >> np.uint32(15)
        found.append(run % HALF)
    runs: Array = np.unique(np.concatenate(found)) + HALF
    return runs
