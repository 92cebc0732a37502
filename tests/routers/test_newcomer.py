"""Nexus's own test on a circle (card 8.4), and what a card says of an expert."""

import numpy as np
import pytest

from experts.errors import ConfigError
from routers.learned.newcomer import GRADED, Card, from_card, from_grades

DOMAINS = np.deg2rad([0, 90, 180, 270, 45])
"""Four that the router was fitted on; the fifth lies between the first and the second."""


def circle(count, seed=0, domains=5):
    rng = np.random.default_rng(seed)
    domain = np.arange(count) % domains
    return domain, DOMAINS[domain] + rng.normal(0, 0.15, count)


def router(angle):
    """How well each of the four experts does at an angle: a fitted router's predictions."""
    return 0.1 + 0.8 * np.exp(-1.5 * (1 - np.cos(angle[:, None] - DOMAINS[None, :4])))


def newcomer_scores(domain, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random(len(domain)) < np.where(domain == 4, 0.95, np.where(domain < 2, 0.5, 0.1))).astype(float)


def test_a_fifth_domain_between_two_known_ones_goes_to_its_expert_and_the_old_ones_stay():
    graded, angle = circle(GRADED)
    card = Card(vector_C=np.array([np.cos(DOMAINS[4]), np.sin(DOMAINS[4])]))
    known = [Card(vector_C=np.array([np.cos(a), np.sin(a)])) for a in DOMAINS[:4]]
    row = from_grades(router(angle), newcomer_scores(graded), from_card(card, known, np.full(4, 0.4)))
    domain, angle = circle(1000, seed=1)
    before = router(angle)
    chosen = np.concatenate([before, row.predict(before)[:, None]], axis=1).argmax(axis=1)
    assert (chosen[domain == 4] == 4).mean() > 1 / 5
    old = domain < 4
    assert (chosen[old] != before[old].argmax(axis=1)).mean() < 0.05


def test_by_its_card_a_newcomer_is_expected_to_do_as_its_likes():
    cards = [Card(vector_C=np.eye(3)[i], params_b=7.0) for i in range(3)]
    row = from_card(Card(vector_C=np.eye(3)[1], params_b=7.0), cards, np.array([0.2, 0.9, 0.2]))
    assert row.mixture_E.argmax() == 1
    assert row.mixture_E.sum() == pytest.approx(1)
    predicted = np.array([[0.2, 0.9, 0.1]])
    assert row.predict(predicted)[0] > 0.6


def test_a_larger_one_is_expected_to_do_better_and_an_unknown_size_does_not_matter():
    alike = np.array([1.0, 0.0])
    cards = [Card(vector_C=alike, params_b=size) for size in (1.0, 7.0, 70.0)]
    mean = np.array([0.2, 0.4, 0.6])
    found = [
        float(from_card(Card(vector_C=alike, params_b=s), cards, mean).predict(mean[None])[0]) for s in (2.0, 110.0)
    ]
    assert found[0] < found[1]
    unknown = from_card(Card(vector_C=alike), cards, mean)
    assert unknown.predict(mean[None])[0] == pytest.approx(0.4)


def test_grades_say_how_good_it_is():
    predicted = np.full((GRADED, 4), 0.5)
    row = from_grades(predicted, np.ones(GRADED))
    assert row.predict(predicted[:1])[0] == pytest.approx(0.93, abs=0.02)


@pytest.mark.parametrize(
    ("count", "score", "message"),
    [
        (GRADED + 1, 1.0, "1 to 50 graded"),
        (0, 1.0, "not 0"),
        (3, np.nan, "question 1: a score"),
        (3, 2.0, "between 0 and 1"),
    ],
)
def test_grades_that_cannot_be_used_are_named(count, score, message):
    with pytest.raises(ConfigError, match=message):
        from_grades(np.full((count, 2), 0.5), np.full(count, score))
