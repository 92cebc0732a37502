"""What moe.cpp computes, in torch: for machines without a compiler, and to test it against.

Legend: T tokens, D width, P rows, F expert width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from collegium_kernels.grouped import combine, dispatch
from collegium_kernels.quant import Quantised, quantise_rows
from collegium_kernels.ragged import Routing, by_expert
from collegium_kernels.steady import steady_map, steady_mm


def emulated_moe(x_TD: Tensor, gate_up: Quantised, down: Quantised, routing: Routing) -> Tensor:
    """int8 activations times dequantised weights, one expert at a time; everything else in fp32."""
    rows = by_expert(routing)
    x_PD = dispatch(x_TD.float(), rows)
    bounds = rows.indptr_E1.tolist()
    y_PD = torch.zeros_like(x_PD)
    for e in range(routing.num_experts):
        mine = slice(bounds[e], bounds[e + 1])
        if mine.stop > mine.start:
            gate_PF, up_PF = _product(x_PD[mine], gate_up, e).chunk(2, dim=1)
            y_PD[mine] = _product(steady_map(functional.silu, gate_PF) * up_PF, down, e)
    return combine(y_PD, x_TD.float(), routing, rows)


def _product(x_PK: Tensor, weights: Quantised, expert: int) -> Tensor:
    codes_PK, scales_PK = quantise_rows(x_PK, weights.span)
    one = Quantised(
        codes_ENK=weights.codes_ENK[expert : expert + 1],
        scales_ENG=weights.scales_ENG[expert : expert + 1],
        bits=weights.bits,
        group=weights.group,
        inputs=weights.inputs,
    )
    return steady_mm(codes_PK * scales_PK, one.dequantise()[0])
