"""What questions like this one say of its options: whether options worded like one of them were right there.

Questions written together share their subject, their wrong options and often their wording. Likeness is the cosine of
hashed grams, rare ones weighing more (tf-idf): of the words for questions, of words and runs for options. No encoder,
for this one did as well as two of them (docs/aggregators-measured.md).

Legend: Q questions asked, O options, N questions learned from, K neighbours, R options of those in a row, H hints.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from orchestrator.aggregators.stacking.grams import Grams, Options, Weighed
from routers.records import Array

HINTS = 2
_NEIGHBOURS = 50
_NEARNESS = 4.0
"""A neighbour counts exp(this * (cosine - 1))."""
_FAINT = 0.001
_AT_ONCE = 512
"""Questions whose likeness to all others is held in memory."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """``sizes_N`` options a question, in a row in ``options``; ``right_N`` is which of them is right."""

    asked: Grams
    options: Grams
    sizes_N: Array
    right_N: Array

    @classmethod
    def of(cls, options: Options, open_QO: Array, right_Q: Array) -> Self:
        places = np.cumsum(open_QO, axis=1)[np.arange(len(right_Q)), right_Q] - 1
        return cls(
            asked=options.asked,
            options=options.grams.where(open_QO.ravel()),
            sizes_N=open_QO.sum(axis=1).astype(np.int32),
            right_N=places.astype(np.int32),
        )

    def check(self) -> None:
        """Raises ValueError for parts that do not fit each other."""
        questions, cells = len(self.sizes_N), int(self.sizes_N.sum())
        found = (len(self.asked.counts_C), len(self.options.counts_C), len(self.right_N))
        if found != (questions, cells, questions) or not ((self.right_N >= 0) & (self.right_N < self.sizes_N)).all():
            raise ValueError(f"neighbours: {found} do not fit {questions} questions with {cells} options")
        for grams in (self.asked, self.options):
            if int(grams.counts_C.sum()) != len(grams.columns_G) or (grams.counts_C < 0).any():
                raise ValueError("neighbours: grams and their counts do not fit")
            if grams.columns_G.dtype != np.uint16:
                raise ValueError(f"neighbours: columns are {grams.columns_G.dtype}, expected uint16")

    def prepare(self) -> None:
        """Weighs the grams now: a second for thousands of questions, which no request should wait for."""
        _ = self._asked.turned, self._options

    def hints(self, options: Options, open_QO: Array, *, family_N: Array | None = None) -> Array:
        """(Q, O, H). With ``family_N`` the questions are those learned from, and none is a neighbour of its own family:
        questions to come seldom have a twin."""
        hints_QOH = np.zeros((*open_QO.shape, HINTS), np.float32)
        asked, worded = self._asked.like(options.asked), self._options.like(options.grams.where(open_QO.ravel()))
        ends = np.concatenate([[0], np.cumsum(open_QO.sum(axis=1))])
        for start in range(0, len(open_QO), _AT_ONCE):
            alike_QN = (asked[start : start + _AT_ONCE] @ self._asked.turned).toarray()
            if family_N is not None:
                alike_QN[family_N[start : start + _AT_ONCE, None] == family_N] = -1.0
            for place, alike_N in enumerate(alike_QN, start):
                hints_QOH[place, open_QO[place]] = self._hint(alike_N, worded[ends[place] : ends[place + 1]])
        return hints_QOH

    def _hint(self, alike_N: Array, worded: Any) -> Array:
        near = np.argpartition(-alike_N, min(_NEIGHBOURS, len(alike_N)) - 1)[:_NEIGHBOURS]
        near = near[alike_N[near] >= 0]
        sizes, starts = self.sizes_N[near], np.cumsum(self.sizes_N[near]) - self.sizes_N[near]
        rows_R = np.arange(sizes.sum()) + np.repeat(self._firsts_N[near] - starts, sizes)
        said_R = -np.repeat(1 / sizes, sizes)
        said_R[starts + self.right_N[near]] += 1
        weights_R = np.repeat(np.exp(_NEARNESS * (alike_N[near] - 1)), sizes)
        alike_RO = self._options.matrix[rows_R] @ worded.T.toarray(order="C")
        said_O = (weights_R * said_R) @ alike_RO
        return np.stack([said_O, said_O / (weights_R @ alike_RO + _FAINT)], axis=1)

    @cached_property
    def _asked(self) -> Weighed:
        return Weighed(self.asked)

    @cached_property
    def _options(self) -> Weighed:
        return Weighed(self.options)

    @cached_property
    def _firsts_N(self) -> Array:
        return np.cumsum(self.sizes_N) - self.sizes_N
