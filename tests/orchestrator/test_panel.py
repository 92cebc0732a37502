"""Several experts for one request: when the asking stops, what happens to the calls under way, what is said of it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.base import EngineExpert, Expert
from experts.errors import DeadlineExceeded, ExpertFailed
from experts.fake import FakeEngine
from experts.types import Completion, EngineSpec, ExpertSpec, Request
from orchestrator.aggregators.base import Aggregator
from orchestrator.aggregators.vote import Vote
from orchestrator.chains import chains
from orchestrator.panel import ask_panel
from orchestrator.pipeline import deadline
from orchestrator.resilience import Timed
from orchestrator.run import Policy, Run
from routers.base import RouteDecision, decide
from routers.baseline import Direct

Virtual = Callable[[Callable[[], Any]], Any]


class Enough:
    """An Aggregator that has enough at ``count`` answers and writes down what it was asked."""

    name, takes_one = "enough", False

    def __init__(self, count: int = 99) -> None:
        self._count = count
        self.asked: list[tuple[str, str]] = []

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        return completions[0]

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        self.asked.append(("".join(c.expert_id for c in completions), "".join(pending)))
        return len(completions) >= self._count


@dataclass
class Table:
    """Experts named a, b, c, ... over scripted engines, and one run that asks ``top_k`` of them."""

    engines: list[FakeEngine]
    experts: list[Expert]
    run: Run

    async def ask(self) -> str:
        return "".join(a.expert_id for a in await ask_panel(self.experts, self.run))

    @property
    def calls(self) -> list[tuple[str, str | None]]:
        return sorted((c.expert_id, c.error) for c in self.run.calls)

    @property
    def idle(self) -> bool:
        return sum(engine.running for engine in self.engines) == 0


def table(*scripts: dict[str, Any], top_k: int = 9, aggregator: Aggregator | None = None, **policy: Any) -> Table:
    names = "abcdef"[: len(scripts)]
    specs = [EngineSpec(engine_id=e, backend="fake", model="", options=o) for e, o in zip(names, scripts, strict=True)]
    engines = [FakeEngine(spec) for spec in specs]
    policy = {"max_calls": 8, "aggregator": aggregator or Enough(), **policy}
    run = Run(
        request=Request(prompt="?", arrival_s=time.monotonic(), deadline_s=30.0),
        policy=Policy(name="p", router=Direct("a"), top_k=top_k, **policy),
        decision=decide({e: 1.0 - i / 10 for i, e in enumerate(names)}, reason="", router="fixed").top(top_k),
    )
    pool: dict[str, Expert] = {
        s.engine_id: Timed(
            EngineExpert(ExpertSpec(expert_id=s.engine_id, engine_id=s.engine_id), engine),
            on_call=run.calls.append,
            first_chunk_s=60.0,
        )
        for s, engine in zip(specs, engines, strict=True)
    }
    assert run.decision is not None
    experts = chains(run.decision, pool, max_calls=run.policy.max_calls, hedge_after_s=None)
    return Table(engines, experts, run)


HANG: dict[str, Any] = {"fail": ["hang"]}
ERROR: dict[str, Any] = {"fail": ["error"]}


# All at once


async def test_answers_come_in_the_experts_order_less_the_failed() -> None:
    panel = table({"ttft_s": 0.01}, ERROR, {}, {"fail": ["cut"]})
    assert await panel.ask() == "ac"
    assert panel.run.unanswered == {"b": "expert_failed", "d": "expert_failed"}


async def test_the_first_experts_failure_is_raised_when_all_fail() -> None:
    with pytest.raises(ExpertFailed, match="'a'"):
        await table({"ttft_s": 0.01, **ERROR}, {"fail": ["refuse"]}).ask()


async def test_a_bug_in_one_expert_is_not_hidden_by_the_others_answers() -> None:
    panel = table({"chunks": None}, {}, HANG)
    with pytest.raises(TypeError):
        await panel.ask()
    assert panel.idle


async def test_an_answer_that_breaks_off_is_replaced_and_the_explanation_says_whose() -> None:
    panel = table({"fail": ["cut"]}, {"fail": ["cut"]}, {}, {}, top_k=1)
    assert await panel.ask() == "c"
    assert panel.run.unanswered == {"a": "expert_failed"}


def test_a_caller_who_goes_stops_every_expert(virtual: Virtual) -> None:
    async def leave() -> None:
        panel = table(HANG, {"chunk_s": 60.0, "chunks": 9}, {})
        task = asyncio.create_task(panel.ask())
        await asyncio.sleep(1)
        assert [e.running for e in panel.engines] == [1, 1, 0]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [e.cancelled for e in panel.engines] == [1, 1, 0]
        assert panel.idle

    virtual(leave)


def test_calls_that_cannot_matter_are_cancelled_down_to_the_engine(virtual: Virtual) -> None:
    async def ask() -> None:
        panel = table({"ttft_s": 2.0}, HANG, {"ttft_s": 1.0}, {"chunk_s": 9.0, "chunks": 2}, aggregator=Enough(2))
        assert await panel.ask() == "ac"
        assert time.monotonic() == 1002.0
        assert panel.calls == [("a", None), ("b", "cancelled"), ("c", None), ("d", "cancelled")]
        assert [e.cancelled for e in panel.engines] == [0, 1, 0, 1]
        assert panel.run.unanswered == {"b": "not_needed", "d": "not_needed"}
        assert panel.idle

    virtual(ask)


async def test_the_aggregator_is_asked_after_each_arrival_who_is_pending() -> None:
    aggregator = Enough()
    panel = table({"ttft_s": 0.02}, {}, ERROR, {"ttft_s": 0.04}, aggregator=aggregator)
    assert await panel.ask() == "abd"
    assert aggregator.asked == [("b", "ad"), ("ab", "d")]


async def test_an_aggregator_that_fails_to_say_leaves_nothing_behind() -> None:
    class Broken(Enough):
        async def settled(self, *_: Any) -> bool:
            raise KeyError("bug")

    panel = table({}, HANG, aggregator=Broken())
    with pytest.raises(KeyError):
        await panel.ask()
    assert panel.idle


# One by one


async def test_one_by_one_stops_when_it_is_settled() -> None:
    aggregator = Enough(2)
    panel = table({}, ERROR, {}, {}, one_by_one=True, aggregator=aggregator)
    assert await panel.ask() == "ac"
    assert [e.calls for e in panel.engines] == [1, 1, 1, 0]
    assert aggregator.asked == [("a", "bcd"), ("a", "cd"), ("ac", "d")]
    assert panel.run.unanswered == {"b": "expert_failed", "d": "not_needed"}


def test_one_by_one_never_asks_two_at_a_time(virtual: Virtual) -> None:
    async def ask() -> None:
        panel = table({"ttft_s": 1.0}, {"ttft_s": 1.0}, {"ttft_s": 1.0}, one_by_one=True)
        assert await panel.ask() == "abc"
        assert time.monotonic() == 1003.0

    virtual(ask)


async def test_one_by_one_that_all_fail_raises_the_first_failure() -> None:
    panel = table(ERROR, ERROR, one_by_one=True)
    with pytest.raises(ExpertFailed, match="'a'"):
        await panel.ask()
    assert len(panel.run.calls) == 2


async def test_one_by_one_a_spare_stands_in_for_who_fails() -> None:
    panel = table(ERROR, {}, {}, top_k=2, one_by_one=True, aggregator=Enough(1))
    assert await panel.ask() == "c"
    assert panel.run.unanswered == {"a": "expert_failed", "b": "not_needed"}


# Quorum


@pytest.mark.parametrize(
    ("ttft_s", "quorum", "answers", "at_s"),
    [
        ((1.0, 2.0, 9.0), 2, "ab", 5.0),  # enough, but the third has until 5
        ((1.0, 2.0, 4.0), 2, "abc", 4.0),
        ((1.0, 7.0, 9.0), 2, "ab", 7.0),  # at 5 one is too few
        ((1.0, 7.0, 9.0), 1, "a", 5.0),
        ((6.0, 7.0, 8.0), 9, "abc", 8.0),  # more than there are
    ],
)
def test_a_quorum_is_enough_once_the_others_are_late(
    virtual: Virtual, ttft_s: tuple[float, ...], quorum: int, answers: str, at_s: float
) -> None:
    async def ask() -> None:
        panel = table(*({"ttft_s": s} for s in ttft_s), quorum=quorum, late_s=5.0)
        assert await panel.ask() == answers
        assert time.monotonic() - 1000.0 == at_s
        assert panel.run.unanswered == {e: "late" for e in "abc" if e not in answers}
        assert panel.idle

    virtual(ask)


def test_one_by_one_a_late_expert_is_left_and_the_rest_never_asked(virtual: Virtual) -> None:
    async def ask() -> None:
        panel = table({"ttft_s": 1.0}, HANG, {}, one_by_one=True, quorum=1, late_s=5.0)
        assert await panel.ask() == "a"
        assert panel.run.unanswered == {"b": "late", "c": "not_needed"}
        assert time.monotonic() == 1005.0

    virtual(ask)


def test_a_deadline_ends_the_wait_for_a_quorum(virtual: Virtual) -> None:
    async def ask() -> None:
        panel = table({}, HANG, HANG, quorum=2, late_s=5.0)
        panel.run.request = replace(panel.run.request, deadline_s=6.0)
        for expert in panel.experts:
            expert.WHOLE_SHARE = 2.0  # type: ignore[attr-defined]
        with pytest.raises(DeadlineExceeded):
            async with deadline(panel.run.request):
                await panel.ask()
        assert panel.calls == [("a", None), ("b", "cancelled"), ("c", "cancelled")]
        assert panel.idle

    virtual(ask)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_answers_that_are_there_are_combined_before_the_deadline(virtual: Virtual, one_by_one: bool) -> None:
    """b hangs for three quarters of the deadline, and its spare c for the rest."""

    async def ask() -> None:
        panel = table({"ttft_s": 1.0}, HANG, HANG, top_k=2, one_by_one=one_by_one)
        async with deadline(panel.run.request):
            assert await panel.ask() == "a"
        assert time.monotonic() == 1027.0
        assert panel.run.unanswered == {"b": "late"}
        assert panel.idle

    virtual(ask)


# With a real aggregator


def test_a_vote_that_is_decided_waits_for_nobody(virtual: Virtual) -> None:
    async def ask() -> None:
        panel = table({"text": "4"}, {"text": "five"}, {"text": "4.0"}, {"text": "4"}, HANG, aggregator=Vote())
        assert await panel.ask() == "abcd"
        assert time.monotonic() == 1000.0
        assert panel.run.unanswered == {"e": "not_needed"}

    virtual(ask)


# Whatever happens


@given(
    scripts=st.lists(
        st.fixed_dictionaries(
            {
                "fail": st.sampled_from(["ok", "error", "cut", "hang", "refuse"]).map(lambda word: [word]),
                "ttft_s": st.sampled_from([0.0, 1.0, 4.0, 9.0]),
            }
        ),
        min_size=1,
        max_size=5,
    ),
    one_by_one=st.booleans(),
    quorum=st.sampled_from([None, 1, 2, 3]),
    enough=st.integers(1, 5),
    top_k=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_each_chosen_expert_answers_or_is_accounted_for(
    virtual: Virtual, scripts: list[dict[str, Any]], one_by_one: bool, quorum: int | None, enough: int, top_k: int
) -> None:
    async def ask() -> None:
        late_s = None if quorum is None else 5.0
        panel = table(
            *scripts, top_k=top_k, aggregator=Enough(enough), one_by_one=one_by_one, quorum=quorum, late_s=late_s
        )
        assert panel.run.decision is not None
        chosen = panel.run.decision.expert_ids
        try:
            async with deadline(panel.run.request):
                answers = await panel.ask()
        except (ExpertFailed, DeadlineExceeded):
            assert time.monotonic() <= 1030.01
        else:
            assert set(panel.run.unanswered) == set(chosen) - set(answers)
            assert len(answers) <= len(chosen)
        assert len(panel.run.calls) == sum(e.calls for e in panel.engines)
        assert panel.idle

    virtual(ask)
