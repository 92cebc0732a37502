"""The clock around each call, and the record it leaves."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from experts.base import Expert
from experts.errors import CollegiumError, ExpertFailed
from experts.types import Chunk, ChunkStream, ExpertSpec, Request, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call of one expert, as it ended. ``error`` is an error code, "cancelled", or None; ``reason`` says it in
    words, for the log: where another expert answers in its place, nobody else hears them."""

    request_id: str
    expert_id: str
    usage: Usage
    usd: float
    ttft_s: float | None
    latency_s: float
    started_s: float
    error: str | None = None
    reason: str | None = None


def failure_kind(exc: BaseException) -> str:
    """The word for how a call or a run ended: an error's code, "cancelled", or "internal_error" for a bug."""
    if isinstance(exc, CollegiumError):
        return exc.code
    return "cancelled" if isinstance(exc, asyncio.CancelledError | GeneratorExit) else "internal_error"


class Timed:
    """Reports every call, however it ends. Fails one whose first chunk is late, or that ends before each choice has
    its finish reason: silence is no answer, and half an answer is none either.

    Where no stream is asked for, the answer is held back until it is complete, so that one that breaks off can be asked
    for again. An engine may send it whole then: its first chunk is as late as its last. Such a call has ``WHOLE_SHARE``
    of the request's deadline, so that one that hangs leaves time for the next expert, and is told apart from a caller
    who gave up.
    """

    WHOLE_SHARE = 0.75

    def __init__(self, inner: Expert, *, on_call: Callable[[CallRecord], None], first_chunk_s: float) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._on_call = on_call
        self._first_chunk_s = first_chunk_s

    async def generate(self, request: Request) -> ChunkStream:
        call, held = _Call(self.spec, request), list[Chunk]()
        try:
            async with aclosing(self._inner.generate(request)) as stream:
                chunk = await self._first(stream, request)
                call.first_s = time.monotonic()
                call.note(chunk)
                if request.stream:
                    yield chunk
                else:
                    held.append(chunk)
                async for chunk in stream:
                    call.note(chunk)
                    if request.stream:
                        yield chunk
                    else:
                        held.append(chunk)
            call.check_end()
            for chunk in held:
                yield chunk
        except asyncio.CancelledError as exc:
            if is_cancelled():
                call.error = failure_kind(exc)
                raise
            # Nobody here gave up: the engine did. Passed on, it would end the request without a reply.
            failure = ExpertFailed(f"Expert '{self.spec.expert_id}': its engine cancelled the call.")
            call.failed(failure)
            raise failure from exc
        except BaseException as exc:
            call.failed(exc)
            raise
        finally:
            self._on_call(call.record())

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _first(self, stream: ChunkStream, request: Request) -> Chunk:
        within_s = self._first_chunk_s if request.stream else self.WHOLE_SHARE * request.deadline_s
        try:
            async with asyncio.timeout(within_s) as limit:
                return await anext(stream)
        except TimeoutError as exc:
            if not limit.expired():
                raise
            # Asked again, it would most likely be silent again; the next best expert is sooner.
            raise ExpertFailed(
                f"Expert '{self.spec.expert_id}' sent nothing within {within_s:g} s.", retryable=False
            ) from exc
        except StopAsyncIteration as exc:
            raise ExpertFailed(f"Expert '{self.spec.expert_id}' ended its stream without an answer.") from exc


class _Call:
    """What Timed learns of one call."""

    __slots__ = ("_finished", "_request", "_spec", "_started_s", "_usage", "error", "first_s", "reason")

    def __init__(self, spec: ExpertSpec, request: Request) -> None:
        self.error: str | None = None
        self.reason: str | None = None
        self.first_s: float | None = None
        self._finished: set[int] = set()
        self._request = request
        self._spec = spec
        self._started_s = time.monotonic()
        self._usage = Usage()

    def note(self, chunk: Chunk) -> None:
        if chunk.usage is not None:
            self._usage = chunk.usage
        if chunk.finish_reason is not None:
            self._finished.add(chunk.index)

    def failed(self, exc: BaseException) -> None:
        self.error = failure_kind(exc)
        self.reason = exc.message if isinstance(exc, CollegiumError) else None

    def check_end(self) -> None:
        if len(self._finished) < self._request.params.n:
            raise ExpertFailed(f"Expert '{self._spec.expert_id}' hung up in the middle of its answer.")

    def record(self) -> CallRecord:
        return CallRecord(
            request_id=self._request.request_id,
            expert_id=self._spec.expert_id,
            usage=self._usage,
            usd=self._spec.usd(self._usage),
            ttft_s=None if self.first_s is None else self.first_s - self._started_s,
            latency_s=time.monotonic() - self._started_s,
            started_s=self._started_s,
            error=self.error,
            reason=self.reason,
        )


def is_cancelled() -> bool:
    """Whether somebody has asked the current task to end: a CancelledError seen without that is somebody else's."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
