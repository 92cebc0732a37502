"""What the stages of one batch share: its files, its worker, its figures; and the one thread that meets the disk."""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from experts.errors import ConfigError
from orchestrator.batches.filing import Filing
from orchestrator.batches.rows import Rows
from orchestrator.batches.source import Source
from orchestrator.batches.store import VERSION, Call, Store
from orchestrator.batches.tally import Meter, Tally
from orchestrator.batches.work import Bench, Worker

P = ParamSpec("P")
T = TypeVar("T")
Order = Literal["grouped", "arrival"]
Stage = Literal["reading", "answering", "combining", "writing"]

PAGE = 256
PAGE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``window``: calls of one engine under way at a time; the engine's own continuous batching takes them together.
    ``max_lines``: the most that the input may have."""

    source: Path
    output: Path
    errors: Path
    state: Path
    order: Order = "grouped"
    window: int = 64
    max_lines: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    stage: Stage
    tally: Tally


class Session:
    """open() before all else, close() whatever happened. ``bench`` gives who answers now; ``watch`` hears of the
    progress, often and from any thread."""

    def __init__(self, job: Job, bench: Callable[[], Bench], watch: Callable[[Progress], None]) -> None:
        self.job = job
        self.bench = bench
        self.stage: Stage = "reading"
        self._watch = watch
        # SQLite and the input file are read and written by one thread, so that the loop waits for no disk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self.source: Source
        self.store: Store
        self.rows: Rows
        self.worker: Worker
        self.meter: Meter
        self.filing: Filing

    async def do(self, work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        """``work`` in the thread of this batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*given, **named))

    async def open(self) -> None:
        """Raises ConfigError where the state is of another input, another order, or in use."""
        await self.do(self._open)

    async def close(self) -> None:
        await self.do(self._close)
        self._thread.shutdown()

    async def page(self, engine_id: str | None, after: tuple[int, int] = (0, -1)) -> list[tuple[Call, bytes]]:
        """The next calls to be made, of one engine or in the order of lines, with their lines: as many as fit into
        memory."""
        return await self.do(self._page, engine_id, after)

    def look(self) -> Tally:
        """The figures as of now, told to whoever watches."""
        tally = self.meter.look(self.bench().service.dispatcher.snapshot())
        self._watch(Progress(stage=self.stage, tally=tally))
        return tally

    def _open(self) -> None:
        self.source = Source(self.job.source, max_line_bytes=self.bench().service.config.limits.max_body_bytes)
        self.store = Store(self.job.state)
        facts = self.store.about() or self._begin()
        self._check_same(facts)
        self.rows = Rows(facts["key"])
        self.worker = Worker(self.bench, self.rows, created=int(facts["created"]))
        self.meter = Meter(tally=Tally.read(facts))
        self.meter.tally.settled, self.meter.tally.failed = self.store.counts()
        self.filing = Filing(self.do, self.store, lambda: self.look().facts())
        self.look()

    def _close(self) -> None:
        for name in ("store", "source"):
            if hasattr(self, name):  # open() may have failed before it
                getattr(self, name).close()

    def _begin(self) -> dict[str, str]:
        facts = {
            "version": VERSION,
            "key": uuid.uuid4().hex,
            "created": str(int(time.time())),
            "order": self.job.order,
            "input_sha256": self.source.digest(),
        }
        self.store.note(facts)
        return facts

    def _check_same(self, facts: Mapping[str, str]) -> None:
        if facts["version"] != VERSION:
            raise ConfigError(f"{self.job.state} was written by another version of collegium; remove it to begin anew.")
        if facts["order"] != self.job.order:
            raise ConfigError(f"The batch was begun with --order {facts['order']}; go on with that.")
        if facts["input_sha256"] != self.source.digest():
            raise ConfigError(
                f"{self.job.source} has changed since the batch was begun, and its answers are for the old one. Put "
                f"that back, or remove {self.job.state} to begin anew."
            )

    def _page(self, engine_id: str | None, after: tuple[int, int]) -> list[tuple[Call, bytes]]:
        if engine_id is None:
            calls = self.store.arrived(after=after, limit=PAGE)
        else:
            calls = self.store.pending(engine_id, after=after, limit=PAGE)
        page, size = [], 0
        for call in calls:
            size += call.size_bytes
            page.append((call, self.source.read(call.offset, call.size_bytes)))
            if size > PAGE_BYTES:
                break
        return page
