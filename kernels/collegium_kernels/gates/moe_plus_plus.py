"""MoE++: zero, copy and constant experts beside the true ones, and scores handed from layer to layer.

Legend: T tokens, D width, E true experts, N zero-cost ones (one zero, one copy, then constants), K slots.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best, fp32_mm, state_of
from collegium_kernels.ragged import Routing, from_topk

CARD = Card(
    title="MoE++, zero, copy and constant experts", source="arXiv 2410.07348", k="0 to 2", cost="(E + N) (D + E + N)"
)


class MoEPlusPlusGate(LinearGate):
    """Ids: E is zero, E + 1 copies the token, the rest give a x + b v. None of them becomes a row of a GEMM.

    ``capacity_factor`` (the paper trains with 1.1) limits every expert, the true ones to tau times a zero-cost one's
    share; what a token gets then depends on the batch, so the default is no limit.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        constants: int = 2,
        k: int = 2,
        tau: float = 0.75,
        balance: float = 0.01,
        capacity_factor: float | None = None,
    ) -> None:
        total = num_experts + 2 + constants
        super().__init__(width, num_experts, total)
        self.k, self.tau, self.balance, self.constants = k, tau, balance, constants
        self.capacity_factor = capacity_factor
        self.residual_EE = nn.Parameter(torch.zeros(total, total))
        self.constant_ND = nn.Parameter(torch.randn(constants, width) * 0.02)
        self.mix_ND = nn.Parameter(torch.randn(2 * constants, width) / width**0.5)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        logits_TE = self.logits(x_TD)
        below_TE = state_of(context, *logits_TE.shape)
        if below_TE is not None:
            logits_TE = logits_TE + fp32_mm(below_TE, self.residual_EE)
        probs_TE = logits_TE.softmax(dim=1)
        weights_TK, ids_TK = best(probs_TE, self.k)
        weights_TK = weights_TK.masked_fill(ids_TK == self.num_experts, 0)
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=1e-9)
        chosen_TK = ids_TK
        if self.capacity_factor is not None:
            over_TK = self._over(ids_TK)
            ids_TK, weights_TK = ids_TK.masked_fill(over_TK, -1), weights_TK.masked_fill(over_TK, 0)
        routing = from_topk(ids_TK, weights_TK, num_experts=self.num_experts, identity_ids=(self.num_experts + 1,))
        routing = self._add_constants(routing, x_TD, ids_TK, weights_TK)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self._loss(probs_TE, chosen_TK), state_TS=logits_TE)

    def capacities_E(self, pairs: int) -> Tensor:
        """Most pairs of each expert: tau to 1 between true and zero-cost ones, together the factor times all pairs."""
        factor, total = self.capacity_factor or 1.0, self.weight_ED.shape[0]
        share = factor * pairs / (self.tau * self.num_experts + total - self.num_experts)
        limits_E = torch.full((total,), share)
        limits_E[: self.num_experts] *= self.tau
        return limits_E.ceil().long()

    def _over(self, ids_TK: Tensor) -> Tensor:
        """Pairs beyond their expert's capacity: first choices have priority, then earlier tokens."""
        ids_P = ids_TK.T.reshape(-1)
        numbers_PE = functional.one_hot(ids_P, self.weight_ED.shape[0]).cumsum(dim=0)
        position_P = numbers_PE.gather(1, ids_P[:, None])[:, 0]
        over_P = position_P > self.capacities_E(len(ids_P)).to(ids_P.device)[ids_P]
        return over_P.view(ids_TK.shape[1], -1).T

    def _add_constants(self, routing: Routing, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Routing:
        mix_TN2 = fp32_mm(x_TD, self.mix_ND).view(-1, self.constants, 2).softmax(dim=2)
        numbers_N = torch.arange(self.constants, device=x_TD.device) + self.num_experts + 2
        weight_TN = (weights_TK[:, :, None] * (ids_TK[:, :, None] == numbers_N)).sum(dim=1)
        copy_T = (weight_TN * mix_TN2[:, :, 0]).sum(dim=1)
        add_TD = ((weight_TN * mix_TN2[:, :, 1])[:, :, None] * self.constant_ND).sum(dim=1)
        return replace(routing, copy_T=copy_T if routing.copy_T is None else routing.copy_T + copy_T, add_TD=add_TD)

    def _loss(self, probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Balance that asks less of zero-cost experts by the factor tau."""
        if len(ids_TK) == 0:
            return probs_TE.sum()
        share_E = torch.bincount(ids_TK.reshape(-1), minlength=probs_TE.shape[1]) / ids_TK.shape[0]
        beta_E = torch.ones_like(share_E)
        beta_E[self.num_experts :] = self.tau
        return self.balance * (beta_E * share_E * probs_TE.mean(dim=0)).sum()
