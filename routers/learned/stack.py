"""A blend of the other models: weights that sum to 1, found on questions that no member was fitted on.

Forward selection with repeats (Caruana et al., 2004) on the score of the expert chosen; a member that adds nothing gets
no weight, so the blend is never worse on those questions than its best member.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.learned.base import Model, Training, split_folds
from routers.learned.choice import Choice
from routers.learned.cluster import Cluster
from routers.learned.factor import Factor
from routers.learned.knn import Knn
from routers.learned.linear import Linear
from routers.learned.task import Task
from routers.questions import Questions
from routers.records import Array

PICKS = 12
_FOLDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    task: Task
    linear: Linear
    factor: Factor
    cluster: Cluster
    knn: Knn
    choice: Choice
    weights_M: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        held = _held_out(training)
        return cls(
            task=Task.fit(training),
            linear=Linear.fit(training),
            factor=Factor.fit_with(training, 4),
            cluster=Cluster.fit(training),
            knn=Knn.fit_with(training, (100, 30.0, 0.3)),
            choice=Choice.fit_with(training, 0.005),
            weights_M=pick_members(held, training.scores_QE),
        )

    def predict(self, questions: Questions) -> Array:
        members: list[Model] = [self.task, self.linear, self.factor, self.cluster, self.knn, self.choice]
        chosen = [(w, m.predict(questions)) for w, m in zip(self.weights_M, members, strict=True) if w > 0]
        blended: Array = np.sum([w * p for w, p in chosen], axis=0)
        return blended


def pick_members(predictions_MQE: Array, scores_QE: Array) -> Array:
    """Weights of the members, from what each predicted for questions it had not seen."""
    picks = np.zeros(len(predictions_MQE))
    total, rows = np.zeros_like(predictions_MQE[0]), np.arange(len(scores_QE))
    best, best_score = picks, -1.0
    for _ in range(PICKS):
        scores = [scores_QE[rows, (total + p).argmax(axis=1)].mean() for p in predictions_MQE]
        member = int(np.argmax(scores))
        total = total + predictions_MQE[member]
        picks = picks + np.eye(len(picks))[member]
        if scores[member] > best_score:
            best, best_score = picks, float(scores[member])
    result: Array = (best / best.sum()).astype(np.float32)
    return result


def _held_out(training: Training) -> Array:
    size = len(training.questions)
    predictions = np.zeros((6, size, training.scores_QE.shape[1]), np.float32)
    for kept, held in split_folds(size, training.seed, folds=_FOLDS):
        inner, asked = training.take(kept), training.questions.take(held)
        members: list[Model] = [
            Task.fit_with(inner, 30.0),
            Linear.fit_with(inner, 3000.0),
            Factor.fit_with(inner, 4),
            Cluster.fit_with(inner, (min(32, max(1, len(kept) // 4)), 50.0)),
            Knn.fit_with(inner, (100, 30.0, 0.3)),
            Choice.fit_with(inner, 0.005),
        ]
        for number, member in enumerate(members):
            predictions[number, held] = member.predict(asked)
    return predictions
