"""Hash routing: the token id decides. Legend: T tokens, V vocabulary, E experts."""

import heapq

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed, needed_ids, zero
from collegium_kernels.ragged import rectangular

CARD = Card(title="Hash layers", source="arXiv 2106.04426", k="1", cost="0")


class HashGate(nn.Module):
    """Random, or balanced by ``frequency_V``: ids by falling frequency, each to the least loaded expert."""

    table_V: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        vocab_size: int = 32000,
        frequency_V: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        generator = torch.Generator().manual_seed(seed)
        table_V = torch.randint(0, num_experts, (vocab_size,), generator=generator)
        self.register_buffer("table_V", table_V if frequency_V is None else balanced_table(frequency_V, num_experts))

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        ids_T1 = self.table_V[needed_ids(context, len(x_TD), len(self.table_V))][:, None]
        routing = rectangular(ids_T1, x_TD.new_ones(ids_T1.shape), num_experts=self.num_experts)
        scores_TE = nn.functional.one_hot(ids_T1[:, 0], self.num_experts).to(x_TD.dtype)
        return Routed(routing=routing, scores_TE=scores_TE, loss=zero(x_TD))


def balanced_table(frequency_V: Tensor, num_experts: int) -> Tensor:
    """An expert for each id, so that expected loads are as even as greed makes them."""
    loads = [(0.0, e) for e in range(num_experts)]
    table_V = torch.empty(frequency_V.shape[0], dtype=torch.int64)
    for token in frequency_V.argsort(descending=True).tolist():
        load, expert = heapq.heappop(loads)
        table_V[token] = expert
        heapq.heappush(loads, (load + float(frequency_V[token]), expert))
    return table_V
