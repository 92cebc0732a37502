"""Times on a CUDA GPU: calls captured in one graph, and the roof of the same run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What this GPU did in this run: operations and bytes a second."""

    flops: float
    bytes_s: float

    def least_ms(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.bytes_s) * 1e3


def graphed(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """All calls in one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def times_ms(replay: Callable[[], None], calls: int, *, budget_ms: float = 60) -> list[float]:
    """Milliseconds of one call, by events, once for each replay."""
    replay()
    torch.cuda.synchronize()
    runs: list[float] = []
    while len(runs) < 5 or (sum(runs) * calls < budget_ms and len(runs) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        replay()
        end.record()
        end.synchronize()
        runs.append(start.elapsed_time(end) / calls)
    return runs


def measure_roof() -> Roof:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(times_ms(graphed([lambda: a @ b] * 4), 4, budget_ms=300))
    numbers, total = source.view(torch.float32), target.view(torch.float32)[0]
    copy = min(times_ms(graphed([lambda: target.copy_(source)] * 2), 2, budget_ms=100))
    read = min(times_ms(graphed([lambda: torch.sum(numbers, 0, out=total)] * 2), 2, budget_ms=100))
    return Roof(flops=2 * 8192**3 / product * 1e3, bytes_s=2**31 / min(copy / 2, read) * 1e3)
