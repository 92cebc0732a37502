"""Cost against quality.

Two experts, strong and weak: how the score grows with the share of questions that the strong one gets (RouteLLM's
curve). APGR is the mean share of the gap that is recovered over all shares; the random mix has 0.5.
All experts: the one with the best ``score - price x cost``, for a sweep of prices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from routers.records import Array

PRICES = 60
BUDGETS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCurve:
    """``scores`` at 0, 1, 2 ... questions sent to the strong expert."""

    strong: int
    weak: int
    scores: Array
    oracle: Array

    @property
    def gap(self) -> float:
        return float(self.scores[-1] - self.scores[0])

    @property
    def area(self) -> float:
        return _area(self.scores)

    @property
    def apgr(self) -> float | None:
        return None if self.gap <= 0 else (self.area - float(self.scores[0])) / self.gap

    @property
    def beyond_random(self) -> float | None:
        """0 for the random mix, 1 for an oracle that knows whom each question needs."""
        random = float(self.scores[0] + self.scores[-1]) / 2
        room = _area(self.oracle) - random
        return None if room <= 0 else (self.area - random) / room

    def calls_for(self, share: float) -> float | None:
        """The smallest share of strong calls that recovers ``share`` of the gap."""
        if self.gap <= 0:
            return None
        reached = np.flatnonzero(self.scores >= self.scores[0] + share * self.gap)
        return None if not len(reached) else float(reached[0]) / (len(self.scores) - 1)


def pair_curve(predicted_QE: Array, scores_QE: Array, strong: int, weak: int) -> PairCurve:
    margin = predicted_QE[:, strong] - predicted_QE[:, weak]
    gain = scores_QE[:, strong].astype(np.float64) - scores_QE[:, weak]
    base = float(scores_QE[:, weak].mean(dtype=np.float64))
    return PairCurve(strong=strong, weak=weak, scores=_sent(margin, gain, base), oracle=_sent(gain, gain, base))


def _sent(margin: Array, gain: Array, base: float) -> Array:
    """Among questions of one margin nobody is first, whatever the file's order: each stands for their mean."""
    _, places, counts = np.unique(-margin, return_inverse=True, return_counts=True)
    means = np.bincount(places, weights=gain) / counts
    grown: Array = base + np.concatenate([[0.0], np.cumsum(np.repeat(means, counts))]) / len(gain)
    return grown


def _area(scores: Array) -> float:
    return float((scores[1:] + scores[:-1]).mean() / 2)


def cost_curve(predicted_QE: Array, scores_QE: Array, cost_QE: Array, costs_E: Array) -> list[tuple[float, float]]:
    """(mean cost, mean score) for each price, from free to so dear that the cheapest answers all."""
    rows = np.arange(len(scores_QE))
    spread = max(float(np.ptp(predicted_QE)), 1e-9) / max(float(np.ptp(costs_E)), 1e-12)
    prices = [0.0, *(spread * np.geomspace(1e-3, 1e3, PRICES))]
    chosen = [(predicted_QE - price * costs_E).argmax(axis=1) for price in prices]
    return [(float(cost_QE[rows, c].mean()), float(scores_QE[rows, c].mean(dtype=np.float64))) for c in chosen]


def hull_area(points: Sequence[tuple[float, float]], low: float, high: float) -> float | None:
    """The mean score over all budgets from ``low`` to ``high`` (RouterBench's AIQ, arXiv 2403.12031, section 3.3).

    A budget buys the best mix of two points that costs no more; a dearer point is never worse than a cheaper one.
    """
    if high <= low:
        return None
    hull: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if hull and score <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (cost, score)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((cost, score))
    budgets = np.linspace(low, high, BUDGETS)
    costs, scores = np.array(hull).T
    return float(np.interp(budgets, costs, scores).mean())


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / max(b[0] - a[0], 1e-12)
