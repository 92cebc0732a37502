"""Gaussians of what each expert knows (SEED, arXiv 2401.10191): which expert a new task belongs to, and how experts
that know different classes decide together.

Legend: N points, W width, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Self

import numpy as np

from experts.errors import ConfigError
from routers.records import Array

SHRINKAGE, TEMPERATURE = 1e-3, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """A Gaussian with a full covariance, kept invertible by ``SHRINKAGE`` of a unit sphere."""

    mean_W: Array
    covariance_WW: Array

    @classmethod
    def fit(cls, points_NW: Array) -> Self:
        """Raises ConfigError for fewer than two points."""
        if len(points_NW) < 2:
            raise ConfigError(f"A Gaussian needs two points at least; there are {len(points_NW)}.")
        covariance = np.cov(points_NW, rowvar=False).reshape(points_NW.shape[1], -1)
        return cls(mean_W=points_NW.mean(axis=0), covariance_WW=covariance + SHRINKAGE * np.eye(len(covariance)))

    def log_likelihood(self, points_NW: Array) -> Array:
        from scipy.linalg import cho_factor, cho_solve

        factor = cho_factor(self.covariance_WW)
        apart = points_NW - self.mean_W
        squared = np.sum(apart.T * cho_solve(factor, apart.T), axis=0)
        size = 2 * np.log(np.diag(factor[0])).sum() + len(self.mean_W) * np.log(2 * np.pi)
        found: Array = -(squared + size) / 2
        return found


def divergence(one: Density, other: Density) -> float:
    """KL(one || other), in nats."""
    inverse = np.linalg.inv(other.covariance_WW)
    apart = other.mean_W - one.mean_W
    sizes = np.linalg.slogdet(other.covariance_WW)[1] - np.linalg.slogdet(one.covariance_WW)[1]
    trace = np.trace(inverse @ one.covariance_WW)
    return float((trace + apart @ inverse @ apart - len(apart) + sizes) / 2)


def expert_to_tune(new_classes: Mapping[str, Sequence[Density]]) -> str:
    """The expert, of those that hold the new classes' Gaussians in their own space, that should learn them: where they
    lie furthest apart already, by mean KL over ordered pairs, the least has to change. The first of equals."""
    if not new_classes or min(len(own) for own in new_classes.values()) < 2:
        raise ConfigError("Two new classes at least are needed to say how far apart an expert sees them.")
    apart = {e: float(np.mean([divergence(a, b) for a, b in permutations(own, 2)])) for e, own in new_classes.items()}
    return max(apart, key=apart.__getitem__)


def decide_together(
    known: Mapping[str, Mapping[str, Density]], points: Mapping[str, Array], *, temperature: float = TEMPERATURE
) -> dict[str, Array]:
    """By class, each point's share. Every expert sees the points in its own space and shares one between the classes
    it knows (softmax of log-likelihoods over ``temperature``); a class is averaged over those that know it alone."""
    shares: dict[str, list[Array]] = {}
    for expert, classes in known.items():
        logs_CN = np.stack([density.log_likelihood(points[expert]) for density in classes.values()]) / temperature
        weights = np.exp(logs_CN - logs_CN.max(axis=0))
        for name, row in zip(classes, weights / weights.sum(axis=0), strict=True):
            shares.setdefault(name, []).append(row)
    return {name: np.mean(rows, axis=0) for name, rows in shares.items()}
