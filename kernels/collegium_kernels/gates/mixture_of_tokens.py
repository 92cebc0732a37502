"""Mixture of Tokens: experts read mixtures of a group's tokens.

Legend: G groups, N tokens a group, D width, E experts.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context
from collegium_kernels.moe import SwiGLUExperts

CARD = Card(
    title="Mixture of Tokens",
    source="arXiv 2310.15961",
    k="all, on mixtures",
    cost="2 E D",
    batch_dependent=True,
    kind="layer",
)


class MixtureOfTokens(nn.Module):
    """A group is the same position of different sequences: sequences leak into each other by design."""

    def __init__(self, experts: SwiGLUExperts, width: int) -> None:
        super().__init__()
        self.experts = experts
        self.weight_ED = nn.Parameter(torch.randn(experts.w_down_EDF.shape[0], width) / width**0.5)

    def forward(self, x_GND: Tensor, context: Context | None = None) -> Tensor:
        groups, _, width = x_GND.shape
        E = self.weight_ED.shape[0]
        mix_GNE = (x_GND @ self.weight_ED.t()).softmax(dim=1)
        mixtures_EGD = (mix_GNE.transpose(1, 2) @ x_GND).transpose(0, 1)
        indptr_E1 = torch.arange(E + 1, device=x_GND.device) * groups
        y_EGD = self.experts(mixtures_EGD.reshape(-1, width), indptr_E1).view(E, groups, width)
        y_GND: Tensor = mix_GNE @ y_EGD.transpose(0, 1)
        return y_GND
