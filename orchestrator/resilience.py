"""Retries, fallback, breaker, hedging and timing: each an Expert that wraps an Expert.

Around each expert, from the inside: Timed, Breaker, Retrying; for each request, Hedged and Fallback on top.
All of them act before the first chunk only: after it the caller has part of an answer, and the failure is his to see.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from experts.base import Expert
from experts.errors import BreakerOpen, CollegiumError, ExpertFailed
from experts.types import Chunk, ChunkStream, ExpertSpec, Request, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call of one expert, as it ended. ``error`` is an error code, "cancelled", or None."""

    request_id: str
    expert_id: str
    usage: Usage
    usd: float
    ttft_s: float | None
    latency_s: float
    started_s: float
    error: str | None = None


class Timed:
    """Reports every call, however it ends, and fails one whose first chunk is late."""

    def __init__(self, inner: Expert, *, on_call: Callable[[CallRecord], None], first_chunk_s: float) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._on_call = on_call
        self._first_chunk_s = first_chunk_s

    async def generate(self, request: Request) -> ChunkStream:
        started = time.monotonic()
        first: float | None = None
        usage = Usage()
        error: str | None = "cancelled"
        try:
            async with aclosing(self._inner.generate(request)) as stream:
                yield await self._first(stream)
                first = time.monotonic()
                async for chunk in stream:
                    if chunk.usage is not None:
                        usage = chunk.usage
                    yield chunk
            error = None
        except CollegiumError as exc:
            error = exc.code
            raise
        finally:
            self._report(request, usage, started, first, error)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _first(self, stream: ChunkStream) -> Chunk:
        try:
            async with asyncio.timeout(self._first_chunk_s):
                return await anext(stream)
        except TimeoutError as exc:
            raise ExpertFailed(
                f"Expert '{self.spec.expert_id}' sent nothing within {self._first_chunk_s:g} s."
            ) from exc
        except StopAsyncIteration as exc:
            raise ExpertFailed(f"Expert '{self.spec.expert_id}' ended its stream without an answer.") from exc

    def _report(self, request: Request, usage: Usage, started: float, first: float | None, error: str | None) -> None:
        record = CallRecord(
            request_id=request.request_id,
            expert_id=self.spec.expert_id,
            usage=usage,
            usd=self.spec.usd(usage),
            ttft_s=None if first is None else first - started,
            latency_s=time.monotonic() - started,
            started_s=started,
            error=error,
        )
        self._on_call(record)


class BreakerState:
    """One engine's breaker, shared by its experts: closed, open for ``open_s`` after ``failures`` in a row, then
    half open: one call is let through, and its end decides."""

    def __init__(self, *, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._count = 0
        self._opened: float | None = None
        self._probing = False

    @property
    def state(self) -> str:
        if self._opened is None:
            return "closed"
        return "open" if self._clock() - self._opened < self._open_s else "half_open"

    def admit(self) -> float | None:
        """None when a call may go through, else the seconds to wait."""
        if self._opened is None:
            return None
        left = self._opened + self._open_s - self._clock()
        if left > 0 or self._probing:
            return max(left, 1.0)
        self._probing = True
        return None

    def succeeded(self) -> None:
        self._count, self._opened, self._probing = 0, None, False

    def failed(self) -> None:
        self._count += 1
        if self._count >= self._limit or self._opened is not None:
            self._opened = self._clock()
        self._probing = False

    def abandoned(self) -> None:
        """The call ended without a verdict on the engine: it was cancelled, or the request itself was bad."""
        self._probing = False


class Breaker:
    """Refuses at once while its engine keeps failing, so that callers go on to the next best expert."""

    def __init__(self, inner: Expert, state: BreakerState) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._state = state

    async def generate(self, request: Request) -> ChunkStream:
        if (wait_s := self._state.admit()) is not None:
            raise BreakerOpen(
                f"Engine '{self.spec.engine_id}' keeps failing and is left alone for {wait_s:.0f} s.",
                retry_after_s=wait_s,
            )
        settle = self._state.abandoned
        try:
            async with aclosing(self._inner.generate(request)) as stream:
                async for chunk in stream:
                    settle = self._state.succeeded
                    yield chunk
        except ExpertFailed:
            settle = self._state.failed
            raise
        finally:
            settle()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Retrying:
    """Asks again after a failure that may pass, with exponential backoff and full jitter, inside the deadline."""

    def __init__(self, inner: Expert, *, retries: int, backoff_s: float) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._retries = retries
        self._backoff_s = backoff_s

    async def generate(self, request: Request) -> ChunkStream:
        for attempt in range(self._retries + 1):
            begun = False
            try:
                async with aclosing(self._inner.generate(request)) as stream:
                    async for chunk in stream:
                        begun = True
                        yield chunk
                return
            except CollegiumError as exc:
                # Jitter needs no secrecy, only spread.
                pause_s = self._backoff_s * 2**attempt * random.random()  # noqa: S311
                out_of_time = time.monotonic() + pause_s >= request.expires_s
                if begun or not exc.retryable or attempt == self._retries or out_of_time:
                    raise
            await asyncio.sleep(pause_s)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Fallback:
    """Asks ``first``, then whoever ``spares`` gives next. Several Fallbacks of one request share one iterator of
    spares, so that no spare is asked twice."""

    def __init__(self, first: Expert, spares: Iterator[Expert]) -> None:
        self.spec: ExpertSpec = first.spec
        self._first = first
        self._spares = spares

    async def generate(self, request: Request) -> ChunkStream:
        expert, failure = self._first, None
        while True:
            begun = False
            try:
                async with aclosing(expert.generate(request)) as stream:
                    async for chunk in stream:
                        begun = True
                        yield chunk
                return
            except CollegiumError as exc:
                failure = failure or exc  # the best expert's own failure tells most
                if begun or not exc.fallback:
                    raise
            spare = next(self._spares, None)
            if spare is None:
                raise failure
            expert = spare

    async def aclose(self) -> None:
        """The experts belong to the pool."""


class Hedged:
    """Asks ``second`` too when ``first`` is slow to start; whoever sends a chunk first answers, the other is ended
    (Dean and Barroso, The Tail at Scale, 2013)."""

    def __init__(self, first: Expert, second: Expert, *, after_s: float) -> None:
        self.spec = first.spec
        self._experts: Sequence[Expert] = (first, second)
        self._after_s = after_s

    async def generate(self, request: Request) -> ChunkStream:
        streams = [expert.generate(request) for expert in self._experts]
        races: list[asyncio.Task[Chunk]] = []
        try:
            winner = await self._race(streams, races)
            yield races[winner].result()
            await _stop(races[:winner] + races[winner + 1 :])
            async for chunk in streams[winner]:
                yield chunk
        finally:
            await _stop(races)
            for stream in streams:
                await stream.aclose()

    async def aclose(self) -> None:
        """The experts belong to the pool."""

    async def _race(self, streams: list[ChunkStream], races: list[asyncio.Task[Chunk]]) -> int:
        """The index of the stream whose first chunk came first. Raises the first expert's failure if both fail."""
        races.append(asyncio.ensure_future(anext(streams[0])))
        await asyncio.wait(races, timeout=self._after_s)
        if not races[0].done():
            races.append(asyncio.ensure_future(anext(streams[1])))
        pending = set(races)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for index, race in enumerate(races):
                if race in done and race.exception() is None:
                    return index
        raise races[0].exception() or ExpertFailed(f"Expert '{self.spec.expert_id}' gave no answer.")


async def _stop(tasks: Sequence[asyncio.Task[Chunk]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
