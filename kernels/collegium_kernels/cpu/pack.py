"""Weights in the order in which moe.cpp reads them.

Legend: E experts, N outputs, K inputs, B panels of 64 outputs, G groups.
"""

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from collegium_kernels.quant import Quantised

COLUMNS = 64
HALF = COLUMNS // 2
FLOAT_SPAN = 64  # kFloatSpan of tiles.h
HUGE_PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Panels of codes and of scales; ``inputs`` and ``span`` are the filled-up K and how many inputs share a scale."""

    codes: Tensor
    scales: Tensor
    bits: int
    inputs: int
    span: int


def pack(weights: Quantised, *, gate_up: bool) -> Packed:
    """``gate_up`` puts 32 gate outputs and their 32 up outputs in one panel."""

    def steps(codes_ENK: Tensor) -> Tensor:
        panels = _panels(codes_ENK, gate_up, fill=weights.zero)
        E, B, _, K = panels.shape
        if weights.bits == 8:
            return panels.view(E, B, COLUMNS, K // 4, 4).transpose(2, 3)
        halves = panels.view(E, B, COLUMNS, K // 8, 2, 4).transpose(2, 3)
        return halves[..., 0, :] | (halves[..., 1, :] << 4)

    return Packed(
        codes=_one_by_one(weights.codes_ENK, steps),
        scales=_panels(weights.scales_ENG, gate_up, fill=0).transpose(2, 3).contiguous(),
        bits=weights.bits,
        inputs=weights.codes_ENK.shape[2],
        span=weights.span,
    )


def pack_floats(w_ENK: Tensor, *, gate_up: bool) -> Tensor:
    """Panels of weights as they are, with K filled up to whole spans: (E, B, K, 64), or its like for bf16, of which
    floats.h wants columns i and i + 16 side by side."""

    def lines(w_ENK: Tensor) -> Tensor:
        filled = functional.pad(w_ENK, (0, -w_ENK.shape[2] % FLOAT_SPAN))
        panels = _panels(filled, gate_up, fill=0).transpose(2, 3)
        E, B, K, _ = panels.shape
        return panels.reshape(E, B, K, 2, 2, 16).transpose(4, 5) if w_ENK.dtype == torch.bfloat16 else panels

    return _one_by_one(w_ENK, lines)


def _one_by_one(source_ENX: Tensor, arrange: Callable[[Tensor], Tensor]) -> Tensor:
    """The experts as ``arrange`` has them. A layer may be a large part of the memory: no more than one expert is held
    twice on the way."""
    first = arrange(source_ENX[:1])
    target = on_huge_pages(len(source_ENX), *first.shape[1:], dtype=first.dtype)
    for e in range(len(source_ENX)):
        target[e] = arrange(source_ENX[e : e + 1])[0]
    return target


def _panels(rows_ENX: Tensor, gate_up: bool, *, fill: int) -> Tensor:
    """(E, N, X) as (E, B, 64, X)."""
    if not gate_up:
        return _split(rows_ENX, COLUMNS, fill)
    gate, up = rows_ENX.chunk(2, dim=1)
    return torch.cat([_split(gate, HALF, fill), _split(up, HALF, fill)], dim=2)


def _split(rows_ENX: Tensor, size: int, fill: int) -> Tensor:
    E, N, X = rows_ENX.shape
    return functional.pad(rows_ENX, (0, 0, 0, -N % size), value=fill).view(E, -(-N // size), size, X)


def on_huge_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """An array, not yet written, on huge pages where the system grants them: fewer address translations in use."""
    target = torch.empty(shape, dtype=dtype)
    start = -(-target.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = target.data_ptr() + target.nbytes - start
    if hasattr(mmap, "MADV_HUGEPAGE") and length >= HUGE_PAGE_BYTES:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return target
