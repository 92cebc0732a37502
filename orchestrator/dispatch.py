"""Who may use which engine when: leases on engines that come and go (swaps.py has the policy)."""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from experts.base import Engine, Expert
from experts.types import ChunkStream, Priority, Request
from orchestrator.residency import Residency
from orchestrator.swaps import State


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """One engine at one moment. ``waiting`` and ``running`` are leases; ``announced`` calls are held by batches outside
    the queue. ``load_s`` is all its loads together; ``failure`` says why it could not be loaded."""

    state: State
    running: int = 0
    waiting: Mapping[Priority, int]
    announced: int = 0
    loads: int = 0
    load_s: float = 0.0
    failure: str | None = None


class Dispatcher:
    """One service's view of the residency, which may be shared with the services before it."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self._queues = residency.queues

    def join(self, residency: Residency, engines: Mapping[str, Engine]) -> None:
        """Share ``residency`` with the service before this one, by this one's rules."""
        residency.follow(self.residency)
        self.residency = residency
        self._queues = residency.add(engines)

    @asynccontextmanager
    async def lease(
        self, engine_id: str, *, priority: Priority = "online", expires_s: float | None = None
    ) -> AsyncIterator[None]:
        """The engine is ready, and stays, for as long as the block lasts. ``expires_s`` is on the monotonic clock.

        Raises Unavailable when the engine cannot be loaded, DeadlineExceeded, QueueFull.
        """
        queue = self._queues[engine_id]
        ticket = await self.residency.acquire(queue, priority, math.inf if expires_s is None else expires_s)
        try:
            yield
        finally:
            self.residency.release(ticket)

    def announce(self, engine_id: str, waiting: int) -> None:
        """How many more calls a batch holds for this engine outside the queue; it replaces what was said before. One
        that a reload took away is none of ours any more."""
        if (queue := self._queues.get(engine_id)) is not None:
            self.residency.announce(queue, waiting)

    def snapshot(self) -> dict[str, EngineStatus]:
        return {
            engine_id: EngineStatus(
                state=queue.view.state,
                running=queue.view.running_online + queue.view.running_batch,
                waiting={"online": queue.view.online, "batch": queue.view.batch},
                announced=queue.view.announced,
                loads=self.residency.loads[engine_id],
                load_s=self.residency.load_s[engine_id],
                failure=queue.failure or None,
            )
            for engine_id, queue in self._queues.items()
        }


class Resident:
    """An expert whose engine may have to be loaded first. The wait is nobody's failure: it counts neither for the clock
    around the call, which is inside, nor for the breaker."""

    def __init__(self, inner: Expert, dispatcher: Dispatcher) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._dispatcher = dispatcher

    async def generate(self, request: Request) -> ChunkStream:
        lease = self._dispatcher.lease(self.spec.engine_id, priority=request.priority, expires_s=request.expires_s)
        async with lease, aclosing(self._inner.generate(request)) as stream:
            async for chunk in stream:
                yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
