"""Speed of the experts on a CUDA GPU: ``python -m evals.kernels.gpu`` beside torch, padding and vLLM's Triton kernel.

Prints a table and writes rows.json. Calls are captured in CUDA graphs, one graph going through four routings; the roof
is this run's own large matrix product, and copy or read. ``--vllm FILE`` is vLLM's ``fused_moe.py``, found by itself
where vLLM is installed.
Legend: T (also M) tokens, D width, E experts, F expert width, K slots.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from collegium_kernels.backends import ExpertWeights
from collegium_kernels.ragged import Routing, from_topk, rectangular
from collegium_kernels.triton.backend import TritonBackend
from collegium_kernels.triton.plan import choose_rows
from torch import Tensor

from evals.kernels import gpu_contenders as others
from evals.kernels.gpu_contenders import Run, VllmKernel
from evals.kernels.gpu_timing import Roof, graphed, measure_roof, times_ms

SHAPES = {
    "OLMoE": (64, 2048, 1024, 8),
    "Qwen3-30B": (128, 2048, 768, 8),
    "Mixtral": (8, 4096, 14336, 2),
    "DeepSeekMoE-16B": (64, 2048, 1408, 6),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
LONG = {"Qwen3-30B": (32768,)}
ROUTINGS = 4
# Padding to the busiest expert would take more memory than the rest together.
MOST_PADDED = 2_000_000


def weights_of(name: str) -> ExpertWeights:
    E, D, F, _ = SHAPES[name]

    def draw(*size: int, depth: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16).mul_(depth**-0.5)

    return ExpertWeights(gate_up_EGD=draw(E, 2 * F, D, depth=D), down_EDF=draw(E, D, F, depth=F))


def routings_of(name: str, T: int, *, mean_k: float | None = None, skew: bool = False) -> list[Routing]:
    E, _, _, K = SHAPES[name]
    popularity = 1 / torch.arange(1.0, E + 1) if skew else torch.ones(E)
    made = []
    for _ in range(ROUTINGS):
        ids, weights = torch.multinomial(popularity.expand(T, -1), K).cuda(), torch.rand(T, K).cuda()
        if mean_k is None:
            made.append(rectangular(ids, weights, num_experts=E))
            continue
        keep = torch.rand(T, K).cuda() < (mean_k - 1) / (K - 1)
        keep[:, 0] = True
        made.append(from_topk(ids.masked_fill(~keep, -1), weights, num_experts=E))
    return made


def rows_for(routing: Routing) -> int:
    """What the backend reads from the device and a graph cannot: the tile size."""
    return choose_rows(torch.bincount(routing.expert_ids_P, minlength=routing.num_experts).tolist())


def ours(weights: ExpertWeights, routing: Routing, rows: int | None = None) -> Run:
    run = TritonBackend(rows=rows or rows_for(routing)).prepare(weights)
    return lambda x: run(x, routing)


def least_ms(roof: Roof, weights: ExpertWeights, routing: Routing) -> tuple[float, float, float]:
    """The roof in ms, the operations, and the bytes: used experts once, tokens in and out."""
    _, D, F = weights.shape
    used = int((torch.bincount(routing.expert_ids_P) > 0).sum())
    flops, moved = 6.0 * routing.num_pairs * D * F, 2.0 * (used * 3 * D * F + 2 * routing.num_tokens * D)
    return roof.least_ms(flops, moved), flops, moved


def time_all(makers: dict[str, Callable[[Routing], Run]], routings: list[Routing], D: int) -> dict[str, list[float]]:
    """Contenders one after the other on the same inputs; each is compared with the first before it is timed."""
    x = torch.randn(routings[0].num_tokens, D, device="cuda", dtype=torch.bfloat16)
    results: dict[str, list[float]] = {}
    wanted: Tensor | None = None
    for name, make in makers.items():
        runs = [make(routing) for routing in routings]
        got = runs[0](x).float()
        wanted = got if wanted is None else wanted
        error = float((got - wanted).norm() / wanted.norm())
        if not error < 0.02:
            raise RuntimeError(f"{name} differs from the first contender by {error:.3f}")
        results[name] = times_ms(graphed([partial(run, x) for run in runs]), len(runs))
        del runs, got
    return results


def makers_of(weights: ExpertWeights, vllm: dict[str, VllmKernel], routings: list[Routing]) -> dict[str, Any]:
    makers: dict[str, Callable[[Routing], Run]] = {
        "collegium triton": partial(ours, weights),
        "torch grouped_mm": partial(others.grouped_mm, weights),
        "loop of cuBLAS": partial(others.loop, weights),
    }
    busiest = max(int(torch.bincount(r.expert_ids_P).max()) for r in routings)
    if busiest * weights.shape[0] * weights.shape[2] < MOST_PADDED * 1024:
        makers["padded"] = partial(others.padded, weights)
    if all(r.fixed_k for r in routings):
        for name, kernel in vllm.items():
            makers[name] = partial(kernel.run, weights)
    return makers


def rows_of(
    name: str, label: str, results: dict[str, list[float]], least: tuple[float, float, float]
) -> list[dict[str, Any]]:
    """One row a contender; ``ratio`` is its time over that of the fastest contender that is not ours."""
    rivals = {n: min(t) for n, t in results.items() if not n.startswith("collegium")}
    baseline = min(rivals, key=lambda n: rivals[n]) if rivals else next(iter(results))
    roof_ms, flops, moved = least
    return [
        {
            "op": "fused_moe", "backend": contender, "dtype": "bf16", "shape": f"{name} {label}",
            "ms_min": round(min(times), 5), "ms_median": round(statistics.median(times), 5),
            "gflops": round(flops / min(times) / 1e6), "gb_s": round(moved / min(times) / 1e6),
            "roof_pct": round(100 * roof_ms / min(times), 1),
            "baseline": baseline, "ratio": round(min(times) / min(results[baseline]), 3),
        }
        for contender, times in results.items()
    ]  # fmt: skip


def mean_least(roof: Roof, weights: ExpertWeights, routings: list[Routing]) -> tuple[float, float, float]:
    roof_ms, flops, moved = zip(*(least_ms(roof, weights, r) for r in routings), strict=True)
    return statistics.mean(roof_ms), statistics.mean(flops), statistics.mean(moved)


def main_table(roof: Roof, vllm_source: Path | None, work: Path, names: list[str]) -> list[dict[str, Any]]:
    made = []
    for name in names:
        weights, vllm = weights_of(name), vllm_kernels(name, vllm_source, work)
        for T in TOKENS + LONG.get(name, ()):
            routings = routings_of(name, T)
            results = time_all(makers_of(weights, vllm, routings), routings, weights.shape[1])
            made += rows_of(name, f"M={T}", results, mean_least(roof, weights, routings))
            show(made, f"{name} M={T}")
        del weights
        torch.cuda.empty_cache()
    return made


def ragged_table(roof: Roof, name: str = "OLMoE") -> list[dict[str, Any]]:
    """Time by the mean number of experts a token, beside its share of the fixed-k time and beside padding to k."""
    weights, made = weights_of(name), []
    K = SHAPES[name][3]
    for T in (256, 4096):
        fixed = routings_of(name, T)
        whole = min(time_all({"collegium": partial(ours, weights)}, fixed, weights.shape[1])["collegium"])
        for mean_k in (1.0, 2.0, 4.47, 6.0, 8.0):
            routings = routings_of(name, T, mean_k=mean_k)
            results = time_all({"collegium triton": partial(ours, weights)}, routings, weights.shape[1])
            least = mean_least(roof, weights, routings)
            row = rows_of(name, f"M={T} mean k={mean_k}", results, least)[0]
            share = statistics.mean(r.num_pairs for r in routings) / (T * K)
            bar = max(share * whole, least[0])
            row |= {
                "baseline": "padded to k = 8", "ratio": round(row["ms_min"] / whole, 3),
                "of_proportional": round(row["ms_min"] / (share * whole), 3), "of_bar": round(row["ms_min"] / bar, 3),
            }  # fmt: skip
            made.append(row)
            show(made, row["shape"])
    return made


def tile_table(roof: Roof, name: str, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Tiles from the histogram beside each fixed size, with even and with skewed loads."""
    weights, made = weights_of(name), []
    for T in tokens:
        for skew in (False, True):
            routings = routings_of(name, T, skew=skew)
            makers: dict[str, Any] = {"collegium histogram": partial(ours, weights)}
            for rows in (16, 32, 64, 128):
                makers[f"fixed {rows}"] = partial(ours, weights, rows=rows)
            results = time_all(makers, routings, weights.shape[1])
            label = f"M={T} {'zipf' if skew else 'even'} (chose {rows_for(routings[0])})"
            made += rows_of(name, label, results, mean_least(roof, weights, routings))
            show(made, f"{name} {label}")
    return made


def show(rows: list[dict[str, Any]], shape: str) -> None:
    for row in rows:
        if row["shape"] == shape:
            extra = f" proportional {row['of_proportional']} bar {row['of_bar']}" if "of_bar" in row else ""
            sys.stdout.write(
                f"{shape} | {row['backend']} | {row['ms_min']:.4f} ms | {row['gflops'] / 1e3:.0f} TFLOP/s | "
                f"{row['gb_s']} GB/s | {row['roof_pct']}% | {row['ratio']}{extra}\n"
            )
    sys.stdout.flush()


def vllm_kernels(name: str, source: Path | None, work: Path) -> dict[str, VllmKernel]:
    """With vLLM's default blocks, and with its tuned table for this GPU's family where it ships one."""
    if source is None:
        return {}
    E, _, F, _ = SHAPES[name]
    made = {"vLLM Triton": VllmKernel(source, work)}
    for path in sorted(source.parent.glob(f"configs/E={E},N={F},device_name=NVIDIA_H[12]00*.json")):
        if "dtype" not in path.name:
            table = json.loads(path.read_text())
            table.pop("triton_version", None)
            device = path.stem.partition("device_name=")[2]
            made[f"vLLM Triton, {device}'s table"] = VllmKernel(source, work, {int(k): v for k, v in table.items()})
    return made


def find_vllm() -> Path | None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "model_executor/layers/fused_moe/fused_moe.py"
    return path if path.exists() else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-results/gpu"))
    parser.add_argument("--vllm", type=Path, default=None, help="vLLM's fused_moe.py")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=["main", "ragged", "tiles"])
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("No CUDA GPU is here: nothing was measured.\n")
        return 1
    torch.manual_seed(0)
    chosen.out.mkdir(parents=True, exist_ok=True)
    roof = measure_roof()
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "roof_tflops": round(roof.flops / 1e12), "roof_gb_s": round(roof.bytes_s / 1e9),
    }  # fmt: skip
    sys.stdout.write(f"{json.dumps(about)}\n")
    result: dict[str, Any] = {"about": about}
    with tempfile.TemporaryDirectory() as work:
        if "main" in chosen.only:
            result["rows"] = main_table(roof, chosen.vllm or find_vllm(), Path(work), chosen.shapes)
    if "ragged" in chosen.only:
        result["ragged"] = ragged_table(roof)
    if "tiles" in chosen.only:
        result["tiles"] = tile_table(roof, "OLMoE", (64, 256, 512, 4096)) + tile_table(roof, "Mixtral", (256,))
    (chosen.out / "rows.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
