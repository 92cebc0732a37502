"""Expert choice: each expert takes its best tokens.

Legend: T tokens, D width, E experts, C tokens an expert.
"""

import math
from typing import Literal

from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best, zero
from collegium_kernels.ragged import ByExpert, by_token

CARD = Card(
    title="Expert choice", source="arXiv 2202.09368", k="0 to E, 2 on average", cost="E D", batch_dependent=True
)


class ExpertChoiceGate(LinearGate):
    """Perfect balance, and a routing that depends on every other token: later ones too. Not for decoding.

    Scores sum to one ``over`` the experts of a token or the tokens of an expert."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        over: Literal["experts", "tokens"] = "experts",
    ) -> None:
        super().__init__(width, num_experts)
        if over not in ("experts", "tokens"):
            raise ValueError(f"over '{over}' is not one of experts, tokens")
        self.capacity_factor, self.over = capacity_factor, over

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        T = x_TD.shape[0]
        probs_TE = self.logits(x_TD).softmax(dim=1 if self.over == "experts" else 0)
        C = min(T, math.ceil(T * self.capacity_factor / self.num_experts))
        weights_EC, tokens_EC = best(probs_TE.t(), C)
        tokens_P = tokens_EC.reshape(-1)
        indptr_E1 = tokens_P.new_tensor([e * C for e in range(self.num_experts + 1)])
        rows = ByExpert(indptr_E1=indptr_E1, pairs_P=tokens_P, tokens_P=tokens_P)
        routing = by_token(rows, weights_EC.reshape(-1), num_tokens=T)
        return Routed(routing=routing, scores_TE=probs_TE, loss=zero(x_TD))
