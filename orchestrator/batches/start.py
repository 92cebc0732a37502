"""A batch in a process of its own: where its files lie, what must hold before it starts, and who answers it."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from experts.base import Engine
from experts.errors import CollegiumError, ConfigError
from experts.types import EngineSpec
from orchestrator.batches.lines import Reader
from orchestrator.batches.output import check_room
from orchestrator.batches.runner import report_path
from orchestrator.batches.session import Job, Order
from orchestrator.batches.work import Bench
from orchestrator.build import build_service, make_engine
from orchestrator.config import Config
from orchestrator.policies import Overrides
from orchestrator.security import ANYONE

log = logging.getLogger(__name__)


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
    if not job.source.exists():
        raise ConfigError(f"There is no file {job.source}.")
    if not job.source.is_file():
        raise ConfigError(
            f"{job.source} is no regular file, and a batch reads its input more than once: write it to one."
        )
    for own in (job.output, job.errors, report_path(job.output), job.state):
        if own.resolve() == job.source.resolve():
            raise ConfigError(f"{own} is the input itself, and would be written over; name another file with --out.")
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
    service = build_service(_alone(config, resident), make=make)
    reader = Reader(service, tenant=ANYONE, overrides=overrides)
    residency = service.dispatcher.residency
    try:
        for engine in service.engines.values():
            if not residency.manages(engine):
                await _open(engine)
        yield Bench(service=service, reader=reader)
    finally:
        await residency.close()
        await service.aclose()
        for engine in service.engines.values():
            await residency.drop(engine)


async def _open(engine: Engine) -> None:
    """An engine that is always there, such as an endpoint. One that does not answer has its lines asked elsewhere."""
    try:
        await engine.load()
    except CollegiumError as exc:
        log.error("engine %s did not load: %s", engine.spec.engine_id, exc.message)


def _alone(config: Config, resident: int | None) -> Config:
    """``config`` for a process that has nobody else to answer: an engine may go as soon as nothing is left for it."""
    own = config.residency
    slots = resident or own.slots or (None if own.memory_gib else 1)
    return config.model_copy(update={"residency": own.model_copy(update={"slots": slots, "min_loaded_s": 0.0})})
