"""PEER: a million experts of one neuron each, found by product keys.

Legend: T tokens, D width, H heads, N sub-keys (N^2 experts), Q half a query, K experts a head.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, best
from collegium_kernels.steady import steady_map, steady_mm

CARD = Card(
    title="PEER, product keys",
    source="arXiv 2407.04153",
    k="8 heads x 16 of N^2",
    cost="H (2 Q D + 2 N Q + K^2)",
    kind="layer",
)


def product_top_k(first_RN: Tensor, second_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best sums first[i] + second[j] and their numbers i N + j, from k^2 candidates instead of N^2."""
    a_RK, i_RK = best(first_RN, k)
    b_RK, j_RK = best(second_RN, k)
    sums = (a_RK[:, :, None] + b_RK[:, None, :]).flatten(1)
    numbers = (i_RK[:, :, None] * first_RN.shape[1] + j_RK[:, None, :]).flatten(1)
    values_RK, picked_RK = best(sums, k)
    return values_RK, numbers.gather(1, picked_RK)


class PeerLayer(nn.Module):
    """y = sum over heads and their experts of score x v_i x GELU(u_i . x)."""

    def __init__(
        self,
        width: int,
        sub_keys: int,
        *,
        heads: int = 8,
        k: int = 16,
        query: int = 128,
        score: Literal["softmax", "relu"] = "softmax",
    ) -> None:
        super().__init__()
        self.heads, self.k, self.score = heads, min(k, sub_keys), score
        self.query = nn.Parameter(torch.randn(heads * query, width) / width**0.5)
        self.norm = nn.LayerNorm(query)
        self.keys_2NQ = nn.Parameter(torch.randn(2, sub_keys, query // 2) / (query / 2) ** 0.5)
        self.u = nn.Embedding(sub_keys**2, width)
        nn.init.normal_(self.u.weight, std=width**-0.5)
        self.v = nn.Embedding(sub_keys**2, width)

    def retrieve(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts, (tokens, heads, k)."""
        queries = self.norm(steady_mm(x_TD, self.query).view(len(x_TD) * self.heads, len(self.query) // self.heads))
        first, second = queries.chunk(2, dim=1)
        scores, numbers = product_top_k(steady_mm(first, self.keys_2NQ[0]), steady_mm(second, self.keys_2NQ[1]), self.k)
        scores = scores.softmax(dim=1) if self.score == "softmax" else scores.relu()
        return scores.view(-1, self.heads, self.k), numbers.view(-1, self.heads, self.k)

    def forward(self, x_TD: Tensor, context: Context | None = None) -> Tensor:
        scores, numbers = self.retrieve(x_TD)
        dots = (self.u(numbers) * x_TD[:, None, None, :]).sum(dim=-1)
        hidden = scores * steady_map(functional.gelu, dots)
        y_TD: Tensor = (hidden[..., None] * self.v(numbers)).sum(dim=(1, 2))
        return y_TD
