"""ReMoE: ReLU instead of top-k. Legend: T tokens, D width, E experts."""

import torch
from torch import Tensor

from collegium_kernels.gates.base import Card, Context, LinearGate, Routed
from collegium_kernels.gates.losses import counts
from collegium_kernels.ragged import Routing, from_dense

CARD = Card(title="ReMoE, ReLU", source="arXiv 2412.14711", k="0 to E, held near 2", cost="E D")


class ReMoEGate(LinearGate):
    """The weight is ReLU(w . x). Call ``control`` after each step: it moves the L1 penalty towards k active experts."""

    penalty: Tensor

    def __init__(self, width: int, num_experts: int, *, k: int = 2, penalty: float = 1e-8, factor: float = 1.2) -> None:
        super().__init__(width, num_experts)
        self.k, self.factor = k, factor
        self.register_buffer("penalty", torch.tensor(penalty))

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        weights_TE = self.logits(x_TD).relu()
        routing = from_dense(weights_TE, weights_TE > 0)
        return Routed(routing=routing, scores_TE=weights_TE, loss=self.penalty * self._l1(weights_TE, routing))

    def _l1(self, weights_TE: Tensor, routing: Routing) -> Tensor:
        """Weights of busy experts cost more: the balance loss with ReLU outputs."""
        load_E = counts(routing) * self.num_experts / max(1, self.k * weights_TE.shape[0])
        return (load_E * weights_TE.sum(dim=0)).sum() / max(1, weights_TE.shape[0])

    @torch.no_grad()
    def control(self, *routings: Routing) -> None:
        """Raise the penalty while too many experts are active, lower it otherwise.

        Given the routings of all layers, in each of them, every layer has the same penalty, as in the paper: the layers
        then share the k among them. Given its own, each layer is held near k."""
        tokens = sum(routing.num_tokens for routing in routings)
        if tokens == 0:
            return
        sparsity = 1 - sum(routing.num_pairs for routing in routings) / (tokens * self.num_experts)
        self.penalty *= self.factor if sparsity < 1 - self.k / self.num_experts else 1 / self.factor
