"""THOR: a random expert, made harmless by a consistency loss. Legend: T tokens, E experts, V outputs."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from collegium_kernels.gates.base import Card, Context, Routed, zero
from collegium_kernels.ragged import rectangular

CARD = Card(title="THOR, random", source="arXiv 2110.04260", k="1", cost="0")


class RandomGate(nn.Module):
    """One expert for the whole call from the context's generator; in training call twice and compare the outputs.

    Every token of a call gets the same expert, so that who else is in the batch does not move the draw. ``ensemble``
    serves the mean of all experts instead, the other of the paper's two ways, at E times the cost.
    """

    def __init__(self, width: int, num_experts: int, *, ensemble: bool = False) -> None:
        super().__init__()
        self.num_experts, self.ensemble = num_experts, ensemble

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        ids_K = torch.arange(self.num_experts)
        if self.training or not self.ensemble:
            ids_K = torch.randint(0, self.num_experts, (1,), generator=context.generator)
        ids_TK = ids_K.to(x_TD.device).expand(x_TD.shape[0], -1)
        weights_TK = x_TD.new_full(ids_TK.shape, 1 / len(ids_K))
        routing = rectangular(ids_TK, weights_TK, num_experts=self.num_experts)
        scores_TE = x_TD.new_full((x_TD.shape[0], self.num_experts), 1 / self.num_experts)
        return Routed(routing=routing, scores_TE=scores_TE, loss=zero(x_TD))


def consistency_loss(first_TV: Tensor, second_TV: Tensor, labels_T: Tensor, *, alpha: float = 5.0) -> Tensor:
    """Both passes' cross-entropy, and alpha times their symmetric KL divergence."""
    log_p, log_q = first_TV.log_softmax(dim=1), second_TV.log_softmax(dim=1)
    divergence = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    divergence = divergence + functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return (
        functional.cross_entropy(first_TV, labels_T)
        + functional.cross_entropy(second_TV, labels_T)
        + alpha * divergence / 2
    )
