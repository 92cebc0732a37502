"""READ FIRST. A batch from its first line to its output: plan, call, combine, write; each stage filed as it goes."""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from experts.errors import ConfigError
from orchestrator.batches.filing import Filing
from orchestrator.batches.output import whole, write_rows
from orchestrator.batches.plan import Planner, stretches
from orchestrator.batches.rows import Rows
from orchestrator.batches.source import Source
from orchestrator.batches.store import VERSION, Call, Result, Said, Store
from orchestrator.batches.tally import Meter, Tally
from orchestrator.batches.work import Bench, Worker
from orchestrator.replies import to_json

T = TypeVar("T")
Order = Literal["grouped", "arrival"]
Stage = Literal["reading", "answering", "combining", "writing"]

PAGE = 256
PAGE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``window``: calls of one engine under way at a time; an engine's own continuous batching takes them together.
    ``total_lines``: the most that the input may have."""

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
    total: int


class Runner:
    """One batch. ``bench`` gives who answers now; ``watch`` hears of the progress, often."""

    def __init__(
        self, job: Job, bench: Callable[[], Bench], *, watch: Callable[[Progress], None] = lambda _: None
    ) -> None:
        self._job = job
        self._bench = bench
        self._watch = watch
        # SQLite and the input file are read and written by one thread, so that the loop waits for no disk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._store: Store
        self._source: Source
        self._meter: Meter
        self._filing: Filing
        self._rows: Rows
        self._worker: Worker

    async def run(self) -> Mapping[str, Any]:
        """The report, once the output lies in its place. Raises a CollegiumError; what is settled by then is kept in
        the state file, and another run goes on from it."""
        try:
            await self._do(self._open)
            await self._plan()
            await self._call()
            await self._combine()
            return await self._write()
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            await self._do(self._close)
            self._thread.shutdown()

    # The stages.

    async def _plan(self) -> None:
        """Every line checked and routed."""
        facts = await self._do(self._store.about)
        planner = Planner(self._bench().service, self._bench().reader, self._rows)
        n, offset = int(facts.get("read_n", 0)), int(facts.get("read_offset", 0))
        pieces = stretches(self._source, n=n, offset=offset)
        while (piece := await self._do(next, pieces, None)) is not None:
            done = await planner.plan(piece)
            tally = self._look("reading")
            tally.requests += len(piece)
            self._check_length(tally.requests)
            facts = {**tally.facts(), "read_n": str(done.n), "read_offset": str(done.offset)}
            twice = lambda n, ids=done.ids: planner.twice(n, ids[n])  # noqa: E731
            settled = await self._do(self._store.plan, done.plans, done.settled, done.claims, twice, facts)
            tally.settled += settled

    async def _call(self) -> None:
        """Every call made, and those that its failures bring about."""
        async with self._filing.running():
            if self._job.order == "arrival":
                await self._call_by_line()
                return
            while waiting := await self._do(self._store.engines):
                await self._call_by_engine(waiting)

    async def _call_by_engine(self, waiting: Mapping[str, int]) -> None:
        """As many engines at a time as can be loaded at a time; those that are loaded first, then those with the most
        calls waiting."""
        dispatcher = self._bench().dispatcher
        slots = asyncio.Semaphore(dispatcher.residency.slots or len(waiting))
        there = dispatcher.snapshot()
        queue = sorted(waiting, key=lambda e: (there[e].state != "ready", -waiting[e]))
        async with asyncio.TaskGroup() as group:
            for engine_id in queue:
                place = asyncio.Semaphore(1) if dispatcher.residency.always(engine_id) else slots
                group.create_task(self._feed(engine_id, waiting[engine_id], place))

    async def _feed(self, engine_id: str, waiting: int, place: asyncio.Semaphore) -> None:
        """All calls of one engine, those that come while it answers too."""
        left = waiting
        async with place:
            try:
                while calls := await self._page(engine_id, (0, -1)):
                    async with asyncio.TaskGroup() as group:
                        window = asyncio.Semaphore(self._job.window)
                        while calls:
                            for call, raw in calls:
                                await window.acquire()
                                left -= 1
                                self._bench().dispatcher.announce(engine_id, max(0, left))
                                task = group.create_task(self._answer(call, raw))
                                task.add_done_callback(lambda _, window=window: window.release())
                            calls = await self._page(engine_id, (calls[-1][0].n, calls[-1][0].slot))
            finally:
                self._bench().dispatcher.announce(engine_id, 0)

    async def _call_by_line(self) -> None:
        """First come, first served: each line's calls one after the other, as its decision has them."""
        while calls := await self._page(None, (0, -1)):
            while calls:
                for call, raw in calls:
                    await self._answer(call, raw)
                calls = await self._page(None, (calls[-1][0].n, calls[-1][0].slot))

    async def _answer(self, call: Call, raw: bytes) -> None:
        """One call, filed; and its line's row where it was the last."""
        end, records = await self._worker.ask(call, raw)
        self._meter.called(records)
        if isinstance(end, Said) and end.may_fall_back:
            _, _, decision, _ = await self._do(self._store.line, call.n)
            end = self._worker.spares(call, raw, decision, end)
        last = await self._file(end)
        if last and not self._worker.combines_late(raw):
            await self._file(await self._combined(call.n))

    async def _combine(self) -> None:
        """Rows for the lines that still have none: their answers are in since a run that was cut off, or their
        aggregator asks experts itself."""
        last = 0
        async with self._filing.running():
            while lines := await self._do(self._store.whole, after=last, limit=PAGE):
                async with asyncio.TaskGroup() as group:
                    window = asyncio.Semaphore(self._job.window)
                    for n in lines:
                        await window.acquire()
                        task = group.create_task(self._combine_late(n))
                        task.add_done_callback(lambda _, window=window: window.release())
                last = lines[-1]

    async def _combine_late(self, n: int) -> None:
        await self._file(await self._combined(n))

    async def _write(self) -> Mapping[str, Any]:
        tally, job = self._look("writing"), self._job
        lines, twice = await self._do(write_rows, job.output, self._store.rows(ok=True))
        errors, twice_failed = await self._do(write_rows, job.errors, self._store.rows(ok=False))
        if errors == 0:
            job.errors.unlink()
        report = {
            **{key: getattr(tally, key) for key in ("requests", "expert_calls", "loads")},
            **{key: round(getattr(tally, key), 3) for key in ("load_s", "generate_s", "wall_s")},
            "order": job.order,
            "resident": self._bench().dispatcher.residency.slots,
            "lost": tally.requests - lines - errors + twice + twice_failed,
            "duplicated": twice + twice_failed,
            "errors": errors,
            "prompt_tokens": tally.prompt_tokens,
            "completion_tokens": tally.completion_tokens,
        }
        with whole(report_path(job.output)) as file:
            file.write(to_json(report) + b"\n")
        await self._do(self._store.remove)
        return report

    # What the stages share.

    async def _do(self, work: Callable[..., T], *given: Any, **named: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*given, **named))

    def _open(self) -> None:
        self._source = Source(self._job.source, max_line_bytes=self._bench().service.config.limits.max_body_bytes)
        self._store = Store(self._job.state)
        facts = self._store.about() or self._begin()
        self._check_same(facts)
        self._rows = Rows(facts["key"])
        self._worker = Worker(self._bench, self._rows, created=int(facts["created"]))
        self._meter = Meter(tally=Tally.read(facts))
        self._filing = Filing(self._do, self._store, lambda: self._look("answering").facts())
        self._look("reading")

    def _begin(self) -> dict[str, str]:
        facts = {
            "version": VERSION,
            "key": uuid.uuid4().hex,
            "created": str(int(time.time())),
            "order": self._job.order,
            "input": str(self._job.source.name),
            "input_sha256": self._source.digest(),
        }
        self._store.note(facts)
        return facts

    def _check_same(self, facts: Mapping[str, str]) -> None:
        if facts["version"] != VERSION:
            raise ConfigError(f"{self._job.state} was written by another version of collegium; remove it to begin anew.")
        if facts["order"] != self._job.order:
            raise ConfigError(f"The batch was begun with --order {facts['order']}; go on with that.")
        if facts["input_sha256"] != self._source.digest():
            raise ConfigError(
                f"{self._job.source} has changed since the batch was begun, and its answers are for the old one. Put "
                f"that back, or remove {self._job.state} to begin anew."
            )

    def _close(self) -> None:
        if hasattr(self, "_store"):
            self._store.close()
        if hasattr(self, "_source"):
            self._source.close()

    async def _page(self, engine_id: str | None, after: tuple[int, int]) -> list[tuple[Call, bytes]]:
        return await self._do(self._read_page, engine_id, after)

    def _read_page(self, engine_id: str | None, after: tuple[int, int]) -> list[tuple[Call, bytes]]:
        """The next calls with their lines, as many as fit into memory."""
        if engine_id is None:
            calls = self._store.arrived(after=after, limit=PAGE)
        else:
            calls = self._store.pending(engine_id, after=after, limit=PAGE)
        page, size = [], 0
        for call in calls:
            size += call.size_bytes
            page.append((call, self._source.read(call.offset, call.size_bytes)))
            if size > PAGE_BYTES:
                break
        return page

    async def _combined(self, n: int) -> Result:
        offset, size, decision, heard = await self._do(self._store.line, n)
        raw = await self._do(self._source.read, offset, size)
        return await self._worker.combine(n, raw, decision, heard)

    async def _file(self, end: Said | Result) -> bool:
        if isinstance(end, Result):
            self._meter.tally.settled += 1
        return await self._filing.put(end)

    def _look(self, stage: Stage) -> Tally:
        tally = self._meter.look(self._bench().dispatcher.snapshot())
        self._watch(Progress(stage=stage, tally=tally, total=tally.requests))
        return tally

    def _check_length(self, lines: int) -> None:
        if self._job.max_lines is not None and lines > self._job.max_lines:
            raise ConfigError(f"The input has more than {self._job.max_lines} lines; split it.")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first, of tasks that ended together."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def report_path(output: Path) -> Path:
    """OUT.jsonl -> OUT.report.json"""
    return output.with_name(output.name.removesuffix(".jsonl") + ".report.json")
