"""k nearest neighbours by cosine: an expert is as good as it was on the questions most like this one.

Neighbours of the same task count more by ``same_task``, a cosine. Means of k answers are shrunk to the expert's mean.
"""

from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np

from routers.learned.base import Training, shrunk, split_folds
from routers.questions import Labels, Questions
from routers.records import Array

NEIGHBOURS = (50, 200)
STRENGTHS = (10.0, 100.0)
SAME_TASK = (0.0, 0.3)
_BLOCK = 256

Option = tuple[int, float, float]
"""k, strength, same_task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knn:
    labels: Labels
    vectors_NW: Array
    labels_NT: Array
    scores_NE: Array
    mean_E: Array
    k: int
    strength: float
    same_task: float

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, _tune(training))

    @classmethod
    def fit_with(cls, training: Training, option: Option) -> Self:
        labels = Labels.fit(training.questions)
        k, strength, same_task = option
        return cls(
            labels=labels,
            vectors_NW=training.questions.vectors_QW,
            labels_NT=labels.of(training.questions),
            scores_NE=training.scores_QE.astype(np.float32),
            mean_E=training.scores_QE.mean(axis=0, dtype=np.float32),
            k=min(k, len(training.questions)),
            strength=strength,
            same_task=same_task,
        )

    def predict(self, questions: Questions) -> Array:
        labels = self.labels.of(questions)
        blocks = [slice(i, i + _BLOCK) for i in range(0, len(questions), _BLOCK)]
        return np.concatenate([self._predict(questions.vectors_QW[b], labels[b]) for b in blocks])

    def _predict(self, vectors_QW: Array, labels_QT: Array) -> Array:
        nearness = vectors_QW @ self.vectors_NW.T
        if self.same_task:
            nearness += self.same_task * (labels_QT @ self.labels_NT.T)
        sums = self.scores_NE[_nearest(nearness, self.k)].sum(axis=1)
        return shrunk(sums, np.array(self.k), self.mean_E, self.strength)


def _nearest(nearness_QN: Array, k: int) -> Array:
    """Nearest first; of equally near ones the first, so that results do not depend on how a partition fell."""
    candidates = np.argpartition(-nearness_QN, k - 1, axis=1)[:, :k]
    candidates.sort(axis=1)
    order = np.argsort(-np.take_along_axis(nearness_QN, candidates, axis=1), axis=1, kind="stable")
    return np.take_along_axis(candidates, order, axis=1)


def _tune(training: Training) -> Option:
    """As ``best_of``, but finds the neighbours once for all options: finding them is what takes long."""
    options = list(product(NEIGHBOURS, STRENGTHS, SAME_TASK))
    sums = np.zeros(len(options))
    for kept, held in split_folds(len(training.questions), training.seed):
        largest = Knn.fit_with(training.take(kept), (max(NEIGHBOURS), 1.0, 0.0))
        asked = training.questions.take(held)
        labels = largest.labels.of(asked)
        for block in (slice(i, i + _BLOCK) for i in range(0, len(held), _BLOCK)):
            cosines = asked.vectors_QW[block] @ largest.vectors_NW.T
            alike = labels[block] @ largest.labels_NT.T
            found = {same: _nearest(cosines + same * alike, largest.k) for same in SAME_TASK}
            for number, (k, strength, same) in enumerate(options):
                near = largest.scores_NE[found[same][:, :k]]
                means = shrunk(near.sum(axis=1), np.array(near.shape[1]), largest.mean_E, strength)
                sums[number] += training.scores_QE[held[block], means.argmax(axis=1)].sum()
    return options[int(sums.argmax())]
