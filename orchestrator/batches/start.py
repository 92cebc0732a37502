"""What must hold before a batch starts on the command line: where its files lie, and that they can be written."""

from pathlib import Path

from experts.errors import ConfigError
from orchestrator.batches.output import check_room
from orchestrator.batches.runner import Job, Order


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
