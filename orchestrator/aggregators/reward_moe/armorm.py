"""ArmoRM: rewards by objective, debiased, mixed by a gate that reads the prompt alone (arXiv 2406.12845).

s(x, y) = g(x) . r'(x, y), with r' = r T and g = logit_scale * softmax(MLP(x) / tau) over the objectives.

Legend: N answers, P prompts, D features, W width of the prompt's embedding, O objectives, H hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.aggregators.reward_moe.inputs import Inputs
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """``released`` is the softmax of the released code, for comparison: it runs over axis 1 of (pairs, 2, width), which
    is the chosen and the rejected answer and not the objectives, so that every objective weighs 0.5 * logit_scale."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    tau: float = 1.0
    logit_scale: float = 1.0
    released: bool = False

    def __call__(self, prompts: Array) -> Array:
        """Prompts (..., W) to weights (..., O), which sum to ``logit_scale`` over the last axis."""
        hidden = prompts
        for weight_HH, bias_H in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = np.maximum(hidden @ weight_HH + bias_H, 0)
        logits = (hidden @ self.weights[-1] + self.biases[-1]) / self.tau
        return self.logit_scale * softmax(logits, axis=1 if self.released and logits.ndim == 3 else -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmoRM:
    """``transform_OO`` is T. ``scale_O`` brings the debiased objectives to unit spread, so that the gate's weights can
    be compared: a deviation from the paper, whose objectives have one scale already; ones leave it out."""

    objectives: tuple[str, ...]
    weight_OD: Array
    transform_OO: Array
    scale_O: Array
    gate: Gate

    @property
    def features(self) -> int:
        return int(self.weight_OD.shape[1])

    def rewards(self, features_ND: Array) -> Array:
        """r' (N x O): what the gate's weights multiply."""
        found: Array = (features_ND @ self.weight_OD.T) @ self.transform_OO * self.scale_O
        return found

    def coefficients(self, prompts_PW: Array) -> Array:
        """c (P x O), the weights of the raw objectives: s = c . r."""
        found: Array = (self.gate(prompts_PW) * self.scale_O) @ self.transform_OO.T
        return found

    def score(self, inputs: Inputs) -> tuple[Array, list[Mapping[str, float]]]:
        """What a reward is made of: what each objective adds to it, weight times reward; the verbosity objective adds
        nothing."""
        terms_NO = self.rewards(inputs.features_ND) * self.gate(inputs.prompts_PW)[inputs.prompt_N]
        parts = [dict(zip(self.objectives, map(float, row), strict=True)) for row in terms_NO]
        return terms_NO.sum(axis=1), list(parts)


def uniform_gate(width: int, objectives: int) -> Gate:
    """Every objective weighs the same, whatever the prompt."""
    return Gate(weights=(np.zeros((width, objectives), np.float32),), biases=(np.zeros(objectives, np.float32),))


def softmax(logits: Array, *, axis: int) -> Array:
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    found: Array = powers / powers.sum(axis=axis, keepdims=True)
    return found
