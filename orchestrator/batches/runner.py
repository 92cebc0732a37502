"""READ FIRST. A batch from its first line to its output: plan, call, combine, write; each stage filed as it goes."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from experts.errors import TooLarge
from orchestrator.batches.calls import Calls
from orchestrator.batches.lines import custom_id
from orchestrator.batches.output import whole, write_rows
from orchestrator.batches.plan import Planner, stretches
from orchestrator.batches.session import PAGE, Job, Progress, Session
from orchestrator.batches.work import Bench
from orchestrator.replies import to_json


class Runner:
    """One batch. ``bench`` gives who answers now; ``watch`` hears of the progress, often and from any thread."""

    def __init__(
        self, job: Job, bench: Callable[[], Bench], *, watch: Callable[[Progress], None] = lambda _: None
    ) -> None:
        self._job = job
        self._session = Session(job, bench, watch)

    async def run(self) -> Mapping[str, Any]:
        """The report, once the output lies in its place. Raises a CollegiumError; what is settled by then is kept in
        the state file, and another run goes on from it."""
        async with self._opened():
            await self._plan()
            self._session.stage = "answering"
            await Calls(self._session).make()
            self._session.stage = "combining"
            await Calls(self._session).combine()
            return await self._write()

    async def end(self, code: str, message: str) -> Mapping[str, Any]:
        """Instead of run(), for a batch that is to end as it stands: lines without an answer get ``code``."""
        async with self._opened():
            await self._give_up_unread(code, message)
            await self._give_up_open(code, message)
            return await self._write()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        try:
            await self._session.open()
            yield
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            await self._session.close()

    async def _plan(self) -> None:
        """Every line checked and routed."""
        session = self._session
        planner = Planner(session.bench().service, session.bench().reader, session.rows)
        pieces = await self._unread()
        while (piece := await session.do(next, pieces, None)) is not None:
            done = await planner.plan(piece)
            tally = session.look()
            tally.requests += len(piece)
            self._check_length(tally.requests)
            facts = {**tally.facts(), "read_n": str(done.n), "read_offset": str(done.offset)}
            settled, failed = await session.do(
                session.store.plan,
                done.plans,
                done.settled,
                done.claims,
                partial(planner.twice, done.ids),
                facts,
            )
            tally.settled, tally.failed = tally.settled + settled, tally.failed + failed

    async def _unread(self) -> Any:
        facts = await self._session.do(self._session.store.about)
        n, offset = int(facts.get("read_n", 0)), int(facts.get("read_offset", 0))
        return stretches(self._session.source, n=n, offset=offset)

    def _check_length(self, lines: int) -> None:
        if self._job.max_lines is not None and lines > self._job.max_lines:
            raise TooLarge(f"The input has more than {self._job.max_lines} lines (batches.max_lines); split it.")

    async def _give_up_unread(self, code: str, message: str) -> None:
        session, pieces = self._session, await self._unread()
        while (piece := await session.do(next, pieces, None)) is not None:
            rows = [session.rows.unasked(place.n, custom_id(raw), code, message) for place, raw in piece]
            tally, last = session.look(), piece[-1][0]
            tally.requests += len(piece)
            facts = {**tally.facts(), "read_n": str(last.n), "read_offset": str(last.offset + last.size_bytes)}
            await session.do(session.store.settle, [], rows, facts)

    async def _give_up_open(self, code: str, message: str) -> None:
        session, last = self._session, 0
        while lines := await session.do(session.store.open_lines, after=last, limit=PAGE):
            rows = []
            for n, offset, size in lines:
                raw = await session.do(session.source.read, offset, size)
                rows.append(session.rows.unasked(n, custom_id(raw), code, message))
            await session.do(session.store.settle, [], rows, session.look().facts())
            last = lines[-1][0]

    async def _write(self) -> Mapping[str, Any]:
        session, job = self._session, self._job
        session.stage = "writing"
        tally = session.look()
        lines, twice = await session.do(write_rows, job.output, session.store.rows(ok=True))
        errors, twice_failed = await session.do(write_rows, job.errors, session.store.rows(ok=False))
        if errors == 0:
            job.errors.unlink()
        report = {
            **{key: getattr(tally, key) for key in ("requests", "expert_calls", "loads")},
            **{key: round(getattr(tally, key), 3) for key in ("load_s", "generate_s", "wall_s")},
            "order": job.order,
            "resident": session.bench().service.dispatcher.residency.slots,
            "lost": tally.requests - lines - errors + twice + twice_failed,
            "duplicated": twice + twice_failed,
            "errors": errors,
            "prompt_tokens": tally.prompt_tokens,
            "completion_tokens": tally.completion_tokens,
        }
        with whole(report_path(job.output)) as file:
            file.write(to_json(report) + b"\n")
        await session.do(session.store.remove)
        return report


def report_path(output: Path) -> Path:
    """OUT.jsonl -> OUT.report.json"""
    return output.with_name(output.name.removesuffix(".jsonl") + ".report.json")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first, of tasks that ended together."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
