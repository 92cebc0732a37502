"""The options' prior: how often options that stand out so were the right one, by a small network.

One hidden layer over the traits and the neighbours' hints, and a weight for each gram of the wording, softmax over the
options of a question, fitted together by L-BFGS with weight decay; two starting points are averaged. Legend: Q
questions, O options, T traits and hints, H hidden units, M members, N columns of grams, R options of all questions in a
row.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from orchestrator.aggregators.stacking.grams import Options
from orchestrator.aggregators.stacking.neighbours import Neighbours
from routers.learned.minimise import minimise
from routers.records import Array

_HIDDEN, _MEMBERS, _STEPS = 16, 2, 80
_DECAY, _GRAM_DECAY = 4.0, 2.0
"""Of the network, and of the grams: chosen by cross-validation on train and val."""
NEVER = -14.0
"""Logarithm of the probability of an option that there is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """``mean_T`` and ``scale_T`` bring the traits to one scale."""

    mean_T: Array
    scale_T: Array
    inner_MTH: Array
    bias_MH: Array
    outer_MH: Array
    grams_MN: Array
    neighbours: Neighbours

    @classmethod
    def fit(cls, options: Options, open_QO: Array, right_Q: Array, family_Q: Array, seed: int) -> Self:
        """``open_QO`` says which options there are, ``right_Q`` the right one; a family is one question asked twice."""
        neighbours = Neighbours.of(options, open_QO, right_Q)
        hints_RH = neighbours.hints(options, open_QO, family_N=family_Q)[open_QO]
        rows_RT = np.concatenate([options.traits_QOT[open_QO], hints_RH], axis=1)
        mean, scale = rows_RT.mean(axis=0), rows_RT.std(axis=0) + 1e-3
        inputs_RT, rng = ((rows_RT - mean) / scale).astype(np.float32), np.random.default_rng(seed)
        grams = options.grams.where(open_QO.ravel())
        grams_RN = grams.matrix(grams.values_G)
        members = [_fit_one(inputs_RT, grams_RN, open_QO, right_Q, rng) for _ in range(_MEMBERS)]
        inner, bias, outer, weights = (np.stack(part).astype(np.float32) for part in zip(*members, strict=True))
        return cls(
            mean_T=mean,
            scale_T=scale,
            inner_MTH=inner,
            bias_MH=bias,
            outer_MH=outer,
            grams_MN=weights,
            neighbours=neighbours,
        )

    def predict(self, options: Options, open_QO: Array) -> Array:
        """Logarithms of probabilities, (Q, O); NEVER where there is no option."""
        hints_RH = self.neighbours.hints(options, open_QO)[open_QO]
        inputs_RT = (np.concatenate([options.traits_QOT[open_QO], hints_RH], axis=1) - self.mean_T) / self.scale_T
        grams = options.grams.where(open_QO.ravel())
        chances = np.zeros(open_QO.shape)
        for inner, bias, outer, weights in zip(*self._members(), strict=True):
            chances += softmax(_spread(np.tanh(inputs_RT @ inner + bias) @ outer + grams.weigh(weights), open_QO))
        result: Array = np.where(open_QO, np.log(np.maximum(chances / len(self.outer_MH), 1e-6)), NEVER)
        return result.astype(np.float32)

    def _members(self) -> tuple[Array, ...]:
        return self.inner_MTH, self.bias_MH, self.outer_MH, self.grams_MN


def softmax(logits_QO: Array) -> Array:
    """Over the options; one with a logit of minus infinity gets nothing."""
    raised = np.exp(logits_QO - logits_QO.max(axis=-1, keepdims=True))
    result: Array = raised / raised.sum(axis=-1, keepdims=True)
    return result


def _spread(values_R: Array, open_QO: Array) -> Array:
    spread = np.full(open_QO.shape, -np.inf)
    spread[open_QO] = values_R
    return spread


def _fit_one(inputs_RT: Array, grams_RN: Any, open_QO: Array, right_Q: Array, rng: np.random.Generator) -> list[Array]:
    width = inputs_RT.shape[1]
    start = [rng.normal(0, width**-0.5, (width, _HIDDEN)), np.zeros(_HIDDEN), rng.normal(0, 0.1, _HIDDEN)]
    start.append(np.zeros(grams_RN.shape[1]))
    across_NR = grams_RN.T.tocsr()
    target_QO = np.arange(open_QO.shape[1]) == right_Q[:, None]
    return minimise(start, lambda w: _loss(w, (inputs_RT, grams_RN, across_NR), open_QO, target_QO), steps=_STEPS)


def _loss(
    weights: list[Array], inputs: tuple[Array, Any, Any], open_QO: Array, target_QO: Array
) -> tuple[float, list[Array]]:
    """``inputs``: the traits, the grams, and these turned."""
    inputs_RT, grams_RN, across_NR = inputs
    inner, bias, outer, grams = (w.astype(np.float32) for w in weights)
    hidden_RH = np.tanh(inputs_RT @ inner + bias)
    chances_QO = softmax(_spread(hidden_RH @ outer + grams_RN @ grams, open_QO))
    loss = -np.log(np.maximum(chances_QO[target_QO], 1e-12)).sum()
    loss += _DECAY / 2 * sum(float((w**2).sum()) for w in (weights[0], weights[2]))
    loss += _GRAM_DECAY / 2 * float((weights[3] ** 2).sum())
    error_R = (chances_QO - target_QO)[open_QO].astype(np.float32)
    back_RH = error_R[:, None] * outer * (1 - hidden_RH**2)
    gradients = [
        inputs_RT.T @ back_RH + _DECAY * weights[0],
        back_RH.sum(axis=0),
        hidden_RH.T @ error_R + _DECAY * weights[2],
        across_NR @ error_R + _GRAM_DECAY * weights[3],
    ]
    return float(loss), gradients
