"""Ridge regression of every expert's score on embedding and task; all experts share one factorisation.

The strength is chosen by cross-validation on who is picked, not on squared error. RouteDecisions read the prediction
as a probability, so it is kept inside 0 to 1.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of
from routers.questions import Design, Questions
from routers.records import Array

STRENGTHS = (300.0, 1000.0, 3000.0, 10_000.0, 30_000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    design: Design
    weights_DE: Array
    mean_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, best_of(STRENGTHS, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, strength: float) -> Self:
        design = Design.fit(training.questions)
        mean = training.scores_QE.mean(axis=0)
        weights = ridge(design.features(training.questions), training.scores_QE - mean, strength)
        return cls(design=design, weights_DE=weights, mean_E=mean)

    def predict(self, questions: Questions) -> Array:
        return np.clip(self.design.features(questions) @ self.weights_DE + self.mean_E, 0, 1)


def ridge(inputs_QD: Array, targets_QE: Array, strength: float) -> Array:
    gram = inputs_QD.T @ inputs_QD + strength * np.eye(inputs_QD.shape[1], dtype=inputs_QD.dtype)
    weights: Array = np.linalg.solve(gram, inputs_QD.T @ targets_QE)
    return weights.astype(np.float32)
