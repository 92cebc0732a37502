"""Mixture of attention heads: experts own queries and outputs, keys and values are shared.

Legend: T tokens of one sequence, D width, E experts (heads), A head width, P rows (token, expert).
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, top_k
from collegium_kernels.gates.losses import balance_loss, z_loss
from collegium_kernels.grouped import combine
from collegium_kernels.ragged import by_expert
from collegium_kernels.steady import steady_mm

CARD = Card(
    title="MoA, mixture of attention heads", source="arXiv 2210.05144", k="k heads of E", cost="E D", kind="layer"
)


class MixtureOfHeads(nn.Module):
    """Causal attention of the chosen heads, weighted by their probabilities, which are not renormalised."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        head: int = 16,
        cv: float = 0.0,
        switch: float = 0.01,
        z: float = 0.001,
    ) -> None:
        super().__init__()
        self.gate, self.k, self.head = LinearGate(width, num_experts), k, head
        self.cv, self.switch, self.z = cv, switch, z
        self.query_EAD = nn.Parameter(torch.randn(num_experts, head, width) / width**0.5)
        self.out_EDA = nn.Parameter(torch.randn(num_experts, width, head) / head**0.5)
        self.key_value = nn.Parameter(torch.randn(2 * head, width) / width**0.5)

    def forward(self, x_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Routed]:
        logits_TE = self.gate.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=1)
        routing = top_k(probs_TE, self.k)
        rows = by_expert(routing)
        key_TA, value_TA = steady_mm(x_TD, self.key_value).chunk(2, dim=1)
        seen_TT = torch.ones(len(x_TD), len(x_TD), dtype=torch.bool, device=x_TD.device).tril()
        parts, bounds = [], rows.indptr_E1.tolist()
        for e, (start, end) in enumerate(pairwise(bounds)):
            tokens = rows.tokens_P[start:end]
            scores = steady_mm(steady_mm(x_TD[tokens], self.query_EAD[e]), key_TA) / self.head**0.5
            mixed = scores.masked_fill(~seen_TT[tokens], -torch.inf).softmax(dim=1) @ value_TA
            parts.append(steady_mm(mixed, self.out_EDA[e]))
        loss = self._loss(logits_TE, probs_TE)
        loss = loss + self.switch * balance_loss(probs_TE, routing)
        y_TD = combine(torch.cat(parts), x_TD, routing, rows)
        return y_TD, Routed(routing=routing, scores_TE=probs_TE, loss=loss)

    def _loss(self, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        """The squared coefficient of variation of importance, and the z-loss."""
        importance_E = probs_TE.sum(dim=0)
        spread = importance_E.var(correction=0) / importance_E.mean().square().clamp(min=1e-9)
        return self.cv * spread + self.z * z_loss(logits_TE)
