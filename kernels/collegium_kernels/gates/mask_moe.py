"""MaskMoE: rare words see one expert, frequent words several.

Legend: T tokens, V vocabulary, D width, E experts.
"""

import torch
from torch import Tensor

from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, needed_ids, top_k
from collegium_kernels.gates.losses import balance_loss

CARD = Card(title="MaskMoE", source="arXiv 2407.09816", k="1", cost="E D")


class MaskMoEGate(LinearGate):
    """``rare_V`` marks rare ids; without it the upper half of the ids is rare, as in vocabularies in the order of
    merges. The masks are drawn once, at the start."""

    visible_VE: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        vocab_size: int = 32000,
        rare_V: Tensor | None = None,
        visible: int | None = None,
        seed: int = 0,
        balance: float = 0.01,
    ) -> None:
        super().__init__(width, num_experts)
        if visible is not None and not 0 < visible <= num_experts:
            raise KernelInputError(f"visible is {visible}: it must lie between 1 and {num_experts}, the experts.")
        self.balance = balance
        rare_V = torch.arange(vocab_size) >= vocab_size // 2 if rare_V is None else rare_V
        order_VE = torch.rand(len(rare_V), num_experts, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
        count_V = torch.where(rare_V, 1, num_experts if visible is None else visible)
        self.register_buffer("visible_VE", order_VE < count_V[:, None])

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        seen_TE = self.visible_VE[needed_ids(context, len(x_TD), len(self.visible_VE))]
        probs_TE = self.logits(x_TD).masked_fill(~seen_TE, -torch.inf).softmax(dim=1)
        routing = top_k(probs_TE, 1)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))
