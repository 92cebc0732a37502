"""Pre-gated MoE: block l chooses the experts of block l + 1, whose weights are fetched meanwhile.

Legend: T tokens, D width, E experts.
"""

from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, state_of, top_k, zero

CARD = Card(title="Pre-gated", source="arXiv 2308.12066", k="2, one block ahead", cost="E D")


class PreGate(nn.Module):
    """Routes by the scores that the block below put into the context, and scores for the block above.

    The first block has nobody below and scores for itself too.
    """

    def __init__(self, width: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.here = LinearGate(width, num_experts)
        self.ahead = LinearGate(width, num_experts)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        chosen_below_TE = state_of(context, len(x_TD), self.num_experts)
        logits_TE = self.here.logits(x_TD) if chosen_below_TE is None else chosen_below_TE
        probs_TE = logits_TE.softmax(dim=1)
        routing = top_k(probs_TE, self.k, renormalise=True)
        return Routed(routing=routing, scores_TE=probs_TE, loss=zero(x_TD), state_TS=self.ahead.logits(x_TD))


def exposed_fetch_s(fetch_s: list[float], compute_s: list[float]) -> float:
    """How long fetching holds up the blocks when block l + 1 is fetched while block l computes; the first waits."""
    return fetch_s[0] + sum(max(0.0, f - c) for f, c in zip(fetch_s[1:], compute_s, strict=False))
