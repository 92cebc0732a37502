"""Mixture of depths: only some tokens of a sequence go through a block.

Legend: T tokens of one sequence, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, best, fp32_mm

CARD = Card(
    title="Mixture of depths",
    source="arXiv 2404.02258",
    k="0 or 1 (12.5 %)",
    cost="D",
    batch_dependent=True,
    kind="layer",
)


class MoDLayer(nn.Module):
    """x + r f(x) for the best tokens, x for the others. Decoding has no future: there a trained predictor chooses."""

    def __init__(self, block: nn.Module, width: int, *, share: float = 0.125) -> None:
        super().__init__()
        self.block, self.share = block, share
        self.router = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.predictor = nn.Parameter(torch.zeros(1, width))

    def forward(self, x_TD: Tensor, context: Context | None = None, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        """The output and the predictor's loss. ``causal`` lets the predictor choose."""
        scores_T = fp32_mm(x_TD, self.router)[:, 0]
        guess_T = fp32_mm(x_TD.detach(), self.predictor)[:, 0]
        count = min(len(x_TD), math.ceil(self.share * len(x_TD)))
        chosen = best(scores_T[None], count)[1][0]
        truth_T = torch.zeros_like(guess_T).index_fill(0, chosen, 1.0)
        loss = functional.binary_cross_entropy_with_logits(guess_T, truth_T) if len(x_TD) else guess_T.sum()
        picked = (guess_T > 0).nonzero()[:, 0] if causal else chosen.sort().values
        update = scores_T[picked, None] * self.block(x_TD[picked])
        return x_TD.index_add(0, picked, update.to(x_TD.dtype)), loss
