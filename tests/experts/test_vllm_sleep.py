"""Sleep instead of ending. A GPU would do it; here stand-ins hear what vLLM would be told."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from experts.errors import ConfigError, ExpertFailed
from experts.types import EngineSpec
from experts.vllm import VllmEngine
from experts.vllm_options import read_options

SPEC = EngineSpec(engine_id="e", backend="vllm", model="m", options={"enable_sleep_mode": True})


class Server:
    """In the place of vllm_server.Server."""

    def __init__(self, *, dead: bool = False, wakes: bool = True) -> None:
        self.dead, self.wakes, self.said = dead, wakes, list[str]()

    async def sleep(self, level: int) -> bool:
        self.said.append(f"sleep {level}")
        return True

    async def wake(self) -> None:
        self.said.append("wake")
        if not self.wakes:
            raise RuntimeError("out of memory")

    async def aclose(self) -> None:
        self.said.append("end")


async def running(server: Server) -> VllmEngine:
    async def start() -> Any:
        return server

    engine = VllmEngine(SPEC)
    engine._server = asyncio.create_task(start())
    await engine._server
    return engine


async def test_a_running_engine_sleeps_and_wakes() -> None:
    server = Server()
    engine = await running(server)
    assert await engine.sleep(2)
    await engine.wake()
    assert server.said == ["sleep 2", "wake"]


async def test_what_is_not_there_or_dead_does_not_sleep() -> None:
    assert not await VllmEngine(SPEC).sleep(1)
    server = Server(dead=True)
    assert not await (await running(server)).sleep(1)
    assert server.said == []


async def test_an_engine_that_does_not_wake_has_ended() -> None:
    server = Server(wakes=False)
    engine = await running(server)
    with pytest.raises(ExpertFailed, match="'e' did not wake up: out of memory"):
        await engine.wake()
    assert server.said == ["wake", "end"]
    assert engine._server is None, "load() starts it anew"


async def test_a_wake_that_is_given_up_ends_the_engine_too() -> None:
    server = Server()
    server.wake = asyncio.Event().wait  # type: ignore[assignment,method-assign]
    engine = await running(server)
    task = asyncio.create_task(engine.wake())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (server.said, engine._server) == (["end"], None)


def test_a_cpu_refuses_to_sleep_and_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"sleeps on GPUs only. Leave residency.sleep"):
        read_options(SPEC, "m", ["model", "enable_sleep_mode"], cpu=True, cores=2)
    assert read_options(SPEC, "m", ["model", "enable_sleep_mode"], cpu=False, cores=2).arguments["enable_sleep_mode"]


class Client:
    """In the place of vLLM's AsyncLLM."""

    def __init__(self, enabled: bool) -> None:
        self.model_config = SimpleNamespace(enable_sleep_mode=enabled)
        self.said: list[Any] = []

    async def sleep(self, level: int) -> None:
        self.said.append(("sleep", level))

    async def wake_up(self, tags: list[str] | None = None) -> None:
        self.said.append(("wake_up", tags))

    async def collective_rpc(self, method: str) -> None:
        self.said.append(("rpc", method))


@pytest.mark.vllm
async def test_vllm_is_told_by_its_own_api() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from experts.vllm_server import Server as Real

    assert all(hasattr(AsyncLLM, name) for name in ("sleep", "wake_up", "collective_rpc"))
    client: Any = Client(enabled=True)
    server = Real(engine_id="e", llm=client, adapters={})
    for level in (1, 2):
        assert await server.sleep(level)
        await server.wake()
    await server.wake()  # of one that is awake: nothing
    two = [("sleep", 2), ("wake_up", ["weights"]), ("rpc", "reload_weights"), ("wake_up", ["kv_cache"])]
    assert client.said == [("sleep", 1), ("wake_up", None), *two]


@pytest.mark.vllm
async def test_an_engine_that_cannot_sleep_says_so() -> None:
    from experts.vllm_server import Server as Real

    awake: Any = Client(enabled=False)
    assert not await Real(engine_id="e", llm=awake, adapters={}).sleep(1)
    with_adapters: Any = Client(enabled=True)
    server = Real(engine_id="e", llm=with_adapters, adapters={"math": "folder"})
    assert not await server.sleep(2), "their weights would be gone"
    assert await server.sleep(1)
    assert (awake.said, with_adapters.said) == ([], [("sleep", 1)])
