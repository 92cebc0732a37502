"""MH-MoE: each token is split in sub-tokens that are routed apart. Legend: T tokens, D width, H heads."""

from dataclasses import replace

from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context
from collegium_kernels.moe import MoELayer
from collegium_kernels.steady import steady_mm

CARD = Card(title="MH-MoE", source="arXiv 2404.15045", k="k for each of H parts", cost="2 D^2 + E D", kind="layer")


class MultiHeadMoELayer(nn.Module):
    """``layer`` works on D / H columns. Its experts are made narrower to keep the FLOPs."""

    def __init__(self, layer: MoELayer, width: int, *, heads: int = 2) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.layer, self.heads = layer, heads
        self.split, self.merge = (nn.Linear(width, width, bias=False) for _ in range(2))
        for linear in (self.split, self.merge):
            nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)

    def forward(self, x_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """The output and the gate's loss."""
        parts = steady_mm(x_TD, self.split.weight).reshape(-1, x_TD.shape[1] // self.heads)
        y, routed = self.layer(parts, context and self._of_parts(context))
        return steady_mm(y.reshape(x_TD.shape), self.merge.weight), routed.loss

    def _of_parts(self, context: Context) -> Context:
        """Each part has its token's id and importance."""
        ids_T, importance_T = (
            None if each is None else each.repeat_interleave(self.heads)
            for each in (context.token_ids_T, context.importance_T)
        )
        return replace(context, token_ids_T=ids_T, importance_T=importance_T)
