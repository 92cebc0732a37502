"""What similar questions say of an option."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.aggregators.stacking.grams import Grams, Options
from orchestrator.aggregators.stacking.neighbours import HINTS, Neighbours
from orchestrator.aggregators.stacking.options import TRAITS
from orchestrator.aggregators.stacking.prior import Prior

ASKED = ("Who painted the ceiling of the chapel?", "Who wrote the play about the moor?", "Who carved the marble David?")
LISTS = (("Michelangelo", "Shakespeare", "Newton"), ("Newton", "Shakespeare", "Kant"), ("Kant", "Michelangelo"))
RIGHT = np.array([0, 1, 1])


def worded(asked: tuple[str, ...], lists: tuple[tuple[str, ...], ...]) -> tuple[Options, np.ndarray]:
    width = max(map(len, lists)) + 1
    options = Options(
        traits_QOT=np.zeros((len(lists), width, len(TRAITS)), np.float32),
        grams=Grams.of(lists, width),
        asked=Grams.of_questions(asked),
    )
    return options, np.arange(width) < np.array([len(own) for own in lists])[:, None]


def learned(asked: tuple[str, ...] = ASKED, right: np.ndarray = RIGHT) -> Neighbours:
    return Neighbours.of(*worded(asked, LISTS), right)


def test_an_option_that_was_right_in_a_similar_question_is_favoured() -> None:
    hints = learned().hints(*worded(("Who painted the walls of the chapel?",), (("Kant", "Michelangelo", "Newton"),)))
    assert hints.shape == (1, 4, HINTS)
    assert (hints[0].argmax(axis=0) == 1).all()
    assert (hints[0, [0, 2]] < 0).all()
    assert not hints[0, 3].any(), "no option, no hint"


def test_nearer_questions_count_more() -> None:
    """The same two options were right once each: the question asked decides which."""
    neighbours = Neighbours.of(*worded(ASKED[:2], (LISTS[0][:2], LISTS[0][:2])), np.array([0, 1]))
    for asked, best in (("Who painted the ceiling of the hall?", 0), ("Who wrote the play about the king?", 1)):
        hints = neighbours.hints(*worded((asked,), (LISTS[0][:2],)))
        assert (hints[0, :2].argmax(axis=0) == best).all()


def test_no_question_learned_from_sees_its_own_answer() -> None:
    options, is_open = worded(ASKED, LISTS)
    before = learned().hints(options, is_open, family_N=np.arange(3))
    after = learned(right=np.array([0, 1, 0])).hints(options, is_open, family_N=np.arange(3))
    assert np.array_equal(before[2], after[2])
    assert not np.array_equal(before[0], after[0])
    twins = learned(right=np.array([0, 0, 1])).hints(options, is_open, family_N=np.array([7, 7, 8]))
    assert np.array_equal(twins[0], learned().hints(options, is_open, family_N=np.array([7, 7, 8]))[0])
    alone = Neighbours.of(*worded(ASKED[:1], LISTS[:1]), RIGHT[:1])
    assert not alone.hints(*worded(ASKED[:1], LISTS[:1]), family_N=np.arange(1)).any()


def test_the_prior_learns_to_follow_its_neighbours() -> None:
    """Names that are right in one of thirty subjects and wrong in others: no weight for a gram can tell."""
    rng = np.random.default_rng(0)
    subjects = rng.integers(0, 30, 400)
    asked = tuple(f"topic{s} subject{s} field{s}: who is number {i}?" for i, s in enumerate(subjects))
    names = [[f"name{k}" for k in rng.permutation(30)[:4] if k != s][:3] for s in subjects]
    gold = rng.integers(0, 4, 400)
    lists = tuple((*own[:g], f"name{s}", *own[g:]) for own, g, s in zip(names, gold, subjects, strict=True))
    options, is_open = worded(asked, lists)
    first, last = np.arange(300), np.arange(300, 400)
    prior = Prior.fit(options.take(first), is_open[first], gold[first], first, seed=0)
    chosen = prior.predict(options.take(last), is_open[last]).argmax(axis=1)
    assert (chosen == gold[last]).mean() > 0.9


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_hints_are_finite_whatever_is_asked(question: str, options: list[str]) -> None:
    hints = learned().hints(*worded((question,), (tuple(options),)))
    assert np.isfinite(hints).all()


def test_the_order_of_the_questions_learned_from_does_not_matter() -> None:
    options, is_open = worded(ASKED, LISTS)
    turned = np.array([2, 0, 1])
    other = Neighbours.of(options.take(turned), is_open[turned], RIGHT[turned])
    asked = worded(("Who painted the play?",), (("Kant", "Shakespeare"),))
    assert other.hints(*asked) == pytest.approx(learned().hints(*asked), abs=1e-6)


def test_parts_that_do_not_fit_are_told() -> None:
    good = learned()
    good.check()
    cut = Grams(columns_G=good.asked.columns_G[:-1], counts_C=good.asked.counts_C)
    for bad in (
        replace(good, asked=cut),
        replace(good, sizes_N=good.sizes_N[:-1]),
        replace(good, right_N=good.right_N + 5),
    ):
        with pytest.raises(ValueError, match="neighbours"):
            bad.check()
