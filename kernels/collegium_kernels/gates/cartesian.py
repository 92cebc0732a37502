"""CartesianMoE: two sub-layers of half-size experts, so that pairs of experts are what a token gets.

Legend: T tokens, D width.
"""

from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context
from collegium_kernels.moe import MoELayer

CARD = Card(title="CartesianMoE", source="arXiv 2410.16077", k="k in each of two", cost="2 E D", kind="layer")


class CartesianLayer(nn.Module):
    """h = x + A(x), then h + B(norm(h)); either sub-layer may have a shared expert."""

    def __init__(self, first: MoELayer, second: MoELayer, width: int) -> None:
        super().__init__()
        self.first, self.second, self.norm = first, second, nn.RMSNorm(width)

    def forward(self, x_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """The output, residual included, and the gates' loss."""
        a_TD, routed_a = self.first(x_TD, context)
        h_TD = x_TD + a_TD
        b_TD, routed_b = self.second(self.norm(h_TD), context)
        return h_TD + b_TD, routed_a.loss + routed_b.loss
