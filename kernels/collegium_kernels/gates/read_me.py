"""Read-ME: one small causal transformer over token ids decides for all layers before the model starts.

Legend: T tokens (one sequence), S width of the router, E experts.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed, needed_ids, state_of, top_k, zero

CARD = Card(
    title="Read-ME pre-gating router",
    source="arXiv 2410.19123",
    k="1, the same for all layers",
    cost="24 S^2 + T S, once a token",
)


class ReadMeGate(nn.Module):
    """The state it hands on is its decision: give the Routed's state to every later layer's context."""

    def __init__(
        self, width: int, num_experts: int, *, vocab_size: int = 32000, state: int = 64, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.num_experts, self.vocab_size = num_experts, vocab_size
        self.embedding = nn.Embedding(vocab_size, state)
        block = nn.TransformerEncoderLayer(state, heads, 4 * state, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.score = nn.Linear(state, num_experts, bias=False)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        decided_TE = state_of(context, len(x_TD), self.num_experts)
        logits_TE = self.decide(needed_ids(context, len(x_TD), self.vocab_size)) if decided_TE is None else decided_TE
        probs_TE = logits_TE.softmax(dim=1)
        return Routed(routing=top_k(probs_TE, 1), scores_TE=probs_TE, loss=zero(x_TD), state_TS=logits_TE)

    def decide(self, ids_T: Tensor) -> Tensor:
        """The logits of one sequence, from its token ids alone."""
        if len(ids_T) == 0:
            return torch.zeros(0, self.num_experts, device=ids_T.device)
        mask_TT = nn.Transformer.generate_square_subsequent_mask(len(ids_T), device=ids_T.device)
        hidden = self.encoder(self.embedding(ids_T)[None], mask=mask_TT, is_causal=True)
        logits_TE: Tensor = self.score(hidden[0])
        return logits_TE
