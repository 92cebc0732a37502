"""Fitted on a recorded pool, named in a config, used by the service: each router from end to end."""

import asyncio

import pytest
from typer.testing import CliRunner

from experts.types import Message, Request
from orchestrator.build import build_service
from orchestrator.cli import app
from orchestrator.config import Config
from orchestrator.run import Run
from routers.learned import MODELS

QUESTION = "the court and the contract number 121\na\nb\nc\nd"


@pytest.fixture
def pool(make_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    return make_pool()


def fitted(name, pool, folder):
    words = ["router", "fit", name, "--pool", str(pool), "--out", str(folder / name), "--encoder", "wordllama"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return str(folder / name)


def service_of(pool, policy, extra=None):
    experts = {f"{s}-expert": {"engine": "pool"} for s in ("algebra", "law", "cells", "prices")}
    config = {
        "engines": {"pool": {"backend": "recorded", "model": str(pool)}, **(extra or {})},
        "experts": {**experts, **({"router": {"engine": "chooser"}} if extra else {})},
        "policies": {"default": policy},
        "encoder": {"model": "wordllama"},
    }
    return build_service(Config.model_validate(config))


async def answered(service, text=QUESTION):
    request = Request(messages=(Message(role="user", content=text),), stream=False)
    run = Run(request=request, policy=service.policies.resolve("collegium"))
    (answer,) = await service.orchestrator.complete(run)
    return run, answer


@pytest.mark.parametrize("name", list(MODELS))
def test_a_fitted_router_is_shown_and_sends_law_to_the_lawyer(name, pool, tmp_path):
    folder = fitted(name, pool, tmp_path)
    shown = CliRunner().invoke(app, ["router", "show", folder])
    assert shown.exit_code == 0, shown.output
    assert "120 questions of toy" in shown.output
    assert "law-expert" in shown.output
    if name in ("threshold", "panel", "cascade"):
        return  # they choose between two experts, for a vote, and by price
    service = service_of(pool, {"router": {"name": name, "artefact": folder}})
    run, answer = asyncio.run(answered(service))
    assert answer.expert_id == "law-expert"
    assert len(run.decision.scores) == 4


def test_drawn_recruits_vote(pool, tmp_path):
    options = {"draw": "with", "seed": 1, "competence": "none", "score": "laplace"}
    router = {"name": "skills", "artefact": fitted("skills", pool, tmp_path), "options": options}
    policy = {"router": router, "top_k": 3, "aggregator": "weighted_vote", "max_calls": 3}
    run, _ = asyncio.run(answered(service_of(pool, policy)))
    assert len(run.calls) == len(run.decision.expert_ids) == len(set(run.decision.draws[:3]))


def test_a_cascade_is_a_router_and_an_aggregator(pool, tmp_path):
    router = {"name": "cascade", "artefact": fitted("cascade", pool, tmp_path), "options": {"spend": 0.6}}
    policy = {"router": router, "top_k": 3, "aggregator": {"name": "cascade", "options": {"extract": "text"}}}
    run, _ = asyncio.run(answered(service_of(pool, policy)))
    assert run.trace["signal"] == "agreement"
    assert run.decision.router == "cascade"


def test_a_cascade_asked_one_by_one_never_calls_who_is_not_needed():
    """Three experts that all say the same: two agree, and the third is spared."""
    config = {
        "engines": {"e": {"backend": "fake", "options": {"text": "It is 4."}}},
        "experts": {name: {"engine": "e"} for name in ("cheap", "middle", "dear")},
        "policies": {"default": {"top_k": 3, "one_by_one": True, "aggregator": "cascade"}},
    }
    service = build_service(Config.model_validate(config))
    run, _ = asyncio.run(answered(service, "What is 2 + 2?"))
    assert [c.expert_id for c in run.calls] == ["cheap", "middle"]
    assert run.trace["settled"] is True


def test_an_llm_that_makes_no_choice_falls_back_to_a_fitted_router(pool, tmp_path):
    options = {
        "expert": "router",
        "fallback": "hash",
        "fallback_options": {"seed": 3},
    }
    extra = {"chooser": {"backend": "fake", "options": {"text": "the lawyer, I would say"}}}
    service = service_of(pool, {"router": {"name": "llm", "options": options}}, extra)
    run, answer = asyncio.run(answered(service))
    assert answer.expert_id in run.decision.scores
    assert "no choice in two answers; hash" in run.decision.reason


def test_an_llm_chooses_by_letter(pool):
    extra = {"chooser": {"backend": "fake", "options": {"text": '{"choice": "B"}'}}}
    service = service_of(pool, {"router": {"name": "llm", "options": {"expert": "router"}}}, extra)
    run, answer = asyncio.run(answered(service))
    assert answer.expert_id == "law-expert"
    assert [c.expert_id for c in run.calls] == ["law-expert"], "the router's own question is nobody's bill"


def test_any_request_may_ask_for_hash_routing(pool):
    from orchestrator.policies import Overrides

    service = service_of(pool, {})
    assert service.policies.resolve("collegium", Overrides(router="hash")).router.name == "hash"
