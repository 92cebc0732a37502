"""COMET: k binary trees over the experts, and a learned order of their leaves.

Legend: T tokens, D width, E experts (a power of two), K trees, N = E - 1 nodes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from collegium_kernels.gates.base import Card, Context, Routed, fp32_mm
from collegium_kernels.gates.smooth_step import num_bits, smooth_step
from collegium_kernels.ragged import from_dense

CARD = Card(title="COMET, trees", source="arXiv 2306.02824", k="all, falling to at most 2", cost="k (2 E - 1) D")


class CometGate(nn.Module):
    """A leaf's weight is softmax over all trees of (leaf logit + log path); a path of 0 is out exactly.

    With ``search``, each tree also learns which expert hangs at which leaf, as a near permutation; the paper lets its
    ``temperature`` fall from 1e-3 to 1e-7 and its ``iterations`` rise from 20 to 150. ``harden`` then fixes it.
    """

    order_KE: Tensor | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        gamma: float = 1.0,
        entropy: float = 0.01,
        search: bool = False,
        temperature: float = 1e-3,
        iterations: int = 20,
    ) -> None:
        super().__init__()
        self.num_experts, self.k, self.gamma, self.entropy = num_experts, k, gamma, entropy
        self.depth = num_bits(num_experts)
        if 2**self.depth != num_experts:
            raise ValueError(f"COMET's trees need a power of two of experts, not {num_experts}")
        self.nodes = nn.Parameter(torch.randn(k * (num_experts - 1), width) / width**0.5 * gamma / 4)
        self.leaves = nn.Parameter(torch.randn(k * num_experts, width) / width**0.5)
        self.temperature, self.iterations = temperature, iterations
        self.search_KEE = nn.Parameter(torch.randn(k, num_experts, num_experts) * temperature) if search else None
        self.register_buffer("order_KE", None)
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    def forward(self, x_TD: Tensor, context: Context) -> Routed:
        x_TD = x_TD.float()
        steps_TKN = smooth_step(fp32_mm(x_TD, self.nodes), self.gamma).view(-1, self.k, self.num_experts - 1)
        paths_TKE = _paths(steps_TKN, self.depth)
        leaves_TKE = fp32_mm(x_TD, self.leaves).view(-1, self.k, self.num_experts)
        masked = torch.where(paths_TKE > 0, leaves_TKE + paths_TKE.clamp(min=1e-30).log(), -torch.inf)
        weights_TE = self._to_experts(masked.flatten(1).softmax(dim=1).view_as(masked), context.generator).sum(dim=1)
        loss = -torch.xlogy(paths_TKE, paths_TKE.clamp(min=1e-9)).sum(dim=2).mean() if len(x_TD) else weights_TE.sum()
        routing = from_dense(weights_TE, weights_TE > 0)
        return Routed(routing=routing, scores_TE=weights_TE, loss=self.entropy * loss)

    def _to_experts(self, leaves_TKE: Tensor, generator: torch.Generator | None) -> Tensor:
        """From weights of leaves to weights of the experts that hang there."""
        if self.order_KE is not None:
            return torch.zeros_like(leaves_TKE).scatter(2, self.order_KE.expand_as(leaves_TKE), leaves_TKE)
        if self.search_KEE is None:
            return leaves_TKE
        scores_KEE: Tensor = self.search_KEE
        if self.training:
            noise = torch.rand(scores_KEE.shape, generator=generator).clamp(1e-9, 1 - 1e-7).to(scores_KEE.device)
            scores_KEE = scores_KEE - self.temperature * (-noise.log()).log()
        near_KEE = sinkhorn(scores_KEE, temperature=self.temperature, iterations=self.iterations)
        return torch.einsum("tke,kef->tkf", leaves_TKE, near_KEE)

    def harden(self) -> None:
        """Fix each tree's permutation as the best assignment (the Hungarian method): the gate is then sparse again."""
        from scipy.optimize import linear_sum_assignment

        if self.search_KEE is None:
            raise ValueError("this gate was made without search: there is no order to fix")
        best = [linear_sum_assignment(scores, maximize=True)[1] for scores in self.search_KEE.detach().cpu().numpy()]
        self.order_KE = torch.stack([torch.as_tensor(row) for row in best]).to(self.search_KEE.device)


def _make_room(gate: CometGate, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hardened gate's checkpoint holds an order; torch loads buffers only where there are some already."""
    saved = state.get(prefix + "order_KE")
    gate.order_KE = None if saved is None else torch.empty_like(saved, device=gate.nodes.device)


def _paths(steps_TKN: Tensor, depth: int) -> Tensor:
    """The probability of each leaf: nodes are in breadth-first order."""
    paths = torch.ones_like(steps_TKN[..., :1])
    for level in range(depth):
        here = steps_TKN[..., 2**level - 1 : 2 ** (level + 1) - 1]
        paths = torch.stack([paths * here, paths * (1 - here)], dim=-1).flatten(-2)
    return paths


def sinkhorn(scores_EE: Tensor, *, temperature: float = 1e-3, iterations: int = 20) -> Tensor:
    """A doubly stochastic matrix near the permutation that ``scores_EE`` favours; more dimensions in front are batches.

    Gumbel noise on the scores explores.
    """
    log_EE = scores_EE.double() / temperature
    for _ in range(iterations):
        log_EE = log_EE - log_EE.logsumexp(dim=-1, keepdim=True)
        log_EE = log_EE - log_EE.logsumexp(dim=-2, keepdim=True)
    return log_EE.exp().to(scores_EE.dtype)
