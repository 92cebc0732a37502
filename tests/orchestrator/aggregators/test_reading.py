import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from experts.types import Completion
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.reading import ByMeaning, make_reader
from orchestrator.aggregators.vote import Vote
from tests.orchestrator.aggregators.scripted import ask, decided, parts, said

PARIS = ("the capital of france is paris", "paris is the capital of france", "france's capital is paris")


class Angles:
    """An Encoder of texts that are angles in degrees, and of no others."""

    name, width = "angles", 2

    async def encode(self, texts: Sequence[str]) -> Any:
        angles = np.radians([float(t) for t in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    async def count_tokens(self, texts: Sequence[str]) -> int:
        return len(texts)


def names(*texts: str, threshold: float = 0.9) -> list[str | None]:
    answers = [Completion(request_id="r", expert_id=f"e{i}", text=t) for i, t in enumerate(texts)]
    return asyncio.run(ByMeaning(Angles, threshold).read(ask(), answers))


def test_texts_that_mean_the_same_vote_together() -> None:
    vote = Vote(parts(), extract="embedding", threshold=0.8)
    answers = said(a=PARIS[0], b="I like cheese very much indeed", c=PARIS[1])
    elected = asyncio.run(vote.aggregate(ask("What is the capital of France?"), decided(a=1, b=9, c=2), answers))
    assert elected.expert_id == "c"
    assert elected.trace is not None
    assert sorted(elected.trace["votes"].values()) == [1.0, 2.0]


def test_no_two_of_a_cluster_are_less_alike_than_the_threshold() -> None:
    # 25 degrees are a cosine of 0.906: 0 and 20 agree, 20 and 40 do, 0 and 40 do not.
    assert names("0", "20", "40") in (["0", "0", "40"], ["0", "20", "20"])
    assert names("0", "20", "22", "46") == ["20", "20", "20", "46"]


def test_a_cluster_is_called_by_its_middle() -> None:
    assert names("10", "12", "20", "90") == ["12", "12", "12", "90"]


def test_empty_texts_have_no_meaning_and_one_needs_no_encoder() -> None:
    assert names("", " ") == [None, None]
    vote = Vote(AggregatorParts(encoder=lambda: pytest.fail("asked"), experts={}), extract="embedding")
    assert asyncio.run(vote.aggregate(ask(), decided(a=1, b=1), said(a="x", b=""))).text == "x"


def test_meaning_is_never_settled_before_all_are_there() -> None:
    vote = Vote(parts(), extract="embedding")
    assert not asyncio.run(vote.settled(ask(), decided(a=9, b=1), said(a="x"), ["b"]))
    assert asyncio.run(vote.settled(ask(), decided(a=9, b=1), said(a="x"), []))


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_a_threshold_is_a_cosine(threshold: float) -> None:
    with pytest.raises(ValueError, match="a cosine above 0"):
        make_reader(parts(), "embedding", None, threshold)


def test_meaning_needs_an_encoder() -> None:
    with pytest.raises(ConfigError, match="needs the service's encoder"):
        make_reader(None, "embedding", None, 0.9)


def test_reasoning_does_not_vote() -> None:
    answers = said(a="<think>5? 5 it is. The answer is 5.</think>4", b="4", c="<think>6</think>")
    elected = asyncio.run(Vote().aggregate(ask(), decided(a=1, b=1, c=1), answers))
    assert elected.trace is not None
    assert elected.trace["votes"] == {"4": 2.0, "6": 1.0}


@settings(deadline=None, max_examples=60)
@given(angles=st.lists(st.integers(0, 90).map(str), min_size=1, max_size=6), data=st.data())
def test_the_order_of_the_answers_never_matters(angles: list[str], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(angles))))
    shuffled = names(*(angles[i] for i in order))
    assert [shuffled[order.index(i)] for i in range(len(angles))] == names(*angles)
