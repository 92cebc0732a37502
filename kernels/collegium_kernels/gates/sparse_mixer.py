"""SparseMixer and GRIN: sample an expert, and estimate the gradient of the choice by an ODE solver's step.

Legend: T tokens, D width, E experts, K choices.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import rectangular

CARD = Card(title="SparseMixer, GRIN", source="arXiv 2310.00811, 2409.12136", k="2", cost="E D")
# How often a sample that is not the best is left whole, what multiplies it otherwise, and the gradient's factor.
STEPS = {"v1": (0.5, 0.5, 2.0), "v2": (0.25, 1 / 3, 1.0)}


class _Chosen(torch.autograd.Function):
    """Forward p_a c; backward (grad p_a)(onehot_a - p) on the scores."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, probs_TE: Tensor, ids_T1: Tensor, step_T1: Tensor, factor: float
    ) -> Tensor:
        chosen_T1 = probs_TE.gather(1, ids_T1)
        ctx.save_for_backward(probs_TE, ids_T1, chosen_T1)
        ctx.factor = factor
        return chosen_T1 * step_T1

    @staticmethod
    def backward(ctx: Any, grad_T1: Tensor) -> tuple[Tensor, None, None, None, None]:
        probs_TE, ids_T1, chosen_T1 = ctx.saved_tensors
        scaled_T1 = grad_T1 * chosen_T1 * ctx.factor
        return (-probs_TE * scaled_T1).scatter_add(1, ids_T1, scaled_T1), None, None, None, None


class SparseMixerGate(LinearGate):
    """``variant="v2"`` with k = 2 is GRIN (PhiMoE): each choice has its own softmax, so weights do not sum to 1."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        variant: Literal["v1", "v2"] = "v2",
        epsilon: float = 0.1,
        balance: float = 0.01,
    ) -> None:
        super().__init__(width, num_experts)
        self.k, self.variant, self.epsilon, self.balance = min(k, num_experts), variant, epsilon, balance
        self.omega_E = torch.nn.Parameter(torch.ones(num_experts), requires_grad=variant == "v1")

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        logits_TE = self.logits(x_TD)
        left_TE, ids, weights = logits_TE, [], []
        for _ in range(self.k):
            id_T1, weight_T1 = self.choose(left_TE, context.generator)
            left_TE = left_TE.scatter(1, id_T1, -torch.inf)
            ids.append(id_T1)
            weights.append(weight_T1 * self.omega_E[id_T1])
        routing = rectangular(torch.cat(ids, 1), torch.cat(weights, 1), num_experts=self.num_experts)
        probs_TE = logits_TE.softmax(dim=1)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))

    def choose(self, logits_TE: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """One expert a token and its weight. Logits far behind the best are out, in evaluation too."""
        best_T1 = logits_TE.max(dim=1, keepdim=True).values
        far_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1) > 2 * self.epsilon
        probs_TE = logits_TE.masked_fill(far_TE | logits_TE.isinf(), -torch.inf).softmax(dim=1)
        leader_T1 = probs_TE.argmax(dim=1, keepdim=True)
        if not self.training:
            return leader_T1, probs_TE.gather(1, leader_T1)
        whole, share, factor = STEPS[self.variant]
        sample_T1 = torch.multinomial(probs_TE.detach(), 1, generator=generator)
        coin_T1 = torch.rand(sample_T1.shape, generator=generator, device=sample_T1.device) < whole
        step_T1 = torch.where((sample_T1 == leader_T1) | coin_T1, 1.0, share)
        weight_T1: Tensor = _Chosen.apply(logits_TE, probs_TE.detach(), sample_T1, step_T1, factor)  # type: ignore[no-untyped-call]
        return sample_T1, weight_T1
