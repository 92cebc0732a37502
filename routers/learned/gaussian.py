"""Gaussians (after SEED, arXiv 2401.10191): where in embedding space an expert does well, and where it fails.

Both densities share one covariance of the leading components, shrunk to a sphere; Bayes' rule turns them and the
expert's mean score into a probability. Closed form, nothing iterates.
"""

from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of
from routers.learned.logistic import log_odds, sigmoid
from routers.questions import Design, Questions
from routers.records import Array

COMPONENTS = (16, 48)
TEMPERATURES = (1.0, 3.0)
"""SEED divides log-likelihoods by 3: with as many dimensions, densities are surer than they should be."""
_SPHERE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    design: Design
    basis_DK: Array
    good_EK: Array
    bad_EK: Array
    precision_EKK: Array
    prior_E: Array
    temperature: float

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, best_of(list(product(COMPONENTS, TEMPERATURES)), cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, option: tuple[int, float]) -> Self:
        components, temperature = option
        design = Design.fit(training.questions)
        inputs = design.features(training.questions)
        _, _, directions = np.linalg.svd(inputs, full_matrices=False)
        basis = directions[:components].T
        traits, scores = inputs @ basis, training.scores_QE
        good, bad = _mean(traits, scores), _mean(traits, 1 - scores)
        precisions = [np.linalg.inv(_spread(traits, scores[:, e], good[e], bad[e])) for e in range(scores.shape[1])]
        return cls(
            design=design,
            basis_DK=basis.astype(np.float32),
            good_EK=good.astype(np.float32),
            bad_EK=bad.astype(np.float32),
            precision_EKK=np.stack(precisions).astype(np.float32),
            prior_E=log_odds(scores.mean(axis=0)),
            temperature=temperature,
        )

    def predict(self, questions: Questions) -> Array:
        traits = self.design.features(questions) @ self.basis_DK
        # With one covariance the squares of the question cancel: what is left is linear in it.
        slopes = np.einsum("ekl,el->ke", self.precision_EKK, self.good_EK - self.bad_EK)
        offsets = self._energy(self.good_EK) - self._energy(self.bad_EK)
        return sigmoid((traits @ slopes - offsets) / self.temperature + self.prior_E)

    def _energy(self, means: Array) -> Array:
        energy: Array = np.einsum("ek,ekl,el->e", means, self.precision_EKK, means) / 2
        return energy


def _mean(traits: Array, weights: Array) -> Array:
    mean: Array = weights.T @ traits / np.maximum(weights.sum(axis=0), 1e-6)[:, None]
    return mean


def _spread(traits: Array, scores: Array, good: Array, bad: Array) -> Array:
    own = traits - np.where(scores[:, None] > 0.5, good, bad)
    covariance = own.T @ own / len(traits)
    size = covariance.shape[0]
    mixed: Array = (1 - _SPHERE) * covariance + _SPHERE * np.trace(covariance) / size * np.eye(size)
    return mixed
