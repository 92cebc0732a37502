"""What is measured of one contestant in one round, and how rounds are put together."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from evals.gateway.contestants import Contestant
from evals.gateway.load import Tally, Target, run
from evals.gateway.process import NotStarted

CONNECTIONS = 16
SOAK = 100_000
SOAK_WARM = 12_000
"""More than the 10,000 decisions that are kept by default: what comes after them must not grow."""

Figures = dict[str, float]


async def warm_up(target: Target, within_s: float = 60.0) -> None:
    """Returns after a right answer. Raises NotStarted."""
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        tally = await run(target, connections=1, requests=1, timeout_s=10)
        if tally.right:
            await run(target, connections=4, requests=100)
            await run(target, connections=4, requests=20, stream=True)
            return
        await asyncio.sleep(0.2)
    raise NotStarted(f"it gives no right answer: {dict(tally.faults)}")


async def direct(target: Target, seconds: float) -> Figures:
    """The stub without anybody before it: what has to be taken off."""
    one = await run(target, connections=1, seconds=seconds / 4)
    stream = await run(target, connections=1, seconds=seconds / 4, stream=True, how="steps")
    return {"p50_ms": quantile(one.latency_s, 0.5), "ttfb_ms": quantile(stream.ttfb_s, 0.5)}


async def full_round(contestant: Contestant, seconds: float) -> Figures:
    """One at a time, then 16 connections; whole answers, then streams; chunks all at once, then step by step."""
    target, figures = contestant.target, Figures()
    one = await run(target, connections=1, seconds=seconds / 2)
    figures |= {"p50_ms": quantile(one.latency_s, 0.5), "p99_ms": quantile(one.latency_s, 0.99)}
    flood, figures["cpu_ms"] = await _weighed(contestant, seconds)
    figures["requests_per_s"] = flood.per_second
    first = await run(target, connections=1, seconds=seconds / 2, stream=True, how="steps")
    figures["ttfb_ms"] = quantile(first.ttfb_s, 0.5)
    burst, figures["stream_cpu_ms"] = await _weighed(contestant, seconds, stream=True)
    figures["streams_per_s"] = burst.per_second
    steps, figures["steps_cpu_ms"] = await _weighed(contestant, seconds, stream=True, how="steps")
    figures["steps_per_s"] = steps.per_second
    faults = [t.faults for t in (one, flood, first, burst, steps)]
    figures["merged"] = sum(f["chunks merged"] for f in faults)
    figures["faults"] = sum(f.total() for f in faults) - figures["merged"]
    figures["rss_mib"] = contestant.process.rss_mib()
    return figures


async def soak(contestant: Contestant) -> Figures:
    """Memory when it is warm, and after ``SOAK`` requests more."""
    first = await run(contestant.target, connections=CONNECTIONS, requests=SOAK_WARM)
    warm = contestant.process.rss_mib()
    rest = await run(contestant.target, connections=CONNECTIONS, requests=SOAK)
    ended = contestant.process.rss_mib()
    faults = first.faults.total() + rest.faults.total()
    return {"warm_mib": warm, "ended_mib": ended, "requests": rest.right, "faults": faults}


async def _weighed(
    contestant: Contestant, seconds: float, *, stream: bool = False, how: str = "burst"
) -> tuple[Tally, float]:
    """A flood, and what it cost the contestant in milliseconds of CPU a request."""
    before = contestant.process.cpu_s()
    tally = await run(contestant.target, connections=CONNECTIONS, seconds=seconds, stream=stream, how=how)
    return tally, (contestant.process.cpu_s() - before) * 1e3 / max(tally.answers, 1)


def best(rounds: Sequence[Mapping[str, float]]) -> Figures:
    """The round least disturbed, for each figure: rates at their highest, faults summed, costs at their lowest."""
    figures = Figures()
    for key in rounds[0]:
        values = [r[key] for r in rounds]
        if key in ("faults", "merged"):
            figures[key] = sum(values)
        else:
            figures[key] = max(values) if key.endswith("_per_s") else min(values)
    return figures


def quantile(values: Sequence[float], q: float) -> float:
    """In milliseconds; not a number when there is none."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * q), len(ordered) - 1)] * 1e3 if ordered else float("nan")
