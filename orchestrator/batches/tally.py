"""What a batch has cost so far. Filed with each transaction, so that a batch in several attempts counts them all."""

import time
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from orchestrator.dispatch import EngineStatus
from orchestrator.resilience import CallRecord


@dataclass(slots=True, kw_only=True)
class Tally:
    """``requests`` are the input's lines, blank ones aside; ``settled`` those that have their row, ``failed`` those of
    them that go to the error file. ``generate_s`` is the time in which at least one call was under way; ``wall_s`` that
    of all attempts together."""

    requests: int = 0
    settled: int = 0
    failed: int = 0
    expert_calls: int = 0
    loads: int = 0
    load_s: float = 0.0
    generate_s: float = 0.0
    wall_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def facts(self) -> dict[str, str]:
        return {key: repr(value) for key, value in asdict(self).items()}

    @classmethod
    def read(cls, facts: Mapping[str, str]) -> "Tally":
        tally = cls()
        for key, start in asdict(tally).items():
            setattr(tally, key, type(start)(facts.get(key, start)))
        return tally


@dataclass(slots=True, kw_only=True)
class Meter:
    """Keeps ``tally`` through one attempt, from what the calls and the dispatcher tell."""

    tally: Tally
    _before_s: float = 0.0
    _started_s: float = field(default_factory=time.monotonic)
    _busy: "Busy" = field(default_factory=lambda: Busy())
    _seen: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        self._before_s = self.tally.wall_s

    def called(self, records: Sequence[CallRecord]) -> None:
        for record in records:
            self.tally.generate_s += self._busy.add(record.started_s, record.started_s + record.latency_s)
            self.tally.expert_calls += 1
            self.tally.prompt_tokens += record.usage.prompt_tokens
            self.tally.completion_tokens += record.usage.completion_tokens

    def look(self, snapshot: Mapping[str, EngineStatus]) -> Tally:
        """The tally as of now. What was loaded before the first look is not the batch's."""
        loads, load_s = sum(s.loads for s in snapshot.values()), sum(s.load_s for s in snapshot.values())
        if self._seen is not None:
            self.tally.loads += loads - self._seen[0]
            self.tally.load_s += load_s - self._seen[1]
        self._seen = loads, load_s
        self.tally.wall_s = self._before_s + time.monotonic() - self._started_s
        return self.tally


class Busy:
    """The length of a union of intervals, which come in about the order of their ends: only the last are kept."""

    KEEP = 128

    def __init__(self) -> None:
        self._apart: list[tuple[float, float]] = []

    def add(self, start: float, end: float) -> float:
        """By how much [start, end) makes the union longer."""
        apart = self._apart
        first = bisect_left(apart, start, key=lambda interval: interval[1])
        last = first
        covered = 0.0
        low, high = start, end
        while last < len(apart) and apart[last][0] <= end:
            low, high = min(low, apart[last][0]), max(high, apart[last][1])
            covered += apart[last][1] - apart[last][0]
            last += 1
        del apart[first:last]
        insort(apart, (low, high))
        del apart[: -self.KEEP]
        return high - low - covered
