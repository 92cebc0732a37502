"""ScMoE: routed experts read the layer below, so that their communication hides behind this layer's own work.

Legend: T tokens, D width.
"""

from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed
from collegium_kernels.moe import MoELayer

CARD = Card(title="ScMoE shortcut", source="arXiv 2404.05019", k="1 and a shared one", cost="E D", kind="layer")


class ShortcutLayer(nn.Module):
    """Routed experts on the representation below, a shared expert on this one."""

    def __init__(self, routed: MoELayer, shared: nn.Module) -> None:
        super().__init__()
        self.routed, self.shared = routed, shared

    def start(self, below_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Routed]:
        """May run, and communicate, before this layer's attention has begun."""
        y_TD, routed = self.routed(below_TD, context)
        return y_TD, routed

    def forward(self, below_TD: Tensor, here_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Routed]:
        y_TD, routed = self.start(below_TD, context)
        return y_TD + self.shared(here_TD), routed


def hidden_share(communication_s: float, attention_s: float, shared_s: float) -> float:
    """How much of the communication runs behind attention and the shared expert."""
    return min(1.0, (attention_s + shared_s) / communication_s) if communication_s else 1.0
