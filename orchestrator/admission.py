"""A place in the service: how many requests run at once, and how many wait for it."""

import asyncio
from collections import deque

from experts.errors import QueueFull


class Admission:
    """At most ``max_concurrency`` requests run, at most ``queue`` wait, first come first served; the rest get 503."""

    def __init__(self, *, max_concurrency: int, queue: int) -> None:
        self._free = max_concurrency
        self._queue = queue
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def place(self) -> "Place":
        """A place for as long as the block lasts. Raises QueueFull."""
        return Place(self)

    async def enter(self) -> None:
        if self._free > 0:
            self._free -= 1
            return
        if len(self._waiting) >= self._queue:
            raise QueueFull(f"All places are taken and {self._queue} requests wait; try again in a moment.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif not turn.cancelled():
                self.leave()  # the place was handed over in the moment of leaving
            raise

    def leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Place:
    """What Admission.place() gives. A class, as the others that every request enters: a generator costs twice as
    much."""

    __slots__ = ("_admission",)

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def __aenter__(self) -> None:
        await self._admission.enter()

    async def __aexit__(self, *_: object) -> None:
        self._admission.leave()
