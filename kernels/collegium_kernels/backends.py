"""Which code runs the experts: one file a backend, chosen once, and able to say why."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

from torch import Tensor

from collegium_kernels.errors import BackendUnavailable, KernelInputError, require
from collegium_kernels.quant import ACTIVATION_BITS, GROUPS
from collegium_kernels.ragged import Routing

Precision = Literal["native", "int8", "int4"]
Runner = Callable[[Tensor, Routing], Tensor]

# In the order in which they are tried.
BACKENDS = {
    "triton": "collegium_kernels.triton.backend:TritonBackend",
    "cpu": "collegium_kernels.cpu.backend:CpuBackend",
    "torch": "collegium_kernels.grouped:TorchBackend",
    "reference": "collegium_kernels.reference:ReferenceBackend",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """SwiGLU experts. ``gate_up_EGD`` has the F gate rows first, then the F up rows; ``down_EDF`` leads back.

    ``precision`` is what they are stored in when they run; ``group`` is how many weights share a scale. Quantised
    experts see activations in 8 bits, or in 16: as a row of 8 and a second one of what rounding left.
    """

    gate_up_EGD: Tensor
    down_EDF: Tensor
    precision: Precision = "native"
    group: int = 128
    activation_bits: int = 8

    def __post_init__(self) -> None:
        gate_up, down = self.gate_up_EGD, self.down_EDF
        require(gate_up.dim() == 3, "w_gate_up_EGD", gate_up, "three dimensions (experts, 2 x F, D)")
        require(
            gate_up.shape[1] % 2 == 0, "w_gate_up_EGD", gate_up, "an even second dimension: gate rows, then up rows"
        )
        E, G, D = gate_up.shape
        require(down.shape == (E, D, G // 2), "w_down_EDF", down, f"shape {(E, D, G // 2)}, from w_gate_up_EGD")
        require(gate_up.is_floating_point(), "w_gate_up_EGD", gate_up, "a floating-point dtype")
        require(down.dtype == gate_up.dtype, "w_down_EDF", down, f"the dtype of w_gate_up_EGD, {gate_up.dtype}")
        require(down.device == gate_up.device, "w_down_EDF", down, f"the device of w_gate_up_EGD, {gate_up.device}")
        if self.precision not in ("native", "int8", "int4"):
            raise KernelInputError(f"precision '{self.precision}' is not one of native, int8, int4.")
        empty = self.precision != "native" and 0 in gate_up.shape
        require(not empty, "w_gate_up_EGD", gate_up, f"at least one of everything, to be stored as {self.precision}")
        if self.precision != "native" and self.group not in GROUPS:
            raise KernelInputError(f"group {self.group} is not one of 0 (the whole row), 32, 64, 128.")
        if self.activation_bits not in ACTIVATION_BITS:
            raise KernelInputError(f"activation_bits {self.activation_bits} is not one of 8, 16.")
        if self.precision == "native" and self.activation_bits != 8:
            raise KernelInputError("activation_bits is for precision int8 and int4; native experts round nothing.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, D, F)."""
        E, G, D = self.gate_up_EGD.shape
        return E, D, G // 2

    @property
    def trained(self) -> bool:
        return self.gate_up_EGD.requires_grad or self.down_EDF.requires_grad


class Backend(Protocol):
    name: str
    differentiable: bool

    def refuses(self, weights: ExpertWeights) -> str | None:
        """Why these weights cannot run here; None when they can."""

    def how(self, weights: ExpertWeights) -> str:
        """Which of the backend's own ways these weights will take."""

    def prepare(self, weights: ExpertWeights) -> Runner:
        """Pack the weights once; the runner takes tokens and a routing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The backend that will run, and why each one tried before it will not."""

    backend: Backend
    how: str
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.backend.name}: chosen, {self.how}"]
        return "\n".join(lines + [f"{name}: {reason}" for name, reason in self.refused])


def choose(weights: ExpertWeights, backend: str = "auto") -> Choice:
    """The first backend that accepts, or the one asked for. Raises BackendUnavailable with every reason."""
    if backend != "auto" and backend not in BACKENDS:
        raise KernelInputError(f"backend '{backend}' is not one of auto, {', '.join(BACKENDS)}.")
    gate_up = weights.gate_up_EGD
    require(gate_up.device.type != "meta", "w_gate_up_EGD", gate_up, "numbers: a meta tensor has none")
    refused: list[tuple[str, str]] = []
    for name in BACKENDS if backend == "auto" else (backend,):
        candidate = load(name)
        reason = candidate.refuses(weights)
        if reason is None:
            return Choice(backend=candidate, how=candidate.how(weights), refused=tuple(refused))
        refused.append((name, reason))
    raise BackendUnavailable("No backend can run these weights. " + "; ".join(f"{n}: {r}" for n, r in refused))


def load(name: str) -> Backend:
    module, _, attribute = BACKENDS[name].partition(":")
    made: Backend = getattr(import_module(module), attribute)()
    return made
