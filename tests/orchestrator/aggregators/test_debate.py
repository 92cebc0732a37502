from collections.abc import Sequence
from typing import Any

import pytest

from experts.types import Completion
from orchestrator.aggregators.debate import Debate
from tests.orchestrator.aggregators.scripted import Scripted, always, ask, broken, decided, parts, said

DECISION = decided(a=3, b=2, c=2)


async def debate(*experts: Scripted, answers: Sequence[Completion], **options: Any) -> Completion:
    aggregator = Debate(parts(*experts), enabled=True, **options)
    return await aggregator.aggregate(ask("What is 2 + 2?"), DECISION, answers)


async def test_experts_read_each_other_and_answer_again() -> None:
    a, b, c = always("a", "I was wrong: it is 4"), always("b", "4"), always("c", "4")
    answer = await debate(a, b, c, answers=said(c="4", a="5", b="4"))
    assert answer.trace is not None
    assert (answer.expert_id, answer.text) == ("a", "I was wrong: it is 4")
    assert (answer.trace["rounds"], answer.trace["changed"], answer.trace["votes"]) == (1, ["a"], {"4": 1.0})
    (prompt,) = a.prompts
    assert "yours is number 1." in prompt
    assert prompt.count("[Answer ") == 3
    assert "yours is number 3." in c.prompts[0]


async def test_it_ends_once_all_agree_and_after_its_rounds() -> None:
    a, b = always("a", "4"), always("b", "4")
    agreed = await debate(a, b, answers=said(a="4", b="4.0"), rounds=3)
    assert agreed.trace is not None
    assert (agreed.trace["rounds"], a.requests) == (0, [])
    stubborn = [always("a", "5"), always("b", "4")]
    answer = await debate(*stubborn, answers=said(a="5", b="4"), rounds=2)
    assert answer.trace is not None
    assert (answer.trace["rounds"], [len(e.requests) for e in stubborn]) == (2, [2, 2])


async def test_who_fails_or_says_nothing_keeps_its_answer() -> None:
    answer = await debate(broken("a"), always("b", "<think>hm"), always("c", "5"), answers=said(a="5", b="4", c="4"))
    assert answer.text == "5"
    assert answer.trace is not None
    assert answer.trace["changed"] == ["c"]


async def test_one_answer_is_no_debate() -> None:
    a = always("a", "5")
    assert (await debate(a, answers=said(a="4"))).text == "4"
    assert a.requests == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "'enabled: true' turns it on"),
        ({"enabled": "yes"}, "turns it on"),
        ({"enabled": True, "rounds": 4}, "rounds is 1 to 3"),
    ],
)
def test_it_is_off_unless_asked_for(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Debate(parts(), **options)
