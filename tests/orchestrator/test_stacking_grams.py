"""The wording of options, and what the prior learns from it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.aggregators.stacking.grams import COLUMNS, HALF, Grams, Options, grams_of
from orchestrator.aggregators.stacking.options import TRAITS
from orchestrator.aggregators.stacking.prior import Prior


def worded(options: list[list[str]], width: int) -> Options:
    traits = np.zeros((len(options), width, len(TRAITS)), np.float32)
    questions = ["Which of these?"] * len(options)
    return Options(traits_QOT=traits, grams=Grams.of(options, width), asked=Grams.of_questions(questions))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_grams_within_the_columns(text: str) -> None:
    grams = Grams.of([[text]], 1)
    columns, values = grams.columns_G, grams.values_G
    assert len(set(columns.tolist())) == len(columns) == len(values) == grams.counts_C.sum()
    assert (columns < COLUMNS).all()
    for kind in (values[columns < HALF], values[columns >= HALF]):
        assert not len(kind) or abs(float((kind**2).sum()) - 1) < 1e-4


def test_columns_are_the_same_in_every_process() -> None:
    """An artefact keeps a weight for each column: other columns would make it another model."""
    columns = grams_of("a cat")
    assert columns[:6].tolist() == [7268, 15939, 17320, 34014, 35250, 38117]
    assert len(columns) == 3 + 15


def test_case_and_what_lies_beyond_the_limit_do_not_count() -> None:
    assert np.array_equal(grams_of("Both A and B"), grams_of("both a and b"))
    assert np.array_equal(grams_of("x" * 2000), grams_of("x" * 2000 + " and more"))


def test_rows_taken_are_those_rows() -> None:
    lists = [["one", "two"], [], ["three", "", "a long fourth"], ["five"]]
    some, again = worded(lists, 4).take(np.array([2, 0, 1])), worded([lists[2], lists[0], lists[1]], 4)
    for name in ("columns_G", "values_G", "counts_C"):
        assert np.array_equal(getattr(some.grams, name), getattr(again.grams, name))


def test_the_prior_learns_which_wording_is_right() -> None:
    """Options differ in nothing but a word that the wrong ones have."""
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 3, 150)
    names = ["alpha", "beta", "gamma", "delta", "omega"]
    lists = [[f"{rng.choice(names)} {'only' if o == g else 'never'}" for o in range(3)] for g in gold]
    is_open = np.ones((150, 4), np.bool_)
    is_open[:, -1] = False
    options, first, last = worded(lists, 4), np.arange(100), np.arange(100, 150)
    prior = Prior.fit(options.take(first), is_open[first], gold[first], first, seed=0)
    chances = np.exp(prior.predict(options.take(last), is_open[last]))
    assert (chances.argmax(axis=1) == gold[last]).all()
    assert np.allclose(chances[:, :3].sum(axis=1), 1, atol=1e-4)
