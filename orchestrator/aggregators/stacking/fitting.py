"""Fitting the logit: penalised maximum likelihood, each question seen with several random panels of its experts.

Legend: as in model.py.
"""

from collections.abc import Sequence

import numpy as np

from orchestrator.aggregators.stacking.model import Ballots, Logit, combine, damping, summed
from orchestrator.aggregators.stacking.prior import softmax
from routers.learned.minimise import minimise
from routers.records import Array

_STEPS = 80
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
    heard = random_panels(len(gold_Q) * panels, ballots.votes_QE.shape[1], seed=seed, order=order, largest=largest)
    rows = np.tile(np.arange(len(gold_Q)), panels)
    many = ballots.take(rows).hearing(heard)
    right = many.right(gold_Q[rows])
    experts, width = many.votes_QE.shape[1], many.words_QEW.shape[2]
    start = [np.ones(experts), np.zeros((tasks, experts)), np.zeros(width), np.array(_START)]
    scale = 1 / panels
    worth, in_task, words, shape = minimise(start, lambda w: _loss(w, many, right, scale), steps=_STEPS)
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


def _loss(weights: list[Array], ballots: Ballots, right_Q: Array, scale: float) -> tuple[float, list[Array]]:
    worth, in_task, words, shape = weights
    logit = Logit(worth_E=worth, in_task_CE=in_task, words_W=words, shape=shape)
    said = summed(logit.counts(ballots), ballots)
    chances = softmax(combine(said, ballots, shape))
    rows = np.arange(len(right_Q))
    loss = -np.log(np.maximum(chances[rows, right_Q], 1e-12)).sum() * scale
    error = chances * scale
    error[rows, right_Q] -= scale
    gradients = [*_by_counts(error, ballots, shape, len(in_task)), _by_shape(error, said, ballots, shape)]
    for place, penalty in enumerate(_PENALTIES):
        loss += penalty / 2 * float((weights[place] ** 2).sum())
        gradients[place] = gradients[place] + penalty * weights[place]
    return float(loss), gradients


def _by_counts(error_QO: Array, ballots: Ballots, shape: Array, tasks: int) -> list[Array]:
    chose = ballots.votes_QE >= 0
    own = np.take_along_axis(error_QO, np.maximum(ballots.votes_QE, 0), axis=1) * chose
    own *= damping(ballots, shape)[:, None]
    by_task = np.zeros((tasks + 1, own.shape[1]))
    np.add.at(by_task, ballots.tasks_Q, own)
    return [own.sum(axis=0), by_task[:tasks], np.tensordot(own, ballots.words_QEW, axes=([0, 1], [0, 1]))]


def _by_shape(error_QO: Array, said_QO: Array, ballots: Ballots, shape: Array) -> Array:
    heard = np.log(np.maximum(ballots.asked_QE.sum(axis=1), 1))
    said = (error_QO * said_QO).sum(axis=1) * damping(ballots, shape)
    prior = (error_QO * np.where(ballots.open_QO, ballots.prior_QO, 0.0)).sum(axis=1)
    rest = error_QO[:, -1] * ~ballots.listed_Q
    different = np.log(ballots.open_QO.sum(axis=1))
    return np.array([-(said * heard).sum(), prior.sum(), (prior * heard).sum(), rest.sum(), (rest * different).sum()])
