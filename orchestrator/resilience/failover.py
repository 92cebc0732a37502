"""Another try after a failure: at the same expert, then at the next best."""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from contextlib import aclosing

from experts.base import Expert
from experts.errors import CollegiumError, ExpertFailed
from experts.types import ChunkStream, ExpertSpec, Request


class Retrying:
    """Asks again after a failure that may pass, with exponential backoff and full jitter, inside the deadline.

    An endpoint that says how long it wants to be left alone is obeyed up to ``LONGEST_PAUSE_S``; past that the failure
    is raised, for the next best expert is sooner there.
    """

    LONGEST_PAUSE_S = 5.0

    def __init__(self, inner: Expert, *, retries: int, backoff_s: float) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._retries = retries
        self._backoff_s = backoff_s

    async def generate(self, request: Request) -> ChunkStream:
        for attempt in itertools.count():
            begun = False
            try:
                async with aclosing(self._inner.generate(request)) as stream:
                    async for chunk in stream:
                        begun = True
                        yield chunk
                return
            except CollegiumError as exc:
                pause_s = self._pause_s(exc, attempt, request)
                if begun or pause_s is None:
                    raise
            await asyncio.sleep(pause_s)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _pause_s(self, exc: CollegiumError, attempt: int, request: Request) -> float | None:
        """How long to wait before asking again; None when that is of no use."""
        if not exc.retryable or attempt == self._retries:
            return None
        asked_s = exc.asked_pause_s if isinstance(exc, ExpertFailed) else 0.0
        # Jitter needs no secrecy, only spread.
        pause_s = asked_s + self._backoff_s * 2**attempt * random.random()  # noqa: S311
        left_s = request.expires_s - time.monotonic()
        return pause_s if asked_s <= self.LONGEST_PAUSE_S and pause_s < left_s else None


class Fallback:
    """Asks ``first``, then whoever ``spares`` gives next. Several Fallbacks of one request share one iterator of
    spares, so that no spare is asked twice.

    Raises the first one's failure when all fail; a failure of any that is the request's own fault, at once.
    """

    def __init__(self, first: Expert, spares: Iterator[Expert]) -> None:
        self.spec: ExpertSpec = first.spec
        self._first = first
        self._spares = spares

    async def generate(self, request: Request) -> ChunkStream:
        expert: Expert | None = self._first
        failure: CollegiumError | None = None
        while expert is not None:
            begun = False
            try:
                async with aclosing(expert.generate(request)) as stream:
                    async for chunk in stream:
                        begun = True
                        yield chunk
                return
            except CollegiumError as exc:
                if begun or not exc.fallback:
                    raise
                failure = failure or exc  # the best expert's own failure tells most
            expert = next(self._spares, None)
        assert failure is not None  # noqa: S101  # the loop is left by an answer or after a failure
        raise failure

    async def aclose(self) -> None:
        """The experts belong to the pool."""
