"""SMILE: choose the node, then the device in it.

Legend: T tokens, D width, N nodes, M experts a node, E = N M.
"""

from torch import Tensor, nn

from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Card, Context, LinearGate, Routed, best
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.ragged import rectangular

CARD = Card(title="SMILE, bi-level", source="arXiv 2212.05191", k="1", cost="(N + M) D")


class SmileGate(nn.Module):
    """N + M scores instead of N x M. The expert is node x M + local, its weight the product of both probabilities."""

    def __init__(self, width: int, num_experts: int, *, nodes: int | None = None, balance: float = 0.01) -> None:
        super().__init__()
        self.num_experts, self.balance = num_experts, balance
        self.nodes = nodes or max(n for n in range(1, num_experts + 1) if num_experts % n == 0 and n * n <= num_experts)
        if num_experts % self.nodes:
            raise KernelInputError(f"{num_experts} experts do not divide among {self.nodes} nodes.")
        self.local = num_experts // self.nodes
        self.inter, self.intra = LinearGate(width, self.nodes), LinearGate(width, self.local)

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        node_TN, local_TM = self.inter.logits(x_TD).softmax(dim=1), self.intra.logits(x_TD).softmax(dim=1)
        (p_T1, node_T1), (q_T1, local_T1) = best(node_TN, 1), best(local_TM, 1)
        routing = rectangular(node_T1 * self.local + local_T1, p_T1 * q_T1, num_experts=self.num_experts)
        scores_TE = (node_TN[:, :, None] * local_TM[:, None, :]).flatten(1)
        loss = balance_loss(node_TN, rectangular(node_T1, p_T1, num_experts=self.nodes))
        loss = loss + balance_loss(local_TM, rectangular(local_T1, q_T1, num_experts=self.local))
        return Routed(routing=routing, scores_TE=scores_TE, loss=self.balance * loss)


def messages(nodes: int, local: int) -> tuple[int, int]:
    """Messages one device sends: in a flat all-to-all, and in two levels."""
    return nodes * local - 1, (nodes - 1) + (local - 1)
