"""The gateway's targets, the figures beside them, and where they were taken."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evals.gateway.measure import CONNECTIONS, SOAK, Figures

PACKAGES = ("aiohttp", "fastapi", "httptools", "httpx", "orjson", "pydantic", "starlette", "uvicorn", "uvloop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target. ``figure`` is None when it was not measured; ``at_least`` says which side of ``target`` is good."""

    name: str
    target: float
    figure: float | None
    unit: str = ""
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        met = self.figure >= self.target if self.at_least else self.figure <= self.target
        return "met" if met else "MISSED"


def rows(best: Mapping[str, Figures], soak: Figures, help_s: float | None) -> list[Row]:
    """The targets, from each contestant's best figures; ``stub`` is the upstream asked directly."""
    ours, stub = best.get("collegium", {}), best.get("stub", {})
    rate = ours.get("requests_per_s")

    def added(key: str, base: str) -> float | None:
        return ours[key] - stub[base] if key in ours and base in stub else None

    def times(other: str) -> float | None:
        return rate / best[other]["requests_per_s"] if rate is not None and other in best else None

    growth = 100 * (soak["ended_mib"] / soak["warm_mib"] - 1) if soak else None
    return [
        Row(name=f"requests/s at {CONNECTIONS} connections", target=2000, figure=rate, at_least=True),
        Row(name="CPU a request", target=0.5, figure=ours.get("cpu_ms"), unit="ms"),
        Row(name="added latency, p50", target=0.8, figure=added("p50_ms", "p50_ms"), unit="ms"),
        Row(name="added latency, p99", target=4, figure=added("p99_ms", "p50_ms"), unit="ms"),
        Row(name="streams/s of 32 chunks", target=1000, figure=ours.get("streams_per_s"), at_least=True),
        Row(name="added to the first byte, p50", target=1, figure=added("ttfb_ms", "ttfb_ms"), unit="ms"),
        Row(name="streams with chunks merged", target=0, figure=ours.get("merged")),
        Row(name="wrong or lost answers", target=0, figure=ours.get("faults")),
        Row(name="times LiteLLM's requests/s", target=15, figure=times("litellm"), at_least=True),
        Row(name="share of FastAPI + aiohttp's requests/s", target=0.45, figure=times("aiohttp"), at_least=True),
        Row(name=f"memory after {SOAK:,} requests", target=250, figure=soak.get("ended_mib"), unit="MiB"),
        Row(name="growth over them", target=5, figure=growth, unit="%"),
        Row(name="wrong or lost answers among them", target=0, figure=soak.get("faults")),
        Row(name="collegium --help", target=0.5, figure=help_s, unit="s"),
    ]


def machine() -> dict[str, Any]:
    """Commit, hardware and versions: what a figure needs beside it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def show(
    console: Console, targets: Sequence[Row], rounds: Mapping[str, Sequence[Figures]], best: Mapping[str, Figures]
) -> None:
    """The targets, then everybody's figures: the best round, with the range of requests/s over the rounds."""
    table = Table("what", "target", "figure", "verdict", title="The gateway alone, on one core")
    for row in targets:
        figure = "" if row.figure is None else f"{_figure(row.figure)} {row.unit}"
        table.add_row(row.name, f"{'≥' if row.at_least else '≤'} {row.target:g} {row.unit}", figure, row.verdict)
    console.print(table)
    table = Table("figure", *best, title="Everybody in the same run (requests/s: worst to best round)")
    for label, key in _FIGURES:
        table.add_row(label, *(_cell(key, best[name], rounds[name]) for name in best))
    console.print(table)


_FIGURES = (
    ("requests/s", "requests_per_s"),
    ("CPU ms a request", "cpu_ms"),
    ("p50 ms", "p50_ms"),
    ("p99 ms", "p99_ms"),
    ("first byte of a stream, ms", "ttfb_ms"),
    ("streams/s", "streams_per_s"),
    ("CPU ms a stream", "stream_cpu_ms"),
    ("the same, chunk by chunk", "steps_per_s"),
    ("RSS MiB", "rss_mib"),
)


def _cell(key: str, best: Figures, rounds: Sequence[Figures]) -> str:
    if key not in best:
        return ""
    worst = f"{_figure(min(r[key] for r in rounds))} to " if key == "requests_per_s" else ""
    return worst + _figure(best[key])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
