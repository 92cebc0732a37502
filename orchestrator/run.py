"""A request's life in one object, and who watches it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from experts.errors import CollegiumError
from experts.types import Request, Usage
from orchestrator.aggregators.base import Aggregator
from orchestrator.resilience import CallRecord
from routers.base import RouteDecision, Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a request is answered. ``max_calls`` bounds the experts asked: choices, hedges and fallbacks."""

    name: str
    router: Router
    aggregator: Aggregator
    top_k: int = 1
    max_calls: int = 8
    max_usd: float | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """One request under way, and all that is known of it so far. ``error`` is an error code or "cancelled"."""

    request: Request
    policy: Policy
    decision: RouteDecision | None = None
    routed_s: float | None = None
    calls: list[CallRecord] = field(default_factory=list)
    answer_usage: Usage = field(default_factory=Usage)
    trace: object = None
    error: str | None = None
    latency_s: float = 0.0

    @property
    def usage(self) -> Usage:
        """All calls together."""
        return sum((c.usage for c in self.calls), Usage())

    @property
    def usd(self) -> float:
        return sum(c.usd for c in self.calls)


class Observer(Protocol):
    """Who wants to know: metrics, the decision store, traces, the log. Must not block and must not raise."""

    def routed(self, run: Run) -> None: ...

    def called(self, run: Run, call: CallRecord) -> None: ...

    def ended(self, run: Run) -> None: ...


class Ledger:
    """The runs under way. Experts report their calls here by request id; observers hear of all that happens."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._runs: dict[str, Run] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._runs)

    async def drained(self) -> None:
        """Returns when no run is under way."""
        await self._idle.wait()

    @asynccontextmanager
    async def watch(self, run: Run) -> AsyncIterator[None]:
        """Keeps ``run`` for as long as it lasts and settles how it ended."""
        started = time.monotonic()
        self._runs[run.request.request_id] = run
        self._idle.clear()
        try:
            yield
        except CollegiumError as exc:
            run.error = exc.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            run.error = "deadline_exceeded" if time.monotonic() >= run.request.expires_s else "cancelled"
            raise
        except BaseException:
            run.error = "internal_error"
            raise
        finally:
            run.latency_s = time.monotonic() - started
            del self._runs[run.request.request_id]
            if not self._runs:
                self._idle.set()
            for observer in self._observers:
                observer.ended(run)

    def note_route(self, run: Run) -> None:
        run.routed_s = time.monotonic()
        for observer in self._observers:
            observer.routed(run)

    def note_call(self, call: CallRecord) -> None:
        """For Timed experts. A call of no run (a router's own question, say) is nobody's business here."""
        if (run := self._runs.get(call.request_id)) is None:
            return
        run.calls.append(call)
        for observer in self._observers:
            observer.called(run, call)
