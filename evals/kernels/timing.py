"""Fair times on a machine that others use: one pinned thread, contenders in turn, a roof measured in the same run."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from collegium_kernels.cpu.build import cache_folder, compile_library, find_compiler
from collegium_kernels.cpu.pack import on_huge_pages
from collegium_kernels.errors import BackendUnavailable

# Far more than any L3, read in parts: one of them falls between other programs' turns.
READ_BYTES, PART_BYTES = 512 << 20, 8 << 20
# Short bursts, many times: one of them falls between other programs' turns.
ROUNDS, BURSTS = 200_000, 150
# A machine whose canary moved by more has been doing something else.
DRIFT = 0.05
KINDS = ("int8", "bf16", "fp32", "read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of one contender."""

    runs_s: tuple[float, ...]

    @property
    def min_s(self) -> float:
        return min(self.runs_s)

    @property
    def median_s(self) -> float:
        return statistics.median(self.runs_s)

    @property
    def mad_s(self) -> float:
        return statistics.median(abs(t - self.median_s) for t in self.runs_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """Operations and bytes a second."""

    int8: float
    bf16: float
    fp32: float
    read: float

    def least_s(self, operations: float, moved_bytes: float, kind: str) -> float:
        """No run can be faster: the longer of computing and reading. What bf16 instructions do more slowly than fp32's
        can be done in fp32."""
        rate: float = max(self.bf16, self.fp32) if kind == "bf16" else getattr(self, kind)
        return max(operations / rate, moved_bytes / self.read)


class RoofMeter:
    """Compiles roof.cpp; ``measure`` takes half a second."""

    def __init__(self) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise BackendUnavailable("the roof is measured in C++: put g++ or clang++ on PATH")
        source = Path(__file__).with_name("roof.cpp")
        self._library = ctypes.CDLL(str(compile_library(compiler, (source,), cache_folder())))
        for name in ("roof_compute", "roof_read", "roof_read_and_multiply"):
            getattr(self._library, name).restype = ctypes.c_double
        self._data = on_huge_pages(READ_BYTES, dtype=torch.uint8).fill_(1)

    def measure(self) -> Roof:
        """The best of a few tries each."""
        library, size = self._library, ctypes.c_int64
        kinds = [max(library.roof_compute(kind, size(ROUNDS)) for _ in range(BURSTS)) for kind in range(3)]
        read = max(library.roof_read(part, size(PART_BYTES)) for _ in range(10) for part in self._parts())
        return Roof(int8=kinds[0], bf16=kinds[1], fp32=kinds[2], read=read)

    def read_and_multiply(self, products: int) -> float:
        """Bytes a second when each 64 bytes read take part in so many int8 products (4, 8, 16 or 32)."""
        run, size = self._library.roof_read_and_multiply, ctypes.c_int64(PART_BYTES)
        rate: float = max(run(part, size, products) for _ in range(5) for part in self._parts())
        return rate

    def _parts(self) -> list[ctypes.c_void_p]:
        return [
            ctypes.c_void_p(self._data.data_ptr() + start) for start in range(0, READ_BYTES - PART_BYTES, PART_BYTES)
        ]


def pin() -> int:
    """One thread on one core: the last one, which busy machines use least."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    return core


def interleave(
    contenders: Mapping[str, Callable[[int], object]], *, repeats: int, budget_s: float = 60
) -> dict[str, Times]:
    """Run each in turn, again and again; the argument is the number of the round, to rotate inputs by.

    Times are the thread's own CPU time: with one thread it is the wall time less other programs' turns.
    Stops early, but not before five rounds, when the budget is spent.
    """
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for turn in range(-1, repeats):
        for name, run in contenders.items():
            begin = time.thread_time()
            run(max(turn, 0))
            if turn >= 0:
                runs[name].append(time.thread_time() - begin)
        if turn >= 5 and time.perf_counter() - started > budget_s:
            break
    return {name: Times(runs_s=tuple(times)) for name, times in runs.items()}


def drifted(before: Roof, after: Roof) -> str | None:
    """What moved by more than the limit between the start and the end; None when the run counts."""
    moved = {kind: abs(getattr(after, kind) / getattr(before, kind) - 1) for kind in KINDS}
    worst = max(moved, key=lambda kind: moved[kind])
    return f"{worst} moved {moved[worst]:.0%}" if moved[worst] > DRIFT else None
