"""collegium batch run: a file of requests, answered engine by engine in this process."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.commands.options import Aggregator, ConfigFile, RouterName, TopK
from orchestrator.commands.screen import make_console
from orchestrator.starter import find_config, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.batches.session import Job, Progress
    from orchestrator.config import Config
    from orchestrator.policies import Overrides

READ_LINES = 100_000
"""How often the reading of a long file is told without a terminal."""

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def batch() -> None:
    """Files of requests, answered engine by engine: each is loaded once.

    Example: collegium batch run questions.jsonl --out answers.jsonl
    """


@app.command()
def run(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests in OpenAI's batch format, one a line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Answers, one a line; OUT.report.json lies beside it.")],
    config: ConfigFile = None,
    order: Annotated[
        Literal["grouped", "arrival"],
        typer.Option(help="grouped: each engine loaded once. arrival: line by line, to compare."),
    ] = "grouped",
    resident: Annotated[
        int | None, typer.Option(min=1, help="Engines loaded at a time; without it what the config says, else 1.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a batch that was cut off.")] = False,
    router: RouterName = None,
    top_k: TopK = None,
    aggregator: Aggregator = None,
    window: Annotated[int, typer.Option(min=1, max=4096, help="Calls of one engine under way at a time.")] = 64,
) -> None:
    """Answer every line of a file. Lines that cannot be answered go to OUT.errors.jsonl, with their numbers.

    The batch's state lies beside OUT until it is done: cut off at any moment, it goes on with --resume.

    Example: collegium batch run questions.jsonl --out answers.jsonl --top-k 3 --aggregator vote
    """
    from orchestrator.batches.start import check_start, job_for
    from orchestrator.policies import Overrides

    job = job_for(source, out, order=order, window=window)
    check_start(job, resume=resume)
    loaded = read_config(find_config(config))
    overrides = Overrides(router=router, top_k=top_k, aggregator=aggregator)
    console = make_console()
    try:
        report = asyncio.run(_run(job, loaded, overrides, resident, console))
    except KeyboardInterrupt:
        console.print("Stopped. What was answered is kept: the same command with --resume goes on.")
        raise typer.Exit(1) from None
    _say(console, report, job)
    if report["errors"] == report["requests"] > 0:
        raise typer.Exit(1)  # what comes after this command would find no answer


async def _run(
    job: "Job", config: "Config", overrides: "Overrides", resident: int | None, console: "Console"
) -> Mapping[str, Any]:
    from orchestrator.batches.runner import Runner
    from orchestrator.batches.start import open_bench

    async with open_bench(config, overrides=overrides, resident=resident) as bench:
        with _shown(console) as watch:
            return await Runner(job, lambda: bench, watch=watch).run()


@contextmanager
def _shown(console: "Console") -> Iterator[Callable[["Progress"], None]]:
    """A bar with lines done, loads, tokens a second and the time left; without a terminal, a line now and then."""
    if not console.is_terminal:
        yield _Log(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    numbers = TextColumn("{task.fields[numbers]}")
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), numbers)
    with Bars(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bars:
        yield _Bar(bars)


class _Bar:
    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task = bars.add_task("reading", total=None, numbers="")

    def __call__(self, progress: "Progress") -> None:
        tally, reading = progress.tally, progress.stage == "reading"
        self._bars.update(
            self._task,
            description=progress.stage,
            completed=tally.requests if reading else tally.settled,
            total=None if reading else tally.requests,
            numbers=_numbers(progress),
        )


class _Log:
    """Says something every tenth of the way, when the stage changes, and while a long file is read."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._said: tuple[str, int] = ("", 0)

    def __call__(self, progress: "Progress") -> None:
        tally, stage = progress.tally, progress.stage
        step = tally.requests // READ_LINES if stage == "reading" else 10 * tally.settled // max(1, tally.requests)
        if (stage, step) != self._said:
            self._said = stage, step
            done = f"{tally.requests} lines" if stage == "reading" else f"{tally.settled}/{tally.requests}"
            self._console.print(f"{stage}: {done}, {_numbers(progress)}")


def _numbers(progress: "Progress") -> str:
    tally = progress.tally
    rate = tally.completion_tokens / tally.generate_s if tally.generate_s else 0.0
    return f"{tally.loads} loads, {rate:.0f} tokens/s"


def _say(console: "Console", report: Mapping[str, Any], job: "Job") -> None:
    from orchestrator.batches.runner import report_path

    done = report["requests"] - report["errors"]
    console.print(
        f"{done} of {report['requests']} lines answered by {report['expert_calls']} calls in {report['wall_s']:.1f} s: "
        f"{report['loads']} loads ({report['load_s']:.1f} s), {report['generate_s']:.1f} s of generation.\n"
        f"{job.output}, {report_path(job.output).name}"
    )
    if report["errors"]:
        console.print(f"[yellow]{report['errors']} lines could not be answered:[/] {job.errors}")
