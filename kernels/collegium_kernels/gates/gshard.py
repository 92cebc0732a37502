"""GShard: softmax, the two best renormalised, the second kept by chance.

Legend: T tokens, D width, E experts, K slots.
"""

import math

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import concatenate, from_topk, limit_capacity, rectangular

CARD = Card(title="GShard top-2", source="arXiv 2006.16668", k="1 to 2 in training, 2 after", cost="E D")


class GShardGate(LinearGate):
    """In training the second expert stays with probability min(1, 2 g2). First choices fill the capacity first.

    ``groups`` cuts the tokens in as many parts, each with its own share of the capacity and its own loss, so that a
    token competes with its part alone."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        capacity_factor: float | None = None,
        groups: int = 1,
        balance: float = 0.01,
    ) -> None:
        super().__init__(width, num_experts)
        self.capacity_factor, self.groups, self.balance = capacity_factor, groups, balance

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        if self.groups == 1:
            return self._route(x_TD, context)
        parts = [self._route(part_TD, context) for part_TD in x_TD.tensor_split(self.groups)]
        return Routed(
            routing=concatenate([part.routing for part in parts]),
            scores_TE=torch.cat([part.scores_TE for part in parts]),
            loss=torch.stack([part.loss for part in parts]).mean(),
        )

    def _route(self, x_TD: Tensor, context: Context) -> Routed:
        probs_TE = self.logits(x_TD).softmax(dim=1)
        weights_TK, ids_TK = best(probs_TE, 2)
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        if self.training and ids_TK.shape[1] > 1:
            chance_T = torch.rand(x_TD.shape[0], generator=context.generator, device=x_TD.device)
            drop_T = chance_T > 2 * weights_TK[:, 1]
            ids_TK = torch.stack([ids_TK[:, 0], ids_TK[:, 1].masked_fill(drop_T, -1)], dim=1)
        routing = from_topk(ids_TK, weights_TK, num_experts=self.num_experts)
        first = rectangular(ids_TK[:, :1], weights_TK[:, :1], num_experts=self.num_experts)
        loss = self.balance * balance_loss(probs_TE, first)  # of first choices, as in the paper's algorithm 1
        if self.capacity_factor is not None:
            rank_P = torch.arange(ids_TK.shape[1], device=x_TD.device).expand_as(ids_TK)[ids_TK >= 0]
            capacity = math.ceil(2 * self.capacity_factor * x_TD.shape[0] / self.num_experts)
            routing = limit_capacity(routing, capacity, rank_P=rank_P)
        return Routed(routing=routing, scores_TE=probs_TE, loss=loss)
