"""Clusters of questions, and a ranking of the experts in each (the recipe of Avengers, arXiv 2505.19797).

A question reads the rankings of its ``NEAREST`` clusters, weighted by nearness; small clusters lean on the overall one.
"""

from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of, shrunk
from routers.questions import Design, Questions
from routers.records import Array

COUNTS = (8, 16, 32, 64)
STRENGTHS = (10.0, 50.0)
NEAREST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    design: Design
    centres_CD: Array
    means_CE: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        options = [o for o in product(COUNTS, STRENGTHS) if o[0] <= len(training.questions) // 4] or [(1, 10.0)]
        return cls.fit_with(training, best_of(options, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, option: tuple[int, float]) -> Self:
        from sklearn.cluster import KMeans

        count, strength = option
        design = Design.fit(training.questions)
        inputs = design.features(training.questions)
        means = KMeans(count, n_init=1, max_iter=50, random_state=training.seed).fit(inputs)
        member = np.eye(count, dtype=np.float32)[means.labels_]
        sums, sizes = member.T @ training.scores_QE, member.sum(axis=0)[:, None]
        return cls(
            design=design,
            centres_CD=means.cluster_centers_.astype(np.float32),
            means_CE=shrunk(sums, sizes, training.scores_QE.mean(axis=0), strength),
        )

    def predict(self, questions: Questions) -> Array:
        inputs = self.design.features(questions)
        squared = np.sum(self.centres_CD**2, axis=1) - 2 * inputs @ self.centres_CD.T
        distance = np.sqrt(np.maximum(squared + np.sum(inputs**2, axis=1, keepdims=True), 1e-9))
        nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEAREST]
        weights = 1 / np.take_along_axis(distance, nearest, axis=1) ** 2
        mixed: Array = (weights[:, :, None] * self.means_CE[nearest]).sum(axis=1) / weights.sum(axis=1)[:, None]
        return mixed
