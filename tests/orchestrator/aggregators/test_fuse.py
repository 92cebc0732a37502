import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from experts.types import Completion, Message, Request, SamplingParams
from orchestrator.aggregators.fuse import Fuse
from tests.orchestrator.aggregators.scripted import Scripted, always, ask, broken, decided, parts, said

Virtual = Callable[[Callable[[], Any]], Any]
DECISION = decided(a=3, b=2, c=1)
ANSWERS = said(a="384,400 km", b="<think>a million?</think>About 1.3 light seconds.", c="")


async def fuse(
    expert: Scripted, answers: list[Completion] = ANSWERS, request: Request | None = None, **options: Any
) -> Completion:
    aggregator = Fuse(parts(expert), expert=expert.spec.expert_id, **options)
    return await aggregator.aggregate(request or ask(), DECISION, answers)


async def test_one_expert_writes_the_answer_from_numbered_responses() -> None:
    writer = always("w", "It is 384,400 km away.")
    answer = await fuse(writer)
    assert (answer.expert_id, answer.text) == ("w", "It is 384,400 km away.")
    assert answer.trace == {
        "answers": [
            {"expert_id": "a", "response": 1, "chars": 10, "left_out_chars": 0},
            {"expert_id": "b", "response": 2, "chars": 24, "left_out_chars": 0},
            {"expert_id": "c", "response": None, "chars": 0, "left_out_chars": 0},
        ],
        "expert": "w",
    }
    (prompt,) = writer.prompts
    assert prompt.index("How far is the moon?") < prompt.index("384,400 km") < prompt.index("1.3 light seconds")
    assert "a million" not in prompt
    assert "[Response 3" not in prompt


async def test_the_conversation_the_format_and_the_sampling_stay_and_tools_do_not() -> None:
    writer = always("w", "yes")
    request = Request(
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="user", content="Hello"),
            Message(role="assistant", content="Hi"),
            Message(role="user", content="How far?"),
        ),
        params=SamplingParams(max_tokens=9, temperature=0.5),
        tools=({"type": "function", "function": {"name": "f"}},),
        tool_choice="auto",
        response_format={"type": "json_object"},
    )
    await fuse(writer, request=request)
    (asked,) = writer.requests
    assert [m.role for m in asked.messages] == ["system", "user", "assistant", "user"]
    assert asked.messages[:3] == request.messages[:3]
    assert (asked.params, asked.response_format) == (request.params, request.response_format)
    assert (asked.tools, asked.tool_choice, asked.request_id) == ((), None, request.request_id)


async def test_a_prompt_to_continue_is_fused_as_a_chat() -> None:
    writer = always("w", "yes")
    await fuse(writer, request=Request(prompt="The moon is"))
    assert writer.requests[0].prompt is None
    assert writer.prompts[0].startswith("The moon is\n")


async def test_long_responses_and_questions_lose_their_middle() -> None:
    writer = always("w", "yes")
    answers = said(a="x" * 5000 + "END", b="short")
    answer = await fuse(writer, answers, ask("q" * 9000), response_chars=200, question_chars=300)
    assert answer.trace is not None
    assert answer.trace["answers"][0] == {"expert_id": "a", "response": 1, "chars": 5003, "left_out_chars": 4803}
    (prompt,) = writer.prompts
    assert "END" in prompt
    assert len(prompt) < 2000


@pytest.mark.parametrize(
    ("writer", "note"),
    [
        (broken("w"), "fusing failed (expert_failed): a weighted vote instead"),
        (always("w", " \n"), "fusing failed (expert_failed): a weighted vote instead"),
        (always("w", "<think>for ever"), "fusing failed (expert_failed): a weighted vote instead"),
    ],
    ids=["fails", "says nothing", "only reasons"],
)
async def test_where_the_writer_fails_the_answers_vote(writer: Scripted, note: str) -> None:
    answer = await fuse(writer, said(a="5 km", b="4 km", c="4 km"))
    assert (answer.text, answer.trace and answer.trace["note"]) == ("5 km", f"{note}; 2 answers tied; decided by seed")
    assert len(writer.prompts) == 1


def test_a_writer_that_hangs_leaves_time_for_the_vote(virtual: Virtual) -> None:
    async def ask_it() -> None:
        writer = Scripted("w", lambda _: None)
        request = Request(prompt="?", deadline_s=10.0, arrival_s=asyncio.get_running_loop().time())
        answer = await fuse(writer, said(a="4", b="5"), request)
        assert answer.text in ("4", "5")
        assert asyncio.get_running_loop().time() == 1008.0
        assert writer.running == 0

    virtual(ask_it)


async def test_what_cannot_be_fused_is_not() -> None:
    writer = always("w", "yes")
    nothing = await fuse(writer, said(a="", b=" ", c="<think>"))
    assert nothing.trace is not None
    assert nothing.trace["note"].startswith("no response has any text: a weighted vote instead")
    alike = await fuse(writer, said(b="4", a="4", c=""))
    assert (alike.expert_id, alike.text) == ("a", "4")
    assert alike.trace is not None
    assert alike.trace["note"] == "all say the same: nothing to fuse"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = await fuse(writer, [replace(said(a="")[0], tool_calls=(call,)), *said(b="4")])
    assert called.tool_calls == (call,)
    assert writer.prompts == []


async def test_marks_that_the_writer_repeats_are_taken_out() -> None:
    writer = Scripted("w", lambda prompt: f"{prompt[prompt.index('[Response 1') :].splitlines()[0]}\nIt is far.")
    assert (await fuse(writer)).text == "It is far."


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="names 'nobody'; known experts: w"):
        Fuse(parts(always("w", "")), expert="nobody")
    with pytest.raises(ValueError, match="at least 100"):
        Fuse(parts(always("w", "")), expert="w", response_chars=9)


@settings(deadline=None, max_examples=40)
@given(order=st.permutations(said(a="one", b="two", c="three", d="")), seed=st.integers(0, 3))
def test_the_order_of_the_answers_never_matters(order: list[Completion], seed: int) -> None:
    writer = Scripted("w", lambda prompt: prompt)

    def run(answers: list[Completion]) -> Completion:
        answer = asyncio.run(fuse(writer, answers, ask(metadata={"route_seed": seed})))
        return replace(answer, ttft_s=0, latency_s=0)

    assert run(order) == run(said(a="one", b="two", c="three", d=""))
