"""The dispatch as a counting sort on the device: which row each pair is, and which tiles the rows are cut in.

Legend: P pairs, E experts, N tiles, C pairs of a chunk. One launch where a single chunk holds all pairs, else two, with
a running sum by torch between them where the chunks are many. Nothing is read back. Ids outside [0, E) get no row.
Blocks of (C, E) and (C, C) are compared in registers.
"""

# mypy: ignore-errors
# Triton compiles these: their types are not Python's.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["P", "E", "chunks"], do_not_specialize_on_alignment=["ids_ptr", "counts_ptr"])
def count_kernel(ids_ptr, counts_ptr, P, E, chunks, C: tl.constexpr, E_UP: tl.constexpr):
    """counts (E, chunks): how many of each chunk's pairs go to each expert."""
    chunk = tl.program_id(0)
    pairs = chunk * C + tl.arange(0, C)
    ids = tl.load(ids_ptr + pairs, mask=pairs < P, other=-1)
    experts = tl.arange(0, E_UP)
    counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + experts * chunks + chunk, counts, mask=experts < E)


@triton.jit
def _token(indptr_ptr, pairs, T, steps):
    """The token of each pair: halving the range, ``steps`` times."""
    low = pairs * 0
    high = low + T
    for _ in range(steps):
        middle = (low + high) // 2
        after = tl.load(indptr_ptr + tl.minimum(middle + 1, T)) <= pairs
        low = tl.where(after, tl.minimum(middle + 1, T - 1), low)
        high = tl.where(after, high, middle)
    return low


@triton.jit(
    do_not_specialize=["T", "P", "E", "N", "chunks", "rows", "K", "steps"],
    do_not_specialize_on_alignment=["ids_ptr", "counts_ptr", "indptr_ptr", "pair_ptr", "token_ptr", "tile_ptr"],
)
def place_kernel(
    ids_ptr,  # (P,)
    counts_ptr,  # (E, chunks) from count_kernel, or their running sum with SUMMED; not read for one chunk
    indptr_ptr,  # (T + 1,) the first pair of each token; not read with K
    pair_ptr,  # out (P,): the pair of each row
    token_ptr,  # out (P,): the token of each row
    tile_ptr,  # out (3, N): expert, first row, row after the last
    T,
    P,
    E,
    N,
    chunks,
    rows,
    K,  # pairs of each token, or 0
    steps,  # bits of T
    C: tl.constexpr,
    E_UP: tl.constexpr,
    CHUNKS_UP: tl.constexpr,
    SUMMED: tl.constexpr,
):
    chunk = tl.program_id(0)
    places = tl.arange(0, C)
    experts = tl.arange(0, E_UP)
    known = experts < E
    # With one chunk every program counts it, and the first one places its pairs.
    pairs = places if CHUNKS_UP == 1 else chunk * C + places
    ids = tl.load(ids_ptr + pairs, mask=pairs < P, other=-1)
    chosen = ids[:, None] == experts[None, :]
    if CHUNKS_UP == 1:
        counts = tl.where(known, tl.sum(chosen.to(tl.int32), 0), 0)
        first = tl.cumsum(counts, 0) - counts
    elif SUMMED:
        at = counts_ptr + experts * chunks
        before = tl.load(at - 1, mask=known & (experts > 0), other=0)
        counts = tl.where(known, tl.load(at + chunks - 1, mask=known, other=0) - before, 0)
        first = tl.load(at + chunk - 1, mask=known & (experts + chunk > 0) & (experts * 0 + chunk < chunks), other=0)
    else:
        each = tl.arange(0, CHUNKS_UP)
        inside = known[:, None] & (each < chunks)[None, :]
        of_chunk = tl.load(counts_ptr + experts[:, None] * chunks + each[None, :], mask=inside, other=0)
        counts = tl.sum(of_chunk, 1)
        first = tl.cumsum(counts, 0) - counts + tl.sum(tl.where((each < chunk)[None, :], of_chunk, 0), 1)
    if (chunk == 0) | (CHUNKS_UP > 1):
        earlier = (ids[:, None] == ids[None, :]) & (places[None, :] < places[:, None])
        row = tl.sum(tl.where(chosen, first[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        live = (pairs < P) & (ids >= 0) & (ids < E)
        tl.store(pair_ptr + row, pairs, mask=live)
        token = pairs // tl.maximum(K, 1)
        if K == 0:
            token = _token(indptr_ptr, pairs, T, steps)
        tl.store(token_ptr + row, token, mask=live)
    tile = chunk * C + places
    tiles = (counts + rows - 1) // rows
    last = tl.cumsum(tiles, 0)
    passed = last[None, :] <= tile[:, None]
    here = (last - tiles)[None, :] <= tile[:, None]
    expert = tl.sum(passed.to(tl.int32), 1)
    start = tl.sum(tl.where(passed, counts[None, :] - tiles[None, :] * rows, 0), 1) + tile * rows
    end = tl.sum(tl.where(here, counts[None, :], 0), 1)
    tl.store(tile_ptr + tile, expert, mask=tile < N)
    tl.store(tile_ptr + N + tile, start, mask=tile < N)
    tl.store(tile_ptr + 2 * N + tile, tl.minimum(start + rows, end), mask=tile < N)
