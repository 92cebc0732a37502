"""Leaving an engine alone that keeps failing."""

import time
from collections.abc import Callable
from contextlib import aclosing

from experts.base import Expert
from experts.errors import BreakerOpen, ExpertFailed
from experts.types import ChunkStream, Request


class BreakerState:
    """One engine's breaker, shared by its experts: closed, open for ``open_s`` after ``failures`` in a row, then
    half open: one call is let through, and its end decides.

    A call's end counts only in the ``epoch`` in which the call began: one that was under way when the breaker changed
    says nothing about the engine since.
    """

    def __init__(self, *, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._count = 0
        self._opened: float | None = None
        self._probing = False
        self.epoch = 0

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

    def succeeded(self, epoch: int) -> None:
        if epoch == self.epoch:
            self._count = 0
            if self._opened is not None:
                self._change(None)

    def failed(self, epoch: int) -> None:
        if epoch == self.epoch:
            self._count += 1
            if self._count >= self._limit or self._opened is not None:
                self._change(self._clock())

    def abandoned(self, epoch: int) -> None:
        """The call ended without a verdict on the engine: it was cancelled, or the request itself was bad."""
        if epoch == self.epoch:
            self._probing = False

    def _change(self, opened: float | None) -> None:
        self._opened, self._probing = opened, False
        self.epoch += 1


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
        epoch, settle = self._state.epoch, self._state.abandoned
        try:
            async with aclosing(self._inner.generate(request)) as stream:
                async for chunk in stream:
                    yield chunk
            settle = self._state.succeeded
        except ExpertFailed:
            settle = self._state.failed
            raise
        finally:
            settle(epoch)

    async def aclose(self) -> None:
        await self._inner.aclose()
