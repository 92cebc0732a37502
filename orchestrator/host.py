"""A Service's life: load its engines, take a new config without dropping a request, end."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from experts.base import Engine
from experts.errors import CollegiumError, ConfigError, Unavailable
from orchestrator.build import Service
from orchestrator.config import Config
from orchestrator.residency import Residency
from orchestrator.resilience import is_cancelled

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
        self._closed = False
        self._loading: asyncio.Task[None] | None = None
        self._retiring: dict[asyncio.Task[None], list[Engine]] = {}

    async def start(self) -> None:
        """Load every engine there is room for, one after the other: they compete for the same memory and cores.

        An engine that does not load keeps none of the others from answering. Raises Unavailable when close() comes
        first.
        """
        async with self._turn:
            self._check_open()
            self.failed = await self._load(_stay(self.service))
            for engine_id in self.service.engines:
                await self.service.dispatcher.residency.preload(engine_id)
                self._check_open()
            self.ready = True

    async def reload(self, config: Config) -> None:
        """Answer new requests by ``config``; those under way end on the old one. Waits for a start under way.

        Engines whose config did not change stay loaded, and those that had failed are tried again. New ones are loaded
        beside the old, which takes memory for both. Raises ConfigError, also when a new engine does not load, and then
        nothing has changed.
        """
        async with self._turn:
            self._check_open()
            old = self.service
            kept = {e: x for e, x in old.engines.items() if config.engines.get(e) == old.config.engines[e]}
            new = self._build(config, kept)
            if _way(old.config) != _way(config):
                raise ConfigError("The old config stays: residency and its sleep are switched by a restart only.")
            await self._add({e: x for e, x in _stay(new).items() if e not in kept})
            new.dispatcher.join(old.dispatcher.residency, new.engines)
            self.service = new
            self._retire(old, [x for e, x in old.engines.items() if e not in kept])
            self.failed = {e: reason for e, reason in self.failed.items() if e in kept}
            self.failed = await self._load({e: kept[e] for e in self.failed})

    async def close(self) -> None:
        """Stop loading and unload everything, whatever is under way. Safe to call twice."""
        self.ready, self._closed = False, True
        if self._loading is not None:
            self._loading.cancel()
        residency = self.service.dispatcher.residency
        await residency.close()
        async with self._turn:
            retiring, self._retiring = self._retiring, {}
            for task in retiring:
                task.cancel()
            await asyncio.gather(*retiring, return_exceptions=True)
            left = [engine for engines in retiring.values() for engine in engines]
            await self.service.aclose()
            await _give_back([*left, *self.service.engines.values()], residency)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("The service is shutting down.")

    async def _add(self, engines: Mapping[str, Engine]) -> None:
        """Load all of ``engines`` or none."""
        try:
            failed = await self._load(engines)
        except BaseException:
            await _give_back(engines.values(), self.service.dispatcher.residency)
            raise
        if failed:
            await _give_back(engines.values(), self.service.dispatcher.residency)
            reasons = "; ".join(f"engine '{e}' did not load: {reason}" for e, reason in failed.items())
            raise ConfigError(f"The old config stays: {reasons}")

    async def _load(self, engines: Mapping[str, Engine]) -> dict[str, str]:
        """Why which did not load. Raises Unavailable when close() comes in between."""
        failed = {}
        for engine_id, engine in engines.items():
            try:
                await self._load_one(engine)
            except CollegiumError as exc:
                failed[engine_id] = exc.message
                log.error("engine %s did not load: %s", engine_id, exc.message)
            except Exception as exc:
                failed[engine_id] = f"{type(exc).__name__}: {exc}"
                log.exception("engine %s did not load", engine_id)
            self._check_open()
        return failed

    async def _load_one(self, engine: Engine) -> None:
        # In a task of its own, so that close() can end it without ending whoever waits for it.
        self._loading = asyncio.ensure_future(engine.load())
        try:
            await self._loading
        except asyncio.CancelledError as exc:
            if is_cancelled():
                raise
            raise Unavailable("Its load was cancelled.") from exc
        finally:
            self._loading = None

    def _retire(self, old: Service, engines: list[Engine]) -> None:
        task = asyncio.create_task(_end(old, engines, after=list(self._retiring)))
        self._retiring[task] = engines
        task.add_done_callback(lambda task: self._retiring.pop(task, None))


async def _end(service: Service, engines: Sequence[Engine], *, after: Sequence[asyncio.Task[None]]) -> None:
    """Once its runs have ended, give back what ``service`` alone holds. Services before it may share its engines, so
    their runs end first."""
    if after:
        await asyncio.wait(after)
    await service.ledger.drained()
    await service.aclose()
    await _give_back(engines, service.dispatcher.residency)


def _way(config: Config) -> tuple[bool, int | None]:
    """What engines have to know from their start."""
    return config.residency.limited, config.residency.sleep


def _stay(service: Service) -> dict[str, Engine]:
    """The engines that are loaded at the start and stay; the others come when they are needed."""
    residency = service.dispatcher.residency
    return {e: x for e, x in service.engines.items() if not residency.manages(x)}


async def _give_back(engines: Iterable[Engine], residency: Residency) -> None:
    for engine in engines:
        try:
            await residency.drop(engine)
        except Exception:
            # The others are still to be given back.
            log.exception("%s did not end cleanly", engine.spec.engine_id)
