"""A Service's life: load its engines, take a new config without dropping a request, end."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from experts.base import Engine
from experts.errors import CollegiumError
from orchestrator.build import Service
from orchestrator.config import Config

log = logging.getLogger(__name__)

Builder = Callable[[Config, Mapping[str, Engine]], Service]
"""Makes a Service, taking over the engines given."""


class Host:
    """Holds the Service that answers now. ``failed`` says which engines did not load, and why."""

    def __init__(self, config: Config, build: Builder) -> None:
        self._build = build
        self.service = build(config, {})
        self.failed: dict[str, str] = {}
        self.ready = False
        self._turn = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load every engine, one after the other: they compete for the same memory and cores."""
        async with self._turn:
            await self._load(self.service.engines)
            self.ready = True

    async def reload(self, config: Config) -> None:
        """Answer new requests by ``config``; those under way end on the old one. Engines whose spec did not change
        stay loaded. Raises ConfigError, and then nothing has changed."""
        async with self._turn:
            old = self.service
            kept = {
                e: old.engines[e]
                for e, c in config.engines.items()
                if e in old.engines and old.engines[e].spec == c.spec(e)
            }
            new = self._build(config, kept)
            await self._load({e: x for e, x in new.engines.items() if e not in kept or e in self.failed})
            self.service = new
            task = asyncio.create_task(self._retire(old, [x for e, x in old.engines.items() if e not in kept]))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """End the runs under way and unload everything. Safe to call twice."""
        self.ready = False
        for task in list(self._retiring):
            await task
        for engine in self.service.engines.values():
            await engine.unload()

    async def _load(self, engines: Mapping[str, Engine]) -> None:
        for engine_id, engine in engines.items():
            try:
                await engine.load()
                self.failed.pop(engine_id, None)
            except CollegiumError as exc:
                # One broken engine must not keep the others from answering; /readyz and the log name it.
                self.failed[engine_id] = exc.message
                log.error("engine %s did not load: %s", engine_id, exc.message)

    async def _retire(self, old: Service, engines: list[Engine]) -> None:
        await old.ledger.drained()
        for engine in engines:
            await engine.unload()
