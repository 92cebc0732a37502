"""The calls of a batch, each engine's together; and a line's row as soon as its last answer is in."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from orchestrator.batches.session import PAGE, Session
from orchestrator.batches.store import Call, Result, Said


class Calls:
    def __init__(self, session: Session) -> None:
        self._session = session

    async def make(self) -> None:
        """Every call, and those that failures bring about."""
        async with self._session.filing.running():
            if self._session.job.order == "arrival":
                await self._by_line()
                return
            while waiting := await self._session.do(self._session.store.engines):
                await self._by_engine(waiting)

    async def combine(self) -> None:
        """Rows for the lines that still have none: their answers were in when a run was cut off, or their aggregator
        asks experts itself."""
        last, session = 0, self._session
        async with session.filing.running():
            while lines := await session.do(session.store.whole, after=last, limit=PAGE):
                async with self._window() as window:
                    for n in lines:
                        await window.start(self._combine(n))
                last = lines[-1]

    async def _by_engine(self, waiting: Mapping[str, int]) -> None:
        """As many engines at a time as can be loaded at a time; those that are loaded first, then those with the most
        calls waiting."""
        service = self._session.bench().service
        dispatcher, residency = service.dispatcher, service.dispatcher.residency
        slots = asyncio.Semaphore(residency.slots or len(waiting))
        ready = [engine_id for engine_id, status in dispatcher.snapshot().items() if status.state == "ready"]
        async with asyncio.TaskGroup() as group:
            for engine_id in sorted(waiting, key=lambda e: (e not in ready, -waiting[e])):
                engine = service.engines.get(engine_id)  # None where the config has it no more: spares are asked
                place = slots if engine is not None and residency.manages(engine) else asyncio.Semaphore(1)
                group.create_task(self._feed(engine_id, waiting[engine_id], place))

    async def _feed(self, engine_id: str, left: int, place: asyncio.Semaphore) -> None:
        """All calls of one engine, those that come while it answers too. The dispatcher hears how many are left, so
        that it keeps the engine for them."""
        session = self._session
        async with place:
            try:
                while calls := await session.page(engine_id):
                    async with self._window() as window:
                        while calls:
                            for call, raw in calls:
                                left -= 1
                                session.bench().service.dispatcher.announce(engine_id, max(0, left))
                                await window.start(self._answer(call, raw))
                            calls = await session.page(engine_id, (calls[-1][0].n, calls[-1][0].slot))
            finally:
                session.bench().service.dispatcher.announce(engine_id, 0)

    async def _by_line(self) -> None:
        """First come, first served: each line's calls one after the other, as its decision has them."""
        while calls := await self._session.page(None):
            while calls:
                for call, raw in calls:
                    await self._answer(call, raw)
                calls = await self._session.page(None, (calls[-1][0].n, calls[-1][0].slot))

    async def _answer(self, call: Call, raw: bytes) -> None:
        """One call, filed; and its line's row where it was the last."""
        session = self._session
        end, records = await session.worker.ask(call, raw)
        session.meter.called(records)
        if isinstance(end, Said) and end.may_fall_back:
            _, _, decision, _ = await session.do(session.store.line, call.n)
            end = session.worker.spares(call, raw, decision, end)
        last = await self._file(end)
        if last and not session.worker.combines_late(raw):
            await self._combine(call.n)

    async def _combine(self, n: int) -> None:
        session = self._session
        offset, size, decision, heard = await session.do(session.store.line, n)
        raw = await session.do(session.source.read, offset, size)
        row, records = await session.worker.combine(n, raw, decision, heard)
        session.meter.called(records)
        await self._file(row)

    async def _file(self, end: Said | Result) -> bool:
        """Whether it was the last call of its line."""
        if isinstance(end, Result):
            self._session.meter.tally.settled += 1
            self._session.meter.tally.failed += not end.ok
        return await self._session.filing.put(end)

    @asynccontextmanager
    async def _window(self) -> AsyncIterator["Window"]:
        async with asyncio.TaskGroup() as group:
            yield Window(group, self._session.job.window)


class Window:
    """Tasks of ``group``, at most ``places`` of them at a time."""

    def __init__(self, group: asyncio.TaskGroup, places: int) -> None:
        self._group = group
        self._places = asyncio.Semaphore(places)

    async def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Returns once ``work`` has a place."""
        try:
            await self._places.acquire()
        except BaseException:
            work.close()
            raise
        self._group.create_task(work).add_done_callback(lambda _: self._places.release())
