"""k nearest neighbours by cosine: an expert is as good as it was on the questions most like this one.

Neighbours of the same task count more by ``same_task``, a cosine. Means of k answers are shrunk to the expert's mean.
"""

from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of, shrunk
from routers.questions import Labels, Questions
from routers.records import Array

NEIGHBOURS = (30, 100, 300)
STRENGTHS = (10.0, 100.0)
SAME_TASK = (0.0, 0.3)
_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Knn:
    labels: Labels
    vectors_NW: Array
    labels_NT: Array
    scores_NE: Array
    k: int
    strength: float
    same_task: float

    @classmethod
    def fit(cls, training: Training) -> Self:
        options = list(product(NEIGHBOURS, STRENGTHS, SAME_TASK))
        return cls.fit_with(training, best_of(options, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, option: tuple[int, float, float]) -> Self:
        labels = Labels.fit(training.questions)
        k, strength, same_task = option
        return cls(
            labels=labels,
            vectors_NW=training.questions.vectors_QW,
            labels_NT=labels.of(training.questions),
            scores_NE=training.scores_QE.astype(np.float32),
            k=min(k, len(training.questions)),
            strength=strength,
            same_task=same_task,
        )

    def predict(self, questions: Questions) -> Array:
        labels = self.labels.of(questions)
        blocks = [slice(i, i + _BLOCK) for i in range(0, len(questions), _BLOCK)]
        return np.concatenate([self._predict(questions.vectors_QW[b], labels[b]) for b in blocks])

    def _predict(self, vectors_QW: Array, labels_QT: Array) -> Array:
        nearness = vectors_QW @ self.vectors_NW.T + self.same_task * (labels_QT @ self.labels_NT.T)
        nearest = np.argpartition(-nearness, self.k - 1, axis=1)[:, : self.k]
        # In the order of the rows, so that sums of floats do not depend on how the partition fell.
        nearest.sort(axis=1)
        sums = self.scores_NE[nearest].sum(axis=1)
        return shrunk(sums, np.array(self.k), self.scores_NE.mean(axis=0), self.strength)
