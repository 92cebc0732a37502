import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from experts.base import Engine, collect
from experts.errors import BreakerOpen, ConfigError, ExpertFailed
from experts.fake import FakeEngine
from experts.types import EngineSpec, Request
from orchestrator import build
from orchestrator.build import Service, build_service, make_engine
from orchestrator.config import parse_config
from orchestrator.resilience import CallRecord
from orchestrator.run import Run


def config(**sections: Any) -> Any:
    base: dict[str, Any] = {
        "engines": {"e": {"backend": "fake", "options": {"text": "{expert_id}"}}},
        "experts": {"a": {"engine": "e"}, "b": {"engine": "e"}},
        "policies": {"default": {}},
    }
    return parse_config({**base, **sections})


async def ask(service: Service, model: str = "collegium", **request: Any) -> str:
    run = Run(request=Request(prompt="?", **request), policy=service.policies.resolve(model))
    return (await service.orchestrator.complete(run))[0].text


async def test_a_config_becomes_a_service_that_answers() -> None:
    service = build_service(config(policies={"default": {"router": {"name": "always", "options": {"expert": "b"}}}}))
    assert await ask(service) == "b"
    assert await ask(service, "a") == "a"
    assert service.policies.models == ["collegium", "collegium/default", "a", "b"]
    assert isinstance(service.engines["e"], FakeEngine)
    assert not service.engines["e"].loaded


async def test_what_the_config_says_reaches_the_objects() -> None:
    service = build_service(
        config(
            engines={"e": {"backend": "fake", "options": {"fail": ["error"]}}},
            experts={"a": {"engine": "e"}},
            limits={"max_concurrency": 3, "queue": 4, "max_calls": 5},
            resilience={"retries": 1, "backoff_s": 0.001, "breaker_failures": 2, "breaker_open_s": 60},
        )
    )
    assert (service.admission._free, service.admission._queue) == (3, 4)
    assert service.policies.resolve("collegium").max_calls == 5
    with pytest.raises(ExpertFailed):
        await ask(service)
    engine = service.engines["e"]
    assert isinstance(engine, FakeEngine)
    assert (engine.calls, service.breakers["e"].state) == (2, "open")
    with pytest.raises(BreakerOpen):
        await ask(service)


async def test_experts_of_one_engine_share_it_and_its_breaker_those_of_two_do_not() -> None:
    service = build_service(
        config(
            engines={"bad": {"backend": "fake", "options": {"fail": ["refuse"]}}, "good": {"backend": "fake"}},
            experts={"a": {"engine": "bad"}, "b": {"engine": "bad"}, "c": {"engine": "good"}},
            resilience={"breaker_failures": 1},
        )
    )
    with pytest.raises(ExpertFailed):
        await ask(service, "a")
    with pytest.raises(BreakerOpen):
        await ask(service, "b")
    assert await ask(service, "c")


class Counter:
    def __init__(self) -> None:
        self.ended_runs: list[Run] = []

    def routed(self, run: Run) -> None: ...

    def called(self, run: Run, call: CallRecord) -> None: ...

    def ended(self, run: Run) -> None:
        self.ended_runs.append(run)


async def test_observers_and_engines_are_handed_in() -> None:
    given = FakeEngine(EngineSpec(engine_id="e", backend="fake", model="fake", options={"text": "given"}))
    made: list[EngineSpec] = []
    counter = Counter()

    def make(spec: EngineSpec) -> Engine:
        made.append(spec)
        return FakeEngine(spec)

    two = config(engines={"e": {"backend": "fake"}, "f": {"backend": "fake"}})
    service = build_service(two, {"e": given}, observers=[counter], make=make)
    assert service.engines["e"] is given
    assert [spec.engine_id for spec in made] == ["f"]
    assert await ask(service) == "given"
    await asyncio.sleep(0)  # observers hear of an end once the answer is on its way
    assert len(counter.ended_runs) == 1


async def test_hedging_is_switched_on_by_the_config() -> None:
    engines = {"slow": {"backend": "fake", "options": {"fail": ["hang"]}}, "fast": {"backend": "fake"}}
    service = build_service(
        config(
            engines=engines,
            experts={"a": {"engine": "slow"}, "b": {"engine": "fast"}},
            resilience={"hedge_after_s": 0.01},
        )
    )
    assert await ask(service) == "b heard: ?"


async def test_silence_is_bounded_by_first_chunk_s() -> None:
    service = build_service(
        config(
            engines={"e": {"backend": "fake", "options": {"fail": ["hang"]}}},
            resilience={"retries": 0, "first_chunk_s": 0.01},
        )
    )
    run = Run(request=Request(prompt="?"), policy=service.policies.resolve("collegium"))
    with pytest.raises(ExpertFailed, match="nothing within"):
        await collect(service.orchestrator.generate(run), run.request)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"router": "alwys"}, "policies.default: no router 'alwys'; did you mean 'always'?"),
        ({"router": "rules"}, "policies.default: router 'rules' needs the option 'rules': {name: rules, "),
        (
            {"aggregator": {"name": "fuse", "options": {"question_chars": 9}}},
            "policies.default: aggregator 'fuse' needs the option 'expert': {name: fuse, options: {expert: ...}}",
        ),
        ({"aggregator": "frist"}, "policies.default: no aggregator 'frist'; did you mean 'first'?"),
        ({"aggregator": "zzz"}, "policies.default: no aggregator 'zzz'; known: "),
        (
            {"router": {"name": "random", "options": {"sed": 1}}},
            "policies.default: router 'random': unknown option 'sed'; did you mean 'seed'?",
        ),
        (
            {"router": {"name": "always", "options": {"expert": "z"}}},
            "policies.default: router 'always': no expert 'z'",
        ),
        ({"router": {"name": "rules", "options": {"rules": 5, "default": "a"}}}, "policies.default: router 'rules': "),
        (
            {
                "router": {
                    "name": "rules",
                    "options": {"rules": [{"expert": "a", "min_chars": "many"}], "default": "a"},
                }
            },
            "policies.default: router 'rules'",
        ),
    ],
)
def test_a_mistake_in_a_policy_is_named_when_built(policy: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_service(config(policies={"default": policy}))
    assert caught.value.message.startswith(says)


def test_a_mistake_in_an_engines_options_is_named_when_built() -> None:
    with pytest.raises(ConfigError, match=r"Engine 'e': unknown option \['txt'\]"):
        build_service(config(engines={"e": {"backend": "fake", "options": {"txt": "x"}}}))


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "experts.fake", None)
    with pytest.raises(ConfigError, match=r"backend 'fake' cannot be used here: .*experts\.fake.*collegium doctor"):
        make_engine(EngineSpec(engine_id="e", backend="fake", model="fake"))


async def test_a_request_may_name_what_the_config_uses_and_what_is_free() -> None:
    policies = {
        "default": {"router": {"name": "always", "options": {"expert": "b"}}},
        "other": {"router": {"name": "always", "options": {"expert": "a"}}, "aggregator": "vote"},
    }
    book = build_service(config(policies=policies)).policies
    assert {"always", "random", "round_robin"} <= set(book._routers)
    assert {"first", "vote", "weighted_vote"} <= set(book._aggregators)
    # Of two namesakes, the first policy's stands for the name.
    assert book._routers["always"] is book.resolve("collegium").router
    assert book._aggregators["vote"] is book.resolve("collegium/other").aggregator


class OneEncoder:
    name, width, runtime = "one", 1, "none"

    async def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.ones((len(texts), 1), np.float32)


def test_the_encoder_is_made_once_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int, str]] = []

    def make(model: str, cache_size: int, runtime: str) -> OneEncoder:
        made.append((model, cache_size, runtime))
        return OneEncoder()

    monkeypatch.setattr(build, "make_encoder", make)
    service = build_service(config(encoder={"model": "m", "cache": 7}))
    assert made == []
    assert service.encoder() is service.encoder()
    assert made == [("m", 7, "auto")]


@pytest.mark.parametrize(
    ("residency", "told"),
    [({"slots": 1, "sleep": 2}, True), ({"slots": 1}, None), ({"sleep": 2}, None)],
)
async def test_vllm_is_told_from_the_start_that_it_is_to_sleep(residency: dict[str, Any], told: bool | None) -> None:
    made: list[EngineSpec] = []

    def make(spec: EngineSpec) -> Engine:
        made.append(spec)
        return FakeEngine(EngineSpec(engine_id=spec.engine_id, backend="fake", model="fake"))

    engines = {"v": {"backend": "vllm", "model": "m"}, "e": {"backend": "fake"}}
    build_service(config(engines=engines, residency=residency), make=make)
    assert [spec.options.get("enable_sleep_mode") for spec in made] == [told, None]
