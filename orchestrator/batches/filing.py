"""Many ends of calls in one transaction: whoever puts one waits until it is safe, and meanwhile others come."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from orchestrator.batches.store import Result, Said, Store

Do = Callable[..., Awaitable[Any]]
"""Runs a function in the thread that owns the store."""


class Filing:
    """``facts`` are filed beside each transaction."""

    def __init__(self, do: Do, store: Store, facts: Callable[[], Mapping[str, str]]) -> None:
        self._do = do
        self._store = store
        self._facts = facts
        self._waiting: list[tuple[Said | Result, asyncio.Future[bool]]] = []
        self._some = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ends are filed for as long as the block lasts."""
        task = asyncio.create_task(self._file_all())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def put(self, end: Said | Result) -> bool:
        """Returns once ``end`` is on the disk: whether it was its line's last call. Raises Unavailable when the disk
        refuses it."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((end, done))
        self._some.set()
        return await done

    async def _file_all(self) -> None:
        while await self._some.wait():
            self._some.clear()
            batch, self._waiting = self._waiting, []
            await self._file(batch)

    async def _file(self, batch: list[tuple[Said | Result, asyncio.Future[bool]]]) -> None:
        said = [end for end, _ in batch if isinstance(end, Said)]
        results = [end for end, _ in batch if isinstance(end, Result)]
        try:
            last = {(s.n, s.slot) for s in await self._do(self._store.settle, said, results, self._facts())}
        except Exception as exc:  # noqa: BLE001  # each of those who wait raises it
            for _, done in batch:
                if not done.done():
                    done.set_exception(exc)
            return
        for end, done in batch:
            if not done.done():
                done.set_result(isinstance(end, Said) and (end.n, end.slot) in last)
