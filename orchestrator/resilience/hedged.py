"""A second expert for a first that is slow to start."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from experts.base import Expert
from experts.errors import CollegiumError, ExpertFailed
from experts.types import Chunk, ChunkStream, Request


class Hedged:
    """Asks ``second`` too when ``first`` is slow to start, or at once when ``first`` fails; whoever sends a chunk first
    answers, the other is ended (Dean and Barroso, The Tail at Scale, 2013).

    Raises the first one's failure when both fail; at once, a failure of the first that is the request's own fault.
    """

    def __init__(self, first: Expert, second: Expert, *, after_s: float) -> None:
        self.spec = first.spec
        self._first = first
        self._second = second
        self._after_s = after_s

    async def generate(self, request: Request) -> ChunkStream:
        # The race is for the first chunk: held back until the end, every long answer would look slow.
        is_read, request = request.stream, replace(request, stream=True)
        races: list[asyncio.Task[Chunk]] = []
        async with (
            aclosing(self._first.generate(request)) as first,
            aclosing(self._second.generate(request)) as second,
        ):
            try:
                winner = await self._race(first, second, races)
                _cancel(races)  # only asked to: the chunk does not wait for the loser's end
                held = [races[winner].result()]
                if is_read:
                    yield held.pop()
            finally:
                _cancel(races)
                await asyncio.gather(*races, return_exceptions=True)
            async for chunk in (first, second)[winner]:
                if is_read:
                    yield chunk
                else:
                    held.append(chunk)
        for chunk in held:
            yield chunk

    async def aclose(self) -> None:
        """The experts belong to the pool."""

    async def _race(self, first: ChunkStream, second: ChunkStream, races: list[asyncio.Task[Chunk]]) -> int:
        """The index of the stream whose first chunk came first."""
        races.append(asyncio.create_task(_first_chunk(first)))
        await asyncio.wait(races, timeout=self._after_s)
        winner = _winner(races)
        if winner is None:
            races.append(asyncio.create_task(_first_chunk(second)))
        while winner is None:
            if all(race.done() for race in races):
                races[0].result()  # raises
            await asyncio.wait([race for race in races if not race.done()], return_when=asyncio.FIRST_COMPLETED)
            winner = _winner(races)
        return winner


async def _first_chunk(stream: ChunkStream) -> Chunk:
    try:
        return await anext(stream)
    except StopAsyncIteration as exc:
        raise ExpertFailed("The expert's stream ended without an answer.") from exc


def _winner(races: Sequence[asyncio.Task[Chunk]]) -> int | None:
    """Who has a chunk; None while nobody has. Raises what the other expert cannot make good."""
    for index, race in enumerate(races):
        if not race.done():
            continue
        failure = race.exception()
        if failure is None:
            return index
        if not isinstance(failure, CollegiumError) or (index == 0 and not failure.fallback):
            raise failure
    return None


def _cancel(tasks: Sequence[asyncio.Task[Chunk]]) -> None:
    for task in tasks:
        task.cancel()
