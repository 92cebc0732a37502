"""A new expert joins a fitted router without refitting it (after Nexus, arXiv 2408.15901, section 3).

Nexus projects the embedding of a domain into a row of the router. Here an expert's row is a mixture of the rows that
the router has: the newcomer is predicted to answer as the experts like it do, plus a constant. Its card says who is
like it; at most 50 graded questions correct the mixture and, sooner, the constant. Nothing of the router changes.

Legend: Q questions, E experts of the router, C components of a card.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experts.errors import ConfigError
from routers.records import Array

GRADED = 50
"""Graded questions that are read at most: who has more can fit the router again."""
_NEARNESS = 0.35
_SIZES = 0.5
"""A factor of e in parameters counts as much as this distance between cards."""
_LEVEL_PRIOR, _MIX_PRIOR = 8.0, 200.0
"""Questions that the card's guess is worth against the graded ones: of the constant, and of the mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The newcomer's predicted score is ``predicted_QE @ mixture_E + level``."""

    mixture_E: Array
    level: float

    def predict(self, predicted_QE: Array) -> Array:
        found: Array = np.clip(predicted_QE @ self.mixture_E + self.level, *_bounds(predicted_QE))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known of an expert without asking it: the embedding of its description, and its size if that is known."""

    vector_C: Array
    params_b: float | None = None


def from_card(card: Card, known: Sequence[Card], mean_E: Array) -> Row:
    """``known`` are the cards of the router's experts, ``mean_E`` their mean scores. The level follows their sizes."""
    if len(known) != len(mean_E):
        raise ConfigError(f"{len(known)} cards, but the router has {len(mean_E)} experts.")
    distances = np.array([_distance(card, other) for other in known])
    heats = np.exp(-(distances - distances.min()) / _NEARNESS)
    mixture = heats / heats.sum()
    sizes = np.array([math.log(c.params_b) if c.params_b else np.nan for c in known])
    level = 0.0
    if card.params_b and np.isfinite(sizes).sum() > 2:
        slope = _slope(sizes, mean_E)
        level = slope * (math.log(card.params_b) - float(np.nan_to_num(sizes, nan=math.log(card.params_b)) @ mixture))
    return Row(mixture_E=mixture.astype(np.float32), level=level)


def from_grades(predicted_QE: Array, scores_Q: Array, prior: Row | None = None) -> Row:
    """From the router's predictions for at most ``GRADED`` questions, and what the newcomer scored on them.

    Without a card everyone is equally like it. A ridge in two steps: first the constant, then the mixture.
    """
    count, experts = predicted_QE.shape
    if not 1 <= count <= GRADED or len(scores_Q) != count:
        raise ConfigError(
            f"A newcomer is placed by 1 to {GRADED} graded questions, not {count} ({len(scores_Q)} scores)."
        )
    if bad := [row for row, score in enumerate(scores_Q, 1) if not 0 <= score <= 1]:
        raise ConfigError(f"Graded question {bad[0]}: a score lies between 0 and 1, got {scores_Q[bad[0] - 1]!r}.")
    mixture = np.full(experts, 1 / experts) if prior is None else prior.mixture_E.astype(np.float64)
    level = 0.0 if prior is None else prior.level
    level += float((scores_Q - predicted_QE @ mixture - level).sum() / (count + _LEVEL_PRIOR))
    centred = predicted_QE - predicted_QE.mean(axis=1, keepdims=True)
    left = scores_Q - predicted_QE @ mixture - level
    gram = centred @ centred.T + _MIX_PRIOR * max(float((centred**2).mean()), 1e-6) * np.eye(count)
    step = centred.T @ np.linalg.solve(gram, left)
    return Row(mixture_E=(mixture + step - step.mean()).astype(np.float32), level=level)


def _bounds(predicted_QE: Array) -> tuple[float, float]:
    return float(min(predicted_QE.min(), 0.0)), float(max(predicted_QE.max(), 1.0))


def _distance(card: Card, other: Card) -> float:
    words = 1 - float(card.vector_C @ other.vector_C)
    if not (card.params_b and other.params_b):
        return words
    return words + _SIZES * abs(math.log(card.params_b / other.params_b))


def _slope(sizes_E: Array, mean_E: Array) -> float:
    told = np.isfinite(sizes_E)
    x, y = sizes_E[told] - sizes_E[told].mean(), mean_E[told] - mean_E[told].mean()
    return float(x @ y / (x @ x + 1.0))
