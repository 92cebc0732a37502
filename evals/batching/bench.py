"""`make bench-batch`: what grouping by engine gains, and what the scheduler costs, on simulated engines.

    python -m evals.batching.bench [--out DIR] [--quick]

Every figure is printed beside its target. The exit code is 1 where a bound of the policy does not hold.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.batching import cost, offline, online, timeline
from evals.batching.settings import Offline, Online

SHOWN_S = 600.0
SEEDS = (0, 1, 2)
LOAD = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/batching"))
    parser.add_argument("--quick", action="store_true", help="A tenth of the traffic and of the million.")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    share = 0.1 if given.quick else 1.0
    report: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    for section in (run_offline(), run_online(given.out, 7200 * share), run_cost(int(1_000_000 * share))):
        for key, value in section:
            report[key] = value
            print(f"{key:58} {value}", flush=True)
    (given.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    sys.exit(0 if report["online: bound holds"] else 1)


def run_offline() -> Iterator[tuple[str, Any]]:
    setting = Offline()
    results = [offline.measure(setting, seed) for seed in SEEDS]
    first = results[0]
    yield "offline: questions, experts each, engines used", (first.questions, setting.top_k, first.used)
    yield "offline: seconds a question, one by one (paper: 196.9)", round(first.one_by_one.end_s / first.questions, 1)
    yield "offline: seconds a question, grouped (paper: 25.8)", round(first.grouped.end_s / first.questions, 2)
    yield "offline: loads, one by one", [r.one_by_one.loads for r in results]
    yield "offline: loads, grouped (target: engines used)", [(r.grouped.loads, r.used) for r in results]
    yield "offline: speed-up (target: 7)", [round(r.speedup, 1) for r in results]
    yield "offline: over the lower bound, % (target: 5)", [round(100 * r.over_bound, 2) + 0.0 for r in results]


def run_online(out: Path, until_s: float) -> Iterator[tuple[str, Any]]:
    setting = Online()
    rate = LOAD * setting.feasible_rate()
    yield "online: feasible calls/s, of which offered", (round(setting.feasible_rate(), 2), round(rate, 2))
    runs = [online.measure(setting, rate=rate, until_s=until_s, seed=seed) for seed in SEEDS]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        yield f"online: {name}: calls/s", [round(r.throughput, 2) for r in rows]
        yield f"online: {name}: latency p50, p99, s", [tuple(round(r.latency_s(p), 1) for p in (50, 99)) for r in rows]
        yield f"online: {name}: loads, left at the end", [(r.outcome.loads, r.left) for r in rows]
        yield f"online: {name}: longest wait for an engine, s", [round(r.worst_wait_s, 1) for r in rows]
    gains = [run["collegium"].throughput / run["first come, first served"].throughput for run in runs]
    yield "online: calls/s over first come first served (target: 3)", [round(gain, 1) for gain in gains]
    bound_s = setting.max_wait_s + setting.speeds.load_s
    worst_s = max(run["collegium"].worst_wait_s for run in runs)
    yield "online: max_wait_s + one load, s", bound_s
    yield "online: bound holds", worst_s <= bound_s
    panels = {
        name: (f"{run.throughput:.1f} calls/s, p99 {run.latency_s(99):.0f} s", run.outcome.spans)
        for name, run in runs[0].items()
        if name != "swap at once"
    }
    timeline.draw(panels, out / "timeline.png", engines=setting.engines, until_s=min(SHOWN_S, until_s))


def run_cost(calls: int) -> Iterator[tuple[str, Any]]:
    for engines in (8, 64):
        least, median = cost.decision_us(engines=engines, waiting=10_000, slots=4)
        yield f"cost: a decision, {engines} engines, 10,000 wait, us (target: 50)", (round(least, 1), round(median, 1))
    few, many = (cost.bytes_a_call(engines=64, waiting=n) for n in (10_000, 100_000))
    yield "cost: bytes a waiting call, of 10,000 and of 100,000", (round(few), round(many))
    base_mib = _peak_mib()
    run = cost.million(calls)
    yield f"cost: {run.calls:,} calls, 64 engines, 4 slots: CPU s", round(run.cpu_s, 1)
    yield "cost: of virtual seconds, with loads", (round(run.virtual_s), run.loads)
    yield "cost: peak memory before and after, MiB", (round(base_mib), round(_peak_mib()))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
