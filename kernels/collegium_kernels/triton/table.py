"""Blocks and pipelines of the two products, by the rows of a tile."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One kernel's: BLOCK_N outputs, BLOCK_K depth, and how it runs; see kernels.py for the rest."""

    n: int
    k: int
    warps: int
    stages: int
    group: int = 1
    swap: bool = False
    tma: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both products' for one tile size."""

    gate_up: Config
    down: Config


# 16-bit weights on Hopper: the best of evals/kernels/gpu_tune.py on an H100. Up to 64 rows the weights' way from memory
# counts; at 128 rows the matrix unit. All of them sum a row's products in the same order: the same bits for any tile.
HOPPER = {
    16: Pair(
        gate_up=Config(n=64, k=128, warps=4, stages=3, group=4, swap=True, tma=True),
        down=Config(n=64, k=128, warps=4, stages=3, group=4, swap=True, tma=True),
    ),
    32: Pair(
        gate_up=Config(n=128, k=128, warps=8, stages=3, group=4, swap=True, tma=True),
        down=Config(n=64, k=128, warps=4, stages=3, group=4, swap=True, tma=True),
    ),
    64: Pair(
        gate_up=Config(n=64, k=128, warps=4, stages=4, group=4, tma=True),
        down=Config(n=128, k=64, warps=4, stages=4, group=4, tma=True),
    ),
    128: Pair(
        gate_up=Config(n=128, k=64, warps=8, stages=4, group=8, tma=True),
        down=Config(n=256, k=64, warps=8, stages=4, group=8, tma=True),
    ),
}
# 16-bit weights on other GPUs: fits 96 KiB of shared memory.
PLAIN = Pair(gate_up=Config(n=64, k=64, warps=4, stages=2), down=Config(n=64, k=64, warps=4, stages=3))
# fp32 multiplies outside the matrix unit.
WIDE = Pair(gate_up=Config(n=32, k=32, warps=4, stages=2), down=Config(n=32, k=32, warps=4, stages=2))


def choose(rows: int, *, itemsize: int, hopper: bool) -> Pair:
    if itemsize > 2:
        return WIDE
    return HOPPER[rows] if hopper else PLAIN
