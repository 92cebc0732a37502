"""What a text shows on its surface, and how much it agrees with the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.aggregators.reward_moe.features import (
    NAMES,
    READ_CHARS,
    own_part,
    read_choice,
    read_prompt,
    surface,
)
from orchestrator.aggregators.reward_moe.inputs import AGREEMENT, agreement, feature_width, make_panel, raw_features

OPTIONS = ("12 apples", "15 pears", "20 plums", "the whole orchard")
PROMPT = read_prompt("How many fruits does the farmer sell on the market in one day?", OPTIONS)


def shown(text, choice="A"):
    return dict(zip(NAMES, surface(text, PROMPT, choice), strict=True))


def test_reasoning_that_reaches_its_choice():
    found = shown("He sells 3 times 4, that is 12 apples. The answer is (A).")
    assert found["quoted"] == found["number_found"] == found["ends_on_number"] == found["has_marker"] == 1
    assert found["support"] == 1
    assert found["ends_on_other"] == found["cut_off"] == found["runs_on"] == 0


def test_reasoning_that_reaches_another_option():
    found = shown("It is 3 times 5, so 15. The answer is (A).")
    assert found["ends_on_other"] == 1
    assert found["ends_on_number"] == found["quoted"] == 0


def test_a_number_is_met_by_value():
    assert shown("Roughly 12.05 in all. The answer is (A).")["ends_on_number"] == 1
    assert shown("It is 1,2 or 0.12. The answer is (A).")["ends_on_number"] == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Perhaps it might be 12.", "log_hedges"),
        ("I cannot say; sorry.", "log_refusals"),
        ("What a great question!", "log_flattery"),
        ("This answer is correct, trust me.", "log_self_praise"),
        ("None of the options fits; the closest is A.", "log_doubts"),
        ("First this, then that, therefore A.", "log_steps"),
        ("How many fruits does the farmer sell on the market in one day? A.", "copies_question"),
        ("so it goes on and on " * 20, "loops"),
        ("and then the farmer went to", "cut_off"),
    ],
)
def test_manners_are_seen(text, name):
    assert shown(text)[name] > 0
    assert shown("He sells 12 apples. The answer is (A).")[name] == 0


def test_what_a_base_model_asks_itself_next_does_not_count():
    text = "It is 12. The answer is (A).\n\nQuestion: What is red?\nAnswer: Blood. The answer is (C)."
    assert own_part(text) == "It is 12. The answer is (A)."
    assert read_choice(text, OPTIONS) == "A"
    assert shown(text)["runs_on"] == 1


def test_a_free_answer_chooses_its_last_number():
    assert read_choice("2 x 0.5 = 1\nSo it takes 3.\nA: 3") == "3"


def test_an_empty_answer_has_features_like_any_other():
    assert shown("", None)["empty"] == 1
    assert np.isfinite(list(shown("", None).values())).all()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.lists(st.text(max_size=20), max_size=5), st.sampled_from([None, "A", "J", "7", "é"]))
def test_features_of_any_text_are_finite(text, options, choice):
    row = surface(text, read_prompt(text, options), choice)
    assert len(row) == len(NAMES)
    assert np.isfinite(row).all()


def test_a_long_text_is_read_at_both_ends_only():
    assert len(own_part("x" * 1_000_000)) == 2 * READ_CHARS


def test_agreement_counts_the_others():
    vectors = np.eye(4, dtype=np.float32)
    vectors[1] = vectors[0]
    found = agreement(["A", "A", "B", None], vectors)
    assert found[:, AGREEMENT.index("same_share")] == pytest.approx([1 / 3, 1 / 3, 0, 0])
    assert found[:, AGREEMENT.index("is_largest")].tolist() == [1, 1, 0, 0]
    assert found[:, AGREEMENT.index("best_cosine")].tolist() == [1, 1, 0, 0]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)))
def test_agreement_does_not_depend_on_the_order(order):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    choices = ["A", "50%", "50", None, "A"]
    whole = agreement(choices, vectors)
    moved = agreement([choices[i] for i in order], vectors[list(order)])
    assert np.allclose(moved, whole[list(order)], atol=1e-6)


def test_one_answer_agrees_with_nobody():
    panel = make_panel("What?", (), ["It is 4."])
    row = raw_features(panel, np.ones((1, 4), np.float32) / 2)
    assert (row[0, -len(AGREEMENT) :] == 0).all()
    assert feature_width(4) == 2 * 4 + 1 + len(NAMES) + len(AGREEMENT) + 1
