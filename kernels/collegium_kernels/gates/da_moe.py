"""DA-MoE: tokens that others attend to get more experts. Legend: T tokens, D width, E experts, K slots."""

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best, needed
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import from_topk

CARD = Card(title="DA-MoE, by attention", source="arXiv 2409.06669", k="1 to 4, from attention", cost="E D")


class DAMoEGate(LinearGate):
    """``importance_T`` is relative to the sequence's largest: the caller divides, so other sequences do not matter."""

    def __init__(self, width: int, num_experts: int, *, k_max: int = 4, balance: float = 0.01) -> None:
        super().__init__(width, num_experts)
        self.k_max, self.balance = min(k_max, num_experts), balance

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        importance_T = needed(context.importance_T, "importance_T", len(x_TD))
        probs_TE = self.logits(x_TD).softmax(dim=1)
        weights_TK, ids_TK = best(probs_TE, self.k_max)
        k_T = (self.k_max * importance_T).round().clamp(1, self.k_max)
        over_TK = torch.arange(self.k_max, device=x_TD.device) >= k_T[:, None]
        routing = from_topk(ids_TK.masked_fill(over_TK, -1), weights_TK, num_experts=self.num_experts)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))


def importance(attention_HQK: Tensor) -> Tensor:
    """Mean attention each token received over heads and the queries that could see it, over the largest."""
    seen_K = (attention_HQK.sum(dim=0) > 0).sum(dim=0).clamp(min=1)
    received_K = attention_HQK.mean(dim=0).sum(dim=0) / seen_K
    return received_K / received_K.max()
