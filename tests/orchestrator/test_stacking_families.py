"""Questions that a pool asks twice."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.aggregators.stacking.families import families

ASKED = (
    "Who painted the ceiling of the chapel in Rome, and in which year was it finished?",
    "How many grams of salt dissolve in a litre of water at twenty degrees?",
    "Which river flows through the capital of Austria and into the Black Sea?",
)
OTHERS = tuple(f"word{n} term{n} thing{n} matter{n}" for n in range(40))


def test_twins_and_their_twins_are_one_family() -> None:
    reworded = ASKED[0].replace("finished", "completed")
    found = families([*ASKED, reworded, reworded.replace("Who", "who"), *OTHERS])
    assert found[0] == found[3] == found[4]
    assert len(set(found.tolist())) == len(found) - 2


def test_a_form_that_all_are_written_in_is_no_family() -> None:
    form = "Read the review and say whether its author was content. Answer with yes or no. Review: "
    found = families([form + text for text in (*ASKED, ASKED[0] + " ", *OTHERS)])
    assert found[0] == found[3]
    assert len(set(found.tolist())) == len(found) - 1
    assert len(set(families(["the same"] * 30).tolist())) == 30, "nor are those that say nothing else"
    assert len(set(families([*OTHERS[:20], *["the same words"] * 10]).tolist())) == 30


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12))
def test_every_question_has_a_family(questions: list[str]) -> None:
    found = families(questions)
    assert found.shape == (len(questions),)
    assert np.issubdtype(found.dtype, np.integer)
