import asyncio
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.base import EngineExpert, collect, collect_choices, merge_params, well_formed
from experts.errors import (
    BadRequest,
    BreakerOpen,
    CollegiumError,
    ContextLengthExceeded,
    DeadlineExceeded,
    ExpertFailed,
    QueueFull,
    Unavailable,
)
from experts.fake import FakeEngine
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Message, Request, SamplingParams, Usage

REQUEST = Request(prompt="?", request_id="r")
SPEC = ExpertSpec(expert_id="a", engine_id="e")


async def streamed(*chunks: Chunk) -> ChunkStream:
    for chunk in chunks:
        yield chunk


def piece(text: str = "", **fields: Any) -> Chunk:
    return Chunk(expert_id="a", text=text, **fields)


END = piece(finish_reason="stop")


# Text


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("Où ? \U0001f600", "Où ? \U0001f600"),
        ("\ud83d", "\ufffd"),
        ("a\ud83db\ude00", "a\ufffdb\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ufeff\ud83d", "\ufeff\ufffd"),
    ],
)
def test_half_a_surrogate_pair_is_replaced(text: str, mended: str) -> None:
    assert well_formed(text) == mended


async def test_a_character_that_came_in_two_halves_is_whole() -> None:
    answer = await collect(streamed(piece("It is \ud83d"), piece("\ude00."), END), REQUEST)
    assert answer.text == "It is \U0001f600."


# Types


@pytest.mark.parametrize("wrong", [{}, {"messages": (Message(role="user", content="x"),), "prompt": ""}])
def test_a_request_is_a_chat_or_a_prompt(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="either messages or a prompt") as caught:
        Request(**wrong)
    assert caught.value.param == "messages"


def test_an_empty_prompt_is_a_prompt() -> None:
    assert Request(prompt="").question == ""


def test_the_question_is_the_last_thing_the_user_said() -> None:
    turns = [("system", "s"), ("user", "first"), ("assistant", "a"), ("user", "last"), ("tool", "t")]
    messages = tuple(Message(role=role, content=text) for role, text in turns)  # type: ignore[arg-type]
    assert Request(messages=messages).question == "last"
    assert Request(messages=messages[:1]).question == ""
    assert Request(messages=(Message(role="user", content=None),)).question == ""
    assert Request(prompt="whole").question == "whole"


def test_requests_are_distinct_and_frozen() -> None:
    first, second = Request(prompt="x"), Request(prompt="x")
    assert first.request_id != second.request_id
    assert first.expires_s == first.arrival_s + first.deadline_s
    with pytest.raises(FrozenInstanceError):
        first.prompt = "y"  # type: ignore[misc]


def test_usage_adds_up_and_costs() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=2) + Usage(prompt_tokens=10, completion_tokens=20)
    assert (usage, usage.total_tokens) == (Usage(prompt_tokens=11, completion_tokens=22), 33)
    priced = replace(SPEC, usd_per_mtok_in=2.0, usd_per_mtok_out=3.0)
    assert priced.usd(usage) == pytest.approx((22 + 66) / 1e6)


# Errors


def test_the_tree_of_errors_says_who_may_help() -> None:
    too_long = ContextLengthExceeded(prompt_tokens=9, context_length=8, expert_id="a")
    assert (too_long.status, too_long.fallback, too_long.param) == (400, True, "messages")
    assert "9 tokens" in too_long.message
    assert "at most 8" in too_long.message
    expected = {BadRequest: False, QueueFull: False, DeadlineExceeded: False, Unavailable: True, BreakerOpen: True}
    assert {kind: kind("x").fallback for kind in expected} == expected
    assert [kind("x").retry_after_s for kind in (QueueFull, BreakerOpen, CollegiumError)] == [1.0, 1.0, None]


def test_an_endpoints_wish_to_be_left_alone_is_told_apart_from_our_advice() -> None:
    assert (ExpertFailed("x").retry_after_s, ExpertFailed("x").asked_pause_s) == (1.0, 0.0)
    asked = ExpertFailed("x", retry_after_s=7.0)
    assert (asked.retry_after_s, asked.asked_pause_s) == (7.0, 7.0)


# EngineExpert


class Recorder(FakeEngine):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(EngineSpec(engine_id="e", backend="fake", model="fake"))
        self.asked: list[Request] = []

    def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        self.asked.append(request)
        return super().generate(request, expert)


async def seen_by(spec: ExpertSpec, request: Request) -> Request:
    engine = Recorder()
    expert = EngineExpert(spec, engine)
    await collect(expert.generate(request), request)
    await expert.aclose()
    return engine.asked[0]


def chat(*turns: tuple[str, str]) -> Request:
    return Request(messages=tuple(Message(role=role, content=text) for role, text in turns))  # type: ignore[arg-type]


def turns(request: Request) -> list[tuple[str, str | None]]:
    return [(m.role, m.content) for m in request.messages]


async def test_a_plain_expert_passes_the_very_request_on() -> None:
    request = chat(("user", "hi"))
    assert await seen_by(SPEC, request) is request
    given = replace(request, params=SamplingParams(temperature=0.0))
    assert await seen_by(replace(SPEC, defaults=SamplingParams(temperature=1.0)), given) is given


async def test_prompt_and_demonstrations_stand_around_the_conversation() -> None:
    spec = replace(SPEC, system_prompt="Be kind.", demos=(("q1", "a1"), ("q2", "a2")))
    request = chat(("system", "Be short."), ("developer", "Be exact."), ("user", "hi"), ("system", "later"))
    assert turns(await seen_by(spec, request)) == [
        ("system", "Be kind.\n\nBe short.\n\nBe exact."),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "hi"),
        ("system", "later"),
    ]


async def test_demonstrations_alone_need_no_system_prompt() -> None:
    spec = replace(SPEC, demos=(("q", "a"),))
    assert turns(await seen_by(spec, chat(("user", "hi")))) == [("user", "q"), ("assistant", "a"), ("user", "hi")]
    assert turns(await seen_by(spec, chat(("system", "s")))) == [("system", "s"), ("user", "q"), ("assistant", "a")]


async def test_a_text_to_continue_is_left_as_it_stands() -> None:
    spec = replace(SPEC, system_prompt="Be kind.", demos=(("q", "a"),), defaults=SamplingParams(seed=1))
    asked = await seen_by(spec, Request(prompt="Once upon"))
    assert (asked.prompt, asked.messages, asked.params.seed) == ("Once upon", (), 1)


def test_zero_is_an_answer_and_none_is_not() -> None:
    defaults = SamplingParams(temperature=1.0, top_p=0.5, max_tokens=9, stop=("x",), seed=3, logprobs=2)
    asked = SamplingParams(temperature=0.0, seed=0, logprobs=0, presence_penalty=0.0, n=2)
    assert merge_params(asked, defaults) == SamplingParams(
        temperature=0.0, top_p=0.5, max_tokens=9, stop=("x",), seed=0, logprobs=0, presence_penalty=0.0, n=2
    )


def test_the_number_of_answers_is_the_callers_alone() -> None:
    assert merge_params(SamplingParams(), SamplingParams(n=5, seed=1)).n == 1


def test_nothing_to_merge_makes_nothing_new() -> None:
    asked = SamplingParams(temperature=0.0)
    assert merge_params(asked, SamplingParams()) is asked
    assert merge_params(asked, SamplingParams(temperature=0.7)) is asked


@given(
    asked=st.builds(SamplingParams, temperature=st.none() | st.floats(0, 2), seed=st.none() | st.integers()),
    defaults=st.builds(SamplingParams, temperature=st.none() | st.floats(0, 2), seed=st.none() | st.integers()),
)
def test_what_is_asked_wins_and_merging_twice_changes_nothing(asked: SamplingParams, defaults: SamplingParams) -> None:
    merged = merge_params(asked, defaults)
    for name in ("temperature", "seed"):
        own = getattr(asked, name)
        assert getattr(merged, name) == (getattr(defaults, name) if own is None else own)
    assert merge_params(merged, defaults) is merged


# collect


async def test_chunks_become_one_completion() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    done = await collect(streamed(piece("a"), piece("b"), piece(finish_reason="length"), piece(usage=usage)), REQUEST)
    assert (done.request_id, done.expert_id, done.text, done.finish_reason) == ("r", "a", "ab", "length")
    assert done.usage == usage
    assert 0 <= done.ttft_s <= done.latency_s


async def test_interleaved_choices_come_apart_in_order() -> None:
    ends = [piece(index=i, finish_reason="stop") for i in (1, 0)]
    chunks = [piece("b", index=1), piece("a", index=0), piece("d", index=1), piece("c", index=0), *ends]
    done = await collect_choices(streamed(*chunks), REQUEST)
    assert [(c.index, c.text) for c in done] == [(0, "ac"), (1, "bd")]
    assert (await collect(streamed(*chunks), REQUEST)).text == "ac"


async def test_unknown_usage_is_empty() -> None:
    assert (await collect(streamed(piece("x"), END), REQUEST)).usage == Usage()


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([], "without an answer"),
        ([piece("half")], "'a' hung up"),
        ([piece(usage=Usage())], "hung up"),
        ([END, piece("half", index=1)], "hung up"),
    ],
)
async def test_half_an_answer_is_a_failure(chunks: list[Chunk], says: str) -> None:
    with pytest.raises(ExpertFailed, match=says):
        await collect_choices(streamed(*chunks), REQUEST)


async def test_a_collector_who_is_cancelled_closes_the_stream() -> None:
    engine = FakeEngine(EngineSpec(engine_id="e", backend="fake", model="fake", options={"fail": ["hang"]}))
    task = asyncio.create_task(collect(engine.generate(REQUEST, SPEC), REQUEST))
    await asyncio.sleep(0)
    assert engine.running == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (engine.running, engine.cancelled) == (0, 1)


# Tool calls


async def tool_calls(*deltas: Any) -> list[tuple[str, str, str]]:
    end = piece(finish_reason="tool_calls")
    done = await collect(streamed(*(piece(tool_calls=(d,)) for d in deltas), end), REQUEST)
    assert all(c["type"] == "function" for c in done.tool_calls)
    return [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in done.tool_calls]


def delta(arguments: str | None = None, name: str | None = None, **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **more}


async def test_a_tool_call_comes_in_pieces() -> None:
    assert await tool_calls(
        {"index": 0, "id": "1", "type": "function", "function": {"name": "add", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 0},
    ) == [("1", "add", '{"a": 1}')]


async def test_several_calls_may_interleave() -> None:
    assert await tool_calls(
        delta("", "second", index=1, id="b"),
        delta("[", "first", index=0, id="a"),
        delta("{", index=1),
        delta("]", index=0),
        delta("}", index=1),
    ) == [("a", "first", "[]"), ("b", "second", "{}")]


async def test_without_an_index_the_id_tells_calls_apart() -> None:
    assert await tool_calls(
        delta("[", "first", id="a"),
        delta("{", "second", id="b"),
        delta("]", "first", id="a"),
        delta("}"),  # goes on with the call before it
    ) == [("a", "first", "[]}"), ("b", "second", "{")]


async def test_a_name_that_is_repeated_in_each_piece_is_said_once() -> None:
    assert await tool_calls(delta("{", "f", index=0, id="1"), delta("}", "f", index=0, id="1")) == [("1", "f", "{}")]


async def test_a_call_without_an_id_gets_one_of_its_own() -> None:
    first, second = await tool_calls(delta("", "f", index=0), delta("", "g", index=1))
    assert first[0].startswith("call_")
    assert first[0] != second[0]


@pytest.mark.parametrize(
    "wrong",
    [
        "no mapping",
        None,
        {"index": 0, "function": "f"},
        {"index": "x", "function": {"name": "f"}},
        {"index": 0.5, "function": {"name": "f"}},
        {"index": 0, "function": {"arguments": "{}"}},
        {"index": 0, "function": {"name": "f", "arguments": {"a": 1}}},
        {"index": 0, "function": {"name": ["f"]}},
        {"id": ["x"], "function": {"name": "f"}},
    ],
)
async def test_a_malformed_delta_is_the_experts_failure(wrong: Any) -> None:
    with pytest.raises(ExpertFailed, match="'a' sent a malformed answer"):
        await tool_calls(wrong)


# Log-probabilities


async def logprobs(*pieces: Any) -> Any:
    return (await collect(streamed(*(piece("x", logprobs=p) for p in pieces), END), REQUEST)).logprobs


async def test_logprobs_of_a_chat_are_joined() -> None:
    parts = [{"content": [{"token": t}], "refusal": None} for t in "ab"]
    assert await logprobs(parts[0], None, parts[1]) == {"content": [{"token": "a"}, {"token": "b"}]}


async def test_logprobs_of_a_completion_are_joined() -> None:
    parts = [
        {"tokens": [t], "token_logprobs": [p], "top_logprobs": [{t: p}], "text_offset": [i]}
        for i, (t, p) in enumerate([("a", -1.0), ("b", -2.0)])
    ]
    assert await logprobs(*parts) == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{"a": -1.0}, {"b": -2.0}],
        "text_offset": [0, 1],
    }


async def test_no_logprobs_are_none() -> None:
    assert await logprobs(None, {}, {"content": None}) is None


async def test_malformed_logprobs_are_the_experts_failure() -> None:
    with pytest.raises(ExpertFailed, match="malformed"):
        await logprobs(["no mapping"])
