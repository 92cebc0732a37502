"""Simulated engines under the real scheduler: hours of traffic in seconds, on a clock that jumps from event to event.

Everything that decides is the service's own (orchestrator.scheduler, orchestrator.swaps). What is simulated: an engine
takes ``load_s`` to load, reads ``prefill_tps`` tokens a second and writes ``decode_tps`` for each of its calls; all
that fit into ``kv_tokens`` run at once, the others wait inside the engine, first come first served.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from experts.fake import Speeds
from experts.types import Priority
from orchestrator.scheduler import EngineQueue, Scheduler, Ticket
from orchestrator.swaps import EngineView


class Call(NamedTuple):
    arrival_s: float
    engine: int
    prompt_tokens: int
    answer_tokens: int
    priority: Priority = "online"


class Span(NamedTuple):
    """What an engine did for a while: "loading", "ready" or "draining"."""

    engine: int
    state: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Engine:
    """``backlog``: calls the engine has taken and has no KV cache for yet."""

    speeds: Speeds
    queue: EngineQueue
    number: int
    state: str = "absent"
    backlog: deque[Ticket] = field(default_factory=deque)
    used_tokens: int = 0
    since_s: float = 0.0
    loads: int = 0


@dataclass(slots=True)
class Outcome:
    """``wait_s``: from arrival to the lease; ``latency_s``: to the end. In the order in which the calls ended."""

    calls: list[Call] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    loads: int = 0
    end_s: float = 0.0
    steps: int = 0


class Simulation:
    """``keep``: whether the outcome remembers each call."""

    def __init__(self, scheduler: Scheduler, speeds: list[Speeds], *, keep: bool = True) -> None:
        self.scheduler = scheduler
        self.engines = [Engine(s, self._queue(i, s), i) for i, s in enumerate(speeds)]
        self._by_id = {engine.queue.view.engine_id: engine for engine in self.engines}
        self.now = 0.0
        self.outcome = Outcome()
        self._keep = keep
        self._events: list[tuple[float, int, str, Engine | None, Ticket | None]] = []
        self._number = itertools.count()
        self._wake_s = math.inf

    def _queue(self, number: int, speeds: Speeds) -> EngineQueue:
        view = EngineView(
            engine_id=f"engine {number:02d}", load_s=max(1e-3, speeds.load_s), memory_gib=speeds.memory_gib
        )
        queue = self.scheduler.queues[view.engine_id] = EngineQueue(view)
        return queue

    def run(self, calls: Iterator[Call], *, until_s: float = math.inf) -> Outcome:
        """Until every call has ended, or ``until_s``. ``calls`` come in the order of their arrival; one is drawn at a
        time."""
        coming = next(calls, None)
        while coming is not None or self._events:
            at_s = self._events[0][0] if self._events else math.inf
            if coming is not None and coming.arrival_s <= at_s:
                if coming.arrival_s > until_s:
                    break
                self.now = coming.arrival_s
                self.offer(coming)
                coming = next(calls, None)
            elif at_s > until_s:
                break
            else:
                self._happen()
        self.outcome.end_s = self.now
        return self.outcome

    def offer(self, call: Call) -> None:
        queue = self.engines[call.engine].queue
        ticket = self.scheduler.claim(queue, call.priority, self.now, waiter=call)
        if ticket.granted_s is not None:
            self._begin(ticket)
        else:
            self.step()

    def step(self) -> None:
        self.outcome.steps += 1
        step = self.scheduler.step(self.now)
        for ticket in step.grant:
            self._begin(ticket)
        for queue in step.unload:
            engine = self._of(queue)
            self._schedule(self.now + engine.speeds.unload_s, "unloaded", engine)
        for queue in step.load:
            engine = self._of(queue)
            self._turn(engine, "loading")
            self._schedule(self.now + engine.speeds.load_s, "loaded", engine)
        for queue in step.drain:
            self._turn(self._of(queue), "draining")
        if step.wake_s < self._wake_s:
            self._wake_s = max(step.wake_s, self.now)
            self._schedule(self._wake_s, "wake", None)

    def ended(self, call: Call) -> None:
        """For whoever feeds the next call when one ends."""

    def _happen(self) -> None:
        self.now, _, what, engine, ticket = heapq.heappop(self._events)
        if ticket is not None and engine is not None:
            self._end(ticket, engine)
        elif what == "loaded" and engine is not None:
            self._turn(engine, "ready")
            engine.loads += 1
            self.outcome.loads += 1
            for granted in self.scheduler.loaded(engine.queue, self.now, load_s=engine.speeds.load_s):
                self._begin(granted)
            self.step()
        elif what == "unloaded" and engine is not None:
            self._turn(engine, "absent")
            self.scheduler.unloaded(engine.queue, unload_s=engine.speeds.unload_s)
            self.step()
        elif self.now == self._wake_s:  # else a nearer one was wanted since, and has rung
            self._wake_s = math.inf
            self.step()

    def _begin(self, ticket: Ticket) -> None:
        engine = self._of(ticket.queue)
        engine.backlog.append(ticket)
        if len(engine.backlog) == 1:
            self._fill(engine)

    def _fill(self, engine: Engine) -> None:
        """Start what fits into the KV cache, in order."""
        while engine.backlog:
            call: Call = engine.backlog[0].waiter
            tokens = call.prompt_tokens + call.answer_tokens
            if engine.used_tokens and engine.used_tokens + tokens > engine.speeds.kv_tokens:
                return
            engine.used_tokens += tokens
            run_s = engine.speeds.run_s(call.prompt_tokens, call.answer_tokens)
            self._schedule(self.now + run_s, "ended", engine, engine.backlog.popleft())

    def _end(self, ticket: Ticket, engine: Engine) -> None:
        call: Call = ticket.waiter
        engine.used_tokens -= call.prompt_tokens + call.answer_tokens
        if engine.backlog:
            self._fill(engine)
        self.scheduler.release(ticket, self.now)
        if self._keep and ticket.granted_s is not None:
            self.outcome.calls.append(call)
            self.outcome.wait_s.append(ticket.granted_s - call.arrival_s)
            self.outcome.latency_s.append(self.now - call.arrival_s)
        self.ended(call)
        if self.scheduler.waiting or ticket.queue.view.state == "draining":
            self.step()

    def _of(self, queue: EngineQueue) -> Engine:
        return self._by_id[queue.view.engine_id]

    def _turn(self, engine: Engine, state: str) -> None:
        if engine.state != "absent":
            self.outcome.spans.append(Span(engine.number, engine.state, engine.since_s, self.now))
        engine.state, engine.since_s = state, self.now

    def _schedule(self, at_s: float, what: str, engine: Engine | None, ticket: Ticket | None = None) -> None:
        heapq.heappush(self._events, (at_s, next(self._number), what, engine, ticket))
