"""Chooses by reward, not by likelihood: a softmax over experts, fitted so that its expected score is highest.

A probability per expert spends its strength on easy and hard questions, on which all experts agree; what this model
maximises, mean over questions of sum_e softmax(logits)_e x score_e, moves only where the choice matters.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of
from routers.learned.minimise import minimise
from routers.questions import Design, Questions
from routers.records import Array

STRENGTHS = (0.002, 0.005, 0.02)
_STEPS = 50
_SHARPNESS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    design: Design
    weights_DE: Array
    bias_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, best_of(STRENGTHS, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, strength: float) -> Self:
        design = Design.fit(training.questions)
        inputs, scores = design.features(training.questions), training.scores_QE
        start = [np.zeros((inputs.shape[1], scores.shape[1])), _SHARPNESS * scores.mean(axis=0)]
        weights, bias = minimise(start, lambda w: _loss(w, inputs, scores, strength), steps=_STEPS)
        return cls(design=design, weights_DE=weights.astype(np.float32), bias_E=bias.astype(np.float32))

    def predict(self, questions: Questions) -> Array:
        return _softmax(self.design.features(questions) @ self.weights_DE + self.bias_E)


def _loss(weights: list[Array], inputs: Array, scores: Array, strength: float) -> tuple[float, list[Array]]:
    slopes, bias = weights
    shares = _softmax(inputs @ slopes + bias)
    reward = (shares * scores).sum(axis=1, keepdims=True)
    by_logits = -shares * (scores - reward) / len(scores)
    loss = -float(reward.mean()) + strength * float(np.sum(slopes**2))
    return loss, [inputs.T @ by_logits + 2 * strength * slopes, by_logits.sum(axis=0)]


def _softmax(logits: Array) -> Array:
    heats = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = heats / heats.sum(axis=1, keepdims=True)
    return shares
