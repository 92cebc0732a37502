"""Yuan 2.0-M32: attention among experts before top-2. Legend: T tokens, D width, E experts."""

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed, fp32_mm, top_k
from collegium_kernels.gates.losses import balance_loss

CARD = Card(title="Yuan attention router", source="arXiv 2405.17976", k="2", cost="3 E D + 2 E^2")


class YuanGate(nn.Module):
    """Scores are softmax(q k^T) v with one number an expert in q, k and v."""

    def __init__(self, width: int, num_experts: int, *, k: int = 2, balance: float = 0.0) -> None:
        super().__init__()
        self.num_experts, self.k, self.balance = num_experts, k, balance
        self.weight_qkv = nn.Parameter(torch.randn(3 * num_experts, width) / width**0.5)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        q_TE, k_TE, v_TE = fp32_mm(x_TD, self.weight_qkv).chunk(3, dim=1)
        attention_TEE = (q_TE[:, :, None] * k_TE[:, None, :]).softmax(dim=2)
        probs_TE = (attention_TEE * v_TE[:, None, :]).sum(dim=2).softmax(dim=1)
        routing = top_k(probs_TE, self.k, renormalise=True)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))
