"""A request's life in one object, and who watches it."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from experts.errors import BadRequest, DeadlineExceeded
from experts.types import Request, Usage
from orchestrator.aggregators.base import Aggregator
from orchestrator.resilience import CallRecord, failure_kind
from routers.base import RouteDecision, Router

log = logging.getLogger(__name__)

_TIMER_SLACK_S = 0.002  # uvloop's timers count whole milliseconds and may ring one too early


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a request is answered. ``max_calls`` bounds the experts asked: choices, hedges and fallbacks; asking the
    same one again after a failure is not counted. ``max_usd`` bounds what all of them together may cost. ``one_by_one``
    asks one expert after another. Once ``late_s`` have passed, ``quorum`` answers are enough."""

    name: str
    router: Router
    aggregator: Aggregator
    top_k: int = 1
    max_calls: int = 8
    max_usd: float | None = None
    one_by_one: bool = False
    quorum: int | None = None
    late_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """One request under way, and all that is known of it so far. ``error`` is an error code or "cancelled";
    ``unanswered`` says of a chosen expert why its answer is missing among several (see panel)."""

    request: Request
    policy: Policy
    decision: RouteDecision | None = None
    routed_s: float | None = None
    calls: list[CallRecord] = field(default_factory=list)
    unanswered: Mapping[str, str] = field(default_factory=dict)
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
    """Who wants to know: metrics, the decision store, traces, the log. Must not block; one that raises is logged and
    the request goes on."""

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

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        """Keeps ``run`` for as long as it lasts and settles how it ended. Raises BadRequest for an id in use."""
        started, request_id = time.monotonic(), run.request.request_id
        if request_id in self._runs:
            raise BadRequest(f"A request with the id '{request_id[:100]}' is under way.", param="request_id")
        self._runs[request_id] = run
        self._idle.clear()
        try:
            yield
        except BaseException as exc:
            run.error = failure_kind(exc)
            # Whoever ends the run says only that it is to end, not why.
            if run.error == "cancelled" and time.monotonic() >= run.request.expires_s - _TIMER_SLACK_S:
                run.error = DeadlineExceeded.code
            raise
        finally:
            run.latency_s = time.monotonic() - started
            del self._runs[request_id]
            if run.request.priority == "online":  # a batch tells of its lines itself; they would flood the rest
                # Once the answer is on its way: it need not wait for those who only keep and count. But before whoever
                # waits in drained() goes on.
                asyncio.get_running_loop().call_soon(self._tell, lambda observer: observer.ended(run))
            if not self._runs:
                self._idle.set()

    def note_route(self, run: Run) -> None:
        run.routed_s = time.monotonic()
        self._tell(lambda observer: observer.routed(run))

    def note_call(self, call: CallRecord) -> None:
        """For Timed experts. A call of no run (a router's own question, say) is nobody's business here."""
        if (run := self._runs.get(call.request_id)) is not None:
            run.calls.append(call)
            self._tell(lambda observer: observer.called(run, call))

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                tell(observer)
            except Exception:
                log.exception("observer %s failed", type(observer).__name__)
