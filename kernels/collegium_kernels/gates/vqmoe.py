"""VQMoE: a learned code chooses the expert in one branch, a router in the other.

Legend: T tokens, D width, C codes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, fp32_mm
from collegium_kernels.grouped import combine, dispatch
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from collegium_kernels.ragged import by_expert, from_topk

CARD = Card(title="VQMoE", source="arXiv 2411.19402", k="k + 1", cost="(E + C + 2) D", kind="layer")


class VQMoELayer(nn.Module):
    """Two branches mixed by a gate of two. ``discrete_only`` serves with the code branch alone: it needs no router."""

    def __init__(
        self, layer: MoELayer, width: int, *, codes: int = 512, rho: float = 0.1, commitment: float = 0.25
    ) -> None:
        super().__init__()
        self.layer, self.rho, self.commitment = layer, rho, commitment
        self.experts: SwiGLUExperts = layer.experts
        self.codebook_CD = nn.Parameter(torch.randn(codes, width))
        self.norm = nn.LayerNorm(width)
        self.mix_2D = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.discrete_only = False

    def codes(self, x_TD: Tensor) -> Tensor:
        """The nearest code of each token."""
        squares_C = self.codebook_CD.float().square().sum(dim=1)
        return (squares_C - 2 * fp32_mm(x_TD, self.codebook_CD)).argmin(dim=1)

    def forward(self, x_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """The output, and the loss: the router's and the codebook's."""
        discrete_TD, loss = self._discrete(x_TD)
        if self.discrete_only:
            return discrete_TD, loss
        y_TD, routed = self.layer(x_TD, context)
        mix_T2 = fp32_mm(x_TD, self.mix_2D).softmax(dim=1).to(y_TD.dtype)
        return mix_T2[:, :1] * y_TD + mix_T2[:, 1:] * discrete_TD, loss + routed.loss

    def _discrete(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        codes_T = self.codes(x_TD)
        code_TD = self.codebook_CD[codes_T]
        num_experts = self.experts.w_down_EDF.shape[0]
        ids_T1 = (codes_T % num_experts)[:, None]
        routing = from_topk(ids_T1, x_TD.new_ones(ids_T1.shape), num_experts=num_experts)
        mixed_TD = self.norm((1 - self.rho) * x_TD + self.rho * (code_TD - x_TD).detach())
        rows = by_expert(routing)
        y_TD = combine(self.experts(dispatch(mixed_TD, rows), rows.indptr_E1), mixed_TD, routing, rows)
        if len(x_TD) == 0:
            return y_TD, y_TD.sum()
        learn = functional.mse_loss(code_TD, x_TD.detach())
        return y_TD, learn + self.commitment * functional.mse_loss(x_TD, code_TD.detach())
