import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from routers.calibrate import (
    cascade_curve,
    conformal_threshold,
    expected_cost,
    price_for,
    price_table,
    threshold_for,
)

CONFIDENCE = np.array([0.9, 0.1, 0.5, 0.7, 0.3])


def test_a_budget_gives_a_threshold_and_a_threshold_its_cost():
    threshold = threshold_for(CONFIDENCE, cheap=1.0, dear=10.0, budget=5.0)
    assert threshold == 0.5
    assert expected_cost(CONFIDENCE, threshold, 1.0, 10.0) == pytest.approx(5.0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(1, 20))
def test_no_threshold_spends_more_than_its_budget_and_the_next_one_up_does(confidence, budget):
    confidence = np.array(confidence)
    threshold = threshold_for(confidence, 1.0, 10.0, budget)
    assert expected_cost(confidence, threshold, 1.0, 10.0) <= budget + 1e-6
    if np.isfinite(threshold):
        higher = confidence[confidence > threshold]
        above = higher.min() if len(higher) else np.inf
        assert expected_cost(confidence, float(above), 1.0, 10.0) > budget - 1e-6


def test_a_budget_below_the_cheapest_answer_is_refused():
    with pytest.raises(ConfigError, match="does not pay"):
        threshold_for(CONFIDENCE, 1.0, 10.0, 0.5)


def test_a_budget_for_everything_keeps_nothing():
    assert threshold_for(CONFIDENCE, 1.0, 10.0, 11.0) == np.inf


def test_conformal_keeps_its_promise_on_questions_it_has_not_seen():
    """On average over calibrations, kept and wrong stays under the risk; and much is kept."""
    rng = np.random.default_rng(0)
    risks, kept = [], []
    for _ in range(200):
        confidence = rng.random(600)
        right = rng.random(600) < confidence
        threshold = conformal_threshold(confidence[:300], right[:300].astype(float), 0.1)
        accepted = confidence[300:] >= threshold
        risks.append((accepted & ~right[300:]).mean())
        kept.append(accepted.mean())
    assert np.mean(risks) <= 0.1
    assert np.mean(risks) > 0.08, "not more careful than it need be"
    assert np.mean(kept) > 0.4


def test_conformal_promises_nothing_that_few_questions_cannot_show():
    assert conformal_threshold(np.array([0.9, 0.8]), np.ones(2), 0.05) == np.inf
    assert conformal_threshold(np.full(100, 0.5), np.zeros(100), 0.1) == np.inf, "equal confidences stand together"
    with pytest.raises(ConfigError, match="between 0 and 1"):
        conformal_threshold(CONFIDENCE, np.ones(5), 1.5)


def test_the_curve_goes_from_the_dear_expert_to_the_cheap_one():
    cheap, dear = np.array([1, 0, 1, 1, 0.0]), np.array([1, 1, 1, 1, 0.0])
    curve = cascade_curve(CONFIDENCE, cheap, dear, 1.0, 10.0)
    assert (curve[0].kept, curve[0].cost, curve[0].score) == (1.0, 1.0, 0.6)
    assert (curve[-1].kept, curve[-1].cost, curve[-1].score) == (0.0, 11.0, 0.8)
    assert [p.cost for p in curve] == sorted(p.cost for p in curve)


def test_prices_spend_less_the_higher_they_are():
    rng = np.random.default_rng(0)
    predicted, costs = rng.random((200, 3)), np.array([1.0, 3.0, 9.0])
    prices, spends = price_table(predicted, costs)
    assert (np.diff(spends) <= 0).all()
    for spend in (0.9, 0.5, 0.2):
        chosen = (predicted - price_for(spend, prices, spends) * costs).argmax(axis=1)
        assert costs[chosen].mean() / 9 <= spend
    assert price_for(0.0, prices, spends) == prices[-1]
