"""k nearest neighbours by cosine: an expert is as good as it was on the questions most like this one.

Neighbours of the same task count more by ``same_task``, a cosine. Means of k answers are shrunk to the expert's mean.
Of many questions only those in the nearest cells are looked at (cells.py).
"""

from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np

from routers.learned.base import Training, shrunk, split_folds
from routers.learned.cells import EXACT, Cells
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
    cells: Cells

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, _tune(training))

    @classmethod
    def fit_with(cls, training: Training, option: Option, *, exact: int = EXACT) -> Self:
        """More than ``exact`` questions are sorted into cells."""
        labels = Labels.fit(training.questions)
        k, strength, same_task = option
        vectors, own = training.questions.vectors_QW, labels.of(training.questions)
        cells, order = Cells.fit(_with_labels(vectors, own, same_task), training.seed, exact)
        return cls(
            labels=labels,
            vectors_NW=vectors[order],
            labels_NT=own[order],
            scores_NE=training.scores_QE.astype(np.float32)[order],
            mean_E=training.scores_QE.mean(axis=0, dtype=np.float32),
            k=min(k, len(training.questions)),
            strength=strength,
            same_task=same_task,
            cells=cells,
        )

    def predict(self, questions: Questions) -> Array:
        labels = self.labels.of(questions)
        if len(self.cells.ends_C):
            found = [self._among_near(*one) for one in zip(questions.vectors_QW, labels, strict=True)]
            return shrunk(np.stack(found), np.array(self.k), self.mean_E, self.strength)
        blocks = [slice(i, i + _BLOCK) for i in range(0, len(questions), _BLOCK)]
        return np.concatenate([self._predict(questions.vectors_QW[b], labels[b]) for b in blocks])

    def _predict(self, vectors_QW: Array, labels_QT: Array) -> Array:
        nearness = vectors_QW @ self.vectors_NW.T
        if self.same_task:
            nearness += self.same_task * (labels_QT @ self.labels_NT.T)
        sums = self.scores_NE[_nearest(nearness, self.k)].sum(axis=1)
        return shrunk(sums, np.array(self.k), self.mean_E, self.strength)

    def _among_near(self, vector_W: Array, label_T: Array) -> Array:
        """Sums of the neighbours' scores, by expert."""
        parts = list(self.cells.near(_with_labels(vector_W, label_T, self.same_task), self.k))
        nearness = np.concatenate([self.vectors_NW[p] @ vector_W for p in parts])
        if self.same_task:
            nearness += self.same_task * np.concatenate([self.labels_NT[p] @ label_T for p in parts])
        rows = np.concatenate([np.arange(p.start, p.stop) for p in parts])
        sums: Array = self.scores_NE[rows[_nearest(nearness[None], self.k)[0]]].sum(axis=0)
        return sums


def _with_labels(vectors: Array, labels: Array, same_task: float) -> Array:
    """Vectors whose products are cosines with ``same_task`` added where tasks agree."""
    return np.concatenate([vectors, labels * np.float32(same_task**0.5)], axis=-1)


def _nearest(nearness_QN: Array, k: int) -> Array:
    """Nearest first; of equally near ones the first, so that results do not depend on how a partition fell."""
    candidates = np.argpartition(-nearness_QN, k - 1, axis=1)[:, :k]
    candidates.sort(axis=1)
    order = np.argsort(-np.take_along_axis(nearness_QN, candidates, axis=1), axis=1, kind="stable")
    return np.take_along_axis(candidates, order, axis=1)


def _tune(training: Training) -> Option:
    """As ``best_of``, but finds the neighbours once for all options: finding them is what takes long."""
    options = list(product(NEIGHBOURS, STRENGTHS, SAME_TASK))
    if len(training.questions) > EXACT:
        # Every question is compared with every other one.
        training = training.take(np.random.default_rng(training.seed).permutation(len(training.questions))[:EXACT])
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
