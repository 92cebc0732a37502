"""Which engines are loaded: does what the scheduler says, and tells it what came of it."""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine, Mapping
from typing import Any

from experts.base import Engine
from experts.errors import CollegiumError, DeadlineExceeded, Unavailable
from experts.types import Priority
from orchestrator.loading import Loader, Loading, used_bytes
from orchestrator.scheduler import EngineQueue, Scheduler, Ticket
from orchestrator.swaps import EngineView, Rules

log = logging.getLogger(__name__)

ALWAYS = ("openai", "recorded", "serve")
"""Backends whose engines are always there and take no room: nothing of theirs lies in this machine's memory."""


class Residency:
    """Lives as long as the service does, over all its reloads. ``loads`` and ``load_s`` (all loads together) are by
    engine id. Without ``rules`` that limit anything it has nothing to do: every engine is always there."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        rules: Rules | None = None,
        loading: Loading | None = None,
        queue: int | None = None,
    ) -> None:
        self.loads = Counter[str]()
        self.load_s: defaultdict[str, float] = defaultdict(float)
        self._scheduler = Scheduler(rules or Rules(), queue_limit=math.inf if queue is None else queue)
        self._loader = Loader(loading or Loading(), used_bytes)
        self._engines: dict[EngineQueue, Engine] = {}
        self._tasks: dict[asyncio.Task[None], EngineQueue] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.queues = self.add(engines)

    def add(self, engines: Mapping[str, Engine]) -> dict[str, EngineQueue]:
        """A queue for each engine; those who have one already keep it."""
        known = {engine: queue for queue, engine in self._engines.items()}
        self.queues = {e: known.get(engine) or self._add(engine) for e, engine in engines.items()}
        return self.queues

    @property
    def rules(self) -> Rules:
        return self._scheduler.rules

    @property
    def slots(self) -> int | None:
        return self.rules.slots

    def manages(self, engine: Engine) -> bool:
        """Whether the engine comes and goes."""
        return self.rules.limited and engine.spec.backend not in ALWAYS

    def always(self, engine_id: str) -> bool:
        return not self.manages(self._engines[self.queues[engine_id]])

    def follow(self, other: "Residency") -> None:
        """Take over the settings of the residency that a new config has made."""
        self._scheduler.rules, self._scheduler.queue_limit = other.rules, other._scheduler.queue_limit
        self._loader.loading = other._loader.loading
        self._scheduler.stir()
        self._step()

    async def acquire(self, queue: EngineQueue, priority: Priority, expires_s: float) -> Ticket:
        """Waits until the engine is ready. Raises Unavailable, DeadlineExceeded, QueueFull."""
        if self._closed:
            raise Unavailable("The service is shutting down.")
        now = time.monotonic()
        ticket = self._scheduler.claim(queue, priority, now, expires_s=expires_s)
        if ticket.granted_s is None:
            await self._wait(ticket, expires_s)
        return ticket

    def release(self, ticket: Ticket) -> None:
        self._scheduler.release(ticket, time.monotonic())
        if self._scheduler.waiting or ticket.queue.view.state == "draining":
            self._step()

    def announce(self, queue: EngineQueue, waiting: int) -> None:
        self._scheduler.announce(queue, waiting, time.monotonic())

    async def preload(self, engine_id: str) -> None:
        """Load the engine before anybody asks for it, if there is room; what fails is told by its state."""
        if self._closed:
            raise Unavailable("The service is shutting down.")
        queue = self.queues[engine_id]
        if queue.view.state == "absent" and self._scheduler.has_room(queue):
            self._scheduler.take_up(queue)
            task = self._spawn(queue, self._load(queue))
            await asyncio.wait([task])

    async def drop(self, engine: Engine) -> None:
        """Unload the engine and forget it: no service has it any more."""
        queue = next((q for q, e in self._engines.items() if e is engine), None)
        if queue is not None:
            await self._stop(queue)
        await self._loader.end(engine)
        if queue is not None:
            self._forget(queue)

    async def close(self) -> None:
        """End what is under way. The engines are still to be dropped."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for queue in list(self._engines):
            await self._stop(queue)

    def _add(self, engine: Engine) -> EngineQueue:
        spec = engine.spec
        name = spec.engine_id
        while name in self._scheduler.queues:
            name += "'"  # the one before it, whose last calls are under way
        view = EngineView(engine_id=name, memory_gib=spec.memory_gib or 0.0)
        queue = EngineQueue(view)
        self._engines[queue] = engine
        if self.manages(engine):
            self._scheduler.queues[name] = queue
        else:
            view.state = "ready"
        return queue

    def _forget(self, queue: EngineQueue) -> None:
        self._engines.pop(queue, None)
        self._scheduler.queues.pop(queue.view.engine_id, None)
        self._scheduler.stir()
        self._step()

    async def _wait(self, ticket: Ticket, expires_s: float) -> None:
        ticket.waiter = asyncio.get_running_loop().create_future()
        self._step()
        try:
            async with asyncio.timeout(None if math.isinf(expires_s) else expires_s - time.monotonic()) as limit:
                await ticket.waiter
        except BaseException as exc:
            if ticket.granted_s is not None:
                self.release(ticket)  # granted in the moment of leaving
            elif not ticket.waiter.done() or ticket.waiter.cancelled():
                self._scheduler.withdraw(ticket)
                self._step()
            if isinstance(exc, TimeoutError) and limit.expired():
                engine_id = ticket.queue.view.engine_id
                raise DeadlineExceeded(f"Engine '{engine_id}' could not be loaded before the deadline.") from exc
            raise

    def _step(self) -> None:
        """Do what is due, and come back when the next thing is."""
        if self._closed or not self.rules.limited:
            return
        now = time.monotonic()
        step = self._scheduler.step(now)
        for queue in step.unload:
            self._spawn(queue, self._unload(queue))
        for queue in step.load:
            self._spawn(queue, self._load(queue))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if not math.isinf(step.wake_s):
            # A timer may ring a little early; asked again too soon, the scheduler only says so.
            pause_s = max(0.001, step.wake_s - now)
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._step)

    def _spawn(self, queue: EngineQueue, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = queue
        task.add_done_callback(lambda task: self._tasks.pop(task, None))
        return task

    async def _load(self, queue: EngineQueue) -> None:
        engine_id = self._engines[queue].spec.engine_id
        try:
            loaded = await self._loader.load(self._engines[queue])
        except CollegiumError as exc:
            await self._fail(queue, exc.message)
            return
        except asyncio.CancelledError:
            self._scheduler.load_failed(queue, failure="The load was stopped.", retry_s=0.0)
            raise
        self.loads[engine_id] += 1
        self.load_s[engine_id] += loaded.load_s
        log.info("engine %s is loaded after %.1f s", engine_id, loaded.load_s)
        now = time.monotonic()
        for ticket in self._scheduler.loaded(queue, now, load_s=loaded.load_s, memory_gib=loaded.memory_gib):
            _tell(ticket, None)
        self._step()

    async def _fail(self, queue: EngineQueue, failure: str) -> None:
        failed_s = self._loader.loading.failed_s
        log.error("engine %s is left alone for %g s: %s", queue.view.engine_id, failed_s, failure)
        message = f"Engine '{queue.view.engine_id}' cannot be loaded: {failure}"
        for ticket in self._scheduler.load_failed(queue, failure=message, retry_s=time.monotonic() + failed_s):
            _tell(ticket, Unavailable(message, retry_after_s=failed_s))
        await self._unload(queue)

    async def _unload(self, queue: EngineQueue) -> None:
        started = time.monotonic()
        await self._loader.unload(self._engines[queue])
        self._scheduler.unloaded(queue, unload_s=time.monotonic() - started)
        self._step()

    async def _stop(self, queue: EngineQueue) -> None:
        for ticket in self._scheduler.abandon(queue):
            _tell(ticket, Unavailable("The service is shutting down."))
        tasks = [task for task, of in self._tasks.items() if of is queue]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell(ticket: Ticket, failure: CollegiumError | None) -> None:
    waiter: asyncio.Future[None] | None = ticket.waiter
    if waiter is None or waiter.done():
        return  # it is leaving, and gives back what it was granted
    if failure is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(failure)
