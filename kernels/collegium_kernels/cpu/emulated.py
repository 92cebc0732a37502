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


def emulated_moe(x_TD: Tensor, gate_up: Quantised, down: Quantised, routing: Routing, *, planes: int = 1) -> Tensor:
    """Activations of 8 bits, or of 16 with two planes, times dequantised weights, one expert at a time; everything else
    in fp32."""
    rows = by_expert(routing)
    x_PD = dispatch(x_TD.float(), rows)
    bounds = rows.indptr_E1.tolist()
    y_PD = torch.zeros_like(x_PD)
    for e in range(routing.num_experts):
        mine = slice(bounds[e], bounds[e + 1])
        if mine.stop > mine.start:
            gate_PF, up_PF = _product(x_PD[mine], gate_up, e, planes).chunk(2, dim=1)
            y_PD[mine] = _product(steady_map(functional.silu, gate_PF) * up_PF, down, e, planes)
    return combine(y_PD, x_TD.float(), routing, rows)


def _product(x_PK: Tensor, weights: Quantised, expert: int, planes: int) -> Tensor:
    one = Quantised(
        codes_ENK=weights.codes_ENK[expert : expert + 1],
        scales_ENG=weights.scales_ENG[expert : expert + 1],
        bits=weights.bits,
        group=weights.group,
        inputs=weights.inputs,
    )
    y_PN, rest_PK = torch.zeros(()), x_PK
    for _ in range(planes):
        codes_PK, scales_PK = quantise_rows(rest_PK, weights.span)
        rounded_PK = codes_PK * scales_PK
        y_PN, rest_PK = y_PN + steady_mm(rounded_PK, one.dequantise()[0]), rest_PK - rounded_PK
    return y_PN
