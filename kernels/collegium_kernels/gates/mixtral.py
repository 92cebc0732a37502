"""Top-k, in the order of Mixtral (top-k, then softmax) or of upcycling (softmax, then top-k).

Legend: T tokens, D width, E experts, K slots.
"""

from typing import Literal

from torch import Tensor

from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best, top_k
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import rectangular

CARD = Card(title="Mixtral top-2", source="arXiv 2401.04088", k="2", cost="E D")


class MixtralGate(LinearGate):
    """``order="post"`` and ``order="pre"`` with ``renormalise`` are the same function."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        order: Literal["pre", "post"] = "post",
        renormalise: bool = True,
        balance: float = 0.001,
    ) -> None:
        super().__init__(width, num_experts)
        if order not in ("pre", "post"):
            raise KernelInputError(f"order '{order}' is not one of pre, post.")
        if order == "post" and not renormalise:
            raise KernelInputError("order 'post' sums to 1 by itself: renormalise=False is for order 'pre'.")
        self.k, self.order, self.renormalise, self.balance = k, order, renormalise, balance

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=1)
        if self.order == "post":
            values_TK, ids_TK = best(logits_TE, self.k)
            routing = rectangular(ids_TK, values_TK.softmax(dim=1), num_experts=self.num_experts)
        else:
            routing = top_k(probs_TE, self.k, renormalise=self.renormalise)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))
