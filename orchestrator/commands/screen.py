"""What a person sees: bars and spinners on a terminal, a line each where there is none, and decisions in words."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Rich
    from rich.progress import TaskID

    from experts.models import Progress, Unit


def make_console(*, stderr: bool = True) -> "Console":
    """On standard error by default, so that standard output carries answers only."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def show_decision(console: "Console", decision: Mapping[str, Any]) -> None:
    """Who, why, how fast; then every candidate's score, best first."""
    from rich.markup import escape

    chosen = decision["expert_ids"]
    console.print(
        f"[bold green]{', '.join(chosen)}[/] [dim]by {decision['router']} in {decision['route_ms']:.1f} ms:[/] "
        f"{escape(decision['reason'])}"
    )
    scores = sorted(decision["scores"].items(), key=lambda item: -(item[1] or 0))
    console.print("[dim]" + "  ".join(f"{expert} {score or 0:.3f}" for expert, score in scores) + "[/]")


def show_calls(console: "Console", explanation: Mapping[str, Any]) -> None:
    """Every expert call of a request."""
    from rich.table import Table

    table = Table("expert", "tokens in", "out", "first token", "whole", "USD", "outcome", box=None)
    for call in explanation["calls"]:
        first_ms = "" if call["ttft_ms"] is None else f"{call['ttft_ms']:.0f} ms"
        tokens = call["usage"]
        table.add_row(
            call["expert_id"],
            str(tokens["prompt_tokens"]),
            str(tokens["completion_tokens"]),
            first_ms,
            f"{call['latency_ms']:.0f} ms",
            f"{call['usd']:.6f}",
            call["error"] or "ok",
        )
    console.print(table)
    for missing in explanation.get("unanswered", ()):
        console.print(f"[dim]without {missing['expert_id']}: {missing['reason']}[/]")
    if explanation["trace"]:
        console.print(f"[dim]{explanation['aggregator']}: {explanation['trace']}[/]")


@contextmanager
def waiting(console: "Console", what: str) -> Iterator[None]:
    """Say ``what`` is under way, and how long it took if that was more than two seconds."""
    started = time.monotonic()
    with bars(console) as progress:
        progress.start(what, None, "bytes")
        yield
    if (took_s := time.monotonic() - started) > 2:
        console.print(f"[dim]{what}: {took_s:.0f} s[/]")


@contextmanager
def bars(console: "Console") -> Iterator["Progress"]:
    """One bar a step of work."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as rich:
        yield _Bars(rich)


class _Bars:
    def __init__(self, rich: "Rich") -> None:
        self._rich = rich
        self._task: TaskID | None = None

    def start(self, label: str, total: int | None, unit: "Unit") -> None:
        if self._task is not None:
            self._rich.remove_task(self._task)
        self._task = self._rich.add_task(label, total=total)

    def advance(self, amount: int) -> None:
        if self._task is not None:
            self._rich.advance(self._task, amount)


class _Lines:
    def __init__(self, console: "Console") -> None:
        self._console = console

    def start(self, label: str, total: int | None, unit: "Unit") -> None:
        self._console.print(f"{label} ...")

    def advance(self, amount: int) -> None:
        """A printed line cannot move."""
