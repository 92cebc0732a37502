import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from experts.base import collect
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
from experts.types import Chunk, ChunkStream, Completion, ExpertSpec, Request, SamplingParams, Usage
from orchestrator.resilience import Breaker, BreakerState, CallRecord, Fallback, Hedged, Retrying, Timed, failure_kind

Virtual = Callable[[Callable[[], Any]], Any]
Step = str | float | Chunk | BaseException | type[BaseException]

END = Chunk(expert_id="", finish_reason="stop")
HANG = 1e6


class Scripted:
    """An Expert that plays one sequence of steps a call, the last one again and again: text is sent, seconds are
    slept, exceptions raised."""

    def __init__(self, *calls: Sequence[Step], expert_id: str = "a") -> None:
        self.spec = ExpertSpec(expert_id=expert_id, engine_id=f"{expert_id}-engine", usd_per_mtok_out=1e6)
        self.requests: list[Request] = []
        self.at: list[float] = []
        self.running = 0
        self.ended = 0
        self.closed = False
        self._calls = calls or ([expert_id, END],)

    @property
    def calls(self) -> int:
        return len(self.requests)

    async def generate(self, request: Request) -> ChunkStream:
        steps = self._calls[min(self.calls, len(self._calls) - 1)]
        self.requests.append(request)
        self.at.append(time.monotonic())
        self.running += 1
        try:
            for step in steps:
                if isinstance(step, str):
                    yield Chunk(expert_id=self.spec.expert_id, text=step)
                elif isinstance(step, Chunk):
                    yield step
                elif isinstance(step, int | float):
                    await asyncio.sleep(step)
                else:
                    raise step
        finally:
            self.running -= 1
            self.ended += 1

    async def aclose(self) -> None:
        self.closed = True


def ask(**changes: Any) -> Request:
    return Request(prompt="?", **{"arrival_s": time.monotonic(), "deadline_s": 100.0, **changes})


async def answer(expert: Any, request: Request | None = None) -> Completion:
    request = request or ask()
    return await collect(expert.generate(request), request)


async def texts(expert: Any, request: Request | None = None) -> list[str]:
    async with aclosing(expert.generate(request or ask())) as stream:
        return [chunk.text async for chunk in stream if chunk.text]


def failed(**how: Any) -> ExpertFailed:
    return ExpertFailed("broke", **how)


def too_long() -> ContextLengthExceeded:
    return ContextLengthExceeded(prompt_tokens=9, context_length=8, expert_id="a")


# Timed


def timed(inner: Scripted, *, first_chunk_s: float = 10.0) -> tuple[Timed, list[CallRecord]]:
    records: list[CallRecord] = []
    return Timed(inner, on_call=records.append, first_chunk_s=first_chunk_s), records


def test_timed_reports_times_usage_and_cost(virtual: Virtual) -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=2)
    expert, records = timed(Scripted([0.5, "x", 2.0, END, Chunk(expert_id="a", usage=usage)]))
    virtual(lambda: answer(expert))
    (record,) = records
    assert (record.ttft_s, record.latency_s, record.started_s) == (0.5, 2.5, 1000.0)
    assert (record.usage, record.usd, record.error) == (usage, 2.0, None)


def test_timed_reads_usage_and_end_from_an_answer_of_one_chunk(virtual: Virtual) -> None:
    usage = Usage(completion_tokens=4)
    expert, records = timed(Scripted([Chunk(expert_id="a", text="all", finish_reason="stop", usage=usage)]))
    assert virtual(lambda: answer(expert)).text == "all"
    assert records[0].usage == usage


def test_ttft_does_not_count_what_the_reader_does_with_the_first_chunk(virtual: Virtual) -> None:
    expert, records = timed(Scripted([1.0, "x", END]))

    async def read_slowly() -> None:
        async for _ in expert.generate(ask()):
            await asyncio.sleep(5)

    virtual(read_slowly)
    assert records[0].ttft_s == 1.0


def test_unknown_usage_is_none_at_all(virtual: Virtual) -> None:
    expert, records = timed(Scripted())
    virtual(lambda: answer(expert))
    assert records[0].usage == Usage()


def test_silence_before_the_first_chunk_is_a_failure(virtual: Virtual) -> None:
    inner = Scripted([HANG])
    expert, records = timed(inner, first_chunk_s=3.0)
    with pytest.raises(ExpertFailed, match="within 3 s"):
        virtual(lambda: answer(expert))
    assert (records[0].error, records[0].latency_s, records[0].ttft_s) == ("expert_failed", 3.0, None)
    assert inner.running == 0


def test_a_whole_answer_has_three_quarters_of_the_deadline(virtual: Virtual) -> None:
    expert, records = timed(Scripted([74.0, "x", END], [HANG]), first_chunk_s=3.0)
    assert virtual(lambda: answer(expert, ask(stream=False))).text == "x"
    with pytest.raises(ExpertFailed, match="within 75 s"):
        virtual(lambda: answer(expert, ask(stream=False)))
    assert [r.error for r in records] == [None, "expert_failed"]


def test_the_reason_of_a_failure_is_kept_in_words(virtual: Virtual) -> None:
    expert, records = timed(Scripted([failed()], [KeyError("a bug")]))
    for kind in (ExpertFailed, KeyError):
        with pytest.raises(kind):
            virtual(lambda: answer(expert))
    assert [(r.error, r.reason) for r in records] == [("expert_failed", "broke"), ("internal_error", None)]


def test_silence_is_not_asked_again(virtual: Virtual) -> None:
    inner = Scripted([HANG])
    with pytest.raises(ExpertFailed, match="within 10 s"):
        virtual(lambda: answer(retrying(timed(inner)[0])))
    assert inner.calls == 1


def test_a_slow_middle_is_no_failure(virtual: Virtual) -> None:
    expert, _ = timed(Scripted(["x", 60.0, "y", END]), first_chunk_s=3.0)
    assert virtual(lambda: answer(expert)).text == "xy"


@pytest.mark.parametrize(
    ("steps", "says"), [([], "without an answer"), (["half"], "in the middle"), ([Chunk(expert_id="a")], "middle")]
)
def test_a_stream_that_just_ends_is_a_failure(virtual: Virtual, steps: list[Step], says: str) -> None:
    expert, records = timed(Scripted(steps))
    with pytest.raises(ExpertFailed, match=says):
        virtual(lambda: texts(expert))
    assert records[0].error == "expert_failed"


def test_every_choice_needs_its_end(virtual: Virtual) -> None:
    ends = [Chunk(expert_id="a", index=i, finish_reason="stop") for i in (0, 0, 1)]
    two = SamplingParams(n=2)
    expert, _ = timed(Scripted(ends))
    virtual(lambda: texts(expert, ask(params=two)))
    expert, _ = timed(Scripted(ends[:2]))
    with pytest.raises(ExpertFailed, match="middle"):
        virtual(lambda: texts(expert, ask(params=two)))


def test_an_engines_own_timeout_is_not_taken_for_silence(virtual: Virtual) -> None:
    expert, records = timed(Scripted([TimeoutError("socket")]))
    with pytest.raises(TimeoutError, match="socket"):
        virtual(lambda: answer(expert))
    assert records[0].error == "internal_error"


@pytest.mark.parametrize("steps", [[asyncio.CancelledError], ["half", asyncio.CancelledError]])
def test_an_engine_that_cancels_by_itself_has_failed(virtual: Virtual, steps: list[Step]) -> None:
    expert, records = timed(Scripted(steps))
    with pytest.raises(ExpertFailed, match="cancelled the call"):
        virtual(lambda: answer(expert))
    assert records[0].error == "expert_failed"


def test_a_reader_who_leaves_is_reported_as_cancelled_and_stops_the_engine(virtual: Virtual) -> None:
    inner = Scripted(["x", HANG])
    expert, records = timed(inner)

    async def leave() -> None:
        async with aclosing(expert.generate(ask())) as stream:
            await anext(stream)

    virtual(leave)
    assert ([r.error for r in records], inner.running) == (["cancelled"], 0)


@pytest.mark.parametrize("steps", [[HANG], ["x", HANG]])
def test_a_deadline_around_the_reader_cancels_the_call(virtual: Virtual, steps: list[Step]) -> None:
    inner = Scripted(steps)
    expert, records = timed(inner, first_chunk_s=1e9)

    async def read() -> None:
        async with asyncio.timeout(5):
            await answer(expert)

    with pytest.raises(TimeoutError):
        virtual(read)
    assert ([r.error for r in records], inner.running) == (["cancelled"], 0)


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (BadRequest("no"), "bad_request"),
        (DeadlineExceeded("late"), "deadline_exceeded"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
        (ZeroDivisionError(), "internal_error"),
    ],
)
def test_failure_kinds(exc: BaseException, kind: str) -> None:
    assert failure_kind(exc) == kind


# Breaker


class Dial:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def state_of(failures: int = 2) -> tuple[BreakerState, Dial]:
    dial = Dial()
    return BreakerState(failures=failures, open_s=10.0, clock=dial), dial


async def fail(expert: Any) -> str:
    try:
        await answer(expert)
    except CollegiumError as exc:
        return exc.code
    return "ok"


async def test_the_breaker_opens_after_failures_in_a_row_and_closes_after_a_good_probe() -> None:
    state, dial = state_of()
    good, bad = ["x", END], [failed()]
    inner = Scripted(bad, good, bad, bad, good)
    expert = Breaker(inner, state)
    assert [await fail(expert) for _ in range(3)] == ["expert_failed", "ok", "expert_failed"]
    assert state.state == "closed"
    assert await fail(expert) == "expert_failed"
    assert state.state == "open"
    dial.now = 9.9
    assert await fail(expert) == "breaker_open"
    assert inner.calls == 4
    dial.now = 10.0
    assert state.state == "half_open"
    assert await fail(expert) == "ok"
    assert state.state == "closed"
    assert await fail(expert) == "ok"


async def test_a_failed_probe_opens_the_breaker_again_at_once() -> None:
    state, dial = state_of()
    expert = Breaker(Scripted([failed()]), state)
    await fail(expert)
    await fail(expert)
    dial.now = 10.0
    assert await fail(expert) == "expert_failed"
    assert state.state == "open"
    dial.now = 19.9
    assert await fail(expert) == "breaker_open"


async def test_an_open_breaker_says_when_to_come_back() -> None:
    state, dial = state_of(failures=1)
    expert = Breaker(Scripted([failed()]), state)
    await fail(expert)
    dial.now = 4.0
    with pytest.raises(BreakerOpen, match=r"'a-engine'.* for 6 s") as caught:
        await answer(expert)
    assert caught.value.retry_after_s == 6.0
    dial.now = 9.9
    assert state.admit() == 1.0


async def opened_and_probing() -> tuple[BreakerState, Scripted, Breaker, ChunkStream]:
    """A breaker half open, with one call under way that was let through as the probe."""
    state, dial = state_of(failures=1)
    inner = Scripted([failed()], ["x", END])
    expert = Breaker(inner, state)
    await fail(expert)
    dial.now = 10.0
    probe = expert.generate(ask())
    await anext(probe)
    return state, inner, expert, probe


async def test_only_one_probe_at_a_time() -> None:
    state, inner, expert, probe = await opened_and_probing()
    assert await fail(expert) == "breaker_open"
    assert inner.calls == 2
    assert [chunk async for chunk in probe] == [END]
    assert state.state == "closed"


async def test_a_probe_that_is_cancelled_gives_no_verdict_and_makes_room_for_the_next() -> None:
    state, _, expert, probe = await opened_and_probing()
    await probe.aclose()
    assert state.state == "half_open"
    assert await fail(expert) == "ok"
    assert state.state == "closed"


async def begun(expert: Breaker) -> ChunkStream:
    stream: ChunkStream = expert.generate(ask())
    await anext(stream)
    return stream


@pytest.mark.parametrize("end", ["closed by the reader", "failed", "succeeded"])
async def test_a_call_from_before_the_breaker_opened_says_nothing_about_the_probe(end: str) -> None:
    state, dial = state_of(failures=1)
    last: Step = failed() if end == "failed" else END
    old = await begun(Breaker(Scripted(["x", last]), state))
    await fail(Breaker(Scripted([failed()]), state))
    dial.now = 10.0
    probe = await begun(Breaker(Scripted(), state))
    if end == "closed by the reader":
        await old.aclose()
    elif end == "failed":
        with pytest.raises(ExpertFailed):
            await anext(old)
    else:
        assert [chunk async for chunk in old] == [END]
    assert state.state == "half_open"
    assert await fail(Breaker(Scripted(), state)) == "breaker_open"
    await probe.aclose()


async def test_cancelled_calls_do_not_count_as_failures_nor_as_successes() -> None:
    state, _ = state_of(failures=2)
    broken = Breaker(Scripted([failed()]), state)
    await fail(broken)
    await (await begun(Breaker(Scripted(["x", HANG]), state))).aclose()
    assert state.state == "closed"
    await fail(broken)
    assert state.state == "open"


async def test_a_failure_after_the_first_chunk_counts() -> None:
    state, _ = state_of(failures=1)
    assert await fail(Breaker(Scripted(["x", failed()]), state)) == "expert_failed"
    assert state.state == "open"


@pytest.mark.parametrize("exc", [BadRequest("no"), too_long(), KeyError("bug")])
async def test_a_bad_request_or_a_bug_says_nothing_about_the_engine(exc: Exception) -> None:
    state, _ = state_of(failures=1)
    with pytest.raises(type(exc)):
        await answer(Breaker(Scripted([exc]), state))
    assert state.state == "closed"


async def test_experts_of_one_engine_share_its_breaker() -> None:
    state, _ = state_of(failures=1)
    await fail(Breaker(Scripted([failed()]), state))
    assert await fail(Breaker(Scripted(expert_id="b"), state)) == "breaker_open"


def test_an_engine_that_hangs_opens_its_breaker(virtual: Virtual) -> None:
    async def hang_twice() -> str:
        state = BreakerState(failures=2, open_s=10.0)
        expert = Breaker(timed(Scripted([HANG]), first_chunk_s=1.0)[0], state)
        assert [await fail(expert) for _ in range(3)] == ["expert_failed", "expert_failed", "breaker_open"]
        return state.state

    assert virtual(hang_twice) == "open"


# Retrying


def retrying(inner: Any, *, retries: int = 2, backoff_s: float = 1.0) -> Retrying:
    return Retrying(inner, retries=retries, backoff_s=backoff_s)


def test_what_may_pass_is_asked_again(virtual: Virtual) -> None:
    inner = Scripted([failed()], [failed()], ["x", END])
    assert virtual(lambda: answer(retrying(inner))).text == "x"
    assert inner.calls == 3


def test_the_last_failure_is_raised_when_all_tries_fail(virtual: Virtual) -> None:
    inner = Scripted([failed()], [failed()], [ExpertFailed("the third")])
    with pytest.raises(ExpertFailed, match="the third"):
        virtual(lambda: answer(retrying(inner)))
    assert inner.calls == 3


@pytest.mark.parametrize("exc", [failed(retryable=False), BadRequest("no"), BreakerOpen("open"), KeyError("bug")])
def test_what_will_not_pass_is_not_asked_again(virtual: Virtual, exc: Exception) -> None:
    inner = Scripted([exc])
    with pytest.raises(type(exc)):
        virtual(lambda: answer(retrying(inner)))
    assert inner.calls == 1


def test_no_retries_is_one_call(virtual: Virtual) -> None:
    inner = Scripted([failed()])
    with pytest.raises(ExpertFailed):
        virtual(lambda: answer(retrying(inner, retries=0)))
    assert inner.calls == 1


def test_backoff_doubles_and_is_jittered_from_zero(virtual: Virtual, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.5)
    inner = Scripted([failed()])
    with pytest.raises(ExpertFailed):
        virtual(lambda: answer(retrying(inner, retries=3, backoff_s=4.0)))
    assert inner.at == [1000.0, 1002.0, 1006.0, 1014.0]
    monkeypatch.undo()
    spread = {virtual(lambda: _first_pause()) for _ in range(20)}
    assert len(spread) > 10
    assert all(0 <= pause <= 4.0 for pause in spread)


async def _first_pause() -> float:
    inner = Scripted([failed()], ["x", END])
    await answer(retrying(inner, backoff_s=4.0))
    return inner.at[1] - inner.at[0]


def test_no_pause_reaches_past_the_deadline(virtual: Virtual, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.5)
    inner = Scripted([failed()])

    async def ask_late() -> float:
        with pytest.raises(ExpertFailed):
            await answer(retrying(inner, retries=5, backoff_s=4.0), ask(deadline_s=5.0))
        return time.monotonic()

    assert virtual(ask_late) == 1002.0
    assert inner.calls == 2


def test_an_endpoints_own_wish_is_obeyed(virtual: Virtual, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.0)
    inner = Scripted([failed(retry_after_s=3.0)], ["x", END])
    virtual(lambda: answer(retrying(inner)))
    assert inner.at == [1000.0, 1003.0]


def test_an_endpoint_that_wants_to_be_left_alone_for_long_is_not_waited_for(virtual: Virtual) -> None:
    inner = Scripted([failed(retry_after_s=60.0)])
    with pytest.raises(ExpertFailed) as caught:
        virtual(lambda: answer(retrying(inner)))
    assert (inner.calls, caught.value.retry_after_s) == (1, 60.0)


def test_a_stream_is_not_begun_again(virtual: Virtual) -> None:
    inner = Scripted(["half", failed()])
    seen = []

    async def read() -> None:
        async for chunk in retrying(inner).generate(ask()):
            seen.append(chunk.text)  # noqa: PERF401  # what came before the failure counts

    with pytest.raises(ExpertFailed):
        virtual(read)
    assert (seen, inner.calls) == (["half"], 1)


@pytest.mark.parametrize("wrap", [retrying, lambda inner: Fallback(inner, iter([inner]))])
def test_a_whole_answer_that_breaks_off_is_asked_for_again(virtual: Virtual, wrap: Callable[[Any], Any]) -> None:
    inner = Scripted(["half", failed()], ["whole", END])
    assert virtual(lambda: texts(wrap(timed(inner)[0]), ask(stream=False))) == ["whole"]
    assert (inner.calls, inner.running) == (2, 0)


def test_a_reader_who_leaves_ends_a_pause_and_the_call(virtual: Virtual) -> None:
    inner = Scripted([failed()], [HANG])

    async def leave(after_s: float) -> None:
        task = asyncio.create_task(answer(retrying(inner, backoff_s=1.0)))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    virtual(lambda: leave(0.0))
    virtual(lambda: leave(50.0))
    assert inner.running == 0


# Fallback


def test_the_spares_are_asked_in_turn_until_one_answers(virtual: Virtual) -> None:
    experts = [Scripted([exc], expert_id=e) for e, exc in [("a", failed()), ("b", too_long()), ("c", BreakerOpen("!"))]]
    spares = [*experts[1:], Scripted(expert_id="d"), Scripted(expert_id="e")]
    done = virtual(lambda: answer(Fallback(experts[0], iter(spares))))
    assert done.expert_id == "d"
    assert [e.calls for e in (*experts, *spares[2:])] == [1, 1, 1, 1, 0]


def test_the_first_failure_is_raised_when_all_fail(virtual: Virtual) -> None:
    first, second = Scripted([ExpertFailed("the best")]), Scripted([too_long()], expert_id="b")
    with pytest.raises(ExpertFailed, match="the best"):
        virtual(lambda: answer(Fallback(first, iter([second]))))
    assert second.calls == 1


@pytest.mark.parametrize("exc", [BadRequest("no"), QueueFull("full"), KeyError("bug")])
def test_what_is_nobodys_failure_does_not_fall_back(virtual: Virtual, exc: Exception) -> None:
    spare = Scripted(expert_id="b")
    with pytest.raises(type(exc)):
        virtual(lambda: answer(Fallback(Scripted([exc]), iter([spare]))))
    assert spare.calls == 0


def test_a_request_that_a_spare_finds_bad_is_bad(virtual: Virtual) -> None:
    first, second = Scripted([failed()]), Scripted([BadRequest("no")], expert_id="b")
    with pytest.raises(BadRequest):
        virtual(lambda: answer(Fallback(first, iter([second, Scripted(expert_id="c")]))))


def test_an_engine_that_is_not_there_falls_back(virtual: Virtual) -> None:
    first = Scripted([Unavailable("not loaded")])
    assert virtual(lambda: answer(Fallback(first, iter([Scripted(expert_id="b")])))).expert_id == "b"


def test_a_stream_does_not_change_its_expert(virtual: Virtual) -> None:
    spare = Scripted(expert_id="b")
    with pytest.raises(ExpertFailed):
        virtual(lambda: texts(Fallback(Scripted(["half", failed()]), iter([spare]))))
    assert spare.calls == 0


def test_no_spare_is_asked_twice(virtual: Virtual) -> None:
    spares = [Scripted(expert_id=e) for e in "bcd"]
    shared = iter(spares)

    async def both() -> set[str]:
        rows = [Fallback(Scripted([1.0, failed()], expert_id=e), shared) for e in "xy"]
        return {done.expert_id for done in await asyncio.gather(*map(answer, rows))}

    assert virtual(both) == {"b", "c"}
    assert [s.calls for s in spares] == [1, 1, 0]


def test_a_reader_who_leaves_closes_the_spare(virtual: Virtual) -> None:
    spare = Scripted(["x", HANG], expert_id="b")

    async def leave() -> None:
        async with aclosing(Fallback(Scripted([failed()]), iter([spare])).generate(ask())) as stream:
            await anext(stream)
            assert spare.running == 1

    virtual(leave)
    assert spare.running == 0


# Hedged


def hedged(first: Scripted, second: Scripted) -> Hedged:
    return Hedged(first, second, after_s=2.0)


def test_a_quick_first_is_not_hedged(virtual: Virtual) -> None:
    first, second = Scripted([1.9, "a", END]), Scripted(expert_id="b")
    assert virtual(lambda: answer(hedged(first, second))).text == "a"
    assert second.calls == 0


def test_a_slow_first_is_overtaken_and_ended(virtual: Virtual) -> None:
    first, second = Scripted([HANG]), Scripted([1.0, "b", 1.0, "!", END], expert_id="b")

    async def read() -> list[str]:
        seen = []
        async with aclosing(hedged(first, second).generate(ask())) as stream:
            async for chunk in stream:
                seen.append(chunk.text)
                await asyncio.sleep(0)
                assert first.running == 0
        assert second.at == [1002.0]
        return seen

    assert virtual(read) == ["b", "!", ""]
    assert (first.ended, second.ended) == (1, 1)


def test_a_first_that_wakes_up_in_time_wins(virtual: Virtual) -> None:
    first, second = Scripted([3.0, "a", END]), Scripted([2.0, "b", END], expert_id="b")
    assert virtual(lambda: answer(hedged(first, second))).text == "a"
    assert (second.calls, second.running) == (1, 0)


def test_the_better_expert_wins_a_draw(virtual: Virtual) -> None:
    first, second = Scripted([3.0, "a", END]), Scripted([1.0, "b", END], expert_id="b")
    assert virtual(lambda: answer(hedged(first, second))).text == "a"
    assert (first.running, second.running, second.ended) == (0, 0, 1)


def test_a_first_that_fails_is_replaced_at_once(virtual: Virtual) -> None:
    first, second = Scripted([0.5, failed()]), Scripted(expert_id="b")
    assert virtual(lambda: answer(hedged(first, second))).text == "b"
    assert second.at == [1000.5]


def test_a_first_that_fails_late_leaves_the_second(virtual: Virtual) -> None:
    first, second = Scripted([3.0, failed()]), Scripted([9.0, "b", END], expert_id="b")
    assert virtual(lambda: answer(hedged(first, second))).text == "b"


@pytest.mark.parametrize("second_exc", [ExpertFailed("the second"), BadRequest("the second")])
@pytest.mark.parametrize(("first_s", "second_s"), [(3.0, 5.0), (9.0, 1.0), (0.0, 0.0)])
def test_the_first_failure_is_raised_when_both_fail(
    virtual: Virtual, first_s: float, second_s: float, second_exc: CollegiumError
) -> None:
    first, second = Scripted([first_s, ExpertFailed("the first")]), Scripted([second_s, second_exc], expert_id="b")
    with pytest.raises(ExpertFailed, match="the first"):
        virtual(lambda: answer(hedged(first, second)))
    assert (first.ended, second.ended) == (1, 1)


@pytest.mark.parametrize("after_s", [0.5, 4.0])
def test_a_request_that_the_first_finds_bad_is_bad_at_once(virtual: Virtual, after_s: float) -> None:
    second = Scripted([HANG], expert_id="b")

    async def read() -> float:
        with pytest.raises(BadRequest):
            await answer(hedged(Scripted([after_s, BadRequest("no")]), second))
        return time.monotonic()

    assert virtual(read) == 1000.0 + after_s
    assert second.running == 0


def test_a_bug_in_the_second_is_not_hidden(virtual: Virtual) -> None:
    first = Scripted([HANG])
    with pytest.raises(KeyError):
        virtual(lambda: answer(hedged(first, Scripted([KeyError("bug")], expert_id="b"))))
    assert first.running == 0


def test_a_first_that_ends_without_a_chunk_has_failed(virtual: Virtual) -> None:
    assert virtual(lambda: answer(hedged(Scripted([]), Scripted(expert_id="b")))).text == "b"
    with pytest.raises(ExpertFailed, match="without an answer"):
        virtual(lambda: answer(hedged(Scripted([]), Scripted([], expert_id="b"))))


def test_a_hedged_whole_answer_races_for_the_first_chunk(virtual: Virtual) -> None:
    first, second = Scripted(["a", 60.0, END]), Scripted(expert_id="b")
    retried = retrying(first)

    async def whole() -> str:
        row = Fallback(Hedged(retried, retrying(second), after_s=2.0), iter([]))
        return (await answer(row, ask(stream=False))).text

    assert virtual(whole) == "a"
    assert second.calls == 0


def test_a_hedged_whole_answer_that_breaks_off_is_asked_elsewhere(virtual: Virtual) -> None:
    first, second, third = Scripted(["half", failed()]), Scripted(expert_id="b"), Scripted(["c", END], expert_id="c")
    row = Fallback(Hedged(timed(first)[0], timed(second)[0], after_s=2.0), iter([timed(third)[0]]))
    assert virtual(lambda: texts(row, ask(stream=False))) == ["c"]
    assert (first.calls, second.calls, third.calls) == (1, 0, 1)


@pytest.mark.parametrize("leave_after_s", [0.0, 1.0, 2.0, 3.0, 6.0])
def test_a_reader_who_leaves_ends_both(virtual: Virtual, leave_after_s: float) -> None:
    first, second = Scripted([HANG]), Scripted([3.0, "b", HANG], expert_id="b")

    async def leave() -> None:
        task = asyncio.create_task(answer(hedged(first, second)))
        await asyncio.sleep(leave_after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    virtual(leave)
    assert (first.running, second.running) == (0, 0)


async def test_wrappers_close_what_they_wrap_and_leave_the_pools_experts_alone() -> None:
    inner = Scripted()
    for wrapped in (timed(inner)[0], Breaker(inner, state_of()[0]), retrying(inner)):
        inner.closed = False
        await wrapped.aclose()
        assert inner.closed
        assert wrapped.spec is inner.spec
    inner.closed = False
    for shared in (Fallback(inner, iter([])), hedged(inner, inner)):
        await shared.aclose()
        assert not inner.closed
        assert shared.spec is inner.spec
