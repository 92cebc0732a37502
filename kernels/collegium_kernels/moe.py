"""A mixture-of-experts layer in four verbs, and the one call that fuses the last three.

Legend: T tokens, D width, E experts, F expert width, G = 2F, P rows (token, expert).
"""

import torch
from torch import Tensor, nn

from collegium_kernels.backends import ExpertWeights, Precision, choose
from collegium_kernels.errors import KernelInputError, require
from collegium_kernels.gates.base import Context, Gate, Routed
from collegium_kernels.grouped import combine, dispatch, run_experts
from collegium_kernels.ragged import Routing, by_expert, check_routing


class SwiGLUExperts(nn.Module):
    """E feed-forward networks of one shape."""

    def __init__(self, num_experts: int, width: int, expert_width: int) -> None:
        super().__init__()
        self.w_gate_up_EGD = nn.Parameter(torch.randn(num_experts, 2 * expert_width, width) / width**0.5)
        self.w_down_EDF = nn.Parameter(torch.randn(num_experts, width, expert_width) / expert_width**0.5)

    def forward(self, x_PD: Tensor, indptr_E1: Tensor) -> Tensor:
        return run_experts(x_PD, self.w_gate_up_EGD, self.w_down_EDF, indptr_E1)


class MoELayer(nn.Module):
    """Any gate over any experts; ``shared`` sees every token. This path trains; FusedMoE serves."""

    def __init__(self, gate: Gate, experts: SwiGLUExperts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.experts, self.shared = gate, experts, shared

    def forward(self, x_TD: Tensor, context: Context | None = None) -> tuple[Tensor, Routed]:
        require(x_TD.dim() == 2, "x_TD", x_TD, "two dimensions, (tokens, width): flatten sequences first")
        routed = self.gate(x_TD, context or Context())  # route
        rows = by_expert(routed.routing)
        x_PD = dispatch(x_TD, rows)
        y_PD = self.experts(x_PD, rows.indptr_E1)
        y_TD = combine(y_PD, x_TD, routed.routing, rows)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)), routed


class FusedMoE:
    """Experts packed once for the backend that runs them."""

    def __init__(
        self,
        w_gate_up_EGD: Tensor,
        w_down_EDF: Tensor,
        *,
        precision: Precision = "native",
        group: int = 128,
        activation_bits: int = 8,
        backend: str = "auto",
    ) -> None:
        weights = ExpertWeights(
            gate_up_EGD=w_gate_up_EGD,
            down_EDF=w_down_EDF,
            precision=precision,
            group=group,
            activation_bits=activation_bits,
        )
        self.num_experts, self.width, _ = weights.shape
        self.dtype, self.device = w_gate_up_EGD.dtype, w_gate_up_EGD.device
        self._trained = weights.trained
        self._choice = choose(weights, backend)
        self._run = self._choice.backend.prepare(weights)

    def explain(self) -> str:
        """Which backend runs, and why the ones before it do not."""
        return str(self._choice)

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if not isinstance(x_TD, Tensor):
            raise KernelInputError(f"x_TD is a {type(x_TD).__name__}, not a tensor.")
        require(
            x_TD.dim() == 2 and x_TD.shape[1] == self.width, "x_TD", x_TD, f"two dimensions, (tokens, {self.width})"
        )
        require(x_TD.dtype == self.dtype, "x_TD", x_TD, f"the dtype of the weights, {self.dtype}")
        require(x_TD.device == self.device, "x_TD", x_TD, f"the device of the weights, {self.device}")
        check_routing(routing, num_tokens=x_TD.shape[0], num_experts=self.num_experts, device=self.device)
        if routing.add_TD is not None:
            wanted = f"the shape of x_TD, {tuple(x_TD.shape)}"
            require(routing.add_TD.shape == x_TD.shape, "routing.add_TD", routing.add_TD, wanted)
        self._refuse_gradients(x_TD, routing)
        return self._run(x_TD, routing)

    def _refuse_gradients(self, x_TD: Tensor, routing: Routing) -> None:
        given = (x_TD, routing.weights_P, routing.copy_T, routing.add_TD)
        wanted = self._trained or any(t is not None and t.requires_grad for t in given)
        if wanted and torch.is_grad_enabled() and not self._choice.backend.differentiable:
            name = self._choice.backend.name
            raise KernelInputError(f"Backend '{name}' has no gradients: use backend='torch', or torch.no_grad().")


def fused_moe(
    x_TD: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, routing: Routing, *, backend: str = "auto"
) -> Tensor:
    """``y_TD`` of the experts under ``routing``. To call it often, make a FusedMoE: it packs the weights once."""
    return FusedMoE(w_gate_up_EGD, w_down_EDF, backend=backend)(x_TD, routing)
