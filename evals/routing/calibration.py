"""Do predictions mean what they say? Expected calibration error, and the bins of a reliability plot."""

from dataclasses import dataclass

import numpy as np

from routers.records import Array

BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """``bins``: (mean prediction, mean score, count) of each that is not empty."""

    ece: float
    bins: list[tuple[float, float, int]]


def calibrate(predicted: Array, scores: Array) -> Calibration:
    """Equal-width bins between 0 and 1. Raises ValueError for a prediction outside."""
    predicted, scores = predicted.ravel().astype(np.float64), scores.ravel().astype(np.float64)
    if predicted.min() < 0 or predicted.max() > 1:
        raise ValueError("a probability lies between 0 and 1")
    places = np.minimum((predicted * BINS).astype(np.int64), BINS - 1)
    members = [places == b for b in range(BINS)]
    bins = [(float(predicted[m].mean()), float(scores[m].mean()), int(m.sum())) for m in members if m.any()]
    return Calibration(ece=sum(n * abs(p - s) for p, s, n in bins) / len(predicted), bins=bins)
