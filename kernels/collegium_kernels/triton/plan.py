"""How rows are cut in tiles. Nothing here reads from the device unless it says so.

Legend: P pairs, E experts, N tiles, C pairs of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium_kernels.ragged import Routing, by_expert

# Rows of a tile, and what a tile of that size costs beside one of 16 rows: measured on an H100, OLMoE's experts. A tile
# mostly reads weights, so that a larger one is dear only once it multiplies for longer than it reads.
TILE_COSTS = {16: 1.0, 32: 1.05, 64: 1.2, 128: 1.75}
# The counting sort compares chunks with all experts in registers; above this many experts torch sorts.
CHUNK, COMPARED, MOST_EXPERTS = 128, 16384, 1024
LEAST_CHUNK = 16
# Up to here each program of the sort sums all counts itself; torch's running sum takes as long as that.
SUMMED_HERE = 1024
MOST_WARPS, LEAST_WARPS, COMPARED_A_WARP = 16, 4, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Tile n is expert ``expert_N[n]``, rows ``start_N[n]`` to ``end_N[n]``; unused tiles have the expert E or more.

    Row r is pair ``pairs_P[r]`` of token ``tokens_P[r]``.
    """

    rows: int
    pairs_P: Tensor
    tokens_P: Tensor
    expert_N: Tensor
    start_N: Tensor
    end_N: Tensor


def choose_rows(histogram: Sequence[float]) -> int:
    """The tile size that costs least on these loads."""

    def cost(size: int) -> float:
        return TILE_COSTS[size] * sum(-(-load // size) for load in histogram)

    return min(TILE_COSTS, key=lambda size: (cost(size), size))


def plan(routing: Routing, *, rows: int | None = None, on_device: bool | None = None) -> Tiles:
    """Tiles for a routing. A ragged one's histogram is read to choose their size; a static one assumes even load.

    ``on_device`` sorts in Triton; by default where the routing is on CUDA and the experts are few enough.
    """
    rows = _rows(routing) if rows is None else rows
    if on_device is None:
        on_device = routing.expert_ids_P.is_cuda and routing.num_experts <= MOST_EXPERTS
    return _sorted_in_triton(routing, rows) if on_device else _sorted_in_torch(routing, rows)


def _rows(routing: Routing) -> int:
    """Few pairs cannot fill a larger tile than the smallest: then nothing is read back."""
    P, E = routing.num_pairs, routing.num_experts
    smallest = min(TILE_COSTS)
    if smallest >= P:
        return smallest
    if routing.static:
        return choose_rows([P / E] * E)
    ids_P = routing.expert_ids_P.clamp(0, E)
    counts_E = torch.zeros(E + 1, dtype=torch.int64, device=ids_P.device).scatter_add(0, ids_P, torch.ones_like(ids_P))
    return choose_rows(counts_E[:E].tolist())


def _bound(num_pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles there can be: known on the host, while the use of each is known on the device."""
    return min(num_pairs, num_pairs // rows + num_experts)


def _power_of_2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _sorted_in_triton(routing: Routing, rows: int) -> Tiles:
    from collegium_kernels.triton import sorting

    T, P, E = routing.num_tokens, routing.num_pairs, routing.num_experts
    ids_P, N, experts = routing.expert_ids_P, _bound(P, E, rows), _power_of_2(E)
    C = max(LEAST_CHUNK, min(CHUNK, COMPARED // experts, _power_of_2(P)))
    chunks = max(1, -(-P // C))
    counts_up = _power_of_2(chunks)
    summed = experts * counts_up > SUMMED_HERE
    made = ids_P.new_empty(2 * P + 3 * N, dtype=torch.int32)
    pairs_P, tokens_P, tiles_3N = made[:P], made[P : 2 * P], made[2 * P :]
    counts_EC = made
    warps = max(LEAST_WARPS, min(MOST_WARPS, C * experts // COMPARED_A_WARP))
    if chunks > 1:
        counts_EC = ids_P.new_empty(E * chunks, dtype=torch.int32)
        sorting.count_kernel[(chunks,)](ids_P, counts_EC, P, E, chunks, C=C, E_UP=experts)
        counts_EC = counts_EC.cumsum(0, dtype=torch.int32) if summed else counts_EC
    K = P // max(1, T) if routing.static or routing.fixed_k is not None else 0
    sorting.place_kernel[(-(-max(P, N) // C),)](
        *(ids_P, counts_EC, routing.indptr_T1, pairs_P, tokens_P, tiles_3N),
        *(T, P, E, N, chunks, rows, K, T.bit_length()),
        num_warps=warps, C=C, E_UP=experts, CHUNKS_UP=min(2, counts_up) if summed else counts_up, SUMMED=summed,
    )  # fmt: skip
    expert_N, start_N, end_N = tiles_3N.view(3, N)
    return Tiles(rows=rows, pairs_P=pairs_P, tokens_P=tokens_P, expert_N=expert_N, start_N=start_N, end_N=end_N)


def _sorted_in_torch(routing: Routing, rows: int) -> Tiles:
    by = by_expert(routing)
    E = routing.num_experts
    tiles_E = (by.indptr_E1.diff() + rows - 1) // rows
    last_E = tiles_E.cumsum(0)
    numbers_N = torch.arange(_bound(routing.num_pairs, E, rows), device=by.pairs_P.device)
    expert_N = torch.searchsorted(last_E, numbers_N, right=True)
    known_N = expert_N.clamp(max=E - 1)
    start_N = by.indptr_E1[known_N] + (numbers_N - last_E[known_N] + tiles_E[known_N]) * rows
    end_N = torch.minimum(start_N + rows, by.indptr_E1[known_N + 1])
    return Tiles(rows=rows, pairs_P=by.pairs_P, tokens_P=by.tokens_P, expert_N=expert_N, start_N=start_N, end_N=end_N)
