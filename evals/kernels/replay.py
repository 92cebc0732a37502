"""Cache policies over a recorded trace: ``python -m evals.kernels.replay TRACE --plot hits.svg``."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from collegium_kernels import cache_policies as policies
from collegium_kernels.cache import Tally, Trace, replay
from collegium_kernels.errors import KernelInputError

from evals.kernels.chart import line_chart

SHARES = (0.05, 0.10, 0.25, 0.50)

Run = Callable[[Trace, int], Tally]


def per_layer(trace: Trace, slots: int) -> Tally:
    shares = policies.allocate(policies.miss_curves(trace), slots)
    return replay(trace, policies.PerLayer(shares), slots)


# The allocation and the hot set are made from the trace they then run on: both are upper ends of what a profile gives.
RUNS: dict[str, Run] = {
    "lru": lambda trace, slots: replay(trace, policies.Lru(), slots),
    "lfu": lambda trace, slots: replay(trace, policies.Lfu(), slots),
    "least-stale": lambda trace, slots: replay(trace, policies.LeastStale(), slots),
    "dp-allocation": per_layer,
    "hot-cold": lambda trace, slots: replay(trace, policies.HotCold(trace, slots), slots),
    "belady": lambda trace, slots: replay(trace, policies.Belady(trace), slots),
    "bound without prefetch": policies.bound,
    "least-stale, pre-gated": lambda trace, slots: replay(
        trace, policies.LeastStale(), slots, prefetcher=policies.PreGated(trace)
    ),
    "least-stale, 80 % right": lambda trace, slots: replay(
        trace, policies.LeastStale(), slots, prefetcher=policies.PreGated(trace, accuracy=0.8)
    ),
}


def table(trace: Trace, expert_bytes: int) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The table in Markdown, and each policy's hit rates for the plot."""
    total = trace.num_layers * trace.num_experts
    lines = ["| policy | resident | slots | hit rate | misses | MiB a token |", "|---|---|---|---|---|---|"]
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, run in RUNS.items():
        for share in SHARES:
            slots = max(1, round(share * total))
            tally = run(trace, slots)
            moved = tally.bytes_per_token(expert_bytes) / 2**20
            lines.append(f"| {name} | {share:.0%} | {slots} | {tally.hit_rate:.1%} | {tally.misses} | {moved:.1f} |")
            curves.setdefault(name, []).append((share * 100, tally.hit_rate * 100))
    return "\n".join(lines) + "\n", curves


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="a file made by Trace.save")
    parser.add_argument("--expert-bytes", type=int, default=2 * 3 * 2048 * 1024, help="one expert; OLMoE's in bf16")
    parser.add_argument("--plot", type=Path, help="write the hit rates here, as SVG")
    chosen = parser.parse_args(arguments)
    if not chosen.trace.is_file():
        parser.error(f"there is no trace {chosen.trace}; python -m evals.kernels.record makes one")
    if chosen.plot and chosen.plot.suffix != ".svg":
        parser.error(f"--plot writes SVG: name it {chosen.plot.with_suffix('.svg')}")
    if chosen.plot and not chosen.plot.parent.is_dir():
        parser.error(f"there is no folder {chosen.plot.parent} for the plot")
    if chosen.expert_bytes <= 0:
        parser.error(f"--expert-bytes is {chosen.expert_bytes}: it must be above 0")
    try:
        trace = Trace.load(chosen.trace)
    except KernelInputError as exc:
        parser.error(str(exc))
    text, curves = table(trace, chosen.expert_bytes)
    sys.stdout.write(text)
    if chosen.plot:
        chosen.plot.write_text(line_chart("Hit rate by policy", "resident, % of experts", "hits, %", curves))


if __name__ == "__main__":
    main(sys.argv[1:])
