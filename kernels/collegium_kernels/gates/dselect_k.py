"""DSelect-k: k selectors that write an expert's number in binary.

Legend: T tokens, D width, E experts, S selectors, M bits.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed, fp32_mm
from collegium_kernels.gates.smooth_step import code_probabilities, num_bits, smooth_step
from collegium_kernels.ragged import from_dense

CARD = Card(
    title="DSelect-k", source="arXiv 2106.03760", k="all, falling to at most 4", cost="k (log2 E + 1) D + k E log2 E"
)


class DSelectKGate(nn.Module):
    """Dense at first; the entropy penalty drives each selector to one expert."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 4,
        gamma: float = 1.0,
        entropy: float = 0.01,
        unused: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.k, self.gamma, self.entropy, self.unused = num_experts, k, gamma, entropy, unused
        self.bits = num_bits(num_experts)
        self.weight_bits = nn.Parameter(torch.randn(k * self.bits, width) / width**0.5 * gamma / 4)
        self.weight_alpha = nn.Parameter(torch.randn(k, width) / width**0.5)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        x_TD = x_TD.float()
        t_TSM = fp32_mm(x_TD, self.weight_bits).view(-1, self.k, self.bits)
        single_TSE = code_probabilities(smooth_step(t_TSM, self.gamma), self.num_experts)
        alpha_TS = fp32_mm(x_TD, self.weight_alpha).softmax(dim=1)
        weights_TE = (alpha_TS[:, :, None] * single_TSE).sum(dim=1)
        routing = from_dense(weights_TE, weights_TE > 0)
        return Routed(routing=routing, scores_TE=weights_TE, loss=self._loss(single_TSE))

    def _loss(self, single_TSE: Tensor) -> Tensor:
        """Low entropy; and no weight on numbers that name no expert."""
        if single_TSE.shape[0] == 0:
            return single_TSE.sum()
        entropy = -torch.xlogy(single_TSE, single_TSE.clamp(min=1e-9)).sum(dim=2).mean()
        reach = (1 / single_TSE.sum(dim=2).clamp(min=1e-6)).mean()
        power_of_two = self.num_experts == 2**self.bits
        return self.entropy * entropy + (0.0 if power_of_two else self.unused) * reach
