"""Switch: the one best expert, weighted by its probability. Legend: T tokens, D width, E experts."""

import math

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, top_k
from collegium_kernels.gates.losses import balance_loss, z_loss
from collegium_kernels.ragged import limit_capacity

CARD = Card(title="Switch", source="arXiv 2101.03961", k="1", cost="E D")


class SwitchGate(LinearGate):
    """``capacity_factor`` drops the overflow of full experts and makes the gate batch dependent; None drops nothing."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        capacity_factor: float | None = None,
        jitter: float = 0.01,
        balance: float = 0.01,
        z: float = 0.001,
    ) -> None:
        super().__init__(width, num_experts)
        self.capacity_factor, self.jitter, self.balance, self.z = capacity_factor, jitter, balance, z

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        if self.training and self.jitter:
            noise_TD = torch.rand(x_TD.shape, generator=context.generator, device=x_TD.device)
            x_TD = x_TD * (1 + self.jitter * (2 * noise_TD - 1))
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=1)
        routing = top_k(probs_TE, 1)
        loss = self.balance * balance_loss(probs_TE, routing) + self.z * z_loss(logits_TE)
        if self.capacity_factor is not None:
            routing = limit_capacity(routing, math.ceil(self.capacity_factor * x_TD.shape[0] / self.num_experts))
        return Routed(routing=routing, scores_TE=probs_TE, loss=loss)
