"""AoE: no router; experts vote by how strongly they respond.

Legend: T tokens, D width, E experts, R low rank, F hidden, P rows.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, Routed, top_k
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.grouped import combine
from collegium_kernels.ragged import by_expert
from collegium_kernels.steady import steady_map, steady_mm

CARD = Card(title="AoE, autonomy of experts", source="arXiv 2501.13074", k="2", cost="E R D", kind="layer")


class AoELayer(nn.Module):
    """Every expert makes its low-rank activation; the k with the largest norms go on with the one they have.

    The authors' code has the weights both ways: as they come from the softmax over all norms, and ``renormalise``d.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        rank: int = 16,
        expert_width: int = 32,
        renormalise: bool = False,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_experts, self.k, self.rank = num_experts, k, rank
        self.renormalise, self.balance = renormalise, balance
        self.down_ERD = nn.Parameter(torch.randn(num_experts, rank, width) / width**0.5)
        self.up_EFR = nn.Parameter(torch.randn(num_experts, expert_width, rank) / rank**0.5)
        self.value_EFD = nn.Parameter(torch.randn(num_experts, expert_width, width) / width**0.5)
        self.out_EDF = nn.Parameter(torch.randn(num_experts, width, expert_width) / expert_width**0.5)

    def activations(self, x_TD: Tensor) -> Tensor:
        return steady_mm(x_TD, self.down_ERD.flatten(0, 1)).view(-1, self.num_experts, self.rank)

    def route(self, low_TER: Tensor) -> Routed:
        probs_TE = low_TER.float().square().sum(dim=2).sqrt().softmax(dim=1)
        routing = top_k(probs_TE, self.k, renormalise=self.renormalise)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))

    def forward(self, x_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Routed]:
        low_TER = self.activations(x_TD)
        routed = self.route(low_TER)
        rows = by_expert(routed.routing)
        bounds = rows.indptr_E1.tolist()
        parts = []
        for e, (start, end) in enumerate(pairwise(bounds)):
            tokens = rows.tokens_P[start:end]
            gate = steady_map(functional.silu, steady_mm(low_TER[tokens, e], self.up_EFR[e]))
            parts.append(steady_mm(gate * steady_mm(x_TD[tokens], self.value_EFD[e]), self.out_EDF[e]))
        return combine(torch.cat(parts), x_TD, routed.routing, rows), routed
