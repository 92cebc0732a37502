"""Dynamic top-p: as many experts as it takes to pass a total probability.

Legend: T tokens, D width, E experts.
"""

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import from_topk

CARD = Card(title="Dynamic top-p", source="arXiv 2403.07652", k="1 to E, 1.8 on average", cost="E D + E log E")


class TopPGate(LinearGate):
    """The shortest prefix whose sum exceeds ``p``, weighted by the probabilities. The entropy loss keeps it short."""

    def __init__(
        self, width: int, num_experts: int, *, p: float = 0.4, entropy: float = 1e-4, balance: float = 0.01
    ) -> None:
        super().__init__(width, num_experts)
        self.p, self.entropy, self.balance = p, entropy, balance

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        probs_TE = self.logits(x_TD).softmax(dim=1)
        weights_TE, ids_TE = best(probs_TE, self.num_experts)
        routing = from_topk(top_p(weights_TE, ids_TE, self.p), weights_TE, num_experts=self.num_experts)
        loss = self.balance * balance_loss(probs_TE, routing)
        if len(x_TD):
            loss = loss - self.entropy * torch.xlogy(probs_TE, probs_TE).sum(dim=1).mean()
        return Routed(routing=routing, scores_TE=probs_TE, loss=loss)


def top_p(weights_TE: Tensor, ids_TE: Tensor, p: float) -> Tensor:
    """The ids with -1 from where the sum of the weights before exceeds ``p``; the weights fall from left to right."""
    before_TE = weights_TE.cumsum(dim=1) - weights_TE
    return ids_TE.masked_fill(before_TE > p, -1)
