"""A batch in a process of its own: where its files lie, what must hold before it starts, and who answers it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from experts.base import Engine
from experts.errors import ConfigError
from experts.types import EngineSpec
from orchestrator.batches.lines import Reader
from orchestrator.batches.output import check_room
from orchestrator.batches.session import Job, Order
from orchestrator.batches.work import Bench
from orchestrator.build import build_service, make_engine
from orchestrator.config import Config
from orchestrator.dispatch import Dispatcher, Resident
from orchestrator.policies import Overrides
from orchestrator.residency import Residency
from orchestrator.security import ANYONE


def job_for(source: Path, output: Path, *, order: Order, window: int) -> Job:
    """OUT.jsonl, OUT.errors.jsonl and, until the batch is done, OUT.jsonl.state.sqlite."""
    stem = output.name.removesuffix(".jsonl")
    return Job(
        source=source,
        output=output,
        errors=output.with_name(f"{stem}.errors.jsonl"),
        state=output.with_name(f"{output.name}.state.sqlite"),
        order=order,
        window=window,
    )


def check_start(job: Job, *, resume: bool) -> None:
    """Raises ConfigError for what would only come up after hours of work."""
    if not job.source.is_file():
        raise ConfigError(f"There is no file {job.source}.")
    if job.output.resolve() == job.source.resolve():
        raise ConfigError(f"{job.output} is the input itself; name another file with --out.")
    if job.output.is_dir():
        raise ConfigError(f"{job.output} is a folder; name a file with --out.")
    begun = job.state.exists()
    if begun and not resume:
        raise ConfigError(f"{job.output} was begun and cut off: --resume goes on, removing {job.state} begins anew.")
    if resume and not begun:
        what = "is there: it was finished" if job.output.exists() else "was never begun"
        raise ConfigError(f"There is nothing to resume: {job.output} {what}. Leave --resume out to begin.")
    check_room(job.output.resolve().parent, 0 if begun else job.source.stat().st_size)


@asynccontextmanager
async def open_bench(
    config: Config,
    *,
    overrides: Overrides | None = None,
    resident: int | None = None,
    make: Callable[[EngineSpec], Engine] = make_engine,
) -> AsyncIterator[Bench]:
    """Everything that answers, with no engine loaded yet; all are unloaded at the end. Raises ConfigError."""
    service = build_service(config, make=make)
    dispatcher = Dispatcher(Residency(service.engines, slots=resident or config.residency.slots or 1))
    experts = {e: Resident(x, dispatcher) for e, x in service.experts.items()}
    reader = Reader(service, tenant=ANYONE, overrides=overrides)
    try:
        yield Bench(service=service, experts=experts, dispatcher=dispatcher, reader=reader)
    finally:
        for engine in service.engines.values():
            await engine.unload()
