"""What every backend must equal: one loop, in fp64, written apart from the dispatch code.

Legend: T tokens, D width, E experts, F expert width, G = 2F (gate rows, then up rows).
"""

import torch
from torch import Tensor
from torch.nn import functional

from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.ragged import Routing


def reference_moe(
    x_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, routing: Routing, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The mixture, token by token and expert by expert. Gradients flow through it."""
    out = []
    for t in range(x_TD.shape[0]):
        x_D = x_TD[t].to(dtype)
        y_D = torch.zeros_like(x_D)
        for p in range(int(routing.indptr_T1[t]), int(routing.indptr_T1[t + 1])):
            e = int(routing.expert_ids_P[p])
            if 0 <= e < routing.num_experts:
                y_D = y_D + routing.weights_P[p].to(dtype) * swiglu(x_D, w_gate_up_EGD[e], w_down_EDF[e])
        if routing.copy_T is not None:
            y_D = y_D + routing.copy_T[t].to(dtype) * x_D
        if routing.add_TD is not None:
            y_D = y_D + routing.add_TD[t].to(dtype)
        out.append(y_D)
    return torch.stack(out).to(x_TD.dtype) if out else torch.zeros_like(x_TD)


def swiglu(x_D: Tensor, w_gate_up_GD: Tensor, w_down_DF: Tensor) -> Tensor:
    """One expert on one token, in the token's dtype."""
    gate_F, up_F = (w_gate_up_GD.to(x_D.dtype) @ x_D).chunk(2)
    return w_down_DF.to(x_D.dtype) @ (functional.silu(gate_F) * up_F)


class ReferenceBackend:
    """The loop as a backend: for any device and dtype, and slow."""

    name = "reference"
    differentiable = True

    def refuses(self, weights: ExpertWeights) -> str | None:
        return None if weights.precision == "native" else "the reference loop computes with unquantised weights only"

    def how(self, weights: ExpertWeights) -> str:
        return "a loop in fp64"

    def prepare(self, weights: ExpertWeights) -> Runner:
        gate_up, down = weights.gate_up_EGD, weights.down_EDF
        return lambda x_TD, routing: reference_moe(x_TD, gate_up, down, routing)
