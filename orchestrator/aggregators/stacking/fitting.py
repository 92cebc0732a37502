"""Fitting the logit: penalised maximum likelihood, each question seen with several random panels of its experts.

Legend: as in model.py; V votes of all panels in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from orchestrator.aggregators.stacking.model import Ballots, Logit
from orchestrator.aggregators.stacking.prior import softmax
from routers.learned.minimise import minimise
from routers.records import Array

_STEPS = 40
_ORDERED = 0.7
"""Share of the panels that follow the order."""
_PENALTIES = (1.0, 20.0, 20.0)
"""Of an expert's worth, of its difference in a task, of words; chosen by cross-validation on train and val."""
_START = (0.3, 0.5, 0.0, 0.0, 0.0)


def fit_logit(
    ballots: Ballots,
    gold_Q: Array,
    *,
    tasks: int,
    panels: int,
    seed: int,
    order: Sequence[int] = (),
    largest: int = 0,
) -> Logit:
    """``panels`` random panels a question, of 1 to ``largest`` experts (0: all); with an ``order``, most of them are
    the first of it, which is who will be asked."""
    experts, width = ballots.votes_QE.shape[1], ballots.words_QEW.shape[2]
    heard = random_panels(len(gold_Q) * panels, experts, seed=seed, order=order, largest=largest)
    rows = np.tile(np.arange(len(gold_Q)), panels)
    panel = ballots.take(rows).hearing(heard)
    votes, right = _Votes.of(panel), panel.right(gold_Q[rows])
    start = [np.ones(experts), np.zeros((tasks, experts)), np.zeros(width), np.array(_START)]
    worth, in_task, words, shape = minimise(start, lambda w: _loss(w, votes, right, 1 / panels), steps=_STEPS)
    return Logit(worth_E=worth, in_task_CE=in_task, words_W=words, shape=shape)


def random_panels(count: int, experts: int, *, seed: int, order: Sequence[int] = (), largest: int = 0) -> Array:
    """(count, E): who is heard."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, min(largest or experts, experts) + 1, count)
    places = rng.random((count, experts)).argsort(axis=1).argsort(axis=1)
    if order:
        first = np.full(experts, experts)
        first[list(order)] = np.arange(len(order))
        places[rng.random(count) < _ORDERED] = first
    result: Array = places < np.minimum(sizes, len(order) or experts)[:, None]
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Votes:
    """The votes of many panels without the gaps between them: what a step of the fit costs is their number.

    ``cell_V`` numbers (question, option), ``task_V`` is the number of tasks where a task is not known."""

    cell_V: Array
    row_V: Array
    expert_V: Array
    task_V: Array
    words_VW: Array
    heard_Q: Array
    different_Q: Array
    unlisted_Q: Array
    prior_QO: Array
    closed_QO: Array

    @classmethod
    def of(cls, ballots: Ballots) -> Self:
        rows, experts = np.nonzero(ballots.votes_QE >= 0)
        options = ballots.open_QO.shape[1]
        return cls(
            cell_V=rows * options + ballots.votes_QE[rows, experts],
            row_V=rows,
            expert_V=experts,
            task_V=ballots.tasks_Q[rows],
            words_VW=ballots.words_QEW[rows, experts].astype(np.float64),
            heard_Q=np.log(np.maximum(ballots.asked_QE.sum(axis=1), 1)),
            different_Q=np.log(ballots.open_QO.sum(axis=1)),
            unlisted_Q=~ballots.listed_Q,
            prior_QO=np.where(ballots.open_QO, ballots.prior_QO, 0.0).astype(np.float64),
            closed_QO=np.where(ballots.open_QO, 0.0, -np.inf),
        )

    def by_option(self, counts_V: Array) -> Array:
        total = np.bincount(self.cell_V, counts_V, self.prior_QO.size)
        return total.reshape(self.prior_QO.shape)


def _loss(weights: list[Array], votes: _Votes, right_Q: Array, scale: float) -> tuple[float, list[Array]]:
    worth, in_task, words, shape = weights
    place_V = votes.task_V * len(worth) + votes.expert_V
    known_V = votes.task_V >= 0
    counts = worth[votes.expert_V] + known_V * in_task.ravel()[place_V] + votes.words_VW @ words
    said, damped = votes.by_option(counts), np.exp(-shape[0] * votes.heard_Q)
    scores = damped[:, None] * said + (shape[1] + shape[2] * votes.heard_Q)[:, None] * votes.prior_QO
    scores[:, -1] += votes.unlisted_Q * (shape[3] + shape[4] * votes.different_Q)
    error, rows = softmax(scores + votes.closed_QO) * scale, np.arange(len(right_Q))
    loss = -np.log(np.maximum(error[rows, right_Q] / scale, 1e-12)).sum() * scale
    error[rows, right_Q] -= scale
    own_V = error.ravel()[votes.cell_V] * damped[votes.row_V]
    gradients = [
        np.bincount(votes.expert_V, own_V, len(worth)),
        np.bincount(place_V[known_V], own_V[known_V], in_task.size).reshape(in_task.shape),
        own_V @ votes.words_VW,
        _by_shape(error, said * damped[:, None], votes),
    ]
    for place, penalty in enumerate(_PENALTIES):
        loss += penalty / 2 * float((weights[place] ** 2).sum())
        gradients[place] = gradients[place] + penalty * weights[place]
    return float(loss), gradients


def _by_shape(error_QO: Array, said_QO: Array, votes: _Votes) -> Array:
    said, prior = (error_QO * said_QO).sum(axis=1), (error_QO * votes.prior_QO).sum(axis=1)
    none = error_QO[:, -1] * votes.unlisted_Q
    return np.array([-(said @ votes.heard_Q), prior.sum(), prior @ votes.heard_Q, none.sum(), none @ votes.different_Q])
