"""From a recorded pool to a fitted stack: prior, logit, the order to ask in, and when to stop.

Everything that is chosen is chosen on questions held out: a question's prior comes from a network that never saw it,
and so do the posteriors that the order and the rule for stopping are read from. Legend: as in model.py; K places in the
order, X rules, F figures of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from experts.errors import ConfigError
from orchestrator.aggregators.stacking.fitting import fit_logit
from orchestrator.aggregators.stacking.grams import Options
from orchestrator.aggregators.stacking.model import Ballots, Logit
from orchestrator.aggregators.stacking.prior import NEVER, Prior
from orchestrator.aggregators.stacking.recorded import Recorded, usable
from orchestrator.aggregators.stacking.stopping import Stop, Walk, best_rule, decide, hear, stopping_curve, walk
from routers.learned.base import split_folds
from routers.records import Array

FOLDS = 4
_LONGEST = 8
"""Experts in the order. Further ones were not worth their call on any pool here."""
_PANELS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """``calls``: the mean number of calls that a question may cost. Switched off parts are for ablations."""

    calls: float = 3.0
    seed: int = 0
    with_prior: bool = True
    with_words: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """``order`` are columns of experts; ``word_mean_EW`` and ``word_scale_W`` bring words to one scale.

    ``curve_XF`` says what each rule for stopping leads to on questions held out (stopping.py)."""

    logit: Logit
    prior: Prior | None
    word_mean_EW: Array
    word_scale_W: Array
    order: tuple[int, ...]
    stop: Stop
    curve_XF: Array

    def prepare(self, ballots: Ballots, options: Options) -> Ballots:
        """``ballots`` with this stack's prior and words on its scale."""
        return self.prepare_with(prior_of(self.prior, ballots.open_QO, ballots.listed_Q, options), ballots)

    def prepare_with(self, prior_QO: Array, ballots: Ballots) -> Ballots:
        words = (ballots.words_QEW - self.word_mean_EW) / self.word_scale_W
        return replace(ballots, words_QEW=np.clip(words, -3, 3), prior_QO=prior_QO)


def prior_of(prior: Prior | None, open_QO: Array, listed_Q: Array, options: Options) -> Array:
    """Zero for an open question, whose options are what was answered."""
    result = np.zeros(open_QO.shape, np.float32)
    if prior is not None and listed_Q.any():
        result[listed_Q] = prior.predict(options.take(np.flatnonzero(listed_Q)), open_QO[listed_Q])
    return np.maximum(result, NEVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Priors:
    """``later`` is for questions to come; ``held_QO`` is each question's own, by a network that did not see it."""

    later: Prior | None
    held_QO: Array


def fit_stack(
    recorded: Recorded,
    rows: Array,
    wish: Wish,
    *,
    priors: Priors | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> Stack:
    """Learns from ``rows`` only. ``priors`` of the same rows and seed need not be fitted again: they do not depend on
    the experts. Raises ConfigError."""
    rows = usable(recorded, rows)
    if len(rows) < 2 * FOLDS:
        raise ConfigError(f"{len(rows)} questions are too few to fit a stack on; at least {2 * FOLDS} are needed.")
    ballots, gold = recorded.ballots.take(rows), recorded.gold_Q[rows]
    mean, scale = word_scales(ballots)
    words = np.clip((ballots.words_QEW - mean) / scale, -3, 3) * wish.with_words
    folds = _folds(recorded, rows, wish.seed)
    if priors is None:
        on_step("the options' prior")
        priors = fit_priors(recorded, rows, wish)
    ballots = replace(ballots, words_QEW=words, prior_QO=priors.held_QO)
    on_step("the logit, fold by fold")
    tasks = len(recorded.tasks)
    models = _fit_folds(ballots, gold, folds, tasks, (), wish)
    on_step("the order to ask in")
    order = greedy_order(ballots, gold, models, folds)
    on_step("the logit again, with that order")
    models = _fit_folds(ballots, gold, folds, tasks, order, wish)
    curve = stopping_curve(along(ballots, gold, models, folds, order))
    logit = fit_logit(ballots, gold, tasks=tasks, panels=_PANELS, seed=wish.seed, order=order, largest=_LONGEST)
    return Stack(
        logit=logit,
        prior=priors.later,
        word_mean_EW=mean,
        word_scale_W=scale,
        order=order,
        stop=best_rule(curve, wish.calls)[0],
        curve_XF=curve,
    )


def word_scales(ballots: Ballots) -> tuple[Array, Array]:
    """Words are compared with what their expert usually writes."""
    words, asked = ballots.words_QEW, ballots.asked_QE[..., None]
    mean = (words * asked).sum(axis=0) / np.maximum(asked.sum(axis=0), 1)
    spread = ((words - mean) ** 2 * asked).sum(axis=(0, 1)) / max(int(asked.sum()), 1)
    return mean, np.sqrt(spread) + 0.05


Folds = list[tuple[Array, Array]]


def fit_priors(recorded: Recorded, rows: Array, wish: Wish) -> Priors:
    """On the questions of ``rows`` whose right answer is known."""
    rows = usable(recorded, rows)
    ballots, gold, options = recorded.ballots.take(rows), recorded.gold_Q[rows], recorded.options.take(rows)
    listed, held = ballots.listed_Q, np.zeros(ballots.open_QO.shape, np.float32)
    if not wish.with_prior or not listed.any():
        return Priors(later=None, held_QO=held)

    def fit(part: Array) -> Prior:
        part = part[listed[part]]
        return Prior.fit(
            options.take(part), ballots.open_QO[part], gold[part], recorded.family_Q[rows[part]], wish.seed
        )

    for kept, out in _folds(recorded, rows, wish.seed):
        if listed[kept].any():
            held[out] = prior_of(fit(kept), ballots.open_QO[out], listed[out], options.take(out))
    return Priors(later=fit(np.arange(len(gold))), held_QO=held)


def _folds(recorded: Recorded, rows: Array, seed: int) -> Folds:
    """Twins stay together: a question whose twin was learned from says nothing about those to come."""
    return split_folds(len(rows), seed, FOLDS, recorded.family_Q[rows])


def _fit_folds(
    ballots: Ballots, gold: Array, folds: Folds, tasks: int, order: tuple[int, ...], wish: Wish
) -> list[Logit]:
    return [
        fit_logit(
            ballots.take(kept),
            gold[kept],
            tasks=tasks,
            panels=_PANELS,
            seed=wish.seed,
            order=order,
            largest=_LONGEST,
        )
        for kept, _ in folds
    ]


def greedy_order(ballots: Ballots, gold: Array, models: list[Logit], folds: Folds) -> tuple[int, ...]:
    """Each next expert is the one that adds most to those before him, on questions held out."""
    experts, chosen = ballots.votes_QE.shape[1], list[int]()
    parts = [(model, ballots.take(out), gold[out]) for model, (_, out) in zip(models, folds, strict=True)]
    while len(chosen) < min(experts, _LONGEST):
        scores = {
            e: sum(int(hits(model, part, right, [*chosen, e]).sum()) for model, part, right in parts)
            for e in range(experts)
            if e not in chosen
        }
        chosen.append(max(scores, key=scores.__getitem__))
    return tuple(chosen)


def hits(model: Logit, ballots: Ballots, gold: Array, panel: list[int]) -> Array:
    chosen, _ = decide(model, hear(ballots, panel))
    result: Array = chosen == gold
    return result


def along(ballots: Ballots, gold: Array, models: list[Logit], folds: Folds, order: tuple[int, ...]) -> Walk:
    """Each question asked along the order by the model that did not see it."""
    shape = (len(gold), len(order))
    walked = Walk(sure_QK=np.zeros(shape), gain_QK=np.zeros(shape), right_QK=np.zeros(shape, np.bool_))
    for model, (_, out) in zip(models, folds, strict=True):
        part = walk(model, ballots.take(out), gold[out], order)
        walked.sure_QK[out], walked.gain_QK[out], walked.right_QK[out] = part.sure_QK, part.gain_QK, part.right_QK
    return walked
