"""How rows are cut in tiles. Nothing here reads from the device unless it says so.

Legend: P pairs, E experts, N tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium_kernels.ragged import Routing, by_expert

SIZES = (16, 32, 64, 128)
# A tile costs as much as this many rows before its first one: launch, indices, the tail of the pipeline. A guess
# until a GPU has measured it.
TILE_OVERHEAD_ROWS = 8
# Up to here each pair is a tile of its own: sorting would take longer than the products.
TINY_PAIRS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Tile n is expert ``expert_N[n]``, rows ``start_N[n]`` to ``end_N[n]``; unused tiles have the expert E."""

    rows: int
    pairs_P: Tensor
    expert_N: Tensor
    start_N: Tensor
    end_N: Tensor


def choose_rows(histogram: Sequence[float]) -> int:
    """The tile size that wastes least on these loads."""

    def cost(size: int) -> float:
        return sum(-(-load // size) * (size + TILE_OVERHEAD_ROWS) for load in histogram)

    return min(SIZES, key=lambda size: (cost(size), size))


def plan(routing: Routing, *, rows: int | None = None) -> Tiles:
    """Tiles for a routing. A ragged one's histogram is read to choose their size; a static one assumes even load."""
    P, E = routing.num_pairs, routing.num_experts
    if P <= TINY_PAIRS:
        pairs_P = torch.arange(P, device=routing.expert_ids_P.device)
        return Tiles(rows=SIZES[0], pairs_P=pairs_P, expert_N=routing.expert_ids_P, start_N=pairs_P, end_N=pairs_P + 1)
    by = by_expert(routing)
    if rows is None:
        rows = choose_rows([P / E] * E if routing.static else by.indptr_E1.diff().tolist())
    return _tiles(by.indptr_E1, by.pairs_P, P, rows)


def _tiles(indptr_E1: Tensor, pairs_P: Tensor, num_pairs: int, rows: int) -> Tiles:
    """At most P / rows + E tiles: the bound is known on the host, the use of each on the device."""
    E = indptr_E1.shape[0] - 1
    tiles_E = (indptr_E1.diff() + rows - 1) // rows
    last_E = tiles_E.cumsum(0)
    numbers_N = torch.arange(min(num_pairs, num_pairs // rows + E), device=pairs_P.device)
    expert_N = torch.searchsorted(last_E, numbers_N, right=True)
    known_N = expert_N.clamp(max=E - 1)
    start_N = indptr_E1[known_N] + (numbers_N - last_E[known_N] + tiles_E[known_N]) * rows
    end_N = torch.minimum(start_N + rows, indptr_E1[known_N + 1])
    return Tiles(rows=rows, pairs_P=pairs_P, expert_N=expert_N, start_N=start_N, end_N=end_N)
