"""Logistic regression per expert, all fitted at once; scores between 0 and 1 are soft labels."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of
from routers.learned.minimise import minimise
from routers.questions import Design, Questions
from routers.records import Array

STRENGTHS = (300.0, 1000.0, 3000.0)
_STEPS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Logistic:
    design: Design
    weights_DE: Array
    bias_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, best_of(STRENGTHS, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, strength: float) -> Self:
        design = Design.fit(training.questions, reads_form=True)
        inputs, targets = design.features(training.questions), training.scores_QE
        # A quarter is the curvature of the logistic loss, which puts the strengths on ridge's scale.
        start = [np.zeros((inputs.shape[1], targets.shape[1])), log_odds(targets.mean(axis=0))]
        weights, bias = minimise(start, lambda w: _loss(w, inputs, targets, strength / 4), steps=_STEPS)
        return cls(design=design, weights_DE=weights.astype(np.float32), bias_E=bias.astype(np.float32))

    def predict(self, questions: Questions) -> Array:
        return sigmoid(self.design.features(questions) @ self.weights_DE + self.bias_E)


def _loss(weights: list[Array], inputs: Array, targets: Array, strength: float) -> tuple[float, list[Array]]:
    slopes, bias = weights
    logits = inputs @ slopes + bias
    loss = np.sum(np.logaddexp(0, logits) - targets * logits) + strength / 2 * np.sum(slopes**2)
    error = sigmoid(logits) - targets
    return float(loss), [inputs.T @ error + strength * slopes, error.sum(axis=0)]


def sigmoid(logits: Array) -> Array:
    # By tanh, nothing overflows.
    result: Array = 0.5 * (1 + np.tanh(logits / 2))
    return result


def log_odds(rates: Array) -> Array:
    rates = np.clip(rates, 0.01, 0.99)
    result: Array = np.log(rates / (1 - rates))
    return result
