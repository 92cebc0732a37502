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
    found = [_fit_head(features_ND, labels_NO[:, o], held_N, o) for o in range(labels_NO.shape[1])]
    weights, alphas, errors = zip(*found, strict=True)
    return Heads(weight_OD=np.stack(weights), alphas=alphas, mse=errors)


def _fit_head(features_ND: Array, label_N: Array, held_N: Array, objective: int) -> tuple[Array, float, float]:
    known_N = ~np.isnan(label_N)
    if not known_N.any():
        raise ConfigError(f"Objective {objective} has no label at all; leave it out.")
    train_N, check_N = known_N & ~held_N, known_N & held_N
    if not check_N.any() or not train_N.any():
        train_N = check_N = known_N
    solve = _Ridge(features_ND[train_N], label_N[train_N])
    check_ND, wanted = features_ND[check_N].astype(np.float64), label_N[check_N]
    errors = [float(np.mean((check_ND @ solve.weight(alpha) - wanted) ** 2)) for alpha in ALPHAS]
    best = int(np.argmin(errors))
    return solve.weight(ALPHAS[best]).astype(np.float32), ALPHAS[best], errors[best]


class _Ridge:
    """One eigendecomposition serves every alpha."""

    def __init__(self, features_ND: Array, label_N: Array) -> None:
        gram_DD = (features_ND.T @ features_ND).astype(np.float64)
        self._values, self._vectors = np.linalg.eigh(gram_DD)
        self._target = self._vectors.T @ (features_ND.T @ label_N).astype(np.float64)

    def weight(self, alpha: float) -> Array:
        found: Array = self._vectors @ (self._target / (np.maximum(self._values, 0) + alpha))
        return found
