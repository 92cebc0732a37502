"""AdaMoE: some of the top-k are null experts.

Legend: T tokens, D width, E true experts, N null ones, K slots.
"""

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best
from collegium_kernels.ragged import from_topk

CARD = Card(title="AdaMoE, null experts", source="arXiv 2406.13233", k="0 to 4", cost="(E + N) D")


class AdaMoEGate(LinearGate):
    """Null experts give 0 and cost nothing; weights are renormalised over the true experts chosen."""

    def __init__(
        self, width: int, num_experts: int, *, null_experts: int | None = None, k: int = 4, balance: float = 0.01
    ) -> None:
        nulls = num_experts if null_experts is None else null_experts
        super().__init__(width, num_experts, num_experts + nulls)
        self.null_experts, self.k, self.balance = nulls, min(k, num_experts + nulls), balance

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        probs_TE = self.logits(x_TD).softmax(dim=1)
        weights_TK, ids_TK = best(probs_TE, self.k)
        true_TK = ids_TK < self.num_experts
        total_T1 = (weights_TK * true_TK).sum(dim=1, keepdim=True)
        weights_TK = weights_TK / torch.where(total_T1 > 0, total_T1, 1)
        routing = from_topk(ids_TK, weights_TK, num_experts=self.num_experts)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * self._loss(probs_TE, ids_TK))

    def _loss(self, probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Balance in which the null experts count as one group: how load falls among them is free."""
        if len(ids_TK) == 0:
            return probs_TE.sum()
        share_E = torch.bincount(ids_TK.reshape(-1), minlength=probs_TE.shape[1]) / ids_TK.numel()
        if self.null_experts:
            null_mean = share_E[self.num_experts :].mean()
            share_E = torch.cat([share_E[: self.num_experts], null_mean.expand(self.null_experts)])
        return probs_TE.shape[1] * (share_E * probs_TE.mean(dim=0)).sum()
