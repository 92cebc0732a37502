"""Means with their uncertainty: bootstrap over questions, the same resamples for all that is compared."""

from dataclasses import dataclass

import numpy as np

from routers.records import Array

RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    value: float
    low: float
    high: float

    @property
    def ci95(self) -> list[float]:
        return [self.low, self.high]


class Bootstrap:
    """``counts_BQ``: how often each question is in each resample."""

    def __init__(self, questions: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, questions, (RESAMPLES, questions))
        self._counts_BQ = np.zeros((RESAMPLES, questions), np.float32)
        for row, picks in zip(self._counts_BQ, drawn, strict=True):
            row += np.bincount(picks, minlength=questions)

    def mean(self, scores_Q: Array) -> Estimate:
        means = self._counts_BQ @ scores_Q.astype(np.float32) / len(scores_Q)
        low, high = np.quantile(means, (0.025, 0.975))
        return Estimate(value=float(scores_Q.mean(dtype=np.float64)), low=float(low), high=float(high))

    def difference(self, scores_Q: Array, others_Q: Array) -> Estimate:
        """Paired: question by question."""
        return self.mean(scores_Q.astype(np.float64) - others_Q.astype(np.float64))
