"""Fitted Q iteration over candidates (the dialogue manager of MoE-LM, arXiv 2206.00059).

Which of the offered candidates is worth most in the long run, learned from logged episodes. A value belongs to a
context and a candidate's own embedding, never to its place in the list: the list differs from turn to turn. With
horizon 1 this is a contextual bandit.

Legend: N steps, C candidates a step, W width of a context, X width of a candidate, F = (W + 1)(X + 1) features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experts.errors import ConfigError
from routers.learned.minimise import minimise
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Logged turns. ``offered_NC`` says which places of ``candidates_NCX`` hold a candidate; a step whose
    ``next_offered_NC`` is empty ends its episode."""

    context_NW: Array
    candidates_NCX: Array
    offered_NC: Array
    chosen_N: Array
    reward_N: Array
    next_context_NW: Array
    next_candidates_NCX: Array
    next_offered_NC: Array

    def __post_init__(self) -> None:
        if not self.offered_NC[np.arange(len(self.chosen_N)), self.chosen_N].all():
            row = int(np.flatnonzero(~self.offered_NC[np.arange(len(self.chosen_N)), self.chosen_N])[0])
            raise ConfigError(f"Step {row + 1} chose a candidate that was not offered.")
        if not np.isfinite(self.reward_N).all():
            row = int(np.flatnonzero(~np.isfinite(self.reward_N))[0])
            raise ConfigError(f"The reward of step {row + 1} is no number.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """Q(context, candidate), linear in the products of their numbers."""

    weights_WX: Array

    def of(self, context_NW: Array, candidates_NCX: Array) -> Array:
        """N x C."""
        values: Array = np.einsum("nw,wx,ncx->nc", one_more(context_NW), self.weights_WX, one_more(candidates_NCX))
        return values


Solve = Callable[[Array, Value], Value]


def fit_q(
    steps: Steps, *, discount: float = 1.0, rounds: int = 1, strength: float = 1.0, conservative: float = 0.0
) -> Value:
    """``rounds``: the horizon; 1 learns the next reward alone. ``conservative`` is the weight of CQL's penalty (Kumar
    et al., 2006.04779), which lowers what was offered and not tried: logs that one policy made need it."""
    value = Value(weights_WX=np.zeros((steps.context_NW.shape[1] + 1, steps.candidates_NCX.shape[2] + 1)))
    solve = _conservative(steps, strength, conservative) if conservative else _ridge(steps, strength)
    for _ in range(rounds):
        value = solve(targets(steps, value, discount), value)
    return value


def targets(steps: Steps, value: Value, discount: float) -> Array:
    """The reward, and what the best of the candidates offered next is worth; nothing follows the last step."""
    later = np.where(steps.next_offered_NC, value.of(steps.next_context_NW, steps.next_candidates_NCX), -np.inf)
    best = np.where(steps.next_offered_NC.any(axis=1), later.max(axis=1), 0.0)
    found: Array = steps.reward_N + discount * best
    return found


def pick(
    values_C: Array, offered_C: Array, candidates_CX: Array, *, epsilon: float, rng: np.random.Generator
) -> tuple[int, float]:
    """A candidate that is offered, and the probability it was picked with. The best, or with ``epsilon`` any; equal
    candidates count once, so that saying the same thing twice does not make it likelier.

    Raises ConfigError where none is offered.
    """
    places = _distinct(candidates_CX, offered_C)
    if not places:
        raise ConfigError("No candidate is offered: every expert failed.")
    best = max(places, key=lambda c: values_C[c])
    chosen = int(rng.choice(places)) if rng.random() < epsilon else best
    return chosen, epsilon / len(places) + (1 - epsilon) * (chosen == best)


def one_more(values: Array) -> Array:
    """With a 1 behind, for what depends on one side alone."""
    return np.concatenate([values, np.ones((*values.shape[:-1], 1))], axis=-1)


def _distinct(candidates_CX: Array, offered_C: Array) -> list[int]:
    seen: set[bytes] = set()
    places = []
    for place in np.flatnonzero(offered_C):
        if (key := candidates_CX[place].tobytes()) not in seen:
            seen.add(key)
            places.append(int(place))
    return places


def _features(steps: Steps) -> Array:
    taken_NX = steps.candidates_NCX[np.arange(len(steps.chosen_N)), steps.chosen_N]
    products = np.einsum("nw,nx->nwx", one_more(steps.context_NW), one_more(taken_NX))
    features: Array = products.reshape(len(products), -1)
    return features


def _ridge(steps: Steps, strength: float) -> Solve:
    """Factorised once: only the targets change from round to round."""
    inputs = _features(steps)
    inverse = np.linalg.inv(inputs.T @ inputs + strength * np.eye(inputs.shape[1]))

    def solve(targets_N: Array, value: Value) -> Value:
        return Value(weights_WX=(inverse @ (inputs.T @ targets_N)).reshape(value.weights_WX.shape))

    return solve


def _conservative(steps: Steps, strength: float, weight: float) -> Solve:
    rows = np.arange(len(steps.chosen_N))
    context, candidates = one_more(steps.context_NW), one_more(steps.candidates_NCX)

    def loss(parts: list[Array], targets_N: Array) -> tuple[float, list[Array]]:
        values = np.einsum("nw,wx,ncx->nc", context, parts[0], candidates)
        shown = np.where(steps.offered_NC, values, -np.inf)
        top = shown.max(axis=1, keepdims=True)
        shares = np.exp(shown - top)
        total = shares.sum(axis=1, keepdims=True)
        error = values[rows, steps.chosen_N] - targets_N
        penalty = (top + np.log(total))[:, 0] - values[rows, steps.chosen_N]
        slope = weight * shares / total
        slope[rows, steps.chosen_N] += error - weight
        gradient = np.einsum("nc,nw,ncx->wx", slope, context, candidates) + strength * parts[0]
        value = (error**2).sum() / 2 + weight * penalty.sum() + strength / 2 * (parts[0] ** 2).sum()
        return float(value), [gradient]

    def solve(targets_N: Array, value: Value) -> Value:
        (weights,) = minimise([value.weights_WX], lambda parts: loss(parts, targets_N), steps=300)
        return Value(weights_WX=weights)

    return solve
