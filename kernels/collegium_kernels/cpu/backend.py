"""Experts on the CPU: int8, int4 and floats in our C++, bf16 in vLLM's kernel where that is faster."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.cpu import vllm_bf16
from collegium_kernels.cpu.build import build, cache_folder, find_compiler
from collegium_kernels.cpu.emulated import emulated_moe
from collegium_kernels.cpu.native import KINDS, NativeMoE
from collegium_kernels.cpu.pack import pack, pack_floats
from collegium_kernels.errors import BackendUnavailable
from collegium_kernels.grouped import add_cheap_experts
from collegium_kernels.quant import Quantised, quantise
from collegium_kernels.ragged import Routing

LOG = logging.getLogger(__name__)
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatWay:
    """One way to run unquantised weights. ``why_not`` is None for weights it takes."""

    how: str
    why_not: Callable[[ExpertWeights], str | None]
    prepare: Callable[[ExpertWeights], Runner]


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
        if weights.trained and torch.is_grad_enabled():
            return "the weights ask for gradients: detach() them to serve"
        try:
            self._float_way(weights)
        except BackendUnavailable as exc:
            return str(exc)
        return None

    def how(self, weights: ExpertWeights) -> str:
        if weights.precision == "native":
            return self._float_way(weights).how
        native, reason = self._native()
        what = f"{weights.precision} weights, {weights.activation_bits}-bit activations,"
        if native is None:
            return f"{what} emulated in torch: {reason}"
        return f"{what} in C++ {'for any CPU' if native.portable else 'for AVX512-VNNI'}"

    def prepare(self, weights: ExpertWeights) -> Runner:
        if weights.precision == "native":
            return self._float_way(weights).prepare(weights)
        bits, planes, (E, _, F) = BITS[weights.precision], weights.activation_bits // 8, weights.shape
        gate_up = quantise(weights.gate_up_EGD.detach(), bits=bits, group=weights.group)
        down = quantise(weights.down_EDF.detach(), bits=bits, group=weights.group)
        native, reason = self._native()
        if native is None:
            _tell_once(reason)
            return lambda x_TD, routing: emulated_moe(x_TD, gate_up, down, routing, planes=planes).to(x_TD.dtype)
        return native_runner(native, gate_up, down, expert_width=F, num_experts=E, planes=planes)

    def _native(self) -> tuple[NativeMoE | None, str]:
        """The library, or why there is none."""
        if self._compiler is None:
            return None, "no C++ compiler on PATH (g++, clang++ or c++)"
        return _load(self._compiler, self._folder or cache_folder(), self._portable)

    def _float_way(self, weights: ExpertWeights) -> FloatWay:
        """The faster way that takes the weights. Raises BackendUnavailable with every reason."""
        native, reason = self._native()
        theirs = FloatWay(how="vLLM's bf16 kernel", why_not=vllm_bf16.why_not, prepare=vllm_bf16.prepare)
        ways = [theirs]
        if native is not None:
            ours = FloatWay(
                how=f"{weights.gate_up_EGD.dtype} in C++ by fp32 products for AVX512".removeprefix("torch."),
                why_not=partial(_why_not_floats, native),
                prepare=partial(float_runner, native),
            )
            # Intel's cores multiply bf16 at half the rate of fp32, unless by AMX; AMD's at twice.
            slow_bf16 = native.on_intel and not torch.cpu._is_amx_tile_supported()
            ways = [ours, theirs] if slow_bf16 else [theirs, ours]
        reasons = [reason] if reason else []
        for way in ways:
            why_not = way.why_not(weights)
            if why_not is None:
                return way
            reasons.append(why_not)
        raise BackendUnavailable("; ".join(reasons))


@cache
def _load(compiler: str, folder: Path, portable: bool) -> tuple[NativeMoE | None, str]:
    """Once a process: a model has many layers, and a compiler that fails takes its time."""
    try:
        return NativeMoE(build(compiler, folder), portable=portable), ""
    except BackendUnavailable as exc:
        return None, str(exc)


@cache
def _tell_once(reason: str) -> None:
    """A model has many layers, and each prepares its own experts."""
    LOG.warning("int8 and int4 experts run in torch here, 10 to 70 times slower than compiled: %s", reason)


def _why_not_floats(native: NativeMoE, weights: ExpertWeights) -> str | None:
    if not native.runs_floats:
        return "this CPU has no AVX512, for which the C++ for floats is written"
    if weights.gate_up_EGD.dtype not in KINDS:
        return f"no C++ here for {weights.gate_up_EGD.dtype}"
    return "the experts are empty" if 0 in weights.gate_up_EGD.shape else None


def float_runner(native: NativeMoE, weights: ExpertWeights) -> Runner:
    """Packs; the weights themselves are then free to go."""
    E, _, F = weights.shape
    gate_up = pack_floats(weights.gate_up_EGD.detach(), gate_up=True)
    down = pack_floats(weights.down_EDF.detach(), gate_up=False)

    def run(x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = native.floats(x_TD, gate_up, down, routing, expert_width=F, num_experts=E)
        return add_cheap_experts(y_TD, x_TD, routing).to(x_TD.dtype)

    return run


def native_runner(
    native: NativeMoE, gate_up: Quantised, down: Quantised, *, expert_width: int, num_experts: int, planes: int = 1
) -> Runner:
    """Packs; the codes themselves are then free to go."""
    w_gate_up, w_down = pack(gate_up, gate_up=True), pack(down, gate_up=False)

    def run(x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = native(
            x_TD, w_gate_up, w_down, routing, expert_width=expert_width, num_experts=num_experts, planes=planes
        )
        return add_cheap_experts(y_TD, x_TD, routing).to(x_TD.dtype)

    return run
