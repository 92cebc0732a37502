"""The arithmetic of the benchmark, on numbers that can be checked by hand."""

import numpy as np
import pytest

from evals.routing.calibration import calibrate
from evals.routing.curves import cost_curve, pair_curve
from evals.routing.statistics import Bootstrap

STRONG_WEAK = np.array([[1, 1], [1, 0], [1, 0], [0, 1]], np.float32)
"""Strong first. The weak expert is enough for the first question, and better on the last."""


def test_an_oracle_sends_first_what_only_the_strong_expert_can():
    gain = STRONG_WEAK[:, 0] - STRONG_WEAK[:, 1]
    curve = pair_curve(np.stack([gain, np.zeros(4)], axis=1), STRONG_WEAK, strong=0, weak=1)
    assert curve.scores.tolist() == [0.5, 0.75, 1.0, 1.0, 0.75]
    assert curve.scores.tolist() == curve.oracle.tolist()
    assert curve.beyond_random == pytest.approx(1)
    assert curve.gap == 0.25
    assert curve.area == pytest.approx((0.625 + 0.875 + 1.0 + 0.875) / 4)
    assert curve.apgr == pytest.approx((curve.area - 0.5) / 0.25)
    assert curve.calls_for(0.5) == 0.25


def test_the_worst_order_is_below_the_random_mix():
    gain = STRONG_WEAK[:, 0] - STRONG_WEAK[:, 1]
    curve = pair_curve(np.stack([-gain, np.zeros(4)], axis=1), STRONG_WEAK, strong=0, weak=1)
    assert curve.beyond_random < 0
    assert curve.calls_for(0.8) == 1.0


def test_a_router_without_preference_is_the_random_mix_whatever_the_files_order():
    """One task, one margin: a file that begins with what only the strong expert can would flatter it."""
    curve = pair_curve(np.tile([0.9, 0.2], (4, 1)), STRONG_WEAK[[1, 2, 0, 3]], strong=0, weak=1)
    assert curve.scores == pytest.approx([0.5, 0.5625, 0.625, 0.6875, 0.75])
    assert curve.apgr == pytest.approx(0.5)
    assert curve.beyond_random == pytest.approx(0)


def test_without_a_gap_there_is_nothing_to_recover():
    same = np.ones((4, 2), np.float32)
    curve = pair_curve(np.zeros((4, 2)), same, strong=0, weak=1)
    assert curve.apgr is None
    assert curve.calls_for(0.5) is None
    assert curve.beyond_random is None


def test_the_cost_curve_goes_from_the_best_to_the_cheapest():
    predicted = np.array([[0.9, 0.5], [0.9, 0.8]])
    scores = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    cost = np.array([[10.0, 1.0], [10.0, 1.0]])
    curve = cost_curve(predicted, scores, cost, np.array([10.0, 1.0]))
    assert curve[0] == (10.0, 1.0)
    assert curve[-1] == (1.0, 0.5)
    assert (5.5, 1.0) in curve, "the easy question goes to the cheap expert first"


def test_calibration_is_the_distance_between_promise_and_truth():
    predicted = np.array([0.05] * 10 + [0.95] * 10)
    assert calibrate(predicted, np.array([0.0] * 10 + [1.0] * 10)).ece == pytest.approx(0.05)
    assert calibrate(predicted, np.array([1.0] * 10 + [0.0] * 10)).ece == pytest.approx(0.95)
    assert calibrate(np.array([1.0]), np.array([1.0])).bins == [(1.0, 1.0, 1)]
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(np.array([1.2]), np.array([1.0]))


def test_a_bootstrap_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(40):
        estimate = Bootstrap(200, seed).mean((rng.random(200) < 0.3).astype(np.float32))
        hits += estimate.low <= 0.3 <= estimate.high
    assert hits >= 34


def test_a_paired_difference_is_narrower_than_the_scores():
    rng = np.random.default_rng(0)
    first = (rng.random(500) < 0.5).astype(np.float32)
    second = first.copy()
    second[:10] = 1
    bootstrap = Bootstrap(500, 0)
    difference, score = bootstrap.difference(second, first), bootstrap.mean(first)
    assert 0 <= difference.low <= difference.value == pytest.approx(second.mean() - first.mean())
    assert difference.high - difference.low < (score.high - score.low) / 3
