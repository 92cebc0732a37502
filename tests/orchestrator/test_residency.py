"""Leases on engines that come and go, on a virtual clock; faults; and the whole service over HTTP."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import pytest

from experts.base import EngineExpert
from experts.errors import ConfigError, DeadlineExceeded, QueueFull, Unavailable
from experts.fake import FakeEngine
from experts.types import EngineSpec, ExpertSpec, Request
from orchestrator.build import build_service
from orchestrator.config import parse_config
from orchestrator.dispatch import Dispatcher, Resident
from orchestrator.host import Host
from orchestrator.loading import GIB, Loader, Loading
from orchestrator.residency import Residency
from orchestrator.run import Run
from orchestrator.swaps import Rules
from tests.orchestrator.served import serving

Virtual = Callable[[Callable[[], Any]], Any]
RULES = Rules(slots=1, max_wait_s=5.0, min_loaded_s=0.0)
LOADING = Loading(timeout_s=20.0, retries=1, backoff_s=1.0, failed_s=60.0)


def fake(engine_id: str, **options: Any) -> FakeEngine:
    return FakeEngine(EngineSpec(engine_id=engine_id, backend="fake", model="fake", options=options))


class Bench:
    def __init__(self, rules: Rules = RULES, queue: int | None = None, **engines: dict[str, Any]) -> None:
        self.engines = {name: fake(name, **options) for name, options in engines.items()}
        self.dispatcher = Dispatcher(Residency(self.engines, rules=rules, loading=LOADING, queue=queue))

    async def use(self, engine_id: str, run_s: float = 1.0, **how: Any) -> float:
        async with self.dispatcher.lease(engine_id, **how):
            engine = self.engines[engine_id]
            assert engine.loaded
            began = asyncio.get_running_loop().time()
            await asyncio.sleep(run_s)
            assert engine.loaded, "unloaded under a call"
        return began

    def state(self, engine_id: str) -> str:
        return self.dispatcher.snapshot()[engine_id].state


def test_calls_wait_for_their_engine_and_share_it(virtual: Virtual) -> None:
    async def go() -> None:
        bench = Bench(a={"load_s": 2.0}, b={"load_s": 2.0, "unload_s": 1.0})
        began = await asyncio.gather(*(bench.use(e) for e in "abab"))
        assert began == [1002.0, 1005.0, 1002.0, 1005.0]
        status = bench.dispatcher.snapshot()
        assert [(s.loads, s.load_s, s.state) for s in status.values()] == [(1, 2.0, "absent"), (1, 2.0, "ready")]

    virtual(go)


def test_a_caller_who_leaves_is_forgotten_whenever_he_leaves(virtual: Virtual) -> None:
    async def go() -> None:
        for after_s in (0.0, 1.0, 1.999, 2.0, 2.5):
            bench = Bench(a={"load_s": 2.0}, b={})
            task = asyncio.create_task(bench.use("a"))
            await asyncio.sleep(after_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            status = bench.dispatcher.snapshot()["a"]
            assert (status.running, sum(status.waiting.values())) == (0, 0)
            await bench.use("b")

    virtual(go)


def test_a_deadline_ends_the_wait(virtual: Virtual) -> None:
    async def go() -> None:
        bench = Bench(a={"load_s": 10.0})
        with pytest.raises(DeadlineExceeded, match="'a' could not be loaded before the deadline"):
            await bench.use("a", expires_s=1003.0)
        assert asyncio.get_running_loop().time() == 1003.0
        await bench.use("a")

    virtual(go)


def test_a_load_that_fails_once_is_tried_again(virtual: Virtual) -> None:
    async def go() -> None:
        bench = Bench(a={"load_s": 2.0, "fail_load": ["error", "ok"]})
        assert await bench.use("a") == 1005.0
        assert bench.engines["a"].tries == 2

    virtual(go)


@pytest.mark.parametrize(
    ("trouble", "says", "at_s"),
    [("error", "as scripted", 1005.0), ("memory", "MemoryError", 1005.0), ("hang", "within 20 s", 1041.0)],
)
def test_an_engine_that_does_not_load_is_left_alone_and_the_others_are_served(
    virtual: Virtual, trouble: str, says: str, at_s: float
) -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        bench = Bench(a={"load_s": 2.0, "fail_load": [trouble, trouble, "ok"]}, b={})
        waits = [asyncio.create_task(bench.use("a")) for _ in range(3)]
        other = asyncio.create_task(bench.use("b"))
        for failure in await asyncio.gather(*waits, return_exceptions=True):
            assert isinstance(failure, Unavailable)
            assert failure.fallback
            assert says in str(failure)
        assert loop.time() == at_s
        assert bench.state("a") == "failed"
        assert says in str(bench.dispatcher.snapshot()["a"].failure)
        await other
        with pytest.raises(Unavailable):
            await bench.use("a")
        await asyncio.sleep(61)
        await bench.use("a")

    virtual(go)


def test_while_a_slow_engine_goes_its_slot_is_taken(virtual: Virtual) -> None:
    async def go() -> None:
        bench = Bench(a={"unload_s": 30.0}, b={})
        await bench.use("a")
        assert await bench.use("b") >= 1031.0
        assert not bench.engines["a"].loaded

    virtual(go)


def test_the_queue_has_an_end(virtual: Virtual) -> None:
    async def go() -> None:
        bench = Bench(queue=1, a={"load_s": 2.0})
        first = asyncio.create_task(bench.use("a"))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await bench.use("a")
        await first

    virtual(go)


def test_close_tells_those_who_wait_and_ends_what_loads(virtual: Virtual) -> None:
    async def go() -> None:
        bench = Bench(a={"load_s": 9.0})
        waiting = asyncio.create_task(bench.use("a"))
        await asyncio.sleep(1)
        residency = bench.dispatcher.residency
        await residency.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await waiting
        with pytest.raises(Unavailable, match="shutting down"):
            await bench.use("a")
        for engine in bench.engines.values():
            await residency.drop(engine)
        await asyncio.sleep(60)
        assert not bench.engines["a"].loaded

    virtual(go)


async def test_without_slots_every_engine_is_there_and_nothing_waits() -> None:
    dispatcher = Dispatcher(Residency({"a": fake("a")}))
    async with dispatcher.lease("a", priority="batch"):
        assert (dispatcher.snapshot()["a"].state, dispatcher.snapshot()["a"].running) == ("ready", 1)
    assert dispatcher.snapshot()["a"].running == 0


def test_an_expert_that_dies_gives_its_lease_back(virtual: Virtual) -> None:
    async def go() -> None:
        bench = Bench(a={"fail": ["cut"]}, b={})
        inner = EngineExpert(ExpertSpec(expert_id="A", engine_id="a"), bench.engines["a"])
        expert = Resident(inner, bench.dispatcher)
        for _ in range(2):
            with pytest.raises(Unavailable, match="cut off"):
                async with aclosing(expert.generate(Request(prompt="?"))) as stream:
                    [chunk async for chunk in stream]
        assert bench.dispatcher.snapshot()["a"].running == 0
        await bench.use("b")

    virtual(go)


class Sleepy(FakeEngine):
    """Sleeps if ``can``."""

    def __init__(self, *, can: bool) -> None:
        super().__init__(EngineSpec(engine_id="a", backend="fake", model="fake"))
        self.can, self.said = can, list[str]()

    async def load(self) -> None:
        self.said.append("load")

    async def unload(self) -> None:
        self.said.append("unload")

    async def sleep(self, level: int) -> bool:
        self.said.append(f"sleep {level}")
        return self.can

    async def wake(self) -> None:
        self.said.append("wake")


@pytest.mark.parametrize(
    ("can", "said"),
    [
        (True, ["load", "sleep 1", "wake", "sleep 1", "unload"]),
        (False, ["load", "sleep 1", "unload", "load", "sleep 1", "unload", "unload"]),
    ],
)
async def test_an_engine_that_can_sleep_does_instead_of_ending(can: bool, said: list[str]) -> None:
    engine, loader = Sleepy(can=can), Loader(Loading(sleep_level=1), lambda: None)
    for _ in range(2):
        await loader.load(engine)
        await loader.unload(engine)
    await loader.end(engine)
    assert engine.said == said


async def test_an_engine_that_fails_to_fall_asleep_or_takes_too_long_ends() -> None:
    class Restless(Sleepy):
        async def sleep(self, level: int) -> bool:
            if level == 1:
                raise RuntimeError("as scripted")
            return await asyncio.Event().wait()

    for level in (1, 2):
        engine = Restless(can=True)
        loader = Loader(Loading(sleep_level=level, timeout_s=0.05), lambda: None)
        for _ in range(2):
            await loader.load(engine)
            await loader.unload(engine)
        assert engine.said == ["load", "unload"] * 2, "and is loaded, not woken"


async def test_what_a_load_takes_is_measured_where_it_is_alone() -> None:
    used = iter([0, 3 * GIB, 3 * GIB, 3 * GIB, 5 * GIB, 5 * GIB])
    loader = Loader(Loading(), lambda: next(used))
    assert (await loader.load(fake("a"))).memory_gib == 3.0
    first, second = await asyncio.gather(loader.load(fake("b", load_s=0.01)), loader.load(fake("c", load_s=0.01)))
    assert (first.memory_gib, second.memory_gib) == (None, None)


# The service


def two(**residency: Any) -> dict[str, Any]:
    """Two engines and their experts, one slot."""
    return {
        "engines": {e: {"backend": "fake", "options": {"load_s": 0.02}} for e in "ab"},
        "experts": {"A": {"engine": "a"}, "B": {"engine": "b"}},
        "policies": {
            "default": {"router": "always"},
            "both": {"router": "round_robin", "top_k": 2, "aggregator": "vote"},
        },
        "resilience": {"retries": 0},
        "residency": {"slots": 1, "max_wait_s": 0.5, "min_loaded_s": 0.05, **residency},
    }


def ask(served: Any, model: str) -> tuple[int, str]:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    reply = served.http.post("/v1/chat/completions", json=body)
    return reply.status_code, reply.text


def test_interleaved_requests_over_http_are_grouped() -> None:
    with serving(two()) as served, ThreadPoolExecutor(16) as pool:
        ready = served.http.get("/readyz").json()
        assert ready == {"ready": True, "engines": {"a": "ready", "b": "absent"}}
        replies = list(pool.map(lambda model: ask(served, model), ["A", "B"] * 32))
        assert all(status == 200 and f"{m} heard" in text for (status, text), m in zip(replies, "AB" * 32, strict=True))
        status = served.service.dispatcher.snapshot()
        loads = sum(engine.loads for engine in status.values())
        assert 2 <= loads < 32, "64 in turn: first come, first served would load 64 times"
        assert ask(served, "collegium/both")[0] == 200
        page = served.http.get("/metrics").text
    assert 'collegium_engine_loads_total{engine="b"}' in page
    assert 'collegium_engine_queue{engine="a",priority="batch"} 0.0' in page


def test_requests_of_an_engine_that_does_not_load_go_to_the_next_best() -> None:
    config = two(load_retries=0)
    config["engines"]["a"]["options"] = {"fail_load": ["error"]}
    with serving(config) as served:
        status, text = ask(served, "collegium")
        assert (status, "B heard" in text) == (200, True)
        assert served.http.get("/readyz").json()["engines"]["a"].startswith("failed")
        assert ask(served, "A")[0] == 503


async def test_a_reload_shares_the_slots_and_ends_what_no_service_has_any_more() -> None:
    made: list[FakeEngine] = []

    def make(spec: EngineSpec) -> FakeEngine:
        made.append(FakeEngine(spec))
        return made[-1]

    host = Host(parse_config(two()), lambda config, engines: build_service(config, engines, make=make))
    await host.start()
    assert [engine.loaded for engine in made] == [True, False]
    changed = two()
    changed["engines"]["b"]["options"] = {"text": "new"}
    await host.reload(parse_config(changed))
    assert [engine.loaded for engine in made] == [True, False, False], "a stays, the new b comes when it is asked"
    run = Run(request=Request(prompt="?"), policy=host.service.policies.resolve("B"))
    assert (await host.service.orchestrator.complete(run))[0].text == "new"
    assert [engine.loaded for engine in made] == [False, False, True]
    for other in ({}, {"slots": 1, "sleep": 2}):
        with pytest.raises(ConfigError, match="by a restart only"):
            await host.reload(parse_config({**changed, "residency": other}))
    await host.close()
    assert not any(engine.loaded for engine in made)
