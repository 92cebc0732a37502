"""The experts in plain torch: any device, any dtype, with gradients.

Legend: T tokens, P rows (one a pair, sorted by expert), D width, E experts, F expert width, G = 2F.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.errors import require
from collegium_kernels.ragged import ByExpert, Routing, by_expert
from collegium_kernels.steady import segment_sum, steady_map, steady_mm


def dispatch(x_TD: Tensor, rows: ByExpert) -> Tensor:
    """The rows each expert reads, side by side."""
    return x_TD[rows.tokens_P]


def run_experts(x_PD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, indptr_E1: Tensor) -> Tensor:
    """SwiGLU of each expert on its own rows; rows after the last expert's are zero."""
    E = indptr_E1.shape[0] - 1
    require(w_gate_up_EGD.shape[0] == E, "w_gate_up_EGD", w_gate_up_EGD, f"{E} experts, as the routing has")
    same = x_PD.dtype == w_gate_up_EGD.dtype or torch.is_autocast_enabled(x_PD.device.type)
    require(same, "x_PD", x_PD, f"the dtype of the experts, {w_gate_up_EGD.dtype}")
    if x_PD.is_cuda and x_PD.dtype == torch.bfloat16:
        return _run_on_cuda(x_PD, w_gate_up_EGD, w_down_EDF, indptr_E1)
    bounds = indptr_E1.tolist()
    parts = [
        _swiglu(x_PD[start:end], w_gate_up_EGD[e], w_down_EDF[e])
        for e, (start, end) in enumerate(pairwise(bounds))
        if end > start
    ]
    parts.append(x_PD.new_zeros(x_PD.shape[0] - bounds[-1], w_down_EDF.shape[1]))
    return torch.cat(parts)


def combine(y_PD: Tensor, x_TD: Tensor, routing: Routing, rows: ByExpert) -> Tensor:
    """The weighted sum of each token's rows, of itself for identity experts, and of what constant experts add."""
    T = x_TD.shape[0]
    require(routing.num_tokens == T, "routing.indptr_T1", routing.indptr_T1, f"one entry more than {T} tokens")
    order_P = torch.empty_like(rows.pairs_P)
    order_P[rows.pairs_P] = torch.arange(order_P.shape[0], device=order_P.device)
    y_TD = segment_sum(y_PD, routing.weights_P, routing.indptr_T1, order_P)
    return add_cheap_experts(y_TD, x_TD, routing).to(x_TD.dtype)


def add_cheap_experts(y_TD: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
    """Identity and constant experts: no GEMM."""
    if routing.copy_T is not None:
        y_TD = y_TD + routing.copy_T[:, None] * x_TD
    return y_TD if routing.add_TD is None else y_TD + routing.add_TD


def _swiglu(x_RD: Tensor, w_gate_up_GD: Tensor, w_down_DF: Tensor) -> Tensor:
    gate_RF, up_RF = steady_mm(x_RD, w_gate_up_GD).chunk(2, dim=1)
    return steady_mm(steady_map(functional.silu, gate_RF) * up_RF, w_down_DF)


def _run_on_cuda(x_PD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, indptr_E1: Tensor) -> Tensor:
    """grouped_mm reads the offsets on the device. It leaves the rows after the last offset unwritten."""
    offsets_E = indptr_E1[1:].int()
    gate_PF, up_PF = functional.grouped_mm(x_PD, w_gate_up_EGD.mT, offs=offsets_E).chunk(2, dim=1)
    y_PD = functional.grouped_mm(functional.silu(gate_PF) * up_PF, w_down_EDF.mT, offs=offsets_E)
    live_P = torch.arange(x_PD.shape[0], device=x_PD.device) < indptr_E1[-1]
    return torch.where(live_P[:, None], y_PD, 0)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TorchBackend:
    """Grouped products in torch; also the path that trains."""

    name = "torch"
    differentiable = True

    def refuses(self, weights: ExpertWeights) -> str | None:
        if weights.precision != "native":
            return "torch computes with unquantised weights only"
        dtype = weights.gate_up_EGD.dtype
        return None if dtype in DTYPES else f"torch has no products of {dtype}"

    def how(self, weights: ExpertWeights) -> str:
        return "products of sixteen rows"

    def prepare(self, weights: ExpertWeights) -> Runner:
        def run(x_TD: Tensor, routing: Routing) -> Tensor:
            rows = by_expert(routing)
            y_PD = run_experts(dispatch(x_TD, rows), weights.gate_up_EGD, weights.down_EDF, rows.indptr_E1)
            return combine(y_PD, x_TD, routing, rows)

        return run
