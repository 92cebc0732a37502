"""ArmoRM, stage 1: one ridge without intercept an objective, each fitted on the rows that have its label
(arXiv 2406.12845, section 3.1 and the released script).

Legend: N answers, D features, O objectives.
"""

from dataclasses import dataclass

import numpy as np

from experts.errors import ConfigError
from routers.records import Array

ALPHAS = tuple(10.0**power for power in range(-4, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """``weight_OD`` gives the objectives' rewards, on the scale of their labels; ``alphas`` and ``mse`` are those of
    the held-out rows."""

    weight_OD: Array
    alphas: tuple[float, ...]
    mse: tuple[float, ...]


def fit_heads(features_ND: Array, labels_NO: Array, group_N: Array, *, seed: int) -> Heads:
    """The alpha of each objective is the one with the lowest error on a fifth of its groups (prompts).

    NaN is a missing label. Raises ConfigError for an objective that has no label at all, naming its number.
    """
    groups = np.unique(group_N)
    held_N = np.isin(group_N, np.random.default_rng(seed).permutation(groups)[: max(len(groups) // 5, 1)])
    known: dict[bytes, _Ridge] = {}
    found = []
    for objective in range(labels_NO.shape[1]):
        label_N = labels_NO[:, objective]
        known_N = ~np.isnan(label_N)
        if not known_N.any():
            raise ConfigError(f"Objective {objective} has no label at all; leave it out.")
        key = np.packbits(known_N).tobytes()
        if key not in known:
            known[key] = _Ridge(features_ND, known_N, held_N)
        found.append(known[key].best(label_N))
    weights, alphas, errors = zip(*found, strict=True)
    return Heads(weight_OD=np.stack(weights), alphas=alphas, mse=errors)


class _Ridge:
    """One eigendecomposition serves every alpha, and every objective with labels on the same rows."""

    def __init__(self, features_ND: Array, known_N: Array, held_N: Array) -> None:
        self._train_N, self._check_N = known_N & ~held_N, known_N & held_N
        if not self._train_N.any() or not self._check_N.any():
            self._train_N = self._check_N = known_N
        self._known_N = known_N
        self._train_ND, self._check_ND = features_ND[self._train_N], features_ND[self._check_N]
        self._known_ND = features_ND[known_N]
        self._trained, self._whole = _decompose(self._train_ND), _decompose(self._known_ND)

    def best(self, label_N: Array) -> tuple[Array, float, float]:
        """The weights of the best alpha, fitted again on all rows; that alpha, and its error on the held-out rows."""
        target_D = self._train_ND.T @ label_N[self._train_N]
        weights = [_solve(self._trained, target_D, alpha) for alpha in ALPHAS]
        guesses = self._check_ND @ np.stack(weights, axis=1).astype(np.float32)
        errors = ((guesses - label_N[self._check_N, None]) ** 2).mean(axis=0)
        place = int(np.argmin(errors))
        whole_D = _solve(self._whole, self._known_ND.T @ label_N[self._known_N], ALPHAS[place])
        return whole_D.astype(np.float32), ALPHAS[place], float(errors[place])


def _decompose(features_ND: Array) -> tuple[Array, Array]:
    values, vectors = np.linalg.eigh((features_ND.T @ features_ND).astype(np.float64))
    return values, vectors


def _solve(decomposed: tuple[Array, Array], target_D: Array, alpha: float) -> Array:
    values, vectors = decomposed
    found: Array = vectors @ ((vectors.T @ target_D.astype(np.float64)) / (np.maximum(values, 0) + alpha))
    return found
