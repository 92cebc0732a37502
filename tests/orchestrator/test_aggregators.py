import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from experts.types import Completion, Message, Request, SamplingParams
from orchestrator.aggregators import AGGREGATORS
from orchestrator.aggregators.election import lot
from orchestrator.aggregators.first import First
from orchestrator.aggregators.vote import Vote, WeightedVote
from orchestrator.build import make_aggregator
from routers.base import RouteDecision
from routers.static import WordLlama

APPLES = "How many apples are left?"


def ask(question=APPLES, **fields):
    return Request(request_id="r", messages=(Message(role="user", content=question),), **fields)


def decided(top_k=None, **scores):
    decision = RouteDecision(expert_ids=(), weights=(), scores=scores, reason="", router="scripted")
    return decision.top(top_k or len(scores))


def said(**texts):
    return [Completion(request_id="r", expert_id=e, text=t) for e, t in texts.items()]


def combine(aggregator, decision, answers, request=None):
    """These aggregators wait for nothing, so that one step ends them; an event loop each time would take seconds."""
    with pytest.raises(StopIteration) as ended:
        aggregator.aggregate(request or ask(), decision, answers).send(None)
    return ended.value.value


EQUAL = decided(a=1, b=1, c=1)


def test_first_takes_the_best_ranked_whatever_the_order():
    decision = decided(a=0.2, b=0.9, c=0.9)
    answers = said(a="x", b="y", c="z", spare="w")
    for order in (answers, answers[::-1]):
        assert combine(First(), decision, order).expert_id == "b"
    assert combine(First(), decision, answers[::3]).expert_id == "a"


def test_the_majority_wins_and_the_trace_says_how():
    answers = said(a="The answer is 4.", b="It is 5.", c="So $4.00 remain.")
    result = combine(Vote(), EQUAL, answers)
    assert result == replace(answers[0], trace=result.trace)
    assert result.trace == {
        "answers": [
            {"expert_id": "a", "extracted": "4", "weight": 1.0},
            {"expert_id": "b", "extracted": "5", "weight": 1.0},
            {"expert_id": "c", "extracted": "4", "weight": 1.0},
        ],
        "votes": {"4": 2.0, "5": 1.0},
        "winner": "4",
    }


def test_the_winners_heaviest_expert_speaks_for_them_in_his_own_words():
    answers = said(a="4", b="It is four: 4", c="5")
    result = combine(Vote(), decided(a=1, b=3, c=2), answers)
    assert (result.expert_id, result.text) == ("b", "It is four: 4")


def test_weights_can_outvote_a_majority():
    decision = decided(a=6, b=2, c=2)
    answers = said(a="4", b="5", c="5")
    assert combine(Vote(), decision, answers).text == "5"
    weighted = combine(WeightedVote(), decision, answers)
    assert weighted.text == "4"
    assert weighted.trace["votes"] == {"4": 0.6, "5": 0.4}


def test_weights_are_shared_out_among_those_who_came_and_can_be_read():
    decision = decided(a=6, b=2, c=2)
    assert combine(WeightedVote(), decision, said(b="5", c="4")).trace["votes"] == {"5": 0.5, "4": 0.5}
    partly = combine(WeightedVote(), decision, said(a="no idea", b="5", c="4"))
    assert partly.trace["answers"] == [
        {"expert_id": "a", "extracted": None, "weight": 0.0},
        {"expert_id": "b", "extracted": "5", "weight": 0.5},
        {"expert_id": "c", "extracted": "4", "weight": 0.5},
    ]


def test_a_spare_weighs_as_much_as_the_least_of_the_chosen():
    decision = decided(top_k=2, a=6, b=2, spare=1)
    result = combine(WeightedVote(), decision, said(a="4", spare="5"))
    assert result.trace["votes"] == {"4": 0.75, "5": 0.25}
    assert combine(WeightedVote(), decision, said(unheard_of="5")).text == "5"


def test_weights_that_are_all_nought_count_alike():
    decision = RouteDecision(expert_ids=("a", "b"), weights=(0.0, 0.0), scores={"a": 0, "b": 0}, reason="", router="x")
    result = combine(WeightedVote(), decision, said(a="4", b="4", c="?"))
    assert result.trace["votes"] == {"4": 1.0}


def test_a_tie_goes_to_the_heavier_side():
    decision = decided(a=5, b=1, c=3, d=2)
    result = combine(Vote(), decision, said(b="5", c="4", d="4", a="5"))
    assert result.text == "5"
    assert result.trace["note"] == "2 answers tied; decided by weight"


def test_sums_that_only_rounding_tells_apart_tie():
    decision = RouteDecision(
        expert_ids=("a", "b", "c"), weights=(0.1, 0.2, 0.3), scores={"a": 1, "b": 2, "c": 3}, reason="", router="x"
    )
    result = combine(WeightedVote(), decision, said(a="4", b="4", c="5"))
    assert result.trace["note"] == "2 answers tied; decided by seed"


def test_an_equal_tie_is_drawn_by_the_request_s_seed():
    decision = decided(a=1, b=1)
    answers = said(a="4", b="5")

    def winner(**fields):
        return combine(Vote(), decision, answers, ask(**fields)).text

    by_params = {seed: winner(params=SamplingParams(seed=seed)) for seed in range(40)}
    assert set(by_params.values()) == {"4", "5"}
    for seed, text in by_params.items():
        assert winner(metadata={"route_seed": seed}) == text
        assert winner(metadata={"route_seed": seed}, params=SamplingParams(seed=seed + 1)) == text
    assert winner() == winner()
    assert combine(Vote(), decision, answers).trace["note"] == "2 answers tied; decided by seed"


def test_answers_that_cannot_be_read_do_not_vote():
    result = combine(Vote(), EQUAL, said(a="I cannot tell.", b="No idea.", c="4"))
    assert result.text == "4"
    assert result.trace["votes"] == {"4": 1.0}


def test_when_none_can_be_read_the_heaviest_expert_answers():
    result = combine(Vote(), decided(a=1, b=3, c=2), said(a="no", b="hm", c=""))
    assert result.text == "hm"
    assert result.trace["votes"] == {}
    assert result.trace["winner"] is None
    assert "no answer could be read" in result.trace["note"]


def test_one_answer_is_enough():
    assert combine(WeightedVote(), EQUAL, said(b="4")).trace["votes"] == {"4": 1.0}
    assert combine(Vote(), EQUAL, said(b="")).text == ""


def test_a_text_that_is_none_counts_as_empty():
    answers = [replace(said(a="")[0], text=None), *said(b="4")]
    assert combine(Vote(), decided(a=9, b=1), answers).text == "4"


def test_letters_of_the_question_s_own_options():
    question = "Where is the Louvre?\nA. Rome\nB. Paris\nC. Lyon"
    answers = said(a="B", b="(B) Paris", c="I am sure: the answer is C.", d="Paris")
    result = combine(Vote(), decided(a=1, b=1, c=9, d=1), answers, ask(question))
    assert result.trace["votes"] == {"B": 3.0, "C": 1.0}


def test_percentages_vote_with_what_the_others_wrote():
    answers = said(a="50%", b="50", c="0.5")
    assert combine(Vote(), EQUAL, answers, ask("What percentage?")).trace["votes"] == {"50": 2.0, "0.5": 1.0}


def call(name, arguments, call_id):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tool_calls_vote_by_what_they_call():
    a, b, c, d = said(a="", b="", c="", d="4")
    answers = [
        replace(a, tool_calls=(call("sum", '{"x": 1, "y": 2}', "1"),)),
        replace(b, tool_calls=(call("sum", '{"y":2,"x":1}', "2"),)),
        replace(c, tool_calls=(call("sum", "{broken", "3"),)),
        d,
    ]
    result = combine(Vote(), decided(a=1, b=2, c=3, d=4), answers)
    assert result.expert_id == "b"
    assert result.tool_calls == answers[1].tool_calls
    assert sorted(result.trace["votes"].values()) == [1.0, 1.0, 2.0]
    json.dumps(result.trace)


def test_tool_calls_nested_beyond_reason_still_vote():
    deep = replace(said(a="")[0], tool_calls=(call("f", "[" * 950 + "]" * 950, "1"),))
    assert combine(Vote(), decided(a=1), [deep]).tool_calls == deep.tool_calls


def test_long_answers_are_shortened_in_the_trace_only():
    question = "Write a story."
    stories = ["once upon a time " * 50 + end for end in ("they lived.", "they died.")]
    result = combine(Vote(), EQUAL, said(a=stories[0], b=stories[1], c=stories[1]), ask(question))
    assert result.text == stories[1]
    assert len(result.trace["votes"]) == 2
    assert all(len(answer) < 150 for answer in result.trace["votes"])


def test_options_choose_the_extraction():
    answers = said(a='{"n": 4, "why": "x"}', b='{"why": "y", "n": 4.0}', c='{"n": 5}')
    by_field = make_aggregator_of("vote", extract="json", field="n")
    assert combine(by_field, EQUAL, answers).trace["votes"] == {"4": 2.0, "5": 1.0}
    whole = make_aggregator_of("weighted_vote", extract="text")
    assert len(combine(whole, EQUAL, answers).trace["votes"]) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [({"extract": "numbers"}, "known: auto"), ({"field": "n"}, "'field'"), ({"kind": "number"}, "'kind'")],
)
@pytest.mark.parametrize("name", ["vote", "weighted_vote"])
def test_bad_options_are_refused(name, options, words):
    with pytest.raises(ConfigError, match=words):
        make_aggregator_of(name, **options)


def make_aggregator_of(name, **options):
    from orchestrator.config import AggregatorConfig

    return make_aggregator(AggregatorConfig(name=name, options=options), {}, WordLlama)


def test_every_registered_aggregator_is_made_by_name():
    for name in ("first", "vote", "weighted_vote"):
        assert name in AGGREGATORS
        assert make_aggregator_of(name).name == name


TEXTS = st.sampled_from(["4", "4.0", "5", "50%", "0.5", "50", "none", "", "It is 4", "(B)", "é", "The answer is 5."])


@st.composite
def elections(draw):
    experts = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True))
    scores = {e: draw(st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.3, 1.0])) for e in experts}
    answers = [
        Completion(request_id="r", expert_id=e, text=draw(TEXTS), index=index)
        for e in [*experts, "spare"]
        for index in range(draw(st.integers(0, 2)))
    ]
    top_k = draw(st.integers(1, len(experts)))
    return decided(top_k, **scores), answers or said(spare="4"), draw(st.integers(0, 5) | st.none())


@settings(deadline=None)
@given(election=elections(), data=st.data(), name=st.sampled_from(["first", "vote", "weighted_vote"]))
def test_the_order_in_which_answers_come_never_matters(election, data, name):
    decision, answers, seed = election
    request = ask(metadata={} if seed is None else {"route_seed": seed})
    aggregator = make_aggregator_of(name)
    result = combine(aggregator, decision, answers, request)
    shuffled = data.draw(st.permutations(answers))
    assert combine(aggregator, decision, shuffled, request) == result
    assert replace(result, trace=None) in answers


@settings(deadline=None)
@given(election=elections())
def test_the_weights_of_votes_sum_to_one(election):
    decision, answers, _ = election
    trace = combine(WeightedVote(), decision, answers).trace
    assert len(trace["answers"]) == len(answers)
    if trace["winner"] is not None:
        assert sum(trace["votes"].values()) == pytest.approx(1)
        assert sum(a["weight"] for a in trace["answers"]) == pytest.approx(1)
        assert trace["votes"][trace["winner"]] == max(trace["votes"].values())


# settled


def is_settled(aggregator, decision, answers, pending, request=None):
    with pytest.raises(StopIteration) as ended:
        aggregator.settled(request or ask(), decision, answers, pending).send(None)
    return ended.value.value


@pytest.mark.parametrize(
    ("texts", "pending", "settled"),
    [
        ({"a": "4"}, "bc", False),
        ({"a": "4", "b": "4"}, "c", True),
        ({"a": "4", "b": "4"}, "cd", False),  # two for another answer: a tie that weight or the seed decides
        ({"a": "4", "b": "5"}, "c", False),
        ({"a": "4", "b": "4", "c": "5"}, "d", False),
        ({"a": "4", "b": "4", "c": "4", "d": "5"}, "e", True),
        ({"a": "?", "b": "no idea"}, "c", False),
        ({"a": "4", "b": "5"}, "", True),
        ({"a": "50%", "b": "50%"}, "c", False),
    ],
)
def test_a_vote_is_settled_when_the_pending_cannot_turn_it(texts, pending, settled):
    decision = decided(a=1, b=1, c=1, d=1, e=1)
    assert is_settled(Vote(), decision, said(**texts), pending) == settled
    assert is_settled(WeightedVote(), decision, said(**texts), pending) == settled


def test_a_weighty_expert_settles_a_weighted_vote_alone():
    decision = decided(a=6, b=2, c=2)
    assert is_settled(WeightedVote(), decision, said(a="4"), "bc")
    assert not is_settled(Vote(), decision, said(a="4"), "bc")
    assert not is_settled(WeightedVote(), decided(a=5, b=2, c=3), said(a="4"), "bc")  # half against half


def test_a_tie_that_weight_decides_is_settled_and_one_that_the_seed_decides_is_not():
    assert is_settled(Vote(), decided(a=9, b=1), said(a="4"), "b")
    assert not is_settled(Vote(), decided(a=1, b=1), said(a="4"), "b")


def test_a_tie_between_answers_that_are_known_is_settled_by_the_seed():
    decision = decided(a=1, b=1, c=1, d=1)
    answers = said(a="4", b="4", c="5")

    def outcomes(seed):
        request = ask(metadata={"route_seed": seed})
        ends = {combine(Vote(), decision, [*answers, *said(d=t)], request).trace["winner"] for t in ("4", "5", "6")}
        return is_settled(Vote(), decision, answers, "d", request), len(ends) == 1

    assert {outcomes(seed) for seed in range(20)} == {(True, True), (False, False)}


@pytest.mark.parametrize("name", ["vote", "weighted_vote"])
def test_a_percentage_that_was_settled_may_yet_be_read_otherwise(name):
    """50% is 0.5 beside 0.5, and 50 beside 50: the winner is open while the third may say so."""
    decision, came = decided(3, a=1, b=1, c=1), said(a="50%", b="0.5")
    question = ask("What percentage?")
    assert combine(make_aggregator_of(name), decision, came, question).trace["winner"] == "0.5"
    assert not is_settled(make_aggregator_of(name), decision, came, ["c"], question)


@settings(deadline=None, max_examples=300)
@given(election=elections(), data=st.data(), name=st.sampled_from(["vote", "weighted_vote"]))
def test_what_is_settled_no_later_answer_changes(election, data, name):
    decision, answers, seed = election
    request = ask(metadata={} if seed is None else {"route_seed": seed})
    came = [c for c in answers if c.index == 0]
    pending = [e for e in decision.expert_ids if e not in {c.expert_id for c in came}]
    aggregator = make_aggregator_of(name)
    if not came or not is_settled(aggregator, decision, came, pending, request):
        return
    winner = combine(aggregator, decision, came, request).trace["winner"]
    late = [
        Completion(request_id="r", expert_id=data.draw(st.sampled_from([e, "spare"])), text=data.draw(TEXTS))
        for e in pending
        if data.draw(st.booleans())
    ]
    assert combine(aggregator, decision, [*came, *late], request).trace["winner"] == winner


@cache
def luckiest(seed):
    """An answer that the seed prefers to about any other."""
    return max(map(str, range(100, 5000)), key=lambda answer: lot(seed, answer))


@settings(deadline=None, max_examples=200)
@given(election=elections(), name=st.sampled_from(["vote", "weighted_vote"]))
def test_what_is_not_settled_some_later_answers_change(election, name):
    decision, answers, seed = election
    request = ask(metadata={} if seed is None else {"route_seed": seed})
    came = [c for c in answers if c.index == 0]
    pending = [e for e in decision.expert_ids if e not in {c.expert_id for c in came}]
    aggregator = make_aggregator_of(name)
    if not came or is_settled(aggregator, decision, came, pending, request) or "%" in "".join(c.text for c in came):
        return
    winners = {
        combine(aggregator, decision, [*came, *said(**dict.fromkeys(pending, text))], request).trace["winner"]
        for text in ["4", "5", "0.5", "50", "(B)", "none", luckiest(seed)]
    }
    assert len(winners) > 1
