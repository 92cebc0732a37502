"""An activation and a sum in Triton, in place of the compiled ones of vLLM's binary.

Legend: P pairs, T tokens, F expert width, D width, K slots.
"""

# mypy: ignore-errors
# Triton compiles these: their types are not Python's.

import torch
import triton
import triton.language as tl


@triton.jit
def _silu_mul(both_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(both_ptr + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + columns, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_slots(y_ptr, out_ptr, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        total += tl.load(y_ptr + (token * K + slot) * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(both: torch.Tensor, out: torch.Tensor) -> None:
    P, F = out.shape
    _silu_mul[(P, triton.cdiv(F, 1024))](both, out, F, BLOCK=1024)


def sum_slots(y: torch.Tensor, T: int) -> torch.Tensor:
    P, D = y.shape
    out = y.new_empty(T, D)
    _sum_slots[(T, triton.cdiv(D, 1024))](y, out, D, K=P // T, BLOCK=1024)
    return out
