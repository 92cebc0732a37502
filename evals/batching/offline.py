"""A batch, grouped by the scheduler, against the same calls one after the other."""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evals.batching.baselines import FirstCome
from evals.batching.settings import Offline
from evals.batching.simulation import Call, Outcome, Simulation
from orchestrator.scheduler import Scheduler
from orchestrator.swaps import Rules

WINDOW = 64
"""Calls that a batch gives out for one engine at a time; the rest it announces."""


class Batch(Simulation):
    """Gives out ``WINDOW`` calls an engine, the next when one ends, and tells the scheduler what is left."""

    def feed(self, calls: Sequence[Call]) -> Outcome:
        self._left: dict[int, deque[Call]] = defaultdict(deque)
        for call in calls:
            self._left[call.engine].append(call)
        for engine in list(self._left):
            self._announce(engine)
        for engine in list(self._left):
            for _ in range(WINDOW):
                self._next(engine)
        return self.run(iter(()))

    def ended(self, call: Call) -> None:
        self._next(call.engine)

    def _next(self, engine: int) -> None:
        if self._left[engine]:
            call = self._left[engine].popleft()
            self._announce(engine)
            self.offer(call)

    def _announce(self, engine: int) -> None:
        self.scheduler.announce(self.engines[engine].queue, len(self._left[engine]), self.now)


class OneByOne(Simulation):
    """The next call when the one before has ended."""

    def feed(self, calls: Sequence[Call]) -> Outcome:
        self._line = deque(calls)
        self.offer(self._line.popleft())
        return self.run(iter(()))

    def ended(self, call: Call) -> None:
        if self._line:
            self.offer(self._line.popleft()._replace(arrival_s=self.now))


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineResult:
    """``bound_s``: one load of each engine used, and its calls with nobody else there."""

    grouped: Outcome
    one_by_one: Outcome
    bound_s: float
    used: int
    questions: int

    @property
    def speedup(self) -> float:
        return self.one_by_one.end_s / self.grouped.end_s

    @property
    def over_bound(self) -> float:
        return self.grouped.end_s / self.bound_s - 1


def measure(setting: Offline, seed: int) -> OfflineResult:
    calls, rules = setting.calls(seed), Rules(slots=1)
    speeds = [setting.speeds] * setting.engines
    by_engine = defaultdict(list)
    for call in calls:
        by_engine[call.engine].append(call)
    ready = [replace(setting.speeds, load_s=0.0)] * setting.engines
    alone_s = [Simulation(Scheduler(rules), ready).run(iter(own)).end_s for own in by_engine.values()]
    return OfflineResult(
        grouped=Batch(Scheduler(rules), speeds).feed(calls),
        one_by_one=OneByOne(FirstCome(rules), speeds).feed(calls),
        bound_s=sum(alone_s) + setting.speeds.load_s * len(by_engine),
        used=len(by_engine),
        questions=setting.questions,
    )
