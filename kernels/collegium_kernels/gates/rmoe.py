"""RMoE: the router remembers what earlier layers' routers saw.

Legend: T tokens, D width, E experts, S state.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed, fp32_mm, state_of, top_k
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.steady import steady_map

CARD = Card(title="RMoE, recurrent router", source="arXiv 2408.06793", k="2", cost="S D + 6 S^2 + S E")


class GRU(nn.Module):
    """One step, shared by all layers. Written out because nn.GRUCell's rows depend on their number."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight_input = nn.Parameter(torch.randn(3 * size, size) / size**0.5)
        self.weight_state = nn.Parameter(torch.randn(3 * size, size) / size**0.5)
        self.bias_update = nn.Parameter(torch.zeros(size))

    def forward(self, input_TS: Tensor, state_TS: Tensor) -> Tensor:
        reset_i, update_i, new_i = fp32_mm(input_TS, self.weight_input).chunk(3, dim=1)
        reset_h, update_h, new_h = fp32_mm(state_TS, self.weight_state).chunk(3, dim=1)
        update = steady_map(torch.sigmoid, update_i + update_h + self.bias_update)
        new = steady_map(torch.tanh, new_i + steady_map(torch.sigmoid, reset_i + reset_h) * new_h)
        return (1 - update) * new + update * state_TS


class RMoEGate(nn.Module):
    """Reads the state of the layer below from the context and hands its own on. Pass one GRU to all layers."""

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        state: int = 128,
        gru: GRU | None = None,
        detach: bool = False,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_experts, self.k, self.detach, self.balance = num_experts, k, detach, balance
        self.project_SD = nn.Parameter(torch.randn(state, width) / width**0.5)
        self.score_ES = nn.Parameter(torch.randn(num_experts, state) / state**0.5)
        self.gru = gru or GRU(state)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        input_TS = fp32_mm(x_TD, self.project_SD)
        below_TS = state_of(context, *input_TS.shape)
        before_TS = torch.zeros_like(input_TS) if below_TS is None else below_TS
        state_TS: Tensor = self.gru(input_TS, before_TS.detach() if self.detach else before_TS)
        probs_TE = fp32_mm(state_TS, self.score_ES).softmax(dim=1)
        routing = top_k(probs_TE, self.k, renormalise=True)
        loss = self.balance * balance_loss(probs_TE, routing)
        return Routed(routing=routing, scores_TE=probs_TE, loss=loss, state_TS=state_TS)
