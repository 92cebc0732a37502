"""MEO: merge the chosen experts' weights, then compute once.

Legend: T tokens of one sequence, D width, E experts, F hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, LinearGate, best
from collegium_kernels.steady import steady_mm

CARD = Card(
    title="MEO, merged experts",
    source="arXiv 2310.09832",
    k="2, merged",
    cost="E D + k F D, once a sequence",
    batch_dependent=True,
    kind="layer",
)


class MergedExperts(nn.Module):
    """The gate reads the mean of a sequence, later tokens too: not for decoding. y = act(W x + b) with W and b the
    gated sums of the experts'.

    ``bottleneck`` makes it the paper's token-level variant: the experts are still merged once a sequence, but each
    token first adds up(relu(down(x))) of its own, with this many numbers between. ``up`` starts at zero.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        hidden: int = 32,
        bottleneck: int | None = None,
        activation: Callable[[Tensor], Tensor] = functional.gelu,
    ) -> None:
        super().__init__()
        self.gate, self.k, self.activation = LinearGate(width, num_experts), k, activation
        self.weight_EFD = nn.Parameter(torch.randn(num_experts, hidden, width) / width**0.5)
        self.bias_EF = nn.Parameter(torch.zeros(num_experts, hidden))
        self.token_SD = nn.Parameter(torch.randn(bottleneck, width) / width**0.5) if bottleneck else None
        self.token_DS = nn.Parameter(torch.zeros(width, bottleneck)) if bottleneck else None

    def attend(self, x_TD: Tensor) -> Tensor:
        """The tokens as the experts see them."""
        if self.token_SD is None or self.token_DS is None:
            return x_TD
        return x_TD + steady_mm(steady_mm(x_TD, self.token_SD).relu(), self.token_DS)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids of the sequence's experts."""
        mean_1D = x_TD.float().sum(dim=0, keepdim=True) / max(1, len(x_TD))
        values, ids = best(self.gate.logits(mean_1D), self.k)
        return values.softmax(dim=1)[0].to(x_TD.dtype), ids[0]

    def forward(self, x_TD: Tensor, context: Context | None = None) -> Tensor:
        x_TD = self.attend(x_TD)
        weights_K, ids_K = self.choose(x_TD)
        merged_FD = (weights_K[:, None, None] * self.weight_EFD[ids_K]).sum(dim=0)
        return self.activation(steady_mm(x_TD, merged_FD) + (weights_K[:, None] * self.bias_EF[ids_K]).sum(dim=0))

    def mixture(self, x_TD: Tensor) -> Tensor:
        """What it replaces: the same experts computed apart and their outputs mixed."""
        x_TD = self.attend(x_TD)
        weights_K, ids_K = self.choose(x_TD)
        outputs = [self.activation(steady_mm(x_TD, self.weight_EFD[e]) + self.bias_EF[e]) for e in ids_K.tolist()]
        return torch.stack([w * y for w, y in zip(weights_K, outputs, strict=True)]).sum(dim=0)
