"""The three kernels: gate and up with SwiGLU, down with the routed weight, and each token's sum.

Legend: T tokens, P pairs, D width, E experts, F expert width, tiles of M rows. A tile belongs to one expert and covers
rows tile_start to tile_end; row r is pair pairs[r]. Offsets into weights and rows are 64-bit.
"""

# mypy: ignore-errors
# Triton compiles these: their types are not Python's.

import triton
import triton.language as tl


@triton.jit
def gate_up_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (E, 2 F, D): gate rows, then up rows
    h_ptr,  # (P, F), in the order of the pairs
    pairs_ptr,  # (P,) int64: the pair of each row
    tokens_ptr,  # (P,) int64: the token of each pair
    tile_expert_ptr,  # (tiles,) int64: E for a tile that is not used
    tile_start_ptr,  # (tiles,) int64
    tile_end_ptr,  # (tiles,) int64
    D,
    F,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < E:
        rows = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tile_end_ptr + tile)
        pairs = tl.load(pairs_ptr + rows, mask=live, other=0)
        tokens = tl.load(tokens_ptr + pairs, mask=live, other=0)
        columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = columns < F
        gate_base = w_ptr + expert * 2 * F * D + columns[None, :].to(tl.int64) * D
        up_base = gate_base + F.to(tl.int64) * D
        gate = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        for start in range(0, D, BLOCK_D):
            depth = start + tl.arange(0, BLOCK_D)
            x_mask = live[:, None] & (depth[None, :] < D)
            w_mask = inside[None, :] & (depth[:, None] < D)
            x = tl.load(x_ptr + tokens[:, None] * D + depth[None, :], mask=x_mask, other=0.0)
            w_gate = tl.load(gate_base + depth[:, None], mask=w_mask, other=0.0)
            w_up = tl.load(up_base + depth[:, None], mask=w_mask, other=0.0)
            if UPCAST:
                x, w_gate, w_up = x.to(tl.float32), w_gate.to(tl.float32), w_up.to(tl.float32)
            gate = tl.dot(x, w_gate, gate, input_precision="ieee")
            up = tl.dot(x, w_up, up, input_precision="ieee")
        hidden = gate / (1 + tl.exp(-gate)) * up
        target = h_ptr + pairs[:, None] * F + columns[None, :]
        tl.store(target, hidden.to(h_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def down_kernel(
    h_ptr,  # (P, F)
    w_ptr,  # (E, D, F)
    y_ptr,  # (P, D) fp32, in the order of the pairs
    weights_ptr,  # (P,) fp32
    pairs_ptr,  # (P,) int64
    tile_expert_ptr,  # (tiles,) int64
    tile_start_ptr,  # (tiles,) int64
    tile_end_ptr,  # (tiles,) int64
    D,
    F,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < E:
        rows = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tile_end_ptr + tile)
        pairs = tl.load(pairs_ptr + rows, mask=live, other=0)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = columns < D
        base = w_ptr + expert * D * F + columns[None, :].to(tl.int64) * F
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, F, BLOCK_F):
            depth = start + tl.arange(0, BLOCK_F)
            h_mask = live[:, None] & (depth[None, :] < F)
            w_mask = inside[None, :] & (depth[:, None] < F)
            h = tl.load(h_ptr + pairs[:, None] * F + depth[None, :], mask=h_mask, other=0.0)
            w = tl.load(base + depth[:, None], mask=w_mask, other=0.0)
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)
            total = tl.dot(h, w, total, input_precision="ieee")
        total = total * tl.load(weights_ptr + pairs, mask=live, other=0.0)[:, None]
        tl.store(y_ptr + pairs[:, None] * D + columns[None, :], total, mask=live[:, None] & inside[None, :])


@triton.jit
def combine_kernel(
    y_ptr,  # (P, D) fp32
    ids_ptr,  # (P,) int64: E for a pair that has no row
    indptr_ptr,  # (T + 1,) int64
    out_ptr,  # (T, D) fp32
    D,
    E,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for pair in range(tl.load(indptr_ptr + token), tl.load(indptr_ptr + token + 1)):
        if tl.load(ids_ptr + pair) < E:
            total += tl.load(y_ptr + pair * D + columns, mask=inside, other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * D + columns, total, mask=inside)
