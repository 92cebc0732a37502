"""MoWE: a fixed expert for each word of a large routing vocabulary.

Legend: T tokens, V routing ids, E experts.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.errors import require
from collegium_kernels.gates.base import Card, Context, Routed, needed_ids, zero
from collegium_kernels.gates.hashed import balanced_table
from collegium_kernels.ragged import rectangular

CARD = Card(title="MoWE, word experts", source="arXiv 2311.10768", k="1", cost="0 (n hashes)")
MULTIPLIER = 1_000_003


class WordGate(nn.Module):
    """A word is the last ``ngram`` token ids, hashed to a routing id; a table of even loads gives its expert.

    With ``ngram`` above 1 the tokens must be those of one sequence."""

    table_V: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        routing_vocab: int = 1 << 20,
        ngram: int = 1,
        frequency_V: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.ngram, self.routing_vocab = num_experts, ngram, routing_vocab
        if frequency_V is not None:
            require(
                frequency_V.shape == (routing_vocab,), "frequency_V", frequency_V, f"one for each of {routing_vocab}"
            )
        table_V = torch.arange(routing_vocab) % num_experts
        self.register_buffer("table_V", table_V if frequency_V is None else balanced_table(frequency_V, num_experts))

    def routing_ids(self, token_ids_T: Tensor) -> Tensor:
        """Each position's word: it reads no later token."""
        words_T = token_ids_T.long()
        for back in range(1, self.ngram):
            earlier_T = nn.functional.pad(token_ids_T.long(), (back, 0))[: len(token_ids_T)]
            words_T = words_T + (earlier_T + 1) * pow(MULTIPLIER, back, self.routing_vocab)
        return words_T % self.routing_vocab

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        ids_T1 = self.table_V[self.routing_ids(needed_ids(context, len(x_TD), None))][:, None]
        routing = rectangular(ids_T1, x_TD.new_ones(ids_T1.shape), num_experts=self.num_experts)
        scores_TE = nn.functional.one_hot(ids_T1[:, 0], self.num_experts).to(x_TD.dtype)
        return Routed(routing=routing, scores_TE=scores_TE, loss=zero(x_TD))
