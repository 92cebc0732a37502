"""Task-level routing: every token of a task goes to the same experts, which can therefore be cut out and served alone.

Legend: T tokens, D width, E experts, K slots, N tasks.
"""

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed, best, needed_ids, top_k
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.moe import MoELayer, SwiGLUExperts

CARD = Card(title="Task-level MoE", source="arXiv 2110.03742", k="2", cost="0", kind="layer")


class TaskLevelGate(nn.Module):
    """Scores a learned embedding of the task in the token's place. ``Context.token_ids_T`` holds each token's task."""

    def __init__(
        self, width: int, num_experts: int, *, tasks: int = 8, k: int = 2, task_width: int = 16, balance: float = 0.01
    ) -> None:
        super().__init__()
        self.num_experts, self.k, self.balance = num_experts, k, balance
        self.task_ND = nn.Parameter(torch.randn(tasks, task_width))
        self.weight_ED = nn.Parameter(torch.randn(num_experts, task_width) / task_width**0.5)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        tasks_T = needed_ids(context, len(x_TD), len(self.task_ND))
        probs_TE = self.probabilities()[tasks_T]
        routing = top_k(probs_TE, self.k, renormalise=True)
        return Routed(routing=routing, scores_TE=probs_TE, loss=self.balance * balance_loss(probs_TE, routing))

    def probabilities(self) -> Tensor:
        """N x E: the whole routing table. A task that was never trained has the scores it started with: give it the
        id of the nearest known one."""
        return (self.task_ND @ self.weight_ED.T).softmax(dim=1)


class OneTask(nn.Module):
    """What is left of a layer for one task: K experts with fixed weights, and no gate to ask."""

    def __init__(self, experts: SwiGLUExperts, weights_K: Tensor) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("weights_K", weights_K)
        self.weights_K: Tensor

    def forward(self, x_TD: Tensor) -> Tensor:
        slots, count = len(self.weights_K), len(x_TD)
        indptr = torch.arange(slots + 1, device=x_TD.device) * count
        y_KTD = self.experts(x_TD.repeat(slots, 1), indptr).view(slots, count, -1)
        return torch.einsum("k,ktd->td", self.weights_K.to(y_KTD.dtype), y_KTD)


def extract_task(layer: MoELayer, task: int) -> OneTask:
    """The experts of ``task``, cut out of ``layer``: the same outputs for its tokens from K / E of the weights."""
    gate, experts = layer.gate, layer.experts
    if not isinstance(gate, TaskLevelGate):
        raise TypeError("only a layer that routes by task has the same experts for all of a task's tokens")
    weights, ids = best(gate.probabilities()[task : task + 1].detach(), gate.k)
    gate_up, down = experts.w_gate_up_EGD.detach()[ids[0]], experts.w_down_EDF.detach()[ids[0]]
    own = SwiGLUExperts(gate.k, down.shape[1], down.shape[2]).to(device=down.device, dtype=down.dtype)
    with torch.no_grad():
        own.w_gate_up_EGD.copy_(gate_up)
        own.w_down_EDF.copy_(down)
    return OneTask(own, (weights / weights.sum(dim=1, keepdim=True))[0])
