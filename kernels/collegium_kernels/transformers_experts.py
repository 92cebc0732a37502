"""Our experts in transformers: ``from_pretrained(..., experts_implementation="collegium_int8")`` after ``register()``.

Legend: T tokens, D width, K slots.
"""

import weakref
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


class Packed:
    """A module's experts, and what they were made for. A copy of the module, pickled or not, makes its own."""

    def __init__(self, moe: FusedMoE, weights: tuple[Tensor, ...], made_for: tuple[Any, ...]) -> None:
        self.moe, self._weights, self._made_for = moe, tuple(weakref.ref(w) for w in weights), made_for

    def fits(self, weights: tuple[Tensor, ...], made_for: tuple[Any, ...]) -> bool:
        """Weights that are computed at each call (parametrised, or with adapters) are never the same: new numbers may
        lie at the old address."""
        same = all(mine() is theirs for mine, theirs in zip(self._weights, weights, strict=True))
        return same and self._made_for == made_for

    def __reduce__(self) -> Any:
        return type(None), ()


def forward_for(precision: Precision) -> Any:
    """What transformers calls with a module of experts; it packs their weights at the first call, and again when they
    have changed, another precision is asked for, or gradients are (which torch has, and the fast kernels have not)."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        packed: Packed | None = self.__dict__.get(PACKED)
        if packed is None:
            _refuse_what_we_cannot(self)
        weights = self.gate_up_proj, self.down_proj
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, top_k_weights, *weights))
        made_for = precision, trains, *(_state(each) for each in weights)
        if packed is None or not packed.fits(weights, made_for):
            packed = self.__dict__[PACKED] = Packed(_pack(*weights, precision, trains=trains), weights, made_for)
        # Routers of transformers mark slots without an expert by ids outside the experts'.
        routing = static_from_topk(top_k_index, top_k_weights, num_experts=packed.moe.num_experts)
        return packed.moe(hidden_states, routing)

    return forward


def _state(weights: Tensor) -> tuple[Any, ...]:
    """Changes with the numbers: by an optimiser's step, load_state_dict(), to(). Torch does not tell when numbers are
    written in place through ``.data``."""
    version = 0 if weights.is_inference() else weights._version
    return weights.data_ptr(), version, weights.dtype, weights.device


def _pack(gate_up: Tensor, down: Tensor, precision: Precision, *, trains: bool) -> FusedMoE:
    if trains and precision == "native":
        return FusedMoE(gate_up, down, backend="torch")
    if not trains:
        gate_up, down = gate_up.detach(), down.detach()
    return FusedMoE(gate_up, down, precision=precision)


def _refuse_what_we_cannot(module: Any) -> None:
    activation = type(getattr(module, "act_fn", None)).__name__.lower()
    if module.is_transposed or module.has_bias or not module.has_gate or "silu" not in activation:
        raise ValueError(
            f"{type(module).__name__} are not plain SwiGLU experts with weights (E, 2 F, D) and (E, D, F)."
        )
