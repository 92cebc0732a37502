"""StableMoE: learn to route, distil into a router on word ids, freeze it.

Legend: T tokens, D width, E experts.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best, fp32_mm, needed_ids, zero
from collegium_kernels.gates.losses import counts
from collegium_kernels.ragged import Routing, limit_capacity, rectangular
from collegium_kernels.steady import steady_map

CARD = Card(title="StableMoE", source="arXiv 2204.08396", k="1", cost="E D, then 50 E")


class StableMoEGate(LinearGate):
    """Stage 1 routes greedily by x . e_i and distils; stage 2 routes by token id alone. y = g FFN(x) + (1 - g) x.

    ``capacity_factor`` (2 in the paper) drops the overflow of full experts in stage 1, which keeps its (1 - g) x alone,
    and makes that stage batch dependent; None drops nothing.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        vocab_size: int = 32000,
        embedding_width: int = 50,
        stage: int = 1,
        balance: float = 0.3,
        distil: float = 0.3,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__(width, num_experts)
        self.stage, self.balance, self.distil, self.capacity_factor = stage, balance, distil, capacity_factor
        self.embedding = nn.Embedding(vocab_size, embedding_width)
        self.light_ES = nn.Parameter(torch.randn(num_experts, embedding_width) / embedding_width**0.5)

    def freeze(self) -> None:
        """Enter stage 2: no gradient reaches either router again."""
        self.stage = 2
        for parameter in (self.embedding.weight, self.light_ES):
            parameter.requires_grad_(False)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        ids_T = needed_ids(context, len(x_TD), self.embedding.num_embeddings)
        scores_TE = self.logits(x_TD)
        light_TE = fp32_mm(self.embedding(ids_T), self.light_ES)
        chosen_T1 = best(scores_TE if self.stage == 1 else light_TE, 1)[1]
        gate_T1 = steady_map(torch.sigmoid, scores_TE.gather(1, chosen_T1))
        routing = rectangular(chosen_T1, gate_T1, num_experts=self.num_experts)
        loss = self._loss(gate_T1, chosen_T1, light_TE, routing) if self.stage == 1 else zero(x_TD)
        if self.stage == 1 and self.capacity_factor is not None:
            routing = limit_capacity(routing, math.ceil(self.capacity_factor * len(x_TD) / self.num_experts))
        return Routed(routing=_keep_the_rest(routing, gate_T1), scores_TE=scores_TE, loss=loss)

    def _loss(self, gate_T1: Tensor, chosen_T1: Tensor, light_TE: Tensor, routing: Routing) -> Tensor:
        if gate_T1.shape[0] == 0:
            return gate_T1.sum()
        load_E = counts(routing).float()
        excess_E = (load_E - load_E.mean()) / load_E.mean()
        balance = (excess_E[chosen_T1[:, 0]] * gate_T1[:, 0]).sum() / gate_T1.shape[0]
        return self.balance * balance + self.distil * functional.cross_entropy(light_TE, chosen_T1[:, 0])


def _keep_the_rest(routing: Routing, gate_T1: Tensor) -> Routing:
    return replace(routing, copy_T=1 - gate_T1[:, 0])
