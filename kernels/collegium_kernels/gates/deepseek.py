"""DeepSeekMoE: many small experts, some of them always on (MoELayer's ``shared``), weights not renormalised.

Legend: T tokens, D width, E routed experts, F expert width.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, top_k
from collegium_kernels.gates.losses import counts
from collegium_kernels.ragged import Routing

CARD = Card(title="DeepSeekMoE, shared and fine-grained", source="arXiv 2401.06066", k="6 of 64, 2 shared", cost="E D")


class DeepSeekGate(LinearGate):
    """``devices`` groups neighbouring experts for the device balance loss."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 6,
        balance: float = 0.001,
        device_balance: float = 0.0,
        devices: int = 1,
    ) -> None:
        super().__init__(width, num_experts)
        if num_experts % devices:
            raise KernelInputError(f"{num_experts} experts do not divide among {devices} devices.")
        self.k, self.balance, self.device_balance, self.devices = min(k, num_experts), balance, device_balance, devices

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        probs_TE = self.logits(x_TD).softmax(dim=1)
        routing = top_k(probs_TE, self.k)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self._loss(probs_TE, routing))

    def _loss(self, probs_TE: Tensor, routing: Routing) -> Tensor:
        if probs_TE.shape[0] == 0:
            return probs_TE.sum()
        share_E = counts(routing) * self.num_experts / (self.k * probs_TE.shape[0])
        mean_E = probs_TE.mean(dim=0)
        grouped_share = share_E.view(self.devices, -1).mean(dim=1)
        grouped_mean = mean_E.view(self.devices, -1).sum(dim=1)
        return self.balance * (share_E * mean_E).sum() + self.device_balance * (grouped_share * grouped_mean).sum()


class SharedExpert(nn.Module):
    """SwiGLU on every token: K_s shared experts are one of K_s times the width."""

    def __init__(self, width: int, expert_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * expert_width, bias=False)
        self.down = nn.Linear(expert_width, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TD).chunk(2, dim=-1)
        y_TD: Tensor = self.down(torch.nn.functional.silu(gate_TF) * up_TF)
        return y_TD
