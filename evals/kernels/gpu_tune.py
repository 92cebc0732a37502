"""Try blocks and pipelines on this GPU: ``python -m evals.kernels.gpu_tune --out FILE``, for triton/table.py.

Candidates are compiled by many processes first (Triton's cache is on disk), then timed one after the other.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.ragged import Routing, rectangular
from collegium_kernels.triton.backend import TritonBackend
from collegium_kernels.triton.table import HOPPER, Config, Pair

from evals.kernels.gpu import routings_of, weights_of
from evals.kernels.gpu_timing import graphed, times_ms

PROCESSES = 14
# Shape, tokens and tile rows to try there.
POINTS = (
    ("OLMoE", 1, 16), ("OLMoE", 16, 16), ("OLMoE", 256, 64), ("Qwen3-30B", 1, 16), ("Qwen3-30B", 16, 16),
    ("Qwen3-30B", 64, 16), ("Qwen3-30B", 256, 32), ("Qwen3-30B", 256, 16), ("Qwen3-30B", 1024, 128),
    ("Qwen3-30B", 1024, 64),
)  # fmt: skip


def candidates(rows: int) -> Iterator[Pair]:
    """The table's own pair, then each other product in turn with the other one as it is."""
    base = HOPPER[rows]
    yield base
    small = [
        Config(n=n, k=k, warps=w, stages=s, swap=swap, tma=tma)
        for n, k, w, s in (
            (64, 64, 4, 4),
            (64, 128, 4, 2),
            (64, 128, 4, 3),
            (64, 256, 4, 2),
            (128, 128, 8, 2),
            (128, 128, 8, 3),
        )
        for swap, tma in ((True, True), (True, False))
    ]
    small += [Config(n=n, k=128, warps=4, stages=4, swap=False, tma=True) for n in (32, 64)]
    large_gate = [
        Config(n=n, k=64, warps=w, stages=s, group=g, tma=tma)
        for (n, w, s), g, tma in product(((128, 8, 3), (128, 8, 4), (64, 4, 4), (64, 8, 4)), (8,), (True, False))
    ]
    large_gate += [Config(n=128, k=64, warps=8, stages=4, group=g, tma=True) for g in (1, 4, 16)]
    large_gate += [Config(n=128, k=64, warps=8, stages=s, group=8, tma=True, swap=True) for s in (3, 4)]
    large_gate += [Config(n=128, k=128, warps=8, stages=2, group=8, tma=True)]
    large_down = [
        Config(n=n, k=64, warps=w, stages=s, group=g, tma=tma)
        for (n, w, s), g, tma in product(((256, 8, 3), (256, 8, 4), (128, 8, 4), (128, 4, 4)), (8,), (True, False))
    ]
    large_down += [Config(n=256, k=64, warps=8, stages=4, group=g, tma=True) for g in (1, 4, 16)]
    large_down += [Config(n=256, k=64, warps=8, stages=4, group=8, tma=True, swap=True)]
    large_down += [Config(n=128, k=128, warps=8, stages=3, group=8, tma=True)]
    gates, downs = (small, small) if rows < 64 else (large_gate, large_down)
    if rows == 64:
        gates, downs = large_gate + small, large_down + small
    for config in gates:
        yield replace(base, gate_up=config)
    for config in downs:
        yield replace(base, down=config)


def compile_part(part: int) -> None:
    """Every PROCESSES-th candidate, run once on a small layer whose sizes divide as the real ones do."""
    E, D, F = 4, 512, 512
    weights = ExpertWeights(
        gate_up_EGD=torch.zeros(E, 2 * F, D, device="cuda", dtype=torch.bfloat16),
        down_EDF=torch.zeros(E, D, F, device="cuda", dtype=torch.bfloat16),
    )
    everything = [(rows, pair) for rows in HOPPER for pair in candidates(rows)]
    for rows, pair in everything[part::PROCESSES]:
        for T in (64, 8) if rows == 16 else (64,):
            ids = torch.randint(0, E, (T, 1), device="cuda")
            x = torch.zeros(T, D, device="cuda", dtype=torch.bfloat16)
            routing = rectangular(ids, torch.rand(T, 1, device="cuda"), num_experts=E)
            _try(TritonBackend(rows=rows, pair=pair), weights, x, routing)


def _try(backend: TritonBackend, weights: ExpertWeights, x: torch.Tensor, routing: Any) -> bool:
    from triton.runtime.errors import TritonError  # type: ignore[import-untyped]

    try:
        backend.prepare(weights)(x, routing)
        torch.cuda.synchronize()
    except (TritonError, RuntimeError) as exc:
        sys.stderr.write(f"{exc}\n"[:200])
        return False
    return True


def tune() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for name, _, _ in POINTS):
        weights = weights_of(name)
        for T, rows in ((T, rows) for at, T, rows in POINTS if at == name):
            routings = routings_of(name, T)
            x = torch.randn(T, weights.shape[1], device="cuda", dtype=torch.bfloat16)
            for pair in candidates(rows):
                backend = TritonBackend(rows=rows, pair=pair)
                if _try(backend, weights, x, routings[0]):
                    best = min(_time(backend.prepare(weights), x, routings))
                    found.append({"shape": name, "T": T, "rows": rows, "ms": best, **asdict(pair)})
            _report(found, name, T, rows)
        del weights
    return found


def _time(run: Runner, x: torch.Tensor, routings: list[Routing]) -> list[float]:
    return times_ms(graphed([partial(run, x, routing) for routing in routings]), len(routings), budget_ms=12)


def _report(found: list[dict[str, Any]], name: str, T: int, rows: int) -> None:
    here = [f for f in found if (f["shape"], f["T"], f["rows"]) == (name, T, rows)]
    base = here[0]
    sys.stdout.write(f"{name} M={T} rows={rows}: table {base['ms']:.4f}\n")
    for part in ("gate_up", "down"):
        other = "down" if part == "gate_up" else "gate_up"
        same = sorted((f for f in here if f[other] == base[other]), key=lambda f: float(f["ms"]))
        for f in same[:4]:
            sys.stdout.write(f"  {part} {f['ms']:.4f} {tuple(f[part].values())}\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--compile-only", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.part is not None:
        compile_part(chosen.part)
        return
    command = [sys.executable, "-m", "evals.kernels.gpu_tune", "--out", str(chosen.out), "--part"]
    parts = [subprocess.Popen([*command, str(part)]) for part in range(PROCESSES)]
    for part in parts:
        part.wait()
    if not chosen.compile_only:
        chosen.out.write_text(json.dumps(tune()))


if __name__ == "__main__":
    main(sys.argv[1:])
