import asyncio
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import BadRequest, ConfigError
from experts.types import ExpertSpec, Message, Request
from routers.base import RouterParts
from routers.baseline import Always, Direct, Hash, Random, RoundRobin, Rules


class Expert:
    def __init__(self, spec):
        self.spec = spec


def no_encoder():
    raise AssertionError("a baseline router needs no encoder")


def pool_of(*expert_ids):
    return [ExpertSpec(expert_id=e, engine_id="x") for e in expert_ids]


POOL = pool_of("a", "b", "c")
PARTS = RouterParts(encoder=no_encoder, experts={s.expert_id: Expert(s) for s in POOL})
RULES = [{"expert": "b", "contains": "integral"}, {"expert": "c", "min_chars": 40}]


def ask(text="hello", **metadata):
    return Request(messages=(Message(role="user", content=text),), metadata=metadata)


async def route(router, *requests, pool=POOL):
    return await router.route(requests or [ask()], pool)


async def one(router, request=None, pool=POOL):
    (decision,) = await router.route([request or ask()], pool)
    return decision


ROUTERS = [
    Always(PARTS),
    Always(PARTS, expert="c"),
    Random(PARTS, seed=1),
    RoundRobin(PARTS),
    Hash(PARTS),
    Rules(PARTS, rules=RULES, default="a"),
]


@settings(deadline=None)
@given(
    router=st.sampled_from(ROUTERS),
    expert_ids=st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True),
    texts=st.lists(st.text(max_size=60), max_size=4),
    top_k=st.integers(1, 9),
)
def test_every_decision_stays_within_the_pool_and_its_weights_sum_to_one(router, expert_ids, texts, top_k):
    decisions = asyncio.run(router.route([ask(t) for t in texts], pool_of(*expert_ids)))
    assert len(decisions) == len(texts)
    for decision in decisions:
        wide = decision.top(top_k)
        assert len(decision.expert_ids) == 1
        assert set(decision.scores) == set(expert_ids)
        assert all(math.isfinite(s) for s in decision.scores.values())
        assert len(set(wide.expert_ids)) == len(wide.expert_ids) == min(top_k, len(expert_ids))
        assert set(wide.expert_ids) <= set(expert_ids)
        assert sum(wide.weights) == pytest.approx(1)
        assert wide.expert_ids[0] == decision.expert_ids[0]
        assert decision.router == router.name
        assert decision.reason


async def test_always_keeps_the_others_in_order_as_spares():
    assert (await one(Always(PARTS, expert="b"))).ranked() == ["b", "a", "c"]
    assert (await one(Always(PARTS))).ranked() == ["a", "b", "c"]
    assert (await one(Always(PARTS, expert="b"), pool=pool_of("c", "a"))).ranked() == ["c", "a"]


def test_always_refuses_an_expert_nobody_knows():
    with pytest.raises(ConfigError, match="no expert 'z'; known: a, b, c"):
        Always(PARTS, expert="z")


async def test_direct_asks_the_one_named_and_nobody_else():
    decision = await one(Direct("b"))
    assert (decision.expert_ids, dict(decision.scores)) == (("b",), {"b": 1.0})


async def test_direct_does_not_exceed_the_budget_that_took_its_expert_out_of_the_pool():
    with pytest.raises(BadRequest, match=r"'b'.*max_usd") as caught:
        await one(Direct("b"), pool=pool_of("a", "c"))
    assert caught.value.param == "collegium.max_usd"


@settings(deadline=None)
@given(seed=st.integers())
def test_random_repeats_itself_with_the_same_seed(seed):
    first, second = Random(PARTS, seed=seed), Random(PARTS, seed=seed)
    requests = [ask(str(i)) for i in range(20)]
    assert asyncio.run(first.route(requests, POOL)) == asyncio.run(second.route(requests, POOL))


async def test_random_is_uniform():
    decisions = await route(Random(PARTS, seed=3), *[ask()] * 3000)
    counts = Counter(d.expert_ids[0] for d in decisions)
    assert all(900 < counts[e] < 1100 for e in "abc")


@pytest.mark.parametrize("seed", [0, 7, "seven", 1.5, ["anything"]])
async def test_a_request_s_own_seed_decides_whatever_came_before(seed):
    router = Random(PARTS)
    decisions = await route(router, *[ask(route_seed=seed), ask(), ask(route_seed=seed)])
    assert decisions[0].scores == decisions[2].scores
    assert decisions[0].scores == (await one(Random(PARTS, seed=99), ask(route_seed=seed))).scores


async def test_requests_with_different_seeds_differ():
    decisions = await route(Random(PARTS), *[ask(route_seed=i) for i in range(50)])
    assert {d.expert_ids[0] for d in decisions} == {"a", "b", "c"}


@settings(deadline=None)
@given(batches=st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_round_robin_is_fair_however_the_requests_come(batches):
    router = RoundRobin(PARTS)
    decisions = [d for n in batches for d in asyncio.run(router.route([ask()] * n, POOL))]
    chosen = [d.expert_ids[0] for d in decisions]
    assert chosen == [("a", "b", "c")[i % 3] for i in range(len(chosen))]
    assert decisions[0].ranked() == ["a", "b", "c"]


async def test_the_first_rule_that_holds_decides_and_later_ones_stand_by():
    rules = [
        {"expert": "c", "contains": ["derivative", "INTEGRAL"]},
        {"expert": "b", "regex": r"\bx\^2\b"},
        {"expert": "a", "tag": "finance"},
    ]
    router = Rules(PARTS, rules=rules, default="a")
    decision = await one(router, ask("The Integral of x^2"))
    assert decision.ranked() == ["c", "b", "a"]
    assert decision.reason == "rule 1: contains ['derivative', 'INTEGRAL']"
    assert (await one(router, ask("Plot X^2"))).reason == r"rule 2: regex \bx\^2\b"
    assert (await one(router, ask("hi", tag="finance"))).reason == "rule 3: tag finance"
    assert (await one(router, ask("hi"))).reason == "no rule matched"


async def test_all_conditions_of_a_rule_must_hold():
    router = Rules(PARTS, rules=[{"expert": "b", "contains": "tax", "min_chars": 5, "max_chars": 8}], default="a")
    chosen = [(await one(router, ask(text))).expert_ids[0] for text in ("tax", "tax  ", "a tax", "tax rates now")]
    assert chosen == ["a", "b", "b", "a"]


async def test_lengths_are_of_the_whole_question_but_texts_are_sought_at_its_start():
    rules = [{"expert": "b", "contains": "needle"}, {"expert": "c", "min_chars": 100_000}]
    router = Rules(PARTS, rules=rules, default="a")
    assert (await one(router, ask("x" * 99_994 + "needle"))).expert_ids == ("c",)
    assert (await one(router, ask("needle" + "x" * 99_994))).expert_ids == ("b",)


async def test_a_rule_whose_expert_is_not_in_the_pool_is_passed_over():
    router = Rules(PARTS, rules=[{"expert": "b", "contains": "x"}, {"expert": "c", "contains": "x"}], default="a")
    assert (await one(router, ask("x"), pool=pool_of("a", "c"))).ranked() == ["c", "a"]
    assert (await one(router, ask("y"), pool=pool_of("c"))).expert_ids == ("c",)


GOOD = {"expert": "a", "contains": "x"}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"contains": "x"}, "has 'expert'"),
        ({"expert": "a", "contain": "x"}, "contains"),
        ({"expert": "a"}, "default"),
        ({"expert": "z", "contains": "x"}, "no expert 'z'"),
        ({"expert": ["a"], "contains": "x"}, "no expert"),
        ({"expert": "a", "contains": 5}, "'contains'"),
        ({"expert": "a", "contains": []}, "'contains'"),
        ({"expert": "a", "contains": ["x", 5]}, "'contains'"),
        ({"expert": "a", "regex": "("}, "no regular expression"),
        ({"expert": "a", "regex": ""}, "'regex'"),
        ({"expert": "a", "regex": "a{99999999999}"}, "no regular expression"),
        ({"expert": "a", "min_chars": "ten"}, "'min_chars'"),
        ({"expert": "a", "max_chars": -1}, "'max_chars'"),
        ({"expert": "a", "max_chars": True}, "'max_chars'"),
        ("contains x", "has 'expert'"),
        (None, "has 'expert'"),
    ],
)
def test_a_bad_rule_is_named_by_its_number(bad, words):
    with pytest.raises(ConfigError, match="rule 2") as caught:
        Rules(PARTS, rules=[GOOD, bad], default="a")
    assert words in caught.value.message


def test_a_default_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="default: no expert 'z'; known: a, b, c"):
        Rules(PARTS, rules=[], default="z")


async def test_hash_spreads_questions_evenly_and_always_alike():
    requests = [ask(f"question {i}") for i in range(3000)]
    chosen = [d.expert_ids[0] for d in await route(Hash(PARTS), *requests)]
    assert all(abs(n - 1000) < 120 for n in Counter(chosen).values())
    again = [d.expert_ids[0] for d in await route(Hash(PARTS), *requests[::-1], pool=POOL[::-1])]
    assert chosen == again[::-1]
    other = [d.expert_ids[0] for d in await route(Hash(PARTS, seed=1), *requests)]
    assert 0.25 < sum(a == b for a, b in zip(chosen, other, strict=True)) / 3000 < 0.42


async def test_hash_moves_only_the_questions_of_who_left():
    requests = [ask(f"question {i}") for i in range(600)]
    before = [d.expert_ids[0] for d in await route(Hash(PARTS), *requests)]
    after = [d.expert_ids[0] for d in await route(Hash(PARTS), *requests, pool=pool_of("a", "c"))]
    assert all(x == y for x, y in zip(before, after, strict=True) if x != "b")
