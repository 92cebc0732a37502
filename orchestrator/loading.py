"""One engine's way into memory and out of it: tried again when it fails, given up when it hangs, measured."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from experts.base import Engine
from experts.errors import CollegiumError, ExpertFailed
from orchestrator.resilience import is_cancelled

log = logging.getLogger(__name__)

GIB = 2**30


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can give most of its memory back without ending: vLLM on a GPU."""

    async def sleep(self, level: int) -> bool:
        """Level 1 keeps the weights in the machine's memory, level 2 drops them. False: it cannot."""

    async def wake(self) -> None:
        """Ready again. Raises ExpertFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """A load that takes ``timeout_s`` has failed; one that failed is tried ``retries`` times more, after ``backoff_s``,
    twice that, and so on; then the engine is left alone for ``failed_s``. ``sleep_level``: see Sleeper; None: engines
    end instead."""

    timeout_s: float = 600.0
    retries: int = 1
    backoff_s: float = 1.0
    failed_s: float = 60.0
    sleep_level: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    load_s: float
    memory_gib: float | None = None


class Loader:
    """``used_bytes`` tells what this process and those below it take now; None where that cannot be told."""

    def __init__(self, loading: Loading, used_bytes: Callable[[], int | None]) -> None:
        self.loading = loading
        self._used_bytes = used_bytes
        self._asleep: set[Engine] = set()
        self._under_way = 0
        self._begun = 0

    async def load(self, engine: Engine) -> Loaded:
        """Raises ExpertFailed once no try is left; the engine is to be unloaded then."""
        for attempt in range(self.loading.retries + 1):
            try:
                return await self._try(engine)
            except CollegiumError as exc:
                failure = exc.message
                log.warning("engine %s did not load: %s", engine.spec.engine_id, failure)
            if attempt < self.loading.retries:
                await asyncio.sleep(self.loading.backoff_s * 2**attempt)
        raise ExpertFailed(failure, retryable=False)

    async def unload(self, engine: Engine) -> None:
        """However long it takes: until then the memory is not free. What the engine raises is logged."""
        self._begun += 1
        try:
            if await self._falls_asleep(engine):
                self._asleep.add(engine)
            else:
                await self.end(engine)
        except Exception:
            # Nobody could do anything about it; the engine is asked to load again when it is needed.
            log.exception("engine %s did not end cleanly", engine.spec.engine_id)

    async def end(self, engine: Engine) -> None:
        """unload(), and no sleep."""
        self._asleep.discard(engine)
        await engine.unload()

    async def _falls_asleep(self, engine: Engine) -> bool:
        level = self.loading.sleep_level
        if level is None or engine in self._asleep or not isinstance(engine, Sleeper):
            return False
        try:
            async with asyncio.timeout(self.loading.timeout_s):
                return await engine.sleep(level)
        except Exception:
            log.exception("engine %s did not fall asleep, and ends", engine.spec.engine_id)
            return False

    async def _try(self, engine: Engine) -> Loaded:
        started, before = time.monotonic(), self._used_bytes()
        self._begun += 1
        alone, begun = self._under_way == 0, self._begun
        self._under_way += 1
        try:
            async with asyncio.timeout(self.loading.timeout_s) as limit:
                await self._bring(engine)
        except TimeoutError as exc:
            if not limit.expired():
                raise ExpertFailed(f"Engine '{engine.spec.engine_id}': {exc}") from exc
            raise ExpertFailed(
                f"Engine '{engine.spec.engine_id}' was not ready within {self.loading.timeout_s:g} s; "
                "residency.load_timeout_s says how long a load may take."
            ) from exc
        except asyncio.CancelledError as exc:
            if is_cancelled():
                raise
            raise ExpertFailed(f"Engine '{engine.spec.engine_id}' cancelled its own load.") from exc
        except CollegiumError:
            raise
        except Exception as exc:
            raise ExpertFailed(f"Engine '{engine.spec.engine_id}': {type(exc).__name__}: {exc}") from exc
        finally:
            self._under_way -= 1
        after = self._used_bytes()
        # With another load or unload at the same time, nobody can say whose memory it is.
        known = alone and begun == self._begun and before is not None and after is not None
        return Loaded(
            load_s=time.monotonic() - started,
            memory_gib=max(0.0, after - before) / GIB if known and before is not None and after is not None else None,
        )

    async def _bring(self, engine: Engine) -> None:
        if engine in self._asleep and isinstance(engine, Sleeper):
            self._asleep.discard(engine)
            await engine.wake()
        else:
            await engine.load()


GPUS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def used_bytes() -> int | None:
    """Memory of this process and all below it; shared pages count once for each that maps them. None without psutil,
    which vLLM brings: no other engine lies in memory. None beside a GPU, where engines lie in memory of its own."""
    if any(path.exists() for path in GPUS):
        return None
    try:
        import psutil
    except ImportError:
        return None
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # it ended while we looked
    return total
