"""How rows are cut in tiles. Nothing here reads from the device unless it says so.

Legend: P pairs, E experts, N tiles, C pairs of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium_kernels.ragged import Routing, by_expert

SIZES = (16, 32, 64, 128)
# A tile costs as much as this many rows before its first one: launch, indices, the tail of the pipeline.
TILE_OVERHEAD_ROWS = 8
# Up to here each pair is a tile of its own: even a small sort would take longer than it saves.
TINY_PAIRS = 16
# The counting sort compares chunks with all experts in registers; above this many experts torch sorts.
CHUNK, COMPARED, MOST_EXPERTS = 128, 16384, 1024


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
    """The tile size that wastes least on these loads."""

    def cost(size: int) -> float:
        return sum(-(-load // size) * (size + TILE_OVERHEAD_ROWS) for load in histogram)

    return min(SIZES, key=lambda size: (cost(size), size))


def plan(routing: Routing, *, rows: int | None = None, on_device: bool | None = None) -> Tiles:
    """Tiles for a routing. A ragged one's histogram is read to choose their size; a static one assumes even load.

    ``on_device`` sorts in Triton; by default where the routing is on CUDA and the experts are few enough.
    """
    P, E = routing.num_pairs, routing.num_experts
    if P <= TINY_PAIRS:
        return _one_each(routing)
    rows = _rows(routing) if rows is None else rows
    if on_device is None:
        on_device = routing.expert_ids_P.is_cuda and E <= MOST_EXPERTS
    return _sorted_in_triton(routing, rows) if on_device else _sorted_in_torch(routing, rows)


def _rows(routing: Routing) -> int:
    P, E = routing.num_pairs, routing.num_experts
    if routing.static:
        return choose_rows([P / E] * E)
    return choose_rows(torch.bincount(routing.expert_ids_P, minlength=E).tolist())


def _one_each(routing: Routing) -> Tiles:
    P = routing.num_pairs
    steps = torch.arange(P + 1, device=routing.expert_ids_P.device)
    return Tiles(
        rows=SIZES[0], pairs_P=steps[:-1], tokens_P=routing.tokens_P(), expert_N=routing.expert_ids_P,
        start_N=steps[:-1], end_N=steps[1:],
    )  # fmt: skip


def _bound(num_pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles there can be: known on the host, while the use of each is known on the device."""
    return min(num_pairs, num_pairs // rows + num_experts)


def _sorted_in_triton(routing: Routing, rows: int) -> Tiles:
    import triton

    from collegium_kernels.triton import sorting

    P, E = routing.num_pairs, routing.num_experts
    ids_P, N, experts = routing.expert_ids_P, _bound(P, E, rows), triton.next_power_of_2(E)
    C = max(16, min(CHUNK, COMPARED // experts))
    chunks = triton.cdiv(P, C)
    made = ids_P.new_empty(2 * P + 3 * N, dtype=torch.int32)
    pairs_P, tokens_P, tiles_3N = made[:P], made[P : 2 * P], made[2 * P :]
    ends_EC = made
    if chunks > 1:
        counts_EC = ids_P.new_empty(E * chunks, dtype=torch.int32)
        sorting.count_kernel[(chunks,)](ids_P, counts_EC, P, E, chunks, C=C, E_UP=experts)
        ends_EC = counts_EC.cumsum(0, dtype=torch.int32)
    K = P // max(1, routing.num_tokens) if routing.static or routing.fixed_k is not None else 0
    token_of_P = ids_P if K else routing.tokens_P()
    sorting.place_kernel[(triton.cdiv(max(P, N), C),)](
        *(ids_P, ends_EC, token_of_P, pairs_P, tokens_P, tiles_3N, P, E, N, chunks, rows, K),
        C=C, E_UP=experts, ONE=chunks == 1,
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
