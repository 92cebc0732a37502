"""Which engine comes next, and which goes for it: a pure function of what waits, what a load costs and the time.

In this order:
1. What is due. A request may wait ``max_wait_s`` for a swap to begin (a batch's ``BATCH_PATIENCE`` times as long), less
   if its deadline is nearer. Who is due first goes first, and starts early enough that those due after it, who need the
   same slots, are not late either. Anybody's engine may have to go for it.
2. What is free: the engine with the most work waiting for each second of loading takes a free slot at once.
3. What is needed least: an engine goes, if it was there ``min_loaded_s`` and more wait for the other than run here and
   are expected to come while both are loaded (its arrivals a second, times the way there and back). An engine that only
   batches have used is not expected to be needed again: it goes as soon as its work is done.

A batch's work keeps its engine until it is done, against other batches; against others it counts for nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Literal

State = Literal["absent", "loading", "ready", "draining", "failed"]

BATCH_PATIENCE = 10.0
"""How many times ``max_wait_s`` a batch's request waits before it counts as due."""
MARGIN = 1.25
"""Swaps are taken to last so many times as long as the longest of late: a queue may be longer than the last one."""
ANNOUNCED_S = 30.0
"""What a batch has announced keeps its engine for so long after its last call: the batch may be gone."""
RATE_S = 60.0
"""Arrivals are averaged over about so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """``slots`` engines at a time, of ``memory_gib`` altogether; None: no limit of that kind."""

    slots: int | None = None
    memory_gib: float | None = None
    max_wait_s: float = 5.0
    min_loaded_s: float = 10.0

    @property
    def limited(self) -> bool:
        return self.slots is not None or self.memory_gib is not None


@dataclass(slots=True, kw_only=True, eq=False)
class EngineView:
    """All that the policy knows of an engine. Not frozen: it is kept up to date call by call, so that a decision costs
    no more with ten thousand calls waiting than with ten.

    ``holds`` says that the engine takes room. ``due_s``: when the first of its waiting calls is due. ``load_s``,
    ``unload_s`` and ``run_s`` (the longest call since the load before the last) are measured, or guessed before.
    ``rate`` is online arrivals a second, as of ``rate_s``. ``quota`` is how much of its batch work was there when it
    was loaded. ``called``: another goes for it already, so the room that becomes free is its.
    """

    engine_id: str
    state: State = "absent"
    holds: bool = False
    memory_gib: float = 0.0
    load_s: float = 1.0
    unload_s: float = 0.0
    run_s: float = 0.0
    online: int = 0
    batch: int = 0
    announced: int = 0
    due_s: float = math.inf
    batch_due_s: float = math.inf
    running_online: int = 0
    running_batch: int = 0
    quota: int = 0
    called: bool = False
    ready_s: float = 0.0
    batch_s: float = -math.inf
    rate: float = 0.0
    rate_s: float = 0.0

    def note_arrival(self, now: float) -> None:
        self.rate = self.rate * math.exp((self.rate_s - now) / RATE_S) + 1 / RATE_S
        self.rate_s = now

    def expected(self, now: float, within_s: float) -> float:
        """Online arrivals within the next ``within_s``, if all goes on as it did."""
        return self.rate * math.exp((self.rate_s - now) / RATE_S) * within_s

    @property
    def drain_s(self) -> float:
        """How long it would take to go."""
        return self.unload_s + (self.run_s if self.running_online or self.running_batch else 0.0)

    def batch_left(self, now: float) -> int:
        """Calls of batches that run here, wait, or are announced and believed."""
        here = self.batch + self.running_batch
        return here + self.announced if here or now - self.batch_s < ANNOUNCED_S else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Load ``engine_id``, or let ``evict`` go, for ``called`` if it is due; neither: wait. ``wake_s`` is when to ask
    again if nothing happens."""

    engine_id: str | None = None
    evict: tuple[str, ...] = ()
    called: str | None = None
    reason: str = ""
    wake_s: float = math.inf


def choose(now: float, engines: Sequence[EngineView], rules: Rules) -> Decision:
    """One step at most; ask again after it. O(engines), and their sort by due time."""
    room = Room(engines, rules)
    ready = [e for e in engines if e.state == "ready"]
    if room.overfull:
        return Decision(evict=_victims(now, ready, room, None), reason="more are loaded than there is room for")
    wanting = [e for e in engines if e.state == "absent" and (e.online or e.batch)]
    if not wanting:
        return Decision()
    line = _Line(now, engines, wanting, room)
    wake_s = line.wake_s
    for engine, urgency in line.in_order():
        if room.has(engine):
            return Decision(engine_id=engine.engine_id, reason=f"{urgency}, and there is room")
        if room.will_have(engine):
            continue
        allowed = [e for e in ready if _may_go(now, e, engine, urgency, rules)]
        if victims := _victims(now, allowed, room, engine):
            called = None if urgency is Urgency.NONE else engine.engine_id
            return Decision(evict=victims, called=called, reason=f"for {engine.engine_id}: {urgency}")
        wake_s = min([wake_s, *(at for e in ready if (at := e.ready_s + rules.min_loaded_s) > now)])
        if urgency is not Urgency.AGED:
            break  # nor for anybody after it
    return Decision(wake_s=wake_s)


class Urgency(StrEnum):
    DUE = "its calls are due"
    AGED = "its batch has waited long"
    NONE = "most waits for it"


class _Line:
    """Who wants to come, and when each has to at the latest.

    Places turn over once a swap (the calls of the engine before end, it goes, the next one loads): the i-th to come
    waits for i // places of them before its own. ``tight``: a swap for anybody else would make one late. ``wake_s``:
    when the next will have to come, or a little before.
    """

    def __init__(self, now: float, engines: Sequence[EngineView], wanting: Sequence[EngineView], room: "Room") -> None:
        self._wanting = wanting
        self._online = sorted([e for e in wanting if e.online], key=attrgetter("due_s"))
        self._batch = [e for e in wanting if e.batch]
        self._late = 0
        self.tight = False
        self.wake_s = min((e.batch_due_s for e in self._batch if e.batch_due_s > now), default=math.inf)
        self._aged = [e for e in self._batch if e.batch_due_s <= now]
        if self._online:
            self._look_ahead(now, engines, room)

    def _look_ahead(self, now: float, engines: Sequence[EngineView], room: "Room") -> None:
        # Also of an engine that is idle: it may be asked at any time.
        drain_s = max([e.run_s + e.unload_s for e in engines if e.state == "ready"], default=0.0)
        swap_s = max([e.run_s + e.unload_s for e in engines]) + max([e.load_s for e in self._online])
        swap_s *= MARGIN
        moving, places = room.moving, room.places
        longest_s = (len(self._online) + moving) // places * swap_s
        for i, engine in enumerate(self._online):
            latest_s = engine.due_s - drain_s
            if latest_s - longest_s > now:  # and so is everybody's after it
                self._wake(latest_s - longest_s)
                return
            start_s = latest_s - (i + moving) // places * swap_s
            if start_s <= now or engine.called:
                self._late = i + 1
            else:
                self._wake(start_s)
            self.tight = self.tight or latest_s - (i + moving + 1) // places * swap_s <= now

    def _wake(self, at_s: float) -> None:
        if at_s < self.wake_s:
            self.wake_s = at_s

    def in_order(self) -> Iterator[tuple[EngineView, Urgency]]:
        """The due by when, the aged by when, the others by work a second of loading, batches last. Where time is tight,
        the others by when they will be due: room for one of them is room taken from those who are next."""
        for engine in self._online[: self._late]:
            yield engine, Urgency.DUE
        for engine in sorted(self._aged, key=attrgetter("batch_due_s")):
            yield engine, Urgency.AGED
        if self.tight:
            for engine in self._online[self._late :]:
                yield engine, Urgency.NONE
        others = [*self._online[self._late :], *(e for e in self._batch if not e.online)]
        while others:  # seldom more than once: cheaper than to sort them
            engine = min(others, key=_work)
            others.remove(engine)
            yield engine, Urgency.NONE


def _work(engine: EngineView) -> tuple[bool, float]:
    return not engine.online, -(engine.online or engine.batch + engine.announced) / engine.load_s


def _may_go(now: float, engine: EngineView, candidate: EngineView, urgency: Urgency, rules: Rules) -> bool:
    """Whether ``engine`` may go for ``candidate``."""
    if urgency is Urgency.DUE:
        return True
    if engine.rate and now < engine.ready_s + rules.min_loaded_s:
        return False
    if urgency is Urgency.AGED:
        return engine.quota <= 0 or not engine.batch_left(now)
    if not candidate.online and (engine.running_online or engine.batch_left(now)):
        return False
    waiting = candidate.online or candidate.batch + candidate.announced
    return waiting > engine.running_online + engine.expected(now, candidate.load_s + engine.load_s + engine.drain_s)


def _victims(now: float, allowed: Sequence[EngineView], room: "Room", candidate: EngineView | None) -> tuple[str, ...]:
    """Those of ``allowed`` who have to go, the least needed ones; () where even all of them make too little room."""

    def need(engine: EngineView) -> tuple[float, ...]:
        held = bool(engine.running_online), engine.batch_left(now) > 0
        return (*held, engine.expected(now, engine.load_s), engine.ready_s)

    gone: list[EngineView] = []
    for engine in sorted(allowed, key=need):
        gone.append(engine)
        if room.enough_without(gone, candidate):
            return tuple(e.engine_id for e in gone)
    return ()


class Room:
    """What is free, and what will be once those who drain have gone. Whoever is promised room keeps it."""

    def __init__(self, engines: Sequence[EngineView], rules: Rules) -> None:
        holding = [e for e in engines if e.holds]
        leaving = [e for e in holding if e.state in ("draining", "failed")]
        self.moving = sum(e.state != "ready" for e in holding)
        self.places = max(1, len(holding) if rules.slots is None else rules.slots)
        self._held = len(holding)
        self._slots = math.inf if rules.slots is None else rules.slots - len(holding)
        self._gib = math.inf if rules.memory_gib is None else rules.memory_gib - sum(e.memory_gib for e in holding)
        self._leaving = len(leaving)
        self._leaving_gib = sum(e.memory_gib for e in leaving)

    @property
    def overfull(self) -> bool:
        """Also without those who leave. One engine alone always fits."""
        many = self._held - self._leaving > 1
        return many and (self._slots + self._leaving < 0 or self._gib + self._leaving_gib < 0)

    def has(self, engine: EngineView) -> bool:
        return (self._slots >= 1 and self._gib >= engine.memory_gib) or not self._held

    def will_have(self, engine: EngineView) -> bool:
        """Whether those who leave make room for ``engine``: it is promised to it then."""
        slots, gib = self._slots + self._leaving, self._gib + self._leaving_gib
        if not self._leaving or not ((slots >= 1 and gib >= engine.memory_gib) or self._held == self._leaving):
            return False
        self._slots -= 1
        self._gib -= engine.memory_gib
        return True

    def enough_without(self, gone: Sequence[EngineView], candidate: EngineView | None) -> bool:
        """Whether ``candidate`` fits (None: whether all the others do) once ``gone`` and those who leave are gone."""
        slots = self._slots + self._leaving + len(gone)
        gib = self._gib + self._leaving_gib + sum(e.memory_gib for e in gone)
        if candidate is None:
            return slots >= 0 and gib >= 0
        alone = len(gone) + self._leaving == self._held
        return (slots >= 1 and gib >= candidate.memory_gib) or alone
