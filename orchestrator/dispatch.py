"""Who may use which engine when: leases on engines that come and go."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from experts.base import Expert
from experts.types import ChunkStream, Priority, Request
from orchestrator.residency import Residency, State


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine at one moment. ``waiting`` and ``running`` are leases; ``announced`` calls are held by batches outside
    the queue. ``load_s`` is all its loads together."""

    state: State
    running: int = 0
    waiting: Mapping[Priority, int]
    announced: int = 0
    loads: int = 0
    load_s: float = 0.0
    failure: str | None = None


class Dispatcher:
    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self._running = dict.fromkeys(residency.engines, 0)
        self._announced = dict.fromkeys(residency.engines, 0)
        self._waiting: dict[str, dict[Priority, int]] = {e: {"online": 0, "batch": 0} for e in residency.engines}
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def lease(
        self, engine_id: str, *, priority: Priority = "online", expires_s: float | None = None
    ) -> AsyncIterator[None]:
        """The engine is ready, and stays, for as long as the block lasts. ``expires_s`` is on the monotonic clock.

        Raises Unavailable when the engine cannot be loaded, DeadlineExceeded, QueueFull.
        """
        self._waiting[engine_id][priority] += 1
        try:
            async with self._changed:
                await self._make_ready(engine_id)
        finally:
            self._waiting[engine_id][priority] -= 1
        self._running[engine_id] += 1
        try:
            yield
        finally:
            self._running[engine_id] -= 1
            async with self._changed:
                self._changed.notify_all()

    def announce(self, engine_id: str, waiting: int) -> None:
        """How many more calls a batch holds for this engine outside the queue; it replaces what was said before."""
        self._announced[engine_id] = waiting

    def snapshot(self) -> dict[str, EngineStatus]:
        return {
            e: EngineStatus(
                state=self.residency.states[e],
                running=self._running[e],
                waiting=dict(self._waiting[e]),
                announced=self._announced[e],
                loads=self.residency.loads[e],
                load_s=self.residency.load_s[e],
            )
            for e in self.residency.engines
        }

    async def _make_ready(self, engine_id: str) -> None:
        while self.residency.states[engine_id] != "ready":
            there = self.residency.resident()
            if self.residency.slots is None or len(there) < self.residency.slots:
                await self.residency.load(engine_id)
                continue
            idle = [e for e in there if not self._running[e]]
            if idle:
                await self.residency.unload(idle[0])
            else:
                await self._changed.wait()


class Resident:
    """An expert whose engine may have to be loaded first."""

    def __init__(self, inner: Expert, dispatcher: Dispatcher) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._dispatcher = dispatcher

    async def generate(self, request: Request) -> ChunkStream:
        engine_id, expires_s = self.spec.engine_id, request.expires_s
        async with self._dispatcher.lease(engine_id, priority=request.priority, expires_s=expires_s):
            async with aclosing(self._inner.generate(request)) as stream:
                async for chunk in stream:
                    yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
