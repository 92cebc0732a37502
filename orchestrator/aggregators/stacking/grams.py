"""The wording of options as hashed grams: words alone and in pairs, and runs of two to four characters.

Each kind has half of the columns, and each option weighs as much as any other, however long it is. numpy alone, for it
runs in the service. Legend: Q questions, O options, C cells (an option of a question, the questions one after another),
G grams of all cells in a row, N columns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self
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
    """``columns_G`` and ``values_G`` of the cells in a row; ``counts_C`` says how many a cell has."""

    columns_G: Array
    values_G: Array
    counts_C: Array

    @classmethod
    def of(cls, options: Sequence[Sequence[str]], width: int) -> Self:
        """``width`` cells a question; those beyond its options are empty."""
        cells = [grams_of(text) for texts in options for text in [*texts, *[""] * (width - len(texts))]]
        return cls(
            columns_G=np.concatenate([columns for columns, _ in cells]),
            values_G=np.concatenate([values for _, values in cells]),
            counts_C=np.array([len(columns) for columns, _ in cells], np.int32),
        )

    def where(self, kept_C: Array) -> Self:
        kept_G = np.repeat(kept_C, self.counts_C)
        return type(self)(
            columns_G=self.columns_G[kept_G], values_G=self.values_G[kept_G], counts_C=self.counts_C[kept_C]
        )

    def take(self, rows: Array, width: int) -> Self:
        """The cells of these questions, in this order."""
        cells = (rows[:, None] * width + np.arange(width)).ravel()
        counts, ends = self.counts_C[cells], np.cumsum(self.counts_C)
        starts = (ends - self.counts_C)[cells]
        places = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return type(self)(columns_G=self.columns_G[places], values_G=self.values_G[places], counts_C=counts)

    def weigh(self, weights_N: Array) -> Array:
        """The sum of its grams' weights, by cell."""
        cells = np.repeat(np.arange(len(self.counts_C)), self.counts_C)
        total: Array = np.bincount(cells, weights_N[self.columns_G] * self.values_G, len(self.counts_C))
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the options of questions look like: options.py's numbers, and their wording."""

    traits_QOT: Array
    grams: Grams

    def __len__(self) -> int:
        return len(self.traits_QOT)

    def take(self, rows: Array) -> Self:
        grams = self.grams.take(np.asarray(rows), self.traits_QOT.shape[1])
        return type(self)(traits_QOT=self.traits_QOT[rows], grams=grams)


def grams_of(text: str) -> tuple[Array, Array]:
    """Columns and values of one option; each kind has length 1."""
    lowered = text[:_READ_CHARS].lower()
    parts = [part for part in (_words(lowered), _runs(lowered)) if len(part)]
    if not parts:
        return np.zeros(0, np.uint16), np.zeros(0, np.float32)
    values = [np.full(len(part), len(part) ** -0.5, np.float32) for part in parts]
    return np.concatenate(parts).astype(np.uint16), np.concatenate(values)


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
