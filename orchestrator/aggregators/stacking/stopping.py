"""When enough was heard: an answer is likely enough, or one more is not expected to change it.

What a question's next answer is worth is the expected value of information (Howard, 1966): how much likelier than now
the best answer will be. The next expert is taken to choose each option as often as the posterior says, in words as
usual. Two experts that agree can turn what one cannot: of one call and of two, the better by the call counts.

Legend: as in model.py; K places in the order, N experts who come next, X rules, F
figures of each.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from experts.errors import ConfigError
from orchestrator.aggregators.stacking.model import Ballots, Logit, combine, said_by_any, summed
from orchestrator.aggregators.stacking.prior import softmax
from routers.records import Array

AHEAD = 2
"""Calls that are thought of. Three were no better."""
NEVER_BELOW = -1.0
"""A least gain that stops nobody."""
_GAINS = (
    NEVER_BELOW,
    *(-0.03, -0.02, -0.01, 0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4),
    1,
)
"""Of 1: one call, whatever comes."""
_SURE, _NEXT = 1.645, 1000
"""A rule keeps its budget with a probability of 95 % over the mean of that many questions to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Nobody is asked any more once an answer is as likely as ``threshold``, or once a call is expected to raise the
    probability of the best one by ``least_gain`` or less."""

    threshold: float
    least_gain: float = NEVER_BELOW

    def __str__(self) -> str:
        sure = f"an option is {self.threshold:.0%} likely"
        if self.least_gain == NEVER_BELOW:
            return sure
        return f"{sure}, or a call is expected to add at most {100 * self.least_gain:.3g} points to the likeliest"

    def is_enough(self, sure: Array, gain: Array) -> Array:
        """``sure`` is 0 where no answer could be read, which is never sure enough."""
        result: Array = ((sure >= self.threshold) & (sure > 0)) | (gain <= self.least_gain)
        return result

    def places(self, sure_QK: Array, gain_QK: Array) -> Array:
        """The place in the order where each question is left alone: (Q,)."""
        enough = self.is_enough(sure_QK, gain_QK)
        enough[:, -1] = True
        result: Array = enough.argmax(axis=1)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """Questions asked along an order: after each place how likely the answer is, what the next call would be worth, and
    whether the answer is right."""

    sure_QK: Array
    gain_QK: Array
    right_QK: Array


def hear(ballots: Ballots, panel: list[int] | tuple[int, ...]) -> Ballots:
    heard = np.zeros((1, ballots.votes_QE.shape[1]), np.bool_)
    heard[0, list(panel)] = True
    return ballots.hearing(heard)


def decide(model: Logit, ballots: Ballots) -> tuple[Array, Array]:
    """The likeliest of the options that somebody chose, -1 for none; and its posterior, 0 then."""
    posterior = np.where(said_by_any(ballots.votes_QE, ballots.open_QO.shape[1]), model.posterior(ballots), 0.0)
    best = posterior.max(axis=1)
    return np.where(best > 0, posterior.argmax(axis=1), -1), best


def expected_gain(model: Logit, ballots: Ballots, next_QN: Array) -> Array:
    """By how much a call is expected to raise the probability of the best answer: (Q,), a little below 0 where nothing
    can change. ``next_QN``: what the choice of each expert who comes next, in turn, would count for."""
    said_QO, was_QO = summed(model.counts(ballots), ballots), said_by_any(ballots.votes_QE, ballots.open_QO.shape[1])
    now_QO = softmax(combine(said_QO, ballots, model.shape))
    best_Q = np.where(was_QO, now_QO, 0.0).max(axis=1)
    gains = [np.zeros(len(best_Q))]
    for calls in range(1, min(AHEAD, next_QN.shape[1]) + 1):
        asked = np.concatenate([ballots.asked_QE, np.ones((len(ballots), calls), np.bool_)], axis=1)
        after, more_Q = replace(ballots, asked_QE=asked), next_QN[:, :calls].sum(axis=1)
        expected_Q = np.zeros(len(best_Q))
        for option in range(said_QO.shape[1]):
            # What if they choose this one?
            chosen_O = np.arange(said_QO.shape[1]) == option
            then_QO = softmax(combine(said_QO + more_Q[:, None] * chosen_O, after, model.shape))
            expected_Q += now_QO[:, option] * np.where(was_QO | chosen_O, then_QO, 0.0).max(axis=1)
        gains.append((expected_Q - best_Q) / calls)
    result: Array = np.max(gains[1:] or gains, axis=0)
    return result


def walk(model: Logit, ballots: Ballots, gold: Array, order: tuple[int, ...]) -> Walk:
    sure, gain, right = (np.zeros((len(gold), len(order)), kind) for kind in (float, float, np.bool_))
    usual_QK = model.usual(ballots.tasks_Q)[:, list(order)]
    for place in range(len(order)):
        heard = hear(ballots, order[: place + 1])
        chosen, sure[:, place] = decide(model, heard)
        gain[:, place] = expected_gain(model, heard, usual_QK[:, place + 1 :])
        right[:, place] = chosen == gold
    return Walk(sure_QK=sure, gain_QK=gain, right_QK=right)


def stopping_curve(walked: Walk) -> Array:
    """What each rule leads to, one a row: (X, F) of threshold, least gain, mean calls, accuracy, and the standard
    deviation of the calls."""
    rows, curve = np.arange(len(walked.sure_QK)), []
    for threshold, gain in product(np.round(np.arange(0.0, 1.001, 0.02), 2), _GAINS):
        places = Stop(threshold=threshold, least_gain=gain).places(walked.sure_QK, walked.gain_QK)
        right = walked.right_QK[rows, places].mean()
        curve.append([threshold, gain, (places + 1).mean(), right, places.std()])
    return np.array(curve)


def best_rule(curve_XF: Array, calls: float) -> tuple[Stop, float, float]:
    """Of the rules that keep to ``calls`` on average, held out and with a margin for the chance of who asks next, the
    most accurate, and its mean calls and accuracy; of equals the one that asks least. Raises ConfigError."""
    kept = curve_XF[curve_XF[:, 2] + _SURE * _NEXT**-0.5 * curve_XF[:, 4] <= calls]
    if not len(kept):
        raise ConfigError(f"A question costs at least one call; a mean of {calls:g} is impossible.")
    threshold, gain, mean_calls, right, _ = min(kept.tolist(), key=lambda row: (-row[3], row[2], -row[1]))
    return Stop(threshold=threshold, least_gain=gain), mean_calls, right
