import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.base import EngineExpert, Expert
from experts.errors import BadRequest, CollegiumError, ConfigError, DeadlineExceeded, ExpertFailed, QueueFull
from experts.fake import FakeEngine
from experts.types import Chunk, Completion, EngineSpec, ExpertSpec, Request, SamplingParams, Usage
from orchestrator.admission import Admission
from orchestrator.aggregators.first import First
from orchestrator.pipeline import Orchestrator, deadline
from orchestrator.resilience import Breaker, BreakerState, CallRecord, Retrying, Timed
from orchestrator.run import Ledger, Policy, Run
from routers.base import RouteDecision, decide
from routers.baseline import Direct

Virtual = Callable[[Callable[[], Any]], Any]


class Ranked:
    """A Router that ranks by a fixed list; whoever is not in the pool is left out."""

    name = "ranked"

    def __init__(self, *order: str) -> None:
        self._order = order

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        known = [s.expert_id for s in pool]
        scores = {e: 1.0 - i / 10 for i, e in enumerate(self._order) if e in known}
        return [decide(scores, reason="fixed", router=self.name) for _ in requests]


class Joined:
    """An Aggregator that needs every answer."""

    name, takes_one = "joined", False

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        text = " | ".join(sorted(c.text for c in completions))
        return replace(completions[0], text=text, trace={"answers": len(completions)})

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        return not pending


class Diary:
    """An Observer that writes everything down."""

    def __init__(self) -> None:
        self.routes: list[Run] = []
        self.calls: list[CallRecord] = []
        self.ends: list[Run] = []

    def routed(self, run: Run) -> None:
        self.routes.append(run)

    def called(self, run: Run, call: CallRecord) -> None:
        assert call in run.calls
        self.calls.append(call)

    def ended(self, run: Run) -> None:
        self.ends.append(run)


@dataclass
class House:
    """A service without its edges, over fake engines; one expert on each, named a, b, c."""

    orchestrator: Orchestrator
    engines: Mapping[str, FakeEngine]
    ledger: Ledger
    admission: Admission
    diary: Diary

    def run(self, policy: Policy | None = None, **request: Any) -> Run:
        request = {"prompt": "?", "arrival_s": time.monotonic(), "deadline_s": 30.0, **request}
        return Run(request=Request(**request), policy=policy or self.policy())

    def policy(self, **changes: Any) -> Policy:
        return Policy(**{"name": "p", "router": Ranked(*self.engines), "aggregator": First(), **changes})

    def is_idle(self) -> bool:
        running = sum(engine.running for engine in self.engines.values())
        return not (running or len(self.ledger) or self.admission.queued) and self.admission._free == 2


def house(
    *scripts: dict[str, Any],
    retries: int = 0,
    hedge_after_s: float | None = None,
    queue: int = 2,
    usd_per_mtok_out: float = 0.0,
) -> House:
    diary = Diary()
    ledger, admission = Ledger([diary]), Admission(max_concurrency=2, queue=queue)
    experts: dict[str, Expert] = {}
    engines = {}
    for expert_id, options in zip("abcdef", scripts, strict=False):
        spec = EngineSpec(engine_id=expert_id, backend="fake", model="fake", options=options)
        engines[expert_id] = FakeEngine(spec)
        own = ExpertSpec(expert_id=expert_id, engine_id=expert_id, usd_per_mtok_out=usd_per_mtok_out)
        timed = Timed(EngineExpert(own, engines[expert_id]), on_call=ledger.note_call, first_chunk_s=5.0)
        breaker = Breaker(timed, BreakerState(failures=3, open_s=10.0))
        experts[expert_id] = Retrying(breaker, retries=retries, backoff_s=0.5)
    orchestrator = Orchestrator(experts=experts, admission=admission, ledger=ledger, hedge_after_s=hedge_after_s)
    return House(orchestrator, engines, ledger, admission, diary)


async def stream(built: House, run: Run) -> list[Chunk]:
    async with deadline(run.request), aclosing(built.orchestrator.generate(run)) as chunks:
        return [chunk async for chunk in chunks]


async def told() -> None:
    """Observers hear of an end once the answer is on its way."""
    await asyncio.sleep(0)


def text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


# One expert


async def test_a_stream_comes_chunk_by_chunk_from_the_best_expert() -> None:
    built = house({"text": "one two", "chunks": 3}, {})
    run = built.run()
    chunks = await stream(built, run)
    assert [c.text for c in chunks if c.text] == ["one", " tw", "o"]
    assert {c.expert_id for c in chunks} == {"a"}
    assert [c.finish_reason for c in chunks][-2:] == ["stop", None]
    assert run.answer_usage == run.usage == Usage(prompt_tokens=1, completion_tokens=2)
    assert built.is_idle()


async def test_observers_hear_of_the_route_each_call_and_the_end() -> None:
    built = house({"fail": ["error"]}, {}, usd_per_mtok_out=1e6)
    run = built.run()
    await stream(built, run)
    await told()
    diary = built.diary
    assert (diary.routes, diary.ends) == ([run], [run])
    assert [(c.expert_id, c.error) for c in diary.calls] == [("a", "expert_failed"), ("b", None)]
    assert (run.error, run.usd, run.usage.total_tokens) == (None, 3.0, 4)
    assert run.decision is not None
    assert run.decision.expert_ids == ("a",)
    assert set(run.decision.scores) == {"a", "b"}
    assert run.decision.route_ms > 0
    assert run.latency_s > 0


@pytest.mark.parametrize("stream", [True, False])
async def test_a_whole_answer_has_a_completion_a_choice(stream: bool) -> None:
    built = house({"text": "yes"})
    run = built.run(params=SamplingParams(n=3), stream=stream)
    done = await built.orchestrator.complete(run)
    assert not run.request.stream
    assert [(c.index, c.text, c.finish_reason) for c in done] == [(i, "yes", "stop") for i in range(3)]


async def test_an_answer_without_usage_is_still_one() -> None:
    built = house({"usage": False})
    run = built.run()
    assert text(await stream(built, run)) == "a heard: ?"
    assert run.usage == run.answer_usage == Usage()


async def test_a_stream_that_breaks_off_is_the_callers_to_see() -> None:
    built = house({"fail": ["cut"], "chunks": 9}, {})
    run = built.run()
    async with aclosing(built.orchestrator.generate(run)) as chunks:
        assert (await anext(chunks)).text == "a "
        with pytest.raises(ExpertFailed, match="cut off"):
            await anext(chunks)
    assert (run.error, built.engines["b"].calls) == ("expert_failed", 0)
    assert built.is_idle()


@pytest.mark.parametrize("script", ["cut", "drop"])
async def test_a_whole_answer_that_breaks_off_is_replaced(script: str) -> None:
    built = house({"fail": [script]}, {})
    run = built.run()
    (done,) = await built.orchestrator.complete(run)
    assert (done.expert_id, run.error, len(run.calls)) == ("b", None, 2)


async def test_a_long_prompt_goes_to_an_expert_that_can_read_it() -> None:
    built = house({"context_length": 2}, {"context_length": 9})
    assert (await stream(built, built.run(prompt="one two three four")))[0].expert_id == "b"
    with pytest.raises(BadRequest, match="at most 2"):
        await stream(built, built.run(prompt="word " * 20))


# Several experts


async def test_several_answers_become_one() -> None:
    built = house({"text": "x"}, {"text": "y"}, {"text": "z"})
    run = built.run(built.policy(aggregator=Joined(), top_k=2))
    (chunk,) = await stream(built, run)
    assert (chunk.text, chunk.finish_reason, run.trace) == ("x | y", "stop", {"answers": 2})
    assert run.answer_usage == Usage(prompt_tokens=1, completion_tokens=1)
    assert run.usage == Usage(prompt_tokens=2, completion_tokens=2)


async def test_an_expert_that_fails_is_replaced_or_missed() -> None:
    scripts: list[dict[str, Any]] = [{"text": "x"}, {"fail": ["cut"]}, {"text": "z"}]
    built = house(*scripts)
    run = built.run(built.policy(aggregator=Joined(), top_k=2))
    assert text(await stream(built, run)) == "x | z"
    built = house(*scripts)
    run = built.run(built.policy(aggregator=Joined(), top_k=2, max_calls=2))
    assert text(await stream(built, run)) == "x"
    assert run.error is None


async def test_the_answers_tool_calls_leave_as_deltas() -> None:
    call = {"index": 0, "id": "1", "function": {"name": "f", "arguments": "{}"}}
    other = {**call, "index": 1, "id": "2"}
    built = house({"tool_calls": [call, other]}, {})
    (chunk,) = await stream(built, built.run(built.policy(aggregator=Joined(), top_k=2)))
    assert [(c["index"], c["id"], c["function"]["name"]) for c in chunk.tool_calls] == [(0, "1", "f"), (1, "2", "f")]
    assert chunk.finish_reason == "tool_calls"


@pytest.mark.parametrize("aggregator", [Joined(), First()])
async def test_more_choices_need_one_expert(aggregator: Any) -> None:
    built = house({}, {})
    run = built.run(built.policy(aggregator=aggregator, top_k=2), params=SamplingParams(n=2))
    if aggregator.takes_one:
        assert len(await built.orchestrator.complete(run)) == 2
        return
    with pytest.raises(BadRequest, match="top_k to 1") as caught:
        await built.orchestrator.complete(run)
    assert (caught.value.param, run.error) == ("n", "bad_request")


async def test_what_takes_one_answer_asks_one_expert() -> None:
    built = house({}, {})
    await stream(built, built.run(built.policy(top_k=2)))
    assert [e.calls for e in built.engines.values()] == [1, 0]


async def test_a_bug_in_an_aggregator_is_an_internal_error_and_nothing_stays_behind() -> None:
    class Broken(Joined):
        async def aggregate(self, *_: Any) -> Completion:
            raise KeyError("bug")

    built = house({}, {})
    run = built.run(built.policy(aggregator=Broken(), top_k=2))
    with pytest.raises(KeyError):
        await stream(built, run)
    assert run.error == "internal_error"
    assert built.is_idle()


# Routing


async def test_a_route_asks_nobody() -> None:
    built = house({}, {}, {})
    decision = await built.orchestrator.route(
        built.run().request, built.policy(aggregator=Joined(), top_k=5, max_calls=2)
    )
    assert decision.expert_ids == ("a", "b")
    assert sum(e.calls for e in built.engines.values()) == 0


class Stale:
    name = "stale"

    def __init__(self, **scores: float) -> None:
        self._scores = scores

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        return [decide(self._scores, reason="", router=self.name)]


@pytest.mark.parametrize("scores", [{"a": 1.0, "gone": 0.5}, {}])
async def test_a_router_that_chooses_from_another_pool_is_found_out(scores: dict[str, float]) -> None:
    built = house({})
    run = built.run(built.policy(router=Stale(**scores)))
    with pytest.raises(ConfigError, match=r"'stale' chose among .*fit it again"):
        await stream(built, run)
    assert (run.error, run.decision) == ("config_error", None)


async def test_a_budget_bounds_all_calls_together() -> None:
    # 4 tokens an answer at most, at 1 USD a token: 4 USD a call.
    built = house({"fail": ["error"]}, {"fail": ["error"]}, {}, usd_per_mtok_out=1e6)
    four = SamplingParams(max_tokens=4)
    with pytest.raises(ExpertFailed, match="'a'"):
        await stream(built, built.run(built.policy(max_usd=8.0), params=four))
    assert [e.calls for e in built.engines.values()] == [1, 1, 0]
    run = built.run(built.policy(max_usd=12.0), params=four)
    assert (await stream(built, run))[0].expert_id == "c"
    decision = await built.orchestrator.route(
        built.run(params=four).request, built.policy(aggregator=Joined(), top_k=3, max_usd=8.0)
    )
    assert decision.expert_ids == ("a", "b")


class Consults(Joined):
    """Asks the last expert once to combine."""

    def consults(self, expert_ids: Sequence[str]) -> Sequence[str]:
        return ("c",)


@pytest.mark.parametrize(
    ("budget", "asked"),
    [
        ({"max_calls": 8}, "abc"),
        ({"max_calls": 4}, "abc"),
        ({"max_calls": 3}, "ab"),
        ({"max_calls": 2}, "a"),
        ({"max_usd": 16.0}, "abc"),
        ({"max_usd": 15.9}, "ab"),
        ({"max_usd": 11.9}, "a"),
    ],
)
async def test_what_an_aggregator_asks_itself_is_within_the_budgets(budget: dict[str, Any], asked: str) -> None:
    built = house({}, {}, {}, usd_per_mtok_out=1e6)
    policy = built.policy(aggregator=Consults(), top_k=3, **budget)
    run = built.run(policy, params=SamplingParams(max_tokens=4))
    await stream(built, run)
    assert "".join(c.expert_id for c in run.calls) == asked


async def test_spares_leave_room_for_what_an_aggregator_asks_itself() -> None:
    built = house({}, {"fail": ["error"]}, {}, {})
    run = built.run(built.policy(aggregator=Consults(), top_k=2, max_calls=3))
    assert text(await stream(built, run)) == "a heard: ?"
    assert len(run.calls) == 2


@pytest.mark.parametrize("router", [Ranked("a", "b"), Direct("a")])
async def test_a_budget_that_buys_no_answer_is_the_requests_fault(router: Any) -> None:
    built = house({}, {}, usd_per_mtok_out=1e6)
    run = built.run(built.policy(router=router, max_usd=3.9), params=SamplingParams(max_tokens=4))
    with pytest.raises(BadRequest, match=r"for 3.9 USD; it may take 4\."):
        await stream(built, run)
    assert sum(e.calls for e in built.engines.values()) == 0


async def test_retries_are_not_counted_by_max_calls() -> None:
    built = house({"fail": ["error", "error", "ok"]}, {}, retries=2)
    run = built.run(built.policy(max_calls=1))
    built.orchestrator._experts["a"]._backoff_s = 0.001  # type: ignore[attr-defined]
    assert (await stream(built, run))[0].expert_id == "a"
    assert [c.error for c in run.calls] == ["expert_failed", "expert_failed", None]


# Deadlines, cancellation, admission


@pytest.mark.parametrize(
    ("scripts", "policy"),
    [
        ([{"fail": ["hang"]}, {"fail": ["hang"]}], {}),
        ([{"chunk_s": 4.0, "chunks": 9}], {}),
        ([{"ttft_s": 4.0}, {"fail": ["hang"]}, {"chunk_s": 2.0, "chunks": 3}], {"aggregator": Joined(), "top_k": 3}),
    ],
    ids=["before the first chunk", "mid stream", "several"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_deadline_ends_everything(
    virtual: Virtual, scripts: list[dict[str, Any]], policy: dict[str, Any], whole: bool
) -> None:
    async def late() -> None:
        built = house(*scripts)
        run = built.run(built.policy(**policy), deadline_s=3.0)
        with pytest.raises(DeadlineExceeded, match="its 3 s"):
            await (built.orchestrator.complete(run) if whole else stream(built, run))
        assert time.monotonic() == 1003.0
        await told()
        assert (run.error, run.latency_s, built.diary.ends) == ("deadline_exceeded", 3.0, [run])
        assert "cancelled" in {c.error for c in run.calls}
        assert built.is_idle()

    virtual(late)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_that_hangs_is_replaced_and_its_breaker_opens(virtual: Virtual, whole: bool, top_k: int) -> None:
    async def ask() -> None:
        built = house({"fail": ["hang"]}, {"ttft_s": 1.0}, {})
        policy = built.policy(aggregator=Joined() if top_k > 1 else First(), top_k=top_k)
        for _ in range(4):
            run = built.run(policy)
            await (built.orchestrator.complete(run) if whole else stream(built, run))
            assert run.error is None
            assert run.latency_s < 30.0
        assert [c.error for c in built.diary.calls if c.expert_id == "a"] == ["expert_failed"] * 3
        assert run.latency_s <= 1.0
        assert built.is_idle()

    virtual(ask)


def test_a_deadline_counts_while_queued(virtual: Virtual) -> None:
    async def late() -> None:
        built = house({"ttft_s": 4.0})
        runs = [built.run(deadline_s=d) for d in (30.0, 30.0, 3.0)]
        results = await asyncio.gather(*(stream(built, run) for run in runs), return_exceptions=True)
        assert [type(r) for r in results] == [list, list, DeadlineExceeded]
        assert [run.error for run in runs] == [None, None, "deadline_exceeded"]
        assert runs[2].calls == []
        assert built.is_idle()

    virtual(late)


def test_a_deadline_that_has_passed_ends_before_an_answer(virtual: Virtual) -> None:
    async def late() -> None:
        built = house({"ttft_s": 0.001})
        run = built.run(arrival_s=time.monotonic() - 60, deadline_s=30.0)
        with pytest.raises(DeadlineExceeded):
            await stream(built, run)
        assert built.is_idle()

    virtual(late)


async def test_a_timeout_of_somebody_else_is_not_the_deadline() -> None:
    with pytest.raises(TimeoutError, match="disk"):
        async with deadline(Request(prompt="?")):
            raise TimeoutError("disk")


@pytest.mark.parametrize("leave_after_s", [0.0, 0.5, 1.5, 2.5, 4.5, 5.5, 6.5], ids=lambda s: f"after {s} s")
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("hedge_after_s", [None, 1.0])
def test_a_caller_who_leaves_stops_every_generation(
    virtual: Virtual, leave_after_s: float, top_k: int, hedge_after_s: float | None
) -> None:
    async def leave() -> None:
        built = house(
            {"ttft_s": 2.0, "fail": ["error"]},
            {"ttft_s": 2.0, "chunk_s": 2.0, "chunks": 9},
            {"fail": ["hang"]},
            retries=1,
            hedge_after_s=hedge_after_s,
        )
        run = built.run(built.policy(aggregator=Joined() if top_k > 1 else First(), top_k=top_k))
        task = asyncio.create_task(stream(built, run))
        await asyncio.sleep(leave_after_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert run.error == "cancelled"
        assert built.is_idle()
        assert len(built.ledger) == 0

    virtual(leave)


async def test_a_caller_who_stops_reading_stops_the_generation() -> None:
    built = house({"chunks": 9})
    run = built.run()
    async with aclosing(built.orchestrator.generate(run)) as chunks:
        await anext(chunks)
        assert (built.engines["a"].running, len(built.ledger)) == (1, 1)
    assert (built.engines["a"].running, built.engines["a"].cancelled) == (0, 1)
    assert (run.error, [c.error for c in run.calls]) == ("cancelled", ["cancelled"])
    assert built.is_idle()


def test_past_the_queue_a_request_is_refused_and_reported(virtual: Virtual) -> None:
    async def crowd() -> None:
        built = house({"ttft_s": 1.0}, queue=1)
        runs = [built.run() for _ in range(4)]
        results = await asyncio.gather(*(stream(built, run) for run in runs), return_exceptions=True)
        assert [type(r) for r in results] == [list, list, list, QueueFull]
        assert runs[3].error == "queue_full"
        assert len(built.diary.ends) == 4
        assert built.is_idle()

    virtual(crowd)


def test_a_slow_first_is_hedged(virtual: Virtual) -> None:
    async def hedge() -> None:
        built = house({"ttft_s": 4.0}, {"ttft_s": 1.0}, hedge_after_s=2.0)
        run = built.run()
        chunks = await stream(built, run)
        assert (chunks[0].expert_id, run.latency_s) == ("b", 3.0)
        assert sorted((c.expert_id, c.error) for c in run.calls) == [("a", "cancelled"), ("b", None)]
        assert built.is_idle()

    virtual(hedge)


def test_max_calls_of_one_leaves_no_hedge(virtual: Virtual) -> None:
    async def hedge() -> None:
        built = house({"ttft_s": 4.0}, {}, hedge_after_s=2.0)
        assert (await stream(built, built.run(built.policy(max_calls=1))))[0].expert_id == "a"
        assert built.engines["b"].calls == 0

    virtual(hedge)


# The ledger


async def test_a_request_id_in_use_is_refused_and_the_first_run_goes_on() -> None:
    built = house({"chunks": 3})
    run = built.run(request_id="same")
    async with aclosing(built.orchestrator.generate(run)) as chunks:
        await anext(chunks)
        with pytest.raises(BadRequest, match="'same' is under way"):
            await stream(built, built.run(request_id="same"))
        async for _ in chunks:
            pass
    await told()
    assert (run.error, len(run.calls), built.diary.ends) == (None, 1, [run])
    assert built.is_idle()
    assert await stream(built, built.run(request_id="same"))


async def test_drained_waits_for_the_last_run() -> None:
    built = house({})
    await built.ledger.drained()
    first, second = built.orchestrator.generate(built.run()), built.orchestrator.generate(built.run())
    await anext(first)
    await anext(second)
    waiting = asyncio.create_task(built.ledger.drained())
    await first.aclose()
    await asyncio.sleep(0)
    assert not waiting.done()
    await second.aclose()
    await asyncio.wait_for(waiting, 1)


async def test_observers_have_heard_of_the_last_run_when_it_is_drained() -> None:
    """What they write to may be closed then."""
    built = house({})
    run = built.run()
    chunks = built.orchestrator.generate(run)
    await anext(chunks)

    async def drained() -> list[Run]:
        await built.ledger.drained()
        return list(built.diary.ends)

    waiting = asyncio.create_task(drained())
    await asyncio.sleep(0)
    await chunks.aclose()
    assert await waiting == [run]


async def test_an_observer_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Diary):
        def routed(self, run: Run) -> None:
            raise KeyError("routed")

        def called(self, run: Run, call: CallRecord) -> None:
            raise KeyError("called")

        def ended(self, run: Run) -> None:
            raise KeyError("ended")

    built = house({})
    built.ledger._observers = (Broken(), built.diary)
    run = built.run()
    assert text(await stream(built, run)) == "a heard: ?"
    await told()
    assert (run.error, built.diary.ends, len(built.diary.calls)) == (None, [run], 1)
    assert [r.getMessage() for r in caplog.records] == ["observer Broken failed"] * 3


def test_a_call_of_no_run_is_nobodys_business() -> None:
    diary = Diary()
    record = CallRecord(request_id="?", expert_id="a", usage=Usage(), usd=0, ttft_s=None, latency_s=0, started_s=0)
    Ledger([diary]).note_call(record)
    assert diary.calls == []


# Whatever happens: one answer or one error, in time, and nothing stays behind


@dataclass(frozen=True)
class Case:
    scripts: list[dict[str, Any]]
    top_k: int
    n: int
    retries: int
    hedge_after_s: float | None
    max_calls: int
    whole: bool
    leave_after_s: float | None
    requests: int


def scripts() -> st.SearchStrategy[dict[str, Any]]:
    outcome = st.sampled_from(["ok", "error", "cut", "drop", "hang", "refuse"])
    return st.fixed_dictionaries(
        {
            "fail": st.lists(outcome, min_size=1, max_size=3),
            "ttft_s": st.sampled_from([0.0, 0.5, 3.0, 7.0]),
            "chunk_s": st.sampled_from([0.0, 0.5, 7.0]),
            "chunks": st.integers(1, 3),
            "usage": st.booleans(),
        }
    )


cases = st.builds(
    Case,
    scripts=st.lists(scripts(), min_size=1, max_size=4),
    top_k=st.integers(1, 3),
    n=st.integers(1, 3),
    retries=st.integers(0, 2),
    hedge_after_s=st.sampled_from([None, 0.0, 1.0]),
    max_calls=st.integers(1, 5),
    whole=st.booleans(),
    leave_after_s=st.sampled_from([None, None, None, 0.1, 2.0, 6.0, 15.0]),
    requests=st.integers(1, 5),
)


def well_formed(answer: list[Completion] | list[Chunk], n: int) -> bool:
    """Each choice ends once, and its text is all of one expert's, or of several that were joined."""
    ends = [part.index for part in answer if part.finish_reason is not None]
    whole = re.compile(r"[a-d] heard: \?( \| [a-d] heard: \?)*")
    return sorted(ends) == list(range(n)) and all(whole.fullmatch(text_of(answer, i)) for i in range(n))


def text_of(answer: list[Completion] | list[Chunk], index: int) -> str:
    return "".join(part.text for part in answer if part.index == index)


@given(case=cases)
@settings(max_examples=150, deadline=None)
def test_every_request_gets_one_answer_or_one_error_in_time(virtual: Virtual, case: Case) -> None:
    async def settle() -> None:
        built = house(*case.scripts, retries=case.retries, hedge_after_s=case.hedge_after_s)
        policy = built.policy(
            aggregator=Joined() if case.top_k > 1 else First(), top_k=case.top_k, max_calls=case.max_calls
        )
        runs = [built.run(policy, deadline_s=20.0, params=SamplingParams(n=case.n)) for _ in range(case.requests)]
        answer = built.orchestrator.complete if case.whole else lambda run: stream(built, run)
        tasks = [asyncio.create_task(answer(run)) for run in runs]
        if case.leave_after_s is not None:
            await asyncio.sleep(case.leave_after_s)
            tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)

        assert time.monotonic() <= 1020.01
        for i, (run, result) in enumerate(zip(runs, results, strict=True)):
            if isinstance(result, asyncio.CancelledError):
                assert (i, run.error) == (0, "cancelled")
                assert case.leave_after_s is not None
            elif isinstance(result, BaseException):
                assert isinstance(result, CollegiumError), result
                assert run.error == result.code
            else:
                assert well_formed(result, case.n)
                assert run.error is None
            assert run.latency_s <= 20.01
            per_expert: dict[str, int] = {}
            for call in run.calls:
                per_expert[call.expert_id] = per_expert.get(call.expert_id, 0) + 1
            assert len(per_expert) <= case.max_calls
            assert all(count <= case.retries + 1 for count in per_expert.values())
            assert run.usage.total_tokens == sum(c.usage.total_tokens for c in run.calls)
        assert sorted(map(id, built.diary.ends)) == sorted(map(id, runs))
        assert sum(len(run.calls) for run in runs) == sum(e.calls for e in built.engines.values())
        assert built.is_idle()
        async with built.admission.place(), built.admission.place():
            pass

    virtual(settle)
