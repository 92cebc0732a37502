"""Experts on the CPU: int8 and int4 in our C++, bf16 in vLLM's kernel."""

import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.cpu import vllm_bf16
from collegium_kernels.cpu.build import build, cache_folder, find_compiler
from collegium_kernels.cpu.emulated import emulated_moe
from collegium_kernels.cpu.native import NativeMoE
from collegium_kernels.cpu.pack import pack
from collegium_kernels.errors import BackendUnavailable
from collegium_kernels.grouped import add_cheap_experts
from collegium_kernels.quant import Quantised, quantise
from collegium_kernels.ragged import Routing

LOG = logging.getLogger(__name__)
BITS = {"int8": 8, "int4": 4}


class CpuBackend:
    """``compiler`` and ``folder`` default to the first on PATH and the user's cache; None for no compiler at all."""

    name = "cpu"
    differentiable = False

    def __init__(self, compiler: str | None = "find", folder: Path | None = None, *, portable: bool = False) -> None:
        self._compiler = find_compiler() if compiler == "find" else compiler
        self._folder = folder
        self._portable = portable

    def refuses(self, weights: ExpertWeights) -> str | None:
        if weights.gate_up_EGD.device.type != "cpu":
            return f"the weights are on {weights.gate_up_EGD.device}"
        if weights.precision != "native":
            return None
        if weights.gate_up_EGD.dtype != torch.bfloat16:
            return f"no kernel here for {weights.gate_up_EGD.dtype}: bf16, int8 and int4 only"
        return vllm_bf16.why_not(weights)

    def how(self, weights: ExpertWeights) -> str:
        if weights.precision == "native":
            return "vLLM's bf16 kernel"
        native, reason = self._native()
        if native is None:
            return f"{weights.precision} emulated in torch: {reason}"
        return f"{weights.precision} in C++ {'for any CPU' if native.portable else 'for AVX512-VNNI'}"

    def prepare(self, weights: ExpertWeights) -> Runner:
        if weights.precision == "native":
            return vllm_bf16.prepare(weights)
        bits, (E, _, F) = BITS[weights.precision], weights.shape
        gate_up = quantise(weights.gate_up_EGD.detach(), bits=bits, group=weights.group)
        down = quantise(weights.down_EDF.detach(), bits=bits, group=weights.group)
        native, reason = self._native()
        if native is None:
            _tell_once(reason)
            return lambda x_TD, routing: emulated_moe(x_TD, gate_up, down, routing).to(x_TD.dtype)
        return native_runner(native, gate_up, down, expert_width=F, num_experts=E)

    def _native(self) -> tuple[NativeMoE | None, str]:
        """The library, or why there is none."""
        if self._compiler is None:
            return None, "no C++ compiler on PATH (g++, clang++ or c++)"
        try:
            return NativeMoE(build(self._compiler, self._folder or cache_folder()), portable=self._portable), ""
        except BackendUnavailable as exc:
            return None, str(exc)


@cache
def _tell_once(reason: str) -> None:
    """A model has many layers, and each prepares its own experts."""
    LOG.warning("int8 and int4 experts run in torch here, 10 to 70 times slower than compiled: %s", reason)


def native_runner(
    native: NativeMoE, gate_up: Quantised, down: Quantised, *, expert_width: int, num_experts: int
) -> Runner:
    """Packs; the codes themselves are then free to go."""
    w_gate_up, w_down = pack(gate_up, gate_up=True), pack(down, gate_up=False)

    def run(x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = native(x_TD, w_gate_up, w_down, routing, expert_width=expert_width, num_experts=num_experts)
        return add_cheap_experts(y_TD, x_TD, routing).to(x_TD.dtype)

    return run
