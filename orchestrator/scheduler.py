"""Calls that wait for their engines, and the steps that bring the engines: bookkeeping without a clock or a loop.

Whoever drives it (residency.Residency with asyncio, the simulation with a virtual clock) tells it what happened and
when, and does what step() says. Every call is O(1), but for step().
"""

import heapq
import itertools
import logging
import math
from dataclasses import dataclass, field
from typing import Any

from experts.errors import QueueFull, Unavailable
from experts.types import Priority
from orchestrator.swaps import BATCH_PATIENCE, Decision, EngineView, Room, Rules, choose

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Ticket:
    """One call's claim on an engine. ``waiter`` is the driver's own."""

    queue: "EngineQueue"
    priority: Priority
    due_s: float
    since_s: float
    waiter: Any = None
    granted_s: float | None = None


class EngineQueue:
    """The calls that wait for one engine, and its ``view``, kept up to date with them."""

    def __init__(self, view: EngineView) -> None:
        self.view = view
        self.longest_s = 0.0  # of the calls since the last load
        self.failure = ""
        self.retry_s = -math.inf
        self._waiting: dict[Priority, dict[Ticket, None]] = {"online": {}, "batch": {}}
        self._dues: dict[Priority, list[tuple[float, int, Ticket]]] = {"online": [], "batch": []}
        self._number = itertools.count()

    def push(self, ticket: Ticket) -> None:
        priority = ticket.priority
        self._waiting[priority][ticket] = None
        heapq.heappush(self._dues[priority], (ticket.due_s, next(self._number), ticket))
        self._note(priority)

    def remove(self, ticket: Ticket) -> bool:
        """False: it does not wait any more."""
        waiting = self._waiting[ticket.priority]
        if ticket not in waiting:
            return False
        del waiting[ticket]
        self._note(ticket.priority)
        return True

    def drain(self) -> list[Ticket]:
        """All of them, online first, each kind in the order it came."""
        found = [t for tickets in self._waiting.values() for t in tickets]
        for priority in self._waiting:
            self._waiting[priority].clear()
            self._dues[priority].clear()
            self._note(priority)
        return found

    def _note(self, priority: Priority) -> None:
        waiting, dues = self._waiting[priority], self._dues[priority]
        while dues and dues[0][2] not in waiting:
            heapq.heappop(dues)
        if len(dues) > 2 * len(waiting) + 16:  # those who left early must not pile up behind one who stays
            dues[:] = [row for row in dues if row[2] in waiting]
            heapq.heapify(dues)
        due_s = dues[0][0] if dues else math.inf
        if priority == "online":
            self.view.online, self.view.due_s = len(waiting), due_s
        else:
            self.view.batch, self.view.batch_due_s = len(waiting), due_s


@dataclass(slots=True)
class Step:
    """What is to be done now, and what has been decided: who drains, whose calls may begin. ``wake_s``: when to ask
    again, if nothing happens before."""

    load: list[EngineQueue] = field(default_factory=list)
    drain: list[EngineQueue] = field(default_factory=list)
    grant: list[Ticket] = field(default_factory=list)
    unload: list[EngineQueue] = field(default_factory=list)
    wake_s: float = math.inf


class Scheduler:
    """``queue_limit``: how many calls may wait, all engines together."""

    def __init__(self, rules: Rules, *, queue_limit: float = math.inf) -> None:
        self.rules = rules
        self.queue_limit = queue_limit
        self.queues: dict[str, EngineQueue] = {}
        self.waiting = 0
        self._leaving: list[EngineQueue] = []
        self._stirred = False
        self._wake_s = math.inf
        self._quiet = Step()

    def claim(
        self, queue: EngineQueue, priority: Priority, now: float, *, expires_s: float = math.inf, waiter: Any = None
    ) -> Ticket:
        """Granted at once where the engine is ready (``granted_s``). Raises Unavailable, QueueFull."""
        view = queue.view
        if view.state == "failed" and now < queue.retry_s:
            raise Unavailable(queue.failure, retry_after_s=queue.retry_s - now)
        if priority == "online":
            view.note_arrival(now)
        ticket = Ticket(queue, priority, self._due_s(view, priority, now, expires_s), now, waiter)
        if view.state == "ready":
            self._grant(ticket, now)
        elif self.waiting >= self.queue_limit:
            raise QueueFull(f"{self.waiting} calls wait for engines to be loaded; try again in a moment.")
        else:
            first = ticket.due_s < (view.due_s if priority == "online" else view.batch_due_s)
            queue.push(ticket)
            self.waiting += 1
            if view.state in ("absent", "failed"):  # the others are on their way
                self._stirred |= first or _is_step(view.online + view.batch)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """A call that waits no more."""
        if ticket.queue.remove(ticket):
            self.waiting -= 1
            self._stirred = True

    def abandon(self, queue: EngineQueue) -> list[Ticket]:
        """Those who wait for an engine that will not come."""
        return self._take(queue)

    def release(self, ticket: Ticket, now: float) -> None:
        """A call that has ended."""
        view = ticket.queue.view
        assert ticket.granted_s is not None  # noqa: S101
        run_s = now - ticket.granted_s
        ticket.queue.longest_s = max(ticket.queue.longest_s, run_s)
        view.run_s = max(run_s, view.run_s)
        if ticket.priority == "online":
            view.running_online -= 1
        else:
            view.running_batch -= 1
            view.batch_s = now
        if view.state == "ready":  # whoever drains is no choice any more; step() sees when it is empty
            self._stirred |= _is_step(view.running_online + view.running_batch)

    def announce(self, queue: EngineQueue, waiting: int, now: float) -> None:
        self._stirred |= waiting == 0
        queue.view.announced, queue.view.batch_s = waiting, now

    def loaded(self, queue: EngineQueue, now: float, *, load_s: float, memory_gib: float | None = None) -> list[Ticket]:
        """The engine is ready: those who waited for it may begin."""
        view = queue.view
        view.state, view.ready_s = "ready", now
        view.load_s = max(1e-3, load_s)
        view.memory_gib = memory_gib or view.memory_gib
        view.run_s, queue.longest_s = queue.longest_s or view.run_s, 0.0
        view.quota = view.batch + view.announced
        queue.failure = ""
        self._stirred = True
        return [self._grant(ticket, now) for ticket in self._take(queue)]

    def load_failed(self, queue: EngineQueue, *, failure: str, retry_s: float) -> list[Ticket]:
        """Nobody is to ask for the engine before ``retry_s``; those who waited wait in vain. It holds its room until
        unloaded() says otherwise."""
        queue.view.state = "failed"
        queue.failure, queue.retry_s = failure, retry_s
        self._stirred = True
        return self._take(queue)

    def unloaded(self, queue: EngineQueue, *, unload_s: float = 0.0) -> None:
        view = queue.view
        view.holds = False
        self._stirred = True
        if view.state != "failed":
            view.state, view.unload_s = "absent", unload_s

    def take_up(self, queue: EngineQueue) -> None:
        """The engine is being loaded: by step(), or because somebody wants it there from the start."""
        queue.view.state, queue.view.holds, queue.view.called = "loading", True, False

    def stir(self) -> None:
        """Something has changed that only the driver knows of: the rules, the engines."""
        self._stirred = True

    def has_room(self, queue: EngineQueue) -> bool:
        return Room([q.view for q in self.queues.values()], self.rules).has(queue.view)

    def step(self, now: float) -> Step:
        """Decides anew where something has changed that may matter: the first to wait for an engine or to leave it,
        the second, the fourth, and so on; so a thousand calls for one engine cost ten decisions."""
        if not (self._stirred or self._leaving or now >= self._wake_s):
            self._quiet.wake_s = self._wake_s
            return self._quiet
        step = Step()
        if self._stirred or now >= self._wake_s:
            self._decide(now, step)
            self._stirred, self._wake_s = False, step.wake_s
        step.wake_s = self._wake_s
        for queue in [q for q in self._leaving if not (q.view.running_online or q.view.running_batch)]:
            self._leaving.remove(queue)
            step.unload.append(queue)
        return step

    def _decide(self, now: float, step: Step) -> None:
        for queue in self.queues.values():
            if queue.view.state == "failed" and now >= queue.retry_s and not queue.view.holds:
                queue.view.state = "absent"
        views = [queue.view for queue in self.queues.values()]
        while (decision := choose(now, views, self.rules)).engine_id is not None or decision.evict:
            self._log(decision)
            if decision.called is not None:
                self.queues[decision.called].view.called = True
            for engine_id in decision.evict:
                self.queues[engine_id].view.state = "draining"
                self._leaving.append(self.queues[engine_id])
                step.drain.append(self.queues[engine_id])
            if decision.engine_id is not None:
                self.take_up(self.queues[decision.engine_id])
                step.load.append(self.queues[decision.engine_id])
        step.wake_s = decision.wake_s

    def _grant(self, ticket: Ticket, now: float) -> Ticket:
        view = ticket.queue.view
        ticket.granted_s = now
        if ticket.priority == "online":
            view.running_online += 1
        else:
            view.running_batch += 1
            view.quota -= 1
            view.batch_s = now
        return ticket

    def _take(self, queue: EngineQueue) -> list[Ticket]:
        tickets = queue.drain()
        self.waiting -= len(tickets)
        return tickets

    def _due_s(self, view: EngineView, priority: Priority, now: float, expires_s: float) -> float:
        patience_s = self.rules.max_wait_s * (1.0 if priority == "online" else BATCH_PATIENCE)
        last_s = expires_s - view.load_s - view.run_s
        # A deadline that cannot be met any more is no reason to hurry.
        return min(now + patience_s, last_s) if last_s > now else now + patience_s

    def _log(self, decision: Decision) -> None:
        if decision.evict:
            log.info("swap: %s goes %s", ", ".join(decision.evict), decision.reason)
        else:
            log.info("swap: %s is loaded: %s", decision.engine_id, decision.reason)


def _is_step(count: int) -> bool:
    """0, 1 and every power of two."""
    return count & (count - 1) == 0
