"""Ridge regression of every expert's score on the embedding; all experts share one factorisation.

It predicts what the task leaves open. Where the embedding says nothing, an expert's mean in the question's task
remains, shrunk as the router 'task' would, so that a strong ridge is that router. Its strength is chosen by
cross-validation on who is picked, not on squared error; the prediction is read as a probability and kept inside 0 to 1.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.learned import task
from routers.learned.base import Training, best_of, simplest_of
from routers.learned.task import Task
from routers.questions import Design, Questions
from routers.records import Array

STRENGTHS = (300.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 1e9)
_SHRINKAGE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    design: Design
    weights_DE: Array
    task: Task

    @classmethod
    def fit(cls, training: Training) -> Self:
        shrinkage = best_of(task.STRENGTHS, Task.fit_with, training)
        options = [(strength, shrinkage) for strength in STRENGTHS]
        return cls.fit_with(training, *simplest_of(options, lambda t, o: cls.fit_with(t, *o), training))

    @classmethod
    def fit_with(cls, training: Training, strength: float, shrinkage: float = _SHRINKAGE) -> Self:
        """``shrinkage`` is the strength of the router 'task' inside."""
        design = Design.fit(training.questions, reads_form=True)
        means = Task.fit_with(training, shrinkage)
        left = training.scores_QE - means.predict(training.questions)
        weights = ridge(design.features(training.questions), left, strength)
        return cls(design=design, weights_DE=weights, task=means)

    def predict(self, questions: Questions) -> Array:
        return np.clip(self.design.features(questions) @ self.weights_DE + self.task.predict(questions), 0, 1)


def ridge(inputs_QD: Array, targets_QE: Array, strength: float) -> Array:
    gram = inputs_QD.T @ inputs_QD + strength * np.eye(inputs_QD.shape[1], dtype=inputs_QD.dtype)
    weights: Array = np.linalg.solve(gram, inputs_QD.T @ targets_QE)
    return weights.astype(np.float32)
