"""Who the scheduler is measured against: the same engines, the same calls, other orders."""

import math
from collections import deque
from typing import Any

from experts.types import Priority
from orchestrator.scheduler import EngineQueue, Scheduler, Step, Ticket
from orchestrator.swaps import Rules


class FirstCome(Scheduler):
    """First come, first served: a call begins when those before it have begun. Where its engine is not there, the one
    longest unused goes as soon as it is idle. Calls in a row for engines that are there run at the same time."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self._line: deque[Ticket] = deque()

    def claim(
        self, queue: EngineQueue, priority: Priority, now: float, *, expires_s: float = math.inf, waiter: Any = None
    ) -> Ticket:
        ticket = Ticket(queue, priority, now, now, waiter)
        self._line.append(ticket)
        self.waiting += 1
        return ticket

    def loaded(self, queue: EngineQueue, now: float, *, load_s: float, memory_gib: float | None = None) -> list[Ticket]:
        queue.view.state, queue.view.ready_s = "ready", now
        return []

    def step(self, now: float) -> Step:
        step = Step()
        while self._line and self._line[0].queue.view.state == "ready":
            ticket = self._line.popleft()
            self.waiting -= 1
            ticket.queue.view.ready_s = now  # used last
            step.grant.append(self._grant(ticket, now))
        if self._line and self._line[0].queue.view.state == "absent":
            self._make_way(self._line[0].queue, step)
        return step

    def _make_way(self, wanted: EngineQueue, step: Step) -> None:
        held = [queue for queue in self.queues.values() if queue.view.holds]
        if len(held) < (self.rules.slots or math.inf):
            self.take_up(wanted)
            step.load.append(wanted)
        elif all(queue.view.state == "ready" for queue in held):
            last = min(held, key=lambda queue: queue.view.ready_s)
            if not last.view.running_online + last.view.running_batch:
                last.view.state = "draining"
                step.drain.append(last)
                step.unload.append(last)
