"""Thresholds and what they cost: both ways, with a guarantee, and as a curve.

A cheap answer is kept where its confidence reaches the threshold; the other questions go on to a dearer expert.

Legend: Q questions, S stages of a cascade, B points of a table.
"""

from dataclasses import dataclass

import numpy as np

from experts.errors import ConfigError
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """``kept``: the share of questions that the cheap expert answers alone."""

    threshold: float
    kept: float
    cost: float
    score: float


def expected_cost(confidence_Q: Array, threshold: float, cheap: float, dear: float) -> float:
    """Mean cost a question: the cheap answer is always paid for, the dear one where it is asked too."""
    return cheap + dear * float((confidence_Q < threshold).mean())


def threshold_for(confidence_Q: Array, cheap: float, dear: float, budget: float) -> float:
    """The highest threshold whose mean cost stays within ``budget``: the most escalations that it pays for.

    Raises ConfigError where not even the cheap answers fit.
    """
    if budget < cheap:
        raise ConfigError(f"A budget of {budget:g} does not pay for the cheapest answer, which costs {cheap:g}.")
    allowed = int((budget - cheap) / dear * len(confidence_Q) + 1e-9) if dear > 0 else len(confidence_Q)
    if allowed >= len(confidence_Q):
        return float("inf")
    # The first confidence that must be kept; equal ones are kept with it.
    return float(np.sort(confidence_Q)[allowed])


def conformal_threshold(confidence_Q: Array, right_Q: Array, risk: float) -> float:
    """The lowest threshold at which a kept answer is wrong for at most a share ``risk`` of all questions, in
    expectation over new questions like these (conformal risk control, Angelopoulos et al., 2208.02814).

    ``inf`` where no threshold promises that: escalate everything. Raises ConfigError for a risk that is no share.
    """
    if not 0 < risk < 1:
        raise ConfigError(f"A risk lies between 0 and 1, not {risk:g}.")
    order = np.argsort(-confidence_Q, kind="stable")
    confidence, wrong = confidence_Q[order], np.cumsum(1.0 - right_Q[order])
    size = len(confidence)
    # Of equal confidences all are kept or none: the count at the last of them holds.
    last = np.append(confidence[1:] != confidence[:-1], True)
    fits = last & ((wrong + 1) / (size + 1) <= risk)
    return float(confidence[np.flatnonzero(fits)[-1]]) if fits.any() else float("inf")


def cascade_curve(
    confidence_Q: Array, cheap_Q: Array, dear_Q: Array, cheap: float, dear: float, points: int = 41
) -> list[CurvePoint]:
    """From asking the dear expert always to never; ``cheap_Q`` and ``dear_Q`` are the two experts' scores."""
    thresholds = np.unique(np.quantile(confidence_Q, np.linspace(0, 1, points)))
    found = []
    for threshold in [*thresholds, np.inf]:
        kept = confidence_Q >= threshold
        found.append(
            CurvePoint(
                threshold=float(threshold),
                kept=float(kept.mean()),
                cost=expected_cost(confidence_Q, float(threshold), cheap, dear),
                score=float(np.where(kept, cheap_Q, dear_Q).mean()),
            )
        )
    return found


def price_table(predicted_QS: Array, costs_S: Array, points: int = 64) -> tuple[Array, Array]:
    """(prices_B, spends_B): choosing each question's best ``score - price x cost``, what is spent at each price, as a
    share of always choosing the last stage. Spends fall as prices rise."""
    spread = max(float(np.ptp(predicted_QS)), 1e-9) / max(float(np.ptp(costs_S)), 1e-12)
    prices = np.concatenate([[0.0], spread * np.geomspace(1e-3, 1e3, points - 1)])
    spends = [float(costs_S[(predicted_QS - p * costs_S).argmax(axis=1)].mean() / costs_S[-1]) for p in prices]
    return prices, np.minimum.accumulate(spends)


def price_for(spend: float, prices_B: Array, spends_B: Array) -> float:
    """The lowest price at which no more than ``spend`` is spent; the highest of the table where none does."""
    fits = np.flatnonzero(spends_B <= spend)
    return float(prices_B[fits[0]] if len(fits) else prices_B[-1])
