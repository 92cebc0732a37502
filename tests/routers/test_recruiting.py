"""The formulas of Symbolic-MoE, with the numbers worked out by hand, and every edge case that its card names."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.recruiting import competence, draw, relevance, trim

PROFILES_KE = np.array([[3.0, 1.0, -2.0], [-1.0, 2.0, 0.0]])
GLOBAL_E = PROFILES_KE.sum(axis=0)


def test_power_competence_is_what_the_released_code_computes():
    assert GLOBAL_E.tolist() == [2, 3, -2]
    np.testing.assert_allclose(competence(GLOBAL_E, "power", 0.5), np.array([25, 36, 1]) / 62)


def test_local_times_global_by_hand():
    shares = relevance(PROFILES_KE[:1], competence(GLOBAL_E, "power", 0.5))
    np.testing.assert_allclose(shares[0], [75 / 111, 36 / 111, 0])


def test_draws_follow_the_shares():
    rng = np.random.default_rng(0)
    drawn = Counter(draw(np.array([75 / 111, 36 / 111, 0]), 100_000, rng, repeat=True))
    assert drawn[0] / 1e5 == pytest.approx(0.6757, abs=0.01)
    assert drawn[1] / 1e5 == pytest.approx(0.3243, abs=0.01)
    assert drawn[2] == 0


def test_softmax_competence_is_the_papers():
    found = competence(np.array([1.0, 0.5, 0.5]), "softmax", 0.5)
    np.testing.assert_allclose(found, np.exp([2, 1, 1]) / np.exp([2, 1, 1]).sum())
    huge = competence(np.array([4000.0, 3000.0, -9000.0]), "softmax", 0.5)
    assert huge.tolist() == [1, 0, 0], "sums over many keywords leave nobody but the best"


def test_the_only_expert_with_a_score_may_have_no_competence():
    """min(G) = 0 gives him no share: the reference divides by zero there."""
    shares = relevance(np.array([[2.0, -1.0]]), competence(np.array([0.0, 4.0]), "power", 0.5))
    assert shares.tolist() == [[0, 1]]


@pytest.mark.parametrize("how", ["power", "softmax", "none"])
def test_equal_experts_have_equal_shares(how):
    for value in (0.0, -3.0, 5.0):
        assert competence(np.full(4, value), how, 0.5).tolist() == [0.25] * 4


def test_where_nobody_has_a_positive_score_all_are_lifted():
    shares = relevance(np.array([[-3.0, -1.0]]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(shares, [[1 / 4, 3 / 4]])


def test_a_keyword_that_counts_twice_weighs_twice():
    once, twice = (relevance(np.array([[n, 1]]) @ PROFILES_KE, np.ones(3) / 3)[0] for n in (1, 2))
    assert twice[0] > once[0]


def test_more_draws_than_experts_need_repeats():
    rng = np.random.default_rng(0)
    assert len(draw(np.array([0.5, 0.5]), 5, rng, repeat=True)) == 5
    assert sorted(draw(np.array([0.5, 0.5]), 5, rng, repeat=False)) == [0, 1]


def test_without_repeats_the_first_k_are_a_sample_of_k():
    """Second places as theory has them: p2 = sum over the first of p1 x p2 / (1 - p1)."""
    shares, rng = np.array([0.6, 0.3, 0.1]), np.random.default_rng(0)
    orders = np.array([draw(shares, 3, rng, repeat=False) for _ in range(20_000)])
    np.testing.assert_allclose(np.bincount(orders[:, 0]) / 20_000, shares, atol=0.01)
    second = [sum(shares[i] * shares[j] / (1 - shares[i]) for i in range(3) if i != j) for j in range(3)]
    np.testing.assert_allclose(np.bincount(orders[:, 1]) / 20_000, second, atol=0.015)


def test_an_expert_without_a_share_is_drawn_last():
    rng = np.random.default_rng(0)
    assert all(draw(np.array([0.0, 0.7, 0.3]), 3, rng, repeat=False)[-1] == 0 for _ in range(50))


def test_trimming_leaves_no_expert_with_a_small_share():
    rng = np.random.default_rng(0)
    rows = [[0, 1, 0]] * 30 + [[0, 2, 1]]
    trimmed = trim(rows, 0.05, rng, repeat=True)
    assert 2 not in {e for row in trimmed for e in row}
    assert trimmed[:30] == rows[:30]
    assert [len(row) for row in trimmed] == [3] * 31
    assert trim(rows, 0.0, rng, repeat=True) == rows


def test_trimming_without_repeats_keeps_a_place_that_nobody_else_can_take():
    rows = [[0, 1]] * 30 + [[0, 2], [2, 3]]
    trimmed = trim(rows, 0.05, np.random.default_rng(0), repeat=False)
    assert trimmed[30] == [0, 1]
    assert sorted(trimmed[31]) == [0, 1]
    many = [[e] for e in range(40)]
    assert trim(many, 0.05, np.random.default_rng(0), repeat=False) == many, "everybody is small: nobody is left out"


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6).flatmap(
        lambda g: st.tuples(st.just(g), st.lists(st.floats(-1e3, 1e3), min_size=len(g), max_size=len(g)))
    ),
    st.sampled_from(["power", "softmax", "none"]),
)
def test_shares_are_shares_whatever_the_scores(given_, how):
    global_, local = given_
    share = competence(np.array(global_), how, 0.5)
    rated = relevance(np.array([local]), share)
    for row in (share, rated[0]):
        assert np.isfinite(row).all()
        assert (row >= 0).all()
        assert row.sum() == pytest.approx(1)
