"""ArmoRM, stage 1.5: take verbosity out of the other objectives, r'_i = r_i - lambda_i r_verbosity, with the smallest
lambda that leaves a rank correlation of at most 0.03 with it.

Legend: N answers, O objectives.
"""

import numpy as np

from routers.records import Array

GRID = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, *(round(0.15 + 0.05 * i, 2) for i in range(17)))
THRESHOLD = 0.03


def debias(rewards_NO: Array, verbosity: int | None, *, threshold: float = THRESHOLD) -> Array:
    """T (O x O) with r' = r T. Column ``verbosity`` of r' is 0; None changes nothing.

    An objective that never comes under the threshold keeps lambda 1, as in the paper.
    """
    transform_OO = np.eye(rewards_NO.shape[1], dtype=np.float32)
    if verbosity is None:
        return transform_OO
    own = rewards_NO[:, verbosity]
    for objective in range(rewards_NO.shape[1]):
        lam = 1.0 if objective == verbosity else _penalty(rewards_NO[:, objective], own, threshold)
        transform_OO[verbosity, objective] -= lam
    return transform_OO


def _penalty(reward_N: Array, own_N: Array, threshold: float) -> float:
    return next((lam for lam in GRID if spearman(reward_N - lam * own_N, own_N) <= threshold), 1.0)


def spearman(a_N: Array, b_N: Array) -> float:
    """0 where either is constant: there is nothing to correlate with."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(a_N), rankdata(b_N)])
    if (ranks.std(axis=1) == 0).any():
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])
