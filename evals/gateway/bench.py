"""``python -m evals.gateway.bench``: what the gateway costs, beside what others cost, in one run.

One core holds the program under test, another the stub upstream and the load. The contestants take turns, round after
round, and each figure is its best round: a busy machine makes figures worse, never better.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console
from rich.progress import Progress

from evals.gateway.contestants import CONTESTANTS, Contestant, stub
from evals.gateway.load import Target
from evals.gateway.measure import Figures, best, direct, full_round, soak, warm_up
from evals.gateway.process import NotStarted
from evals.gateway.report import machine, rows, show

PARTS = (*CONTESTANTS, "soak", "help")


class Bench:
    """The run. ``missing`` says who could not take part, and why."""

    def __init__(self, args: argparse.Namespace, folder: Path, progress: Progress) -> None:
        self._only: Sequence[str] = args.only or PARTS
        self._seconds: float = args.seconds
        self._rounds: int = args.rounds
        self._folder = folder
        self._progress = progress
        cores = sorted(os.sched_getaffinity(0))
        self._load_core, self._core = cores[0], cores[-1]
        self.rounds: dict[str, list[Figures]] = {}
        self.soak: Figures = {}
        self.help_s: float | None = None
        self.missing: dict[str, str] = {}

    async def run(self) -> None:
        os.sched_setaffinity(0, {self._load_core})
        if "help" in self._only:
            self.help_s = self._time_help()
        with ExitStack() as stack:
            upstream = stack.enter_context(stub(self._load_core, self._folder))
            contestants = await self._start(upstream, stack)
            await self._take_turns(Target(name="stub", port=upstream, model="stub"), contestants)
            if "soak" in self._only and "collegium" in contestants:
                await self._soak(contestants["collegium"])

    async def _start(self, upstream: int, stack: ExitStack) -> dict[str, Contestant]:
        """Everybody who can take part, started, warmed up and put to sleep."""
        wanted = [name for name in CONTESTANTS if name in self._only or (name == "collegium" and "soak" in self._only)]
        task = self._progress.add_task("starting", total=len(wanted))
        started: dict[str, Contestant] = {}
        for name in wanted:
            try:
                contestant = CONTESTANTS[name](upstream, self._core, self._folder)
                stack.callback(contestant.process.stop)
                with contestant.process.awake():
                    await warm_up(contestant.target)
                started[name] = contestant
            except NotStarted as exc:
                self.missing[name] = str(exc)
            self._progress.advance(task)
        return started

    async def _take_turns(self, upstream: Target, contestants: dict[str, Contestant]) -> None:
        racing = {name: contestant for name, contestant in contestants.items() if name in self._only}
        task = self._progress.add_task("measuring", total=self._rounds * len(racing))
        for _ in range(self._rounds if racing else 0):
            self.rounds.setdefault("stub", []).append(await direct(upstream, self._seconds))
            for name, contestant in racing.items():
                with contestant.process.awake():
                    figures = await full_round(contestant, self._seconds)
                self.rounds.setdefault(name, []).append(figures)
                self._progress.advance(task)

    async def _soak(self, contestant: Contestant) -> None:
        task = self._progress.add_task("memory over 100,000 requests", total=None)
        with contestant.process.awake():
            self.soak = await soak(contestant)
        self._progress.update(task, total=1, completed=1)

    def _time_help(self) -> float:
        times = []
        for _ in range(10):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "orchestrator.cli", "--help"], check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        return min(times)


def main() -> int:
    args = _arguments()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bench = Bench(args, folder, progress)
        place = machine()
        uvloop.run(bench.run())
    figures = {name: best(each) for name, each in bench.rounds.items()}
    targets = rows(figures, bench.soak, bench.help_s)
    show(console, targets, bench.rounds, figures)
    for name, reason in bench.missing.items():
        console.print(f"{name} not measured: {reason}", highlight=False)
    console.print(orjson.dumps(place).decode(), highlight=False, soft_wrap=True)
    result: dict[str, Any] = {
        "machine": place,
        "seconds": args.seconds,
        "targets": [{**asdict(row), "verdict": row.verdict} for row in targets],
        "best": figures,
        "rounds": bench.rounds,
        "soak": bench.soak,
        "missing": bench.missing,
    }
    (folder / "gateway.json").write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2))
    return int(any(row.verdict == "MISSED" for row in targets))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each flood")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run; all of them by default")
    parser.add_argument("--out", default="bench-results", help="folder for gateway.json and the logs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
