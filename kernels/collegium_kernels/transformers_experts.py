"""Our experts in transformers: ``from_pretrained(..., experts_implementation="collegium_int8")`` after ``register()``.

Legend: T tokens, D width, K slots.
"""

from typing import Any

import torch
from torch import Tensor

from collegium_kernels.backends import Precision
from collegium_kernels.moe import FusedMoE
from collegium_kernels.ragged import static_from_topk

NAMES: dict[str, Precision] = {"collegium": "native", "collegium_int8": "int8", "collegium_int4": "int4"}
PACKED = "_collegium_packed"


def register() -> None:
    """Add the names to transformers' registry of experts. Doing it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name, precision in NAMES.items():
        ALL_EXPERTS_FUNCTIONS.register(name, forward_for(precision))


def forward_for(precision: Precision) -> Any:
    """What transformers calls with a module of experts; it packs their weights at the first call, and again when they
    have changed, another precision is asked for, or gradients are (which torch has, and the fast kernels have not)."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if PACKED not in self.__dict__:
            _refuse_what_we_cannot(self)
        trains = torch.is_grad_enabled() and any(
            t.requires_grad for t in (hidden_states, top_k_weights, self.gate_up_proj, self.down_proj)
        )
        state = (precision, trains, *_state(self.gate_up_proj), *_state(self.down_proj))
        if self.__dict__.get(PACKED, (None,))[0] != state:
            self.__dict__[PACKED] = state, _pack(self, precision, trains=trains)
        moe: FusedMoE = self.__dict__[PACKED][1]
        # Routers of transformers mark slots without an expert by ids outside the experts'.
        return moe(hidden_states, static_from_topk(top_k_index, top_k_weights, num_experts=moe.num_experts))

    return forward


def _state(weights: Tensor) -> tuple[Any, ...]:
    """Changes with the numbers: by an optimiser's step, load_state_dict(), to()."""
    version = 0 if weights.is_inference() else weights._version
    return weights.data_ptr(), version, weights.dtype, weights.device


def _pack(module: Any, precision: Precision, *, trains: bool) -> FusedMoE:
    if trains and precision == "native":
        return FusedMoE(module.gate_up_proj, module.down_proj, backend="torch")
    gate_up, down = (weights if trains else weights.detach() for weights in (module.gate_up_proj, module.down_proj))
    return FusedMoE(gate_up, down, precision=precision)


def _refuse_what_we_cannot(module: Any) -> None:
    activation = type(getattr(module, "act_fn", None)).__name__.lower()
    if module.is_transposed or module.has_bias or not module.has_gate or "silu" not in activation:
        raise ValueError(
            f"{type(module).__name__} are not plain SwiGLU experts with weights (E, 2 F, D) and (E, D, F)."
        )
