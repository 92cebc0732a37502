"""Which engine comes next, and which goes for it: a pure function of what waits, what a load costs and the time.

In this order:
1. What is due. A request may wait ``max_wait_s`` for a swap to begin (a batch's ``BATCH_PATIENCE`` times as long), less
   if its deadline is nearer. Who is due first goes first, and starts early enough that those due after it, who need the
   same slots, are not late either. Anybody's engine may have to go for it.
2. What is free: the engine with the most work waiting for each second of loading takes a free slot at once.
3. What is idle: an engine nobody uses goes, if it was there ``min_loaded_s`` and more wait for the other than are
   expected to come for it while both are loaded (its arrivals a second, times both loads). An engine that only batches
   have used is not expected to be needed again: it goes as soon as its work is done.

A batch's work keeps its engine until it is done, against other batches; against others it counts for nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

State = Literal["absent", "loading", "ready", "draining", "failed"]

BATCH_PATIENCE = 10.0
"""How many times ``max_wait_s`` a batch's request waits before it counts as due."""
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


@dataclass(slots=True, kw_only=True)
class EngineView:
    """All that the policy knows of an engine. Not frozen: it is kept up to date call by call, so that a decision costs
    no more with ten thousand calls waiting than with ten.

    ``holds`` says that the engine takes room. ``due_s``: when the first of its waiting calls is due. ``load_s``,
    ``unload_s`` and ``run_s`` (the longest recent call) are measured, or guessed before. ``rate`` is online arrivals a
    second, as of ``rate_s``. ``quota`` is how much of its batch work was there when it was loaded.
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
    """Load ``engine_id``, or let ``evict`` go; neither: wait. ``wake_s`` is when to ask again if nothing happens."""

    engine_id: str | None = None
    evict: tuple[str, ...] = ()
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
    call, wake_s = _calls(now, wanting, ready, room)
    wanting.sort(key=lambda e: _rank(e, call))
    for engine in wanting:
        urgency = call.get(engine.engine_id, Urgency.NONE)
        if room.has(engine):
            return Decision(engine_id=engine.engine_id, reason=f"{urgency}, and there is room")
        if room.will_have(engine):
            continue
        allowed = [e for e in ready if _may_go(now, e, engine, urgency, rules)]
        if victims := _victims(now, allowed, room, engine):
            return Decision(evict=victims, reason=f"for {engine.engine_id}: {urgency}")
        wake_s = min([wake_s, *(at for e in ready if (at := e.ready_s + rules.min_loaded_s) > now)])
        if urgency is not Urgency.AGED:
            break  # nor for anybody after it
    return Decision(wake_s=wake_s)


class Urgency(StrEnum):
    DUE = "its calls are due"
    AGED = "its batch has waited long"
    NONE = "most waits for it"


def _calls(
    now: float, wanting: Sequence[EngineView], ready: Sequence[EngineView], room: "Room"
) -> tuple[dict[str, Urgency], float]:
    """Which engines have to come now; and when the next one will have to.

    Slots turn over once a swap: the i-th to come waits for i // slots swaps before its own.
    """
    line = sorted((e for e in wanting if e.online), key=_due_s)
    drain_s = min((e.drain_s for e in ready), default=0.0)
    swap_s = drain_s + max((e.load_s for e in line), default=0.0)
    late, wake_s = 0, math.inf
    for i, engine in enumerate(line):
        start_s = engine.due_s - drain_s - (i + room.moving) // room.places * swap_s
        if start_s <= now:
            late = i + 1
        else:
            wake_s = min(wake_s, start_s)
    call = {e.engine_id: Urgency.DUE for e in line[:late]}
    for engine in wanting:
        if engine.batch_due_s <= now:
            call.setdefault(engine.engine_id, Urgency.AGED)
        else:
            wake_s = min(wake_s, engine.batch_due_s)
    return call, wake_s


def _due_s(engine: EngineView) -> float:
    return engine.due_s


def _rank(engine: EngineView, call: Mapping[str, Urgency]) -> tuple[float, ...]:
    """Least first: the due by when, the aged by when, the others by work a second of loading, batches last."""
    urgency = call.get(engine.engine_id)
    if urgency is Urgency.DUE:
        return (0, engine.due_s)
    if urgency is Urgency.AGED:
        return (1, engine.batch_due_s)
    return (2 if engine.online else 3, -(engine.online or engine.batch + engine.announced) / engine.load_s)


def _may_go(now: float, engine: EngineView, candidate: EngineView, urgency: Urgency, rules: Rules) -> bool:
    """Whether ``engine`` may go for ``candidate``."""
    if urgency is Urgency.DUE:
        return True
    if engine.rate and now < engine.ready_s + rules.min_loaded_s:
        return False
    if urgency is Urgency.AGED:
        return engine.quota <= 0 or not engine.batch_left(now)
    if engine.running_online or (not candidate.online and engine.batch_left(now)):
        return False
    waiting = candidate.online or candidate.batch + candidate.announced
    return waiting > engine.expected(now, candidate.load_s + engine.load_s)


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
