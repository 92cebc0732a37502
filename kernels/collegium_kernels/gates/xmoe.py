"""XMoE: a threshold on the sum before an expert, at most k_max, best ranks first when full.

Legend: T tokens, D width, E experts.
"""

import math

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import from_topk, limit_capacity

CARD = Card(title="XMoE threshold", source="arXiv 2403.18926", k="1 to 8", cost="E D + E log E")


class XMoEGate(LinearGate):
    """Like top-p, but an expert is left out already when the sum before it equals the threshold."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        threshold: float = 0.9,
        k_max: int = 8,
        capacity_factor: float | None = None,
        balance: float = 0.01,
    ) -> None:
        super().__init__(width, num_experts)
        self.threshold, self.k_max = threshold, min(k_max, num_experts)
        self.capacity_factor, self.balance = capacity_factor, balance

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        probs_TE = self.logits(x_TD).softmax(dim=1)
        weights_TK, ids_TK = best(probs_TE, self.k_max)
        before_TK = weights_TK.cumsum(dim=1) - weights_TK
        keep_TK = before_TK < self.threshold
        routing = from_topk(ids_TK.masked_fill(~keep_TK, -1), weights_TK, num_experts=self.num_experts)
        loss = self.balance * balance_loss(probs_TE, routing)
        if self.capacity_factor is not None:
            ranks_P = torch.arange(self.k_max, device=x_TD.device).expand_as(ids_TK)[keep_TK]
            capacity = math.ceil(self.capacity_factor * x_TD.shape[0] / self.num_experts)
            routing = limit_capacity(routing, capacity, rank_P=ranks_P)
        return Routed(routing=routing, scores_TE=probs_TE, loss=loss)
