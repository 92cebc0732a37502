"""Adaptive gating: a second expert only for the undecided. Legend: T tokens, D width, E experts, K = 2."""

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import Routing, from_topk

CARD = Card(title="Adaptive gating", source="arXiv 2310.07188", k="1 to 2", cost="E D")


class AdaptiveGate(LinearGate):
    """Top-1 where the lead of the first probability exceeds the threshold, else top-2 renormalised."""

    def __init__(self, width: int, num_experts: int, *, threshold: float = 0.1, balance: float = 0.01) -> None:
        super().__init__(width, num_experts)
        self.threshold, self.balance = threshold, balance

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        probs_TE = self.logits(x_TD).softmax(dim=1)
        weights_TK, ids_TK = best(probs_TE, 2)
        sure_T1 = (weights_TK[:, :1] - weights_TK[:, 1:].sum(dim=1, keepdim=True)) > self.threshold
        both_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        weights_TK = torch.where(sure_T1, weights_TK, both_TK)
        ids_TK = torch.cat([ids_TK[:, :1], torch.where(sure_T1, -1, ids_TK[:, 1:])], dim=1)
        routing = from_topk(ids_TK, weights_TK, num_experts=self.num_experts)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))


def curriculum(routings: list[Routing]) -> list[int]:
    """The order of batches from few two-expert tokens to many: easy ones first."""
    shares = [float((r.counts_T() == 2).float().mean()) for r in routings]
    return sorted(range(len(routings)), key=lambda i: shares[i])
