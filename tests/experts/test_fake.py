import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from experts.base import collect_choices
from experts.errors import ConfigError, ContextLengthExceeded, ExpertFailed
from experts.fake import FakeEngine
from experts.types import Chunk, Completion, EngineSpec, ExpertSpec, Message, Request, SamplingParams, Usage

SPEC = ExpertSpec(expert_id="a", engine_id="e", adapter="lora")
REQUEST = Request(messages=(Message(role="system", content="Be kind."), Message(role="user", content="How are you?")))


def engine(**options: Any) -> FakeEngine:
    return FakeEngine(EngineSpec(engine_id="e", backend="fake", model="fake", options=options))


async def chunks(fake: FakeEngine, request: Request = REQUEST) -> list[Chunk]:
    async with aclosing(fake.generate(request, SPEC)) as stream:
        return [chunk async for chunk in stream]


async def answers(fake: FakeEngine, request: Request = REQUEST) -> list[Completion]:
    return await collect_choices(fake.generate(request, SPEC), request)


async def test_the_answer_follows_the_script() -> None:
    fake = engine(text="{expert_id}+{adapter}: {question} {other}")
    (done,) = await answers(fake)
    assert done.text == "a+lora: How are you? {other}"
    assert done.usage == Usage(prompt_tokens=5, completion_tokens=5)
    assert (fake.calls, fake.running, fake.cancelled) == (1, 0, 0)


async def test_a_question_with_braces_is_not_filled_in() -> None:
    (done,) = await answers(engine(text="{question}"), Request(prompt="{adapter} {question}"))
    assert done.text == "{adapter} {question}"


@pytest.mark.parametrize(("pieces", "texts"), [(1, ["abcde"]), (2, ["abc", "de"]), (9, list("abcde"))])
async def test_the_text_comes_in_pieces(pieces: int, texts: list[str]) -> None:
    assert [c.text for c in await chunks(engine(text="abcde", chunks=pieces)) if c.text] == texts


async def test_each_choice_ends_and_usage_counts_all() -> None:
    done = await answers(engine(text="x y"), Request(prompt="?", params=SamplingParams(n=3)))
    assert [(c.index, c.text, c.finish_reason) for c in done] == [(i, "x y", "stop") for i in range(3)]
    assert done[0].usage == Usage(prompt_tokens=1, completion_tokens=6)


async def test_an_empty_text_still_ends() -> None:
    assert [(c.text, c.finish_reason) for c in await chunks(engine(text=""))] == [("", "stop"), ("", None)]


async def test_tool_calls_are_passed_on() -> None:
    call = {"index": 0, "id": "1", "function": {"name": "f", "arguments": "{}"}}
    (done,) = await answers(engine(text="", tool_calls=[call]))
    assert (done.finish_reason, done.tool_calls[0]["id"]) == ("tool_calls", "1")


async def test_usage_may_be_kept_back() -> None:
    assert all(c.usage is None for c in await chunks(engine(usage=False)))


async def test_outcomes_come_in_turn_and_the_last_one_stays() -> None:
    fake = engine(fail=["error", "refuse", "ok", "cut"])
    outcomes = []
    for _ in range(5):
        try:
            await answers(fake)
            outcomes.append("ok")
        except ExpertFailed as exc:
            outcomes.append("may pass" if exc.retryable else "will not pass")
    assert outcomes == ["may pass", "will not pass", "ok", "may pass", "may pass"]
    assert (fake.calls, fake.running) == (5, 0)


async def test_a_cut_comes_after_the_first_piece_and_a_drop_says_nothing() -> None:
    async with aclosing(engine(fail=["cut"]).generate(REQUEST, SPEC)) as stream:
        assert (await anext(stream)).text
        with pytest.raises(ExpertFailed, match="cut off"):
            await anext(stream)
    (only,) = await chunks(engine(fail=["drop"], chunks=3))
    assert (only.finish_reason, only.text) == (None, "a heard")


@pytest.mark.parametrize("options", [{"fail": ["hang"]}, {"ttft_s": 60}, {"chunk_s": 60, "chunks": 3}])
async def test_a_cancelled_call_is_counted_and_over(options: dict[str, Any]) -> None:
    fake = engine(**options)
    task = asyncio.create_task(chunks(fake))
    await asyncio.sleep(0)
    assert fake.running == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (fake.running, fake.cancelled) == (0, 1)


async def test_a_closed_stream_is_counted_as_cancelled() -> None:
    fake = engine(chunks=3)
    async with aclosing(fake.generate(REQUEST, SPEC)) as stream:
        await anext(stream)
    assert (fake.running, fake.cancelled) == (0, 1)


async def test_delays_are_kept() -> None:
    fake, loop = engine(ttft_s=0.02, chunk_s=0.02, chunks=2, load_s=0.02), asyncio.get_running_loop()
    start = loop.time()
    await fake.load()
    assert loop.time() - start >= 0.019
    start = loop.time()
    await chunks(fake)
    assert loop.time() - start >= 0.055


async def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        await chunks(engine(context_length=4))
    assert (caught.value.prompt_tokens, caught.value.context_length) == (5, 4)
    assert await chunks(engine(context_length=5))


async def test_an_engine_that_was_unloaded_or_did_not_load_does_not_answer() -> None:
    fake = engine()
    await fake.load()
    assert fake.loaded
    await fake.unload()
    await fake.unload()
    assert not fake.loaded
    with pytest.raises(ExpertFailed, match="not loaded"):
        await answers(fake)
    await fake.load()
    assert await answers(fake)
    broken = engine(fail=["load", "ok"])
    for _ in range(2):
        with pytest.raises(ExpertFailed, match="failed to load"):
            await broken.load()
    assert not broken.loaded
    with pytest.raises(ExpertFailed, match="not loaded"):
        await answers(broken)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fail": ["explode"]}, r"unknown outcome \['explode'\]; use ok, error"),
        ({"fail": "ok"}, r"unknown outcome \['ok'\]"),
        ({"txet": "x"}, r"unknown option \['txet'\]; use text"),
    ],
)
def test_a_script_with_a_mistake_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        engine(**options)


async def test_time_is_a_matter_of_tokens_and_the_cache_has_an_end() -> None:
    fake, loop = engine(text="a b c d", prefill_tps=100, decode_tps=100, kv_tokens=12), asyncio.get_running_loop()
    request = Request(prompt="one two three four")
    assert fake.speeds.run_s(4, 4) == pytest.approx(0.08)
    start = loop.time()
    await asyncio.gather(*(chunks(fake, request) for _ in range(2)))
    assert loop.time() - start >= 0.155, "16 tokens: one after the other"


async def test_loads_follow_a_script_of_their_own() -> None:
    fake = engine(fail_load=["error", "memory", "ok"])
    with pytest.raises(ExpertFailed, match="this time"):
        await fake.load()
    with pytest.raises(MemoryError):
        await fake.load()
    await fake.load()
    assert (fake.loaded, fake.tries) == (True, 3)
