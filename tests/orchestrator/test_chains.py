import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.base import EngineExpert, Expert, collect
from experts.errors import BadRequest
from experts.fake import FakeEngine
from experts.types import EngineSpec, ExpertSpec, Message, Request, SamplingParams
from orchestrator.chains import affordable, calls_within, chains, dearest_usd
from routers.base import RouteDecision, decide

Virtual = Callable[[Callable[[], Any]], Any]
REQUEST = Request(prompt="?")


def fake(expert_id: str, **options: Any) -> EngineExpert:
    engine = FakeEngine(EngineSpec(engine_id=expert_id, backend="fake", model="fake", options=options))
    return EngineExpert(ExpertSpec(expert_id=expert_id, engine_id=expert_id), engine)


def pool(**scripts: dict[str, Any]) -> dict[str, EngineExpert]:
    return {expert_id: fake(expert_id, **options) for expert_id, options in scripts.items()}


def engine(expert: EngineExpert) -> FakeEngine:
    assert isinstance(expert.engine, FakeEngine)
    return expert.engine


# chains


def decision(*expert_ids: str, k: int) -> RouteDecision:
    scores = {e: 1.0 - i / 10 for i, e in enumerate(expert_ids)}
    return decide(scores, reason="", router="test").top(k)


async def asked(rows: list[Expert]) -> list[str]:
    done = await asyncio.gather(*(collect(row.generate(REQUEST), REQUEST) for row in rows), return_exceptions=True)
    return [d.expert_id if not isinstance(d, BaseException) else type(d).__name__ for d in done]


@pytest.mark.parametrize(
    ("max_calls", "answers", "calls"),
    [
        (1, ["ExpertFailed"], [1, 0, 0, 0]),
        (2, ["ExpertFailed"], [1, 1, 0, 0]),
        (3, ["c"], [1, 1, 1, 0]),
        (8, ["c"], [1, 1, 1, 0]),
    ],
)
async def test_spares_stand_by_in_order_of_score_up_to_max_calls(
    max_calls: int, answers: list[str], calls: list[int]
) -> None:
    experts = pool(a={"fail": ["error"]}, b={"fail": ["error"]}, c={}, d={})
    rows = chains(decision(*"abcd", k=1), experts, max_calls=max_calls, hedge_after_s=None)
    assert await asked(rows) == answers
    assert [engine(e).calls for e in experts.values()] == calls


async def test_choices_share_their_spares() -> None:
    experts = pool(a={"fail": ["error"]}, b={"fail": ["error"]}, c={}, d={})
    rows = chains(decision(*"abcd", k=2), experts, max_calls=8, hedge_after_s=None)
    assert sorted(await asked(rows)) == ["c", "d"]
    assert [row.spec.expert_id for row in rows] == ["a", "b"]


async def test_without_spares_the_experts_are_asked_as_they_are() -> None:
    experts = pool(a={}, b={})
    assert chains(decision("a", "b", k=2), experts, max_calls=8, hedge_after_s=1.0) == list(experts.values())
    assert chains(decision("a", "b", k=1), experts, max_calls=1, hedge_after_s=1.0) == [experts["a"]]


def test_each_hedged_choice_takes_one_spare_and_falls_back_on_the_rest(virtual: Virtual) -> None:
    hang, error = {"fail": ["hang"]}, {"fail": ["error"]}
    experts = pool(a=hang, b=error, c=error, d=hang, e={}, f={})
    rows = chains(decision(*"abcdef", k=2), experts, max_calls=5, hedge_after_s=1.0)

    async def read() -> str:
        # b and its spare d: d hangs. a and its spare c: c has failed, a hangs.
        tasks = [asyncio.create_task(collect(row.generate(REQUEST), REQUEST)) for row in rows]
        await asyncio.sleep(50)
        calls = "".join(str(engine(e).calls) for e in experts.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return calls

    assert virtual(read) == "111100"
    assert sum(engine(e).running for e in experts.values()) == 0


@given(
    size=st.integers(1, 6),
    k=st.integers(1, 6),
    max_calls=st.integers(1, 8),
    bad=st.sets(st.integers(0, 5)),
    hedge=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_never_more_than_max_calls_and_nobody_twice(
    size: int, k: int, max_calls: int, bad: set[int], hedge: bool
) -> None:
    names = "abcdef"[:size]
    experts = pool(**{e: {"fail": ["error" if i in bad else "ok"]} for i, e in enumerate(names)})
    k = min(k, size, max_calls)
    rows = chains(decision(*names, k=k), experts, max_calls=max_calls, hedge_after_s=60.0 if hedge else None)
    answers = asyncio.run(asked(rows))
    calls = [engine(e).calls for e in experts.values()]
    assert max(calls) == 1
    assert sum(calls) <= max_calls
    good = [e for e in answers if e != "ExpertFailed"]
    assert len(set(good)) == len(good)
    # Nobody is given up while a good expert could still have been asked.
    spare_good = [i for i, n in enumerate(calls) if n == 0 and i not in bad]
    assert len(good) == k or not spare_good or sum(calls) == max_calls or hedge


# Budgets

ASKED = Request(messages=(Message(role="user", content="x" * 400),), params=SamplingParams(max_tokens=50))


def priced(expert_id: str, usd_in: float = 0.0, usd_out: float = 0.0, **more: Any) -> ExpertSpec:
    return ExpertSpec(
        expert_id=expert_id, engine_id="e", usd_per_mtok_in=usd_in * 1e6, usd_per_mtok_out=usd_out * 1e6, **more
    )


def test_the_dearest_answer_counts_prompt_answers_and_the_experts_own_words() -> None:
    assert dearest_usd(priced("a", 1.0), ASKED) == 100
    assert dearest_usd(priced("a", 0.0, 1.0), ASKED) == 50
    own = priced("a", 1.0, system_prompt="x" * 40, demos=(("x" * 20, "x" * 20),))
    assert dearest_usd(own, ASKED) == 120
    three = Request(prompt="x" * 8, params=SamplingParams(n=3))
    assert dearest_usd(priced("a", 1.0, 1.0), three) == 2 + 3 * 256
    assert dearest_usd(priced("a", 0.0, 1.0, defaults=SamplingParams(max_tokens=10)), three) == 30


def test_who_alone_is_too_dear_is_no_candidate() -> None:
    specs = [priced("dear", 2.0), priced("cheap", 0.5), priced("free")]
    assert affordable(specs, ASKED, None) == specs
    assert [s.expert_id for s in affordable(specs, ASKED, 50.0)] == ["cheap", "free"]
    with pytest.raises(BadRequest, match="for 10 USD; it may take 50") as caught:
        affordable(specs[:2], ASKED, 10.0)
    assert caught.value.param == "collegium.max_usd"


@pytest.mark.parametrize(
    ("max_usd", "max_calls", "calls"), [(100, 9, 1), (149, 9, 1), (150, 9, 2), (151, 9, 3), (999, 2, 2), (999, 9, 3)]
)
def test_all_who_are_asked_share_one_budget(max_usd: float, max_calls: int, calls: int) -> None:
    ranked = [priced("a", 1.0), priced("b", 0.5), priced("c", 0.01)]
    assert calls_within(ranked, ASKED, max_calls=max_calls, max_usd=max_usd) == calls


def test_a_budget_that_buys_no_call_is_refused() -> None:
    with pytest.raises(BadRequest, match="it may take 100"):
        calls_within([priced("a", 1.0), priced("b")], ASKED, max_calls=8, max_usd=99)


async def test_an_unread_stream_starts_nothing() -> None:
    expert = fake("a")
    async with aclosing(expert.generate(REQUEST)):
        pass
    assert engine(expert).calls == 0
