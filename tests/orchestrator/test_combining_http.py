"""Several experts behind one request, over HTTP: whatever they say, or fail to say, one well-formed reply comes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.orchestrator.served import Served, serving

ASK: list[Any] = [{"role": "user", "content": "How many legs has a spider?"}]
ENGINES: dict[str, dict[str, Any]] = {
    "a": {"text": "It has 8 legs."},
    "eight": {"text": "\\boxed{8}"},
    "json": {"text": '{"answer": 8.0}'},
    "seven": {"text": "The answer is 7."},
    "empty": {"text": ""},
    "vague": {"text": "Who knows?"},
    "thinks": {"text": "<think>Is it 7? The answer is 7.</think>The answer is 8."},
    "long": {"text": "word " * 200_000},
    "nul": {"text": "\0\U0001f600 8 \u202e"},
    "lone": {"text": "It has \ud83d 8 legs."},
    "writer": {"text": "Eight."},
    "broken": {"fail": ["refuse"]},
    "slow": {"ttft_s": 30},
}
FUSE: dict[str, Any] = {"name": "fuse", "options": {"expert": "writer"}}
UNFUSED: dict[str, Any] = {"name": "fuse", "options": {"expert": "broken"}}
JUDGED: dict[str, Any] = {"name": "general_expert", "options": {"expert": "vague", "labels": ["8", "7"]}}
RANKED: dict[str, Any] = {"name": "general_expert", "options": {"expert": "vague", "mode": "rank"}}
ARGUED: dict[str, Any] = {"name": "debate", "options": {"enabled": True}}
COMBINERS: dict[str, Any] = {
    "vote": "vote",
    "weighted_vote": "weighted_vote",
    "best_of": "best_of",
    "fuse": FUSE,
    "unfused": UNFUSED,
    "judged": JUDGED,
    "ranked": RANKED,
    "argued": ARGUED,
}
PANELS = {
    "formats": ("a", "eight", "json", "seven", "thinks"),
    "unparsable": ("vague", "empty", "nul"),
    "empty": ("empty", "empty2", "empty3"),
    "failing": ("broken", "seven", "a", "eight"),
    "alone": ("broken", "broken2", "empty"),
    "long": ("long", "nul", "a"),
    "lone": ("lone", "a", "seven"),
}


OWN_CALLS: dict[str, Callable[[int], int]] = {
    "fuse": lambda n: 1,
    "general_expert predict": lambda n: 1,
    "general_expert rank": lambda n: n * (n - 1),
    "debate": lambda n: n,
}


def _name(aggregator: Any) -> str:
    if not isinstance(aggregator, dict):
        return str(aggregator)
    name: str = aggregator["name"]
    return f"{name} {aggregator['options'].get('mode', 'predict')}" if name == "general_expert" else name


def panel(*experts: str, **policy: Any) -> dict[str, Any]:
    """A policy that asks these experts, best first, and nobody in their place."""
    rules = [{"min_chars": 1, "expert": e} for e in experts]
    router = {"name": "rules", "options": {"rules": rules, "default": experts[-1]}}
    max_calls = len(experts) + OWN_CALLS.get(_name(policy.get("aggregator")), lambda n: 0)(len(experts))
    return {"router": router, "top_k": len(experts), "max_calls": max_calls, "aggregator": "vote", **policy}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    policies = {
        f"{name}.{combiner}": panel(*experts, aggregator=aggregator)
        for name, experts in PANELS.items()
        for combiner, aggregator in COMBINERS.items()
    }
    policies |= {
        "default": panel("a", "eight", "seven", aggregator="first", max_calls=4),
        "dead": panel("broken", "broken2"),
        "quorum": panel("slow", "a", "seven", quorum=2, late_s=0.05),
        "settled": panel("a", "slow", "eight"),
        "in_turn": panel("a", "eight", "seven", one_by_one=True),
        "too_late": panel("a", "slow", aggregator=FUSE),
    }
    config = {
        "engines": {e: {"backend": "fake", "options": o} for e, o in ENGINES.items()},
        "experts": {e: {"engine": e.rstrip("23")} for e in [*ENGINES, "empty2", "empty3", "broken2"]},
        "policies": policies,
        "limits": {"deadline_s": 2.0, "max_calls": 64},
        "resilience": {"retries": 0, "breaker_failures": 1000},
        "encoder": {"model": "wordllama"},
    }
    with serving(config) as running:
        yield running


def ask(served: Served, model: str, **extension: Any) -> dict[str, Any]:
    body = {"model": model, "messages": ASK, "collegium": {"explain": True, **extension}}
    reply = served.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


def text(told: dict[str, Any]) -> str:
    (choice,) = told["choices"]
    assert choice["finish_reason"] == "stop"
    content: str = choice["message"]["content"]
    return content


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("name", PANELS)
def test_whatever_the_experts_say_one_completion_comes(served: Served, name: str, combiner: str) -> None:
    told = ask(served, f"collegium/{name}.{combiner}")
    assert isinstance(text(told), str)
    answers = told["collegium"]["trace"]["answers"]
    failing = [e for e in PANELS[name] if e.startswith("broken")]
    assert sorted(a["expert_id"] for a in answers) == sorted(set(PANELS[name]) - set(failing))
    assert told["collegium"]["unanswered"] == [{"expert_id": e, "reason": "expert_failed"} for e in failing]
    assert told["usage"]["total_tokens"] == sum(c["usage"]["total_tokens"] for c in told["collegium"]["calls"])


@pytest.mark.parametrize("combiner", ["vote", "weighted_vote", "unfused"])
def test_answers_in_different_formats_vote_together(served: Served, combiner: str) -> None:
    told = ask(served, f"collegium/formats.{combiner}")
    votes = told["collegium"]["trace"]["votes"]
    assert max(votes, key=votes.get) == "8"
    assert [a["extracted"] for a in told["collegium"]["trace"]["answers"]] == ["8", "8", "8", "7", "8"]


def test_the_call_that_fuses_is_one_of_the_requests_calls(served: Served) -> None:
    told = ask(served, "collegium/formats.fuse")
    assert (text(told), told["model"]) == ("Eight.", "writer")
    assert sorted(c["expert_id"] for c in told["collegium"]["calls"]) == sorted([*PANELS["formats"], "writer"])
    assert told["collegium"]["answer_usage"]["completion_tokens"] == 1


def test_an_aggregator_named_in_a_request_is_one_that_a_policy_has(served: Served) -> None:
    told = ask(served, "collegium", top_k=3, aggregator="fuse")
    assert (told["collegium"]["aggregator"], text(told)) == ("fuse", "Eight.")
    assert len(told["collegium"]["calls"]) == 4
    body = {"model": "collegium", "messages": ASK, "collegium": {"aggregator": "stack"}}
    refused = served.http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert "known: best_of, debate, first, fuse, general_expert, vote, weighted_vote" in refused.text


@pytest.mark.parametrize("stream", [True, False])
def test_when_all_fail_there_is_one_clear_error(served: Served, stream: bool) -> None:
    body = {"model": "collegium/dead", "messages": ASK, "stream": stream}
    reply = served.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "expert_failed"
    assert "'broken'" in reply.json()["error"]["message"]


def test_a_quorum_does_not_wait_for_who_is_late(served: Served) -> None:
    told = ask(served, "collegium/quorum")
    assert text(told) == "It has 8 legs."
    assert told["collegium"]["unanswered"] == [{"expert_id": "slow", "reason": "late"}]
    assert {c["expert_id"]: c["error"] for c in told["collegium"]["calls"]} == {
        "slow": "cancelled",
        "a": None,
        "seven": None,
    }


@pytest.mark.parametrize(("policy", "left"), [("settled", "slow"), ("in_turn", "seven")])
def test_calls_that_cannot_matter_are_not_waited_for(served: Served, policy: str, left: str) -> None:
    told = ask(served, f"collegium/{policy}")
    assert "8" in text(told)
    assert told["collegium"]["unanswered"] == [{"expert_id": left, "reason": "not_needed"}]
    kept = served.http.get(f"/v1/decisions/{told['id']}").json()
    assert kept["unanswered"] == told["collegium"]["unanswered"]
    page = served.http.get("/metrics").text
    assert f'collegium_calls_per_request_count{{policy="{policy}"}} 1.0' in page
    calls = len(told["collegium"]["calls"])
    assert f'collegium_calls_per_request_sum{{policy="{policy}"}} {calls}.0' in page


def test_a_deadline_is_one_error(served: Served) -> None:
    body = {"model": "collegium/too_late", "messages": ASK}
    reply = served.http.post("/v1/chat/completions", json=body)
    assert reply.status_code in (200, 504)
    if reply.status_code == 504:
        assert reply.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("model", ["lone", "collegium/lone.vote", "collegium/lone.best_of"])
@pytest.mark.parametrize("stream", [True, False])
def test_half_a_surrogate_pair_becomes_a_replacement_character(served: Served, model: str, stream: bool) -> None:
    body = {"model": model, "messages": ASK, "stream": stream}
    reply = served.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200
    assert "It has \ufffd 8 legs." in reply.text


def test_a_combined_answer_streams_as_one_event_and_ends(served: Served) -> None:
    with served.client() as client:
        chunks = list(client.chat.completions.create(model="collegium/formats.fuse", messages=ASK, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Eight."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
