import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from experts.base import Engine
from experts.errors import ConfigError, ExpertFailed, Unavailable
from experts.fake import FakeEngine
from experts.types import Completion, EngineSpec, Request
from orchestrator.app import create_app
from orchestrator.build import Service, build_service
from orchestrator.config import Config, parse_config
from orchestrator.host import Host
from orchestrator.run import Run

Virtual = Callable[[Callable[[], Any]], Any]


class Counted(FakeEngine):
    """Also counts how often it was loaded and unloaded, and fails as ``trouble`` says."""

    def __init__(self, spec: EngineSpec, trouble: Mapping[str, BaseException]) -> None:
        super().__init__(spec)
        self.loads = 0
        self.unloads = 0
        self._trouble = trouble

    async def load(self) -> None:
        self.loads += 1
        await super().load()
        if f"load {self.spec.engine_id}" in self._trouble:
            raise self._trouble[f"load {self.spec.engine_id}"]

    async def unload(self) -> None:
        self.unloads += 1
        await super().unload()
        if f"unload {self.spec.engine_id}" in self._trouble:
            raise self._trouble[f"unload {self.spec.engine_id}"]


class Street:
    """Makes Hosts over fake engines, and keeps every engine ever made."""

    def __init__(self, **trouble: BaseException) -> None:
        self.made: list[Counted] = []
        self.trouble = {key.replace("_", " "): exc for key, exc in trouble.items()}

    def make(self, spec: EngineSpec) -> Engine:
        engine = Counted(spec, self.trouble)
        self.made.append(engine)
        return engine

    def build(self, config: Config, engines: Mapping[str, Engine]) -> Service:
        return build_service(config, engines, make=self.make)

    def host(self, **engines: dict[str, Any]) -> Host:
        return Host(config(**engines), self.build)

    def loaded(self) -> list[str]:
        return [engine.spec.engine_id for engine in self.made if engine.loaded]


def config(**engines: dict[str, Any]) -> Config:
    """One expert on each engine, named in capitals."""
    return parse_config(
        {
            "engines": {e: {"backend": "fake", "options": options} for e, options in engines.items()},
            "experts": {e.upper(): {"engine": e} for e in engines},
            "policies": {"default": {}},
            "resilience": {"retries": 0},
        }
    )


def run_on(service: Service, model: str = "collegium") -> Run:
    return Run(request=Request(prompt="?"), policy=service.policies.resolve(model))


async def ask(host: Host, model: str = "collegium") -> str:
    return (await host.service.orchestrator.complete(run_on(host.service, model)))[0].text


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


# Start


async def test_start_loads_every_engine_and_close_unloads_them() -> None:
    street = Street()
    host = street.host(a={}, b={})
    assert (host.ready, street.loaded()) == (False, [])
    await host.start()
    assert (host.ready, host.failed, street.loaded()) == (True, {}, ["a", "b"])
    assert await ask(host, "B") == "B heard: ?"
    await host.close()
    assert (host.ready, street.loaded()) == (False, [])


def test_engines_load_one_after_the_other(virtual: Virtual) -> None:
    async def start() -> float:
        await Street().host(a={"load_s": 2.0}, b={"load_s": 3.0}).start()
        return asyncio.get_running_loop().time()

    assert virtual(start) == 1005.0


@pytest.mark.parametrize(
    ("exc", "reason"),
    [(ExpertFailed("no memory"), "no memory"), (RuntimeError("driver"), "RuntimeError: driver")],
    ids=["ours", "a foreign one"],
)
async def test_an_engine_that_does_not_load_keeps_nobody_from_answering(
    exc: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    host = Street(load_a=exc).host(a={}, b={})
    await host.start()
    assert (host.ready, host.failed) == (True, {"a": reason})
    assert "engine a did not load" in caplog.text
    assert await ask(host, "B") == "B heard: ?"


async def test_experts_of_an_engine_that_did_not_load_are_replaced() -> None:
    host = Street().host(a={"fail": ["load"]}, b={})
    await host.start()
    assert await ask(host) == "B heard: ?"


async def test_an_engine_that_cancels_its_own_load_has_failed() -> None:
    host = Street(load_a=asyncio.CancelledError()).host(a={}, b={})
    await host.start()
    assert (host.ready, host.failed) == (True, {"a": "Its load was cancelled."})


# Close


@pytest.mark.parametrize("cancel_start_first", [True, False])
def test_close_during_start_stops_loading_and_leaves_nothing_loaded(virtual: Virtual, cancel_start_first: bool) -> None:
    async def close_early() -> None:
        street = Street()
        host = street.host(a={"load_s": 1.0}, b={"load_s": 9.0}, c={})
        start = asyncio.create_task(host.start())
        await asyncio.sleep(5)
        assert street.loaded() == ["a"]
        if cancel_start_first:
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        await host.close()
        result = (await asyncio.gather(start, return_exceptions=True))[0]
        assert isinstance(result, asyncio.CancelledError if cancel_start_first else Unavailable)
        assert asyncio.get_running_loop().time() == 1005.0
        await asyncio.sleep(60)
        assert (host.ready, street.loaded(), street.made[2].loads) == (False, [], 0)

    virtual(close_early)


def test_close_while_the_last_engine_loads_does_not_end_up_ready(virtual: Virtual) -> None:
    async def close_early() -> None:
        street = Street()
        host = street.host(a={"load_s": 9.0})
        start = asyncio.create_task(host.start())
        await asyncio.sleep(5)
        await host.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await start
        assert not host.ready
        assert not street.loaded()

    virtual(close_early)


async def test_close_twice_and_at_once_is_safe() -> None:
    street = Street()
    host = street.host(a={})
    await host.start()
    await asyncio.gather(host.close(), host.close())
    await host.close()
    assert street.loaded() == []


async def test_a_host_that_never_started_can_be_closed() -> None:
    street = Street()
    await street.host(a={}).close()
    assert (street.made[0].loads, street.made[0].unloads) == (0, 1)


async def test_nothing_starts_after_close() -> None:
    street = Street()
    host = street.host(a={})
    await host.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await host.start()
    with pytest.raises(Unavailable, match="shutting down"):
        await host.reload(config(a={}, b={}))
    assert street.loaded() == []


async def test_an_engine_that_does_not_unload_keeps_no_other_from_it(caplog: pytest.LogCaptureFixture) -> None:
    street = Street(unload_a=RuntimeError("stuck"))
    host = street.host(a={}, b={})
    await host.start()
    await host.close()
    assert street.made[1].unloads == 1
    assert "a did not end cleanly" in caplog.text


# Reload


async def test_unchanged_engines_stay_loaded_new_ones_load_and_old_ones_go() -> None:
    street = Street()
    host = street.host(a={}, b={}, c={"text": "old"})
    await host.start()
    await host.reload(config(b={}, c={"text": "new"}, d={}))
    await settle()
    a, b, old_c, new_c, d = street.made
    assert [e.loads for e in street.made] == [1, 1, 1, 1, 1]
    assert [e.unloads for e in street.made] == [1, 0, 1, 0, 0]
    assert list(host.service.engines.values()) == [b, new_c, d]
    assert await ask(host, "C") == "new"
    assert [a.loaded, old_c.loaded] == [False, False]
    await host.close()
    assert street.loaded() == []


def test_runs_under_way_end_on_the_old_service(virtual: Virtual) -> None:
    async def reload_in_between() -> None:
        street = Street()
        host = street.host(a={"text": "old answer", "chunks": 4, "chunk_s": 1.0})
        await host.start()
        old = asyncio.create_task(ask(host))
        await asyncio.sleep(1.5)
        await host.reload(config(a={"text": "new"}))
        assert await ask(host) == "new"
        assert street.made[0].loaded
        assert await old == "old answer"
        await settle()
        assert [e.unloads for e in street.made] == [1, 0]

    virtual(reload_in_between)


def test_an_engine_waits_for_the_runs_of_every_service_that_had_it(virtual: Virtual) -> None:
    async def reload_twice() -> None:
        street = Street()
        shared = {"text": "long answer", "chunks": 4, "chunk_s": 1.0}
        host = street.host(a=shared)
        await host.start()
        oldest = asyncio.create_task(ask(host))
        await asyncio.sleep(0.5)
        await host.reload(config(a=shared, b={}))
        await host.reload(config(b={}))
        await settle()
        assert street.made[0].loaded
        assert await oldest == "long answer"
        await settle()
        assert street.loaded() == ["b"]

    virtual(reload_twice)


async def test_a_config_that_cannot_be_built_changes_nothing() -> None:
    street = Street()
    host = street.host(a={})
    await host.start()
    before = host.service
    with pytest.raises(ConfigError, match="unknown option"):
        await host.reload(config(a={}, b={"txet": 1}))
    assert host.service is before
    assert (host.ready, street.loaded()) == (True, ["a"])


async def test_a_config_whose_engine_does_not_load_changes_nothing() -> None:
    street = Street()
    host = street.host(a={})
    await host.start()
    before = host.service
    with pytest.raises(ConfigError, match=r"The old config stays: engine 'c' did not load: .*as scripted"):
        await host.reload(config(a={"text": "changed"}, b={}, c={"fail": ["load"]}, d={}))
    await settle()
    assert (host.service is before, host.failed, street.loaded()) == (True, {}, ["a"])
    assert await ask(host) == "A heard: ?"


def test_a_reload_that_is_cancelled_leaves_nothing_behind(virtual: Virtual) -> None:
    async def cancel() -> None:
        street = Street()
        host = street.host(a={})
        await host.start()
        before = host.service
        reload = asyncio.create_task(host.reload(config(a={}, b={}, c={"load_s": 60.0})))
        await asyncio.sleep(1)
        assert street.loaded() == ["a", "b"]
        reload.cancel()
        await asyncio.gather(reload, return_exceptions=True)
        assert reload.cancelled()
        assert (host.service is before, street.loaded()) == (True, ["a"])
        await host.reload(config(a={}, b={}))
        assert street.loaded() == ["a", "b"]

    virtual(cancel)


def test_close_during_a_reload_leaves_nothing_behind(virtual: Virtual) -> None:
    async def close_in_between() -> None:
        street = Street()
        host = street.host(a={})
        await host.start()
        reload = asyncio.create_task(host.reload(config(b={}, c={"load_s": 60.0})))
        await asyncio.sleep(1)
        await host.close()
        with pytest.raises(Unavailable):
            await reload
        await settle()
        assert street.loaded() == []

    virtual(close_in_between)


async def test_an_engine_that_had_failed_is_tried_again() -> None:
    street = Street(load_a=ExpertFailed("down"))
    host = street.host(a={}, b={"fail": ["load"]})
    await host.start()
    assert set(host.failed) == {"a", "b"}
    street.trouble.clear()
    await host.reload(config(a={}, c={}))
    assert host.failed == {}
    assert street.loaded() == ["a", "c"]
    assert street.made[0].loads == 2
    street.trouble["load a"] = ExpertFailed("down")
    host.failed["a"] = "as before"
    await host.reload(config(a={}))
    assert host.failed == {"a": "down"}


def test_a_reload_waits_for_the_start(virtual: Virtual) -> None:
    async def both() -> None:
        street = Street()
        host = street.host(a={"load_s": 5.0})
        start = asyncio.create_task(host.start())
        await asyncio.sleep(1)
        await host.reload(config(a={"load_s": 5.0}, b={}))
        assert start.done()
        assert (host.ready, street.loaded(), street.made[0].loads) == (True, ["a", "b"], 1)

    virtual(both)


def test_close_does_not_wait_for_runs_on_a_retired_service(virtual: Virtual) -> None:
    async def close_in_between() -> None:
        street = Street()
        host = street.host(a={"fail": ["hang"]})
        await host.start()
        async with aclosing(host.service.orchestrator.generate(run_on(host.service))) as stream:
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(1)
            await host.reload(config(b={}))
            await asyncio.sleep(1)
            assert street.loaded() == ["a", "b"]
            await host.close()
            assert asyncio.get_running_loop().time() == 1002.0
            assert street.loaded() == []
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    virtual(close_in_between)


async def test_a_retired_services_experts_are_closed() -> None:
    street = Street()
    host = street.host(a={})
    closed: list[str] = []

    async def close() -> None:
        closed.append("A")

    await host.start()
    host.service.experts["A"].aclose = close  # type: ignore[method-assign]
    await host.reload(config(a={}, b={}))
    await settle()
    assert closed == ["A"]


@pytest.mark.parametrize("way", ["close", "reload"])
async def test_a_retired_services_rewards_are_closed(tmp_path: Path, way: str) -> None:
    about = {"version": 1, "kind": "http", "model": "judge", "options": {"base_url": "http://127.0.0.1:9"}}
    (tmp_path / "reward.json").write_text(json.dumps(about))
    judged = {"aggregator": {"name": "best_of", "artefact": str(tmp_path)}}
    changed = config(a={}).model_dump(exclude_unset=True) | {"policies": {"default": {}, "judged": judged}}
    host = Host(parse_config(changed), Street().build)
    await host.start()
    reward = host.service.policies.resolve("collegium/judged").aggregator._reward  # type: ignore[attr-defined]
    with pytest.raises(ExpertFailed):
        await reward.score(Request(prompt="?"), [Completion(request_id="r", expert_id="A", text="x")])
    session = reward._session
    assert not session.closed
    await (host.close() if way == "close" else host.reload(config(a={})))
    await settle()
    assert session.closed
    await host.close()


async def test_an_aggregator_that_does_not_close_keeps_nobody_from_it(caplog: pytest.LogCaptureFixture) -> None:
    street = Street()
    host = Host(config(a={}), street.build)
    await host.start()

    async def close() -> None:
        raise RuntimeError("stuck")

    host.service.policies.aggregators[0].aclose = close  # type: ignore[attr-defined]
    await host.close()
    assert street.loaded() == []
    assert "first did not end cleanly" in caplog.text


async def test_a_request_whose_body_came_across_a_reload_is_answered_by_the_new_service() -> None:
    street = Street()
    app = create_app(config(a={"text": "old"}), make=street.make)
    host: Host = app.state.host
    await host.start()
    body = json.dumps({"model": "collegium", "messages": [{"role": "user", "content": "?"}]}).encode()
    reloaded, sent = asyncio.Event(), []

    async def receive() -> dict[str, Any]:
        if not reloaded.is_set():
            await host.reload(config(a={"text": "new"}))
            await settle()
            assert [e.loaded for e in street.made] == [False, True]
            reloaded.set()
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    await app(scope, receive, send)
    assert sent[0]["status"] == 200, sent
    assert json.loads(sent[1]["body"])["choices"][0]["message"]["content"] == "new"
    await host.close()
