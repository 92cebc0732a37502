"""One expert a task: the cheapest learned router (Task-MoE's routing by task id, arXiv 2110.03742).

A question that does not name its task is given the likeliest by its embedding; a task that was never seen too.
"""

from dataclasses import dataclass
from typing import Self

from routers.learned.base import Training, best_of, shrunk
from routers.questions import Labels, Questions
from routers.records import Array

STRENGTHS = (0.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    labels: Labels
    means_TE: Array
    mean_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, best_of(STRENGTHS, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, strength: float) -> Self:
        labels = Labels.fit(training.questions)
        one_hot = labels.of(training.questions)
        mean = training.scores_QE.mean(axis=0)
        sums = one_hot.T @ training.scores_QE
        means = shrunk(sums, one_hot.sum(axis=0)[:, None], mean, max(strength, 1e-6))
        return cls(labels=labels, means_TE=means, mean_E=mean)

    def predict(self, questions: Questions) -> Array:
        one_hot = self.labels.of(questions)
        return one_hot @ self.means_TE if one_hot.shape[1] else self.mean_E[None].repeat(len(questions), axis=0)
