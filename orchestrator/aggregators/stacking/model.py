"""A conditional logit over the options of a question (McFadden, 1974): who said what, and what that is worth.

    score(option) = n^-c * sum over the experts that chose it of (worth of the expert, in this task, in such words)
                    + (a + b log n) * prior of the option
    posterior     = softmax over the options

``n`` experts answered; ``c`` > 0 says that they repeat each other. Where the question lists no options, those are the
different answers that were given and, last, none of them.

Legend: Q questions, E experts, O options, C tasks, W words (features of an answer's text).
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from orchestrator.aggregators.stacking.prior import softmax
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballots:
    """``votes_QE``: the option that an expert chose, -1 for none; ``asked_QE``: whether he was asked at all.

    ``open_QO``: which options there are; ``prior_QO``: logarithms of their prior; ``tasks_Q`` is -1 where unknown.
    ``listed_Q``: the question lists its options; otherwise the last column stands for none of the answers given.
    """

    votes_QE: Array
    asked_QE: Array
    words_QEW: Array
    open_QO: Array
    prior_QO: Array
    tasks_Q: Array
    listed_Q: Array

    def __len__(self) -> int:
        return len(self.votes_QE)

    def take(self, rows: Array) -> Self:
        return type(self)(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def hearing(self, heard_QE: Array) -> Self:
        """The same questions with these experts only; what nobody said then is no option of an open question."""
        asked = self.asked_QE & heard_QE
        votes = np.where(asked, self.votes_QE, -1)
        said = said_by_any(votes, self.open_QO.shape[1])
        said[:, -1] = True
        is_open = self.open_QO & (said | self.listed_Q[:, None])
        return replace(self, asked_QE=asked, votes_QE=votes, open_QO=is_open)

    def right(self, gold_Q: Array) -> Array:
        """``gold_Q``, or 'none of them' where no expert heard said it."""
        there = np.take_along_axis(self.open_QO, gold_Q[:, None], axis=1)[:, 0]
        result: Array = np.where(there, gold_Q, self.open_QO.shape[1] - 1)
        return result


def said_by_any(votes_QE: Array, options: int) -> Array:
    said = np.zeros((len(votes_QE), options), np.bool_)
    rows, columns = np.nonzero(votes_QE >= 0)
    said[rows, votes_QE[rows, columns]] = True
    return said


@dataclass(frozen=True, slots=True, kw_only=True)
class Logit:
    """``shape`` holds c, a, b, and the score of 'none of them' with what a further different answer adds to it."""

    worth_E: Array
    in_task_CE: Array
    words_W: Array
    shape: Array

    def posterior(self, ballots: Ballots) -> Array:
        """(Q, O); each row sums to 1."""
        return softmax(self.scores(ballots))

    def scores(self, ballots: Ballots) -> Array:
        said = summed(self.counts(ballots), ballots)
        return combine(said, ballots, self.shape)

    def counts(self, ballots: Ballots) -> Array:
        """What each expert's answer adds to the option that he chose, before n^-c: (Q, E)."""
        result: Array = self.usual(ballots.tasks_Q) + ballots.words_QEW @ self.words_W
        return result

    def usual(self, tasks_Q: Array) -> Array:
        """The same for an answer in its expert's usual words."""
        tasks = np.concatenate([self.in_task_CE, np.zeros_like(self.in_task_CE[:1])])[tasks_Q]
        result: Array = self.worth_E + tasks
        return result

    def strength(self, ballots: Ballots) -> Array:
        """n^-c by question."""
        return damping(ballots, self.shape)


def damping(ballots: Ballots, shape: Array) -> Array:
    result: Array = np.maximum(ballots.asked_QE.sum(axis=1), 1) ** -shape[0]
    return result


def summed(counts_QE: Array, ballots: Ballots) -> Array:
    """By option, of those who chose it."""
    rows, columns = np.nonzero(ballots.votes_QE >= 0)
    cells = rows * ballots.open_QO.shape[1] + ballots.votes_QE[rows, columns]
    total: Array = np.bincount(cells, counts_QE[rows, columns], ballots.open_QO.size)
    return total.reshape(ballots.open_QO.shape)


def combine(said_QO: Array, ballots: Ballots, shape: Array) -> Array:
    heard = np.log(np.maximum(ballots.asked_QE.sum(axis=1), 1))
    scores = damping(ballots, shape)[:, None] * said_QO
    scores += (shape[1] + shape[2] * heard)[:, None] * np.where(ballots.open_QO, ballots.prior_QO, 0.0)
    different = np.log(ballots.open_QO.sum(axis=1))
    scores[:, -1] += ~ballots.listed_Q * (shape[3] + shape[4] * different)
    return np.where(ballots.open_QO, scores, -np.inf)
