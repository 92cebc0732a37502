"""The aggregator 'cascade': when it stops, and which answer it gives."""

import math
from dataclasses import replace

import pytest

from experts.base import EngineExpert
from experts.errors import ConfigError
from experts.fake import FakeEngine
from experts.types import Completion, EngineSpec, ExpertSpec, Message, Request
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.cascade import Cascade, Verifier, mean_probability
from routers.base import RouteDecision

ASKED = Request(messages=(Message(role="user", content="What is 2 + 2?"),))
ORDER = RouteDecision(
    expert_ids=("cheap", "middle", "dear"),
    weights=(0.4, 0.3, 0.3),
    scores={"cheap": 1.0, "middle": 0.9, "dear": 0.8},
    reason="",
    router="cascade",
)


def answer(expert_id, text, *probabilities):
    content = [{"token": "x", "logprob": math.log(p)} for p in probabilities]
    logprobs = {"content": content} if content else None
    return Completion(request_id=ASKED.request_id, expert_id=expert_id, text=text, logprobs=logprobs)


def experts(text, fail=("ok",)):
    engine = FakeEngine(EngineSpec(engine_id="x", backend="fake", model="fake", options={"text": text, "fail": fail}))
    return engine, {"judge": EngineExpert(ExpertSpec(expert_id="judge", engine_id="x"), engine)}


def made(text="x", fail=("ok",), **options):
    engine, own = experts(text, fail)
    return engine, Cascade(AggregatorParts(encoder=None, experts=own), **options)


async def settled(cascade, *answers):
    pending = [e for e in ORDER.expert_ids if e not in {a.expert_id for a in answers}]
    return await cascade.settled(ASKED, ORDER, answers, pending)


async def test_two_that_agree_are_enough():
    _, cascade = made(extract="number")
    first, second = answer("cheap", "It is 4."), answer("middle", "4")
    assert not await settled(cascade)
    assert not await settled(cascade, first)
    assert await settled(cascade, first, second)
    assert not await settled(cascade, first, answer("middle", "5"))
    chosen = await cascade.aggregate(ASKED, ORDER, [first, second])
    assert chosen.text == "4"
    assert chosen.trace["settled"] is True


async def test_where_none_agree_the_dearest_answer_stands():
    _, cascade = made(extract="number")
    answers = [answer("cheap", "3"), answer("middle", "no idea"), answer("dear", "4")]
    assert await settled(cascade, *answers), "nobody is left to ask"
    for order in (answers, answers[::-1]):
        chosen = await cascade.aggregate(ASKED, ORDER, order)
        assert chosen.expert_id == "dear"
        assert chosen.trace["settled"] is False


async def test_answers_that_cannot_be_read_do_not_agree():
    _, cascade = made(extract="number")
    assert not await settled(cascade, answer("cheap", "who knows"), answer("middle", "who knows"))


async def test_a_sure_answer_stops_and_an_unsure_one_does_not():
    _, cascade = made(signal="logprobs", threshold=0.8)
    assert mean_probability(answer("cheap", "4", 0.9, 0.9)) == pytest.approx(0.9)
    assert await settled(cascade, answer("cheap", "4", 0.9, 0.9))
    assert not await settled(cascade, answer("cheap", "4", 0.9, 0.2))
    assert not await settled(cascade, answer("cheap", "4")), "no log-probabilities, no confidence"
    unsure = [answer("cheap", "3", 0.5), answer("dear", "4", 0.6)]
    assert (await cascade.aggregate(ASKED, ORDER, unsure)).text == "4"
    sure = [answer("cheap", "3", 0.85), answer("dear", "4", 0.99)]
    assert (await cascade.aggregate(ASKED, ORDER, sure)).text == "3", "good enough when it came"


async def test_a_prompts_log_probabilities_count_too():
    told = Completion(request_id="r", expert_id="x", text="4", logprobs={"token_logprobs": [None, math.log(0.5)]})
    assert mean_probability(told) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("says", "stops"), [('{"choice": "A"}', True), ('{"choice": "B"}', False), ("Who am I to say?", False)]
)
async def test_a_verifier_says_whether_to_go_on(says, stops):
    engine, cascade = made(says, signal="verifier", verifier="judge")
    first = answer("cheap", "4")
    assert await settled(cascade, first) is stops
    chosen = await cascade.aggregate(ASKED, ORDER, [first])
    assert chosen.trace["settled"] is stops
    assert engine.calls == 1, "an answer is verified once"


async def test_a_verifier_that_fails_verifies_nothing():
    _, own = experts("x", ["refuse"])
    (score,) = await Verifier(own["judge"]).score(ASKED, [answer("cheap", "4")])
    assert score.value == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": "mood"}, "'signal' is one of"),
        ({"signal": "verifier"}, "'verifier' names an expert"),
        ({"verifier": "judge"}, "'verifier' names an expert"),
        ({"signal": "verifier", "verifier": "nobody"}, "no expert 'nobody'"),
        ({"threshold": 0.0}, "'threshold' lies"),
        ({"agree": 1}, "'agree' is 2"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        made(**options)


async def test_stages_that_the_router_skipped_are_not_asked_after_a_dearer_one():
    _, cascade = made(extract="number")
    begun_dear = RouteDecision(
        expert_ids=("dear", "cheap"),
        weights=(0.7, 0.3),
        scores={"dear": 1.0, "cheap": 0.3},
        reason="",
        router="cascade",
    )
    first = [answer("dear", "5")]
    assert await cascade.settled(ASKED, begun_dear, first, ["cheap"])
    assert not await cascade.settled(ASKED, begun_dear, [], ["cheap"])
    elsewhere = replace(begun_dear, router="knn")
    assert not await cascade.settled(ASKED, elsewhere, first, ["cheap"])
