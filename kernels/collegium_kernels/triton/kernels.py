"""The three kernels: gate and up with SwiGLU, down with the routed weight, and each token's sum.

Legend: T tokens, P pairs, D width, E experts, F expert width, tiles of M rows. A tile belongs to one expert and covers
rows tile_start to tile_end; row r is pair pairs[r] of token tokens[r]. Offsets into weights and rows are 64-bit.

Weights are always read as (outputs, depth) blocks. SWAP makes them the left operand: Hopper's matrix unit wants 64 rows
there, and a tile of few tokens has them only on the weights' side. TMA reads blocks with the copy engine, from
descriptors; it fills with zeros outside a tensor, and what it reads beyond a tile's own rows or columns is not stored.
EVEN says that blocks divide the depth, so that no load needs a mask.
"""

# mypy: ignore-errors
# Triton compiles these: their types are not Python's.

import triton
import triton.language as tl

# Whether these begin at multiples of 16 bytes must not make another kernel.
TILE = ["tile_expert_ptr", "tile_start_ptr", "tile_end_ptr"]


@triton.jit
def _place(tiles, columns, GROUP: tl.constexpr):
    """Tile and column block of this program: GROUP tiles share their weights' way through the L2 cache."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % size, inside // size


@triton.jit
def _load(base, descriptor, row, start, depth_end, BLOCK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr):
    """A block (rows, BLOCK) of depth: ``base`` points at each row, ``row`` is the first one's number."""
    if TMA:
        block = descriptor.load([row, start])
    elif EVEN:
        block = tl.load(base[:, None] + (start + tl.arange(0, BLOCK))[None, :])
    else:
        depth = start + tl.arange(0, BLOCK)
        block = tl.load(base[:, None] + depth[None, :], mask=depth[None, :] < depth_end, other=0.0)
    return block


@triton.jit
def _multiply(rows, weights, total, SWAP: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        rows, weights = rows.to(tl.float32), weights.to(tl.float32)
    if SWAP:
        total = tl.dot(weights, rows.T, total, input_precision="ieee")
    else:
        total = tl.dot(rows, weights.T, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["tiles", "E"], do_not_specialize_on_alignment=[*TILE, "tokens_ptr"])
def gate_up_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (E, 2 F, D): gate rows, then up rows
    w_blocks,  # the same as a descriptor of (2 E F, D), with TMA
    h_ptr,  # (P, F), in the order of the rows
    tokens_ptr,  # (P,) the token of each row
    tile_expert_ptr,  # (tiles,): E or more for a tile that is not used
    tile_start_ptr,  # (tiles,)
    tile_end_ptr,  # (tiles,)
    tiles,
    D,
    F,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, column = _place(tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if (expert >= 0) & (expert < E):
        rows = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tile_end_ptr + tile)
        # Rows and columns outside are read from the first one and not stored.
        tokens = tl.load(tokens_ptr + rows, mask=live, other=0).to(tl.int64)
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < F
        safe = tl.where(inside, columns, 0)
        x_rows = x_ptr + tokens * D
        gate_rows = w_ptr + (expert * 2 * F + safe) * D
        up_rows = w_ptr + (expert * 2 * F + F + safe) * D
        first = (expert * 2 * F).to(tl.int32) + column * BLOCK_N
        gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_K):
            x = _load(x_rows, None, 0, start, D, BLOCK_K, EVEN, False)
            w_gate = _load(gate_rows, w_blocks, first, start, D, BLOCK_K, EVEN, TMA)
            w_up = _load(up_rows, w_blocks, first + F, start, D, BLOCK_K, EVEN, TMA)
            gate = _multiply(x, w_gate, gate, SWAP, UPCAST)
            up = _multiply(x, w_up, up, SWAP, UPCAST)
        hidden = (gate / (1 + tl.exp(-gate)) * up).to(h_ptr.dtype.element_ty)
        if SWAP:
            hidden = hidden.T
        target = h_ptr + rows[:, None].to(tl.int64) * F + columns[None, :]
        tl.store(target, hidden, mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tiles", "E"], do_not_specialize_on_alignment=[*TILE, "pairs_ptr", "weights_ptr"])
def down_kernel(
    h_ptr,  # (P, F), in the order of the rows
    h_blocks,  # the same as a descriptor, with TMA
    w_ptr,  # (E, D, F)
    w_blocks,  # the same as a descriptor of (E D, F), with TMA
    y_ptr,  # (P, D), in the order of the pairs
    weights_ptr,  # (P,) of the pairs
    pairs_ptr,  # (P,) the pair of each row
    tile_expert_ptr,  # (tiles,)
    tile_start_ptr,  # (tiles,)
    tile_end_ptr,  # (tiles,)
    tiles,
    D,
    F,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, column = _place(tiles, tl.cdiv(D, BLOCK_N), GROUP)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if (expert >= 0) & (expert < E):
        start_row = tl.load(tile_start_ptr + tile).to(tl.int32)
        rows = start_row + tl.arange(0, BLOCK_M)
        live = rows < tl.load(tile_end_ptr + tile)
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = columns < D
        h_rows = h_ptr + tl.where(live, rows, start_row).to(tl.int64) * F
        w_rows = w_ptr + (expert * D + tl.where(inside, columns, 0)) * F
        first = (expert * D).to(tl.int32) + column * BLOCK_N
        total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, F, BLOCK_K):
            h = _load(h_rows, h_blocks, start_row, start, F, BLOCK_K, EVEN, TMA)
            w = _load(w_rows, w_blocks, first, start, F, BLOCK_K, EVEN, TMA)
            total = _multiply(h, w, total, SWAP, UPCAST)
        if SWAP:
            total = total.T
        pairs = tl.load(pairs_ptr + rows, mask=live, other=0).to(tl.int64)
        total = total * tl.load(weights_ptr + pairs, mask=live, other=0.0).to(tl.float32)[:, None]
        target = y_ptr + pairs[:, None] * D + columns[None, :]
        tl.store(target, total.to(y_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["P", "E"], do_not_specialize_on_alignment=["ids_ptr", "indptr_ptr"])
def combine_kernel(
    y_ptr,  # (P, D), in the order of the pairs
    ids_ptr,  # (P,): outside [0, E) for a pair that has no row
    indptr_ptr,  # (T + 1,)
    out_ptr,  # (T, D)
    P,
    D,
    E,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), tl.float32)
    # The offsets are 64-bit, and so is the number of a pair.
    first = tl.maximum(tl.load(indptr_ptr + token), 0)
    for pair in range(first, tl.minimum(tl.load(indptr_ptr + token + 1), P)):
        expert = tl.load(ids_ptr + pair)
        if (expert >= 0) & (expert < E):
            total += tl.load(y_ptr + pair * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * D + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
