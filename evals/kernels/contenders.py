"""Everything that computes the same layer: ours and the ones to beat. Each is made for one shape.

Legend: T tokens, D width, E experts, F expert width, K slots, N output rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from collegium_kernels.backends import ExpertWeights
from collegium_kernels.cpu import vllm_bf16
from collegium_kernels.cpu.backend import float_runner, native_runner
from collegium_kernels.cpu.build import build, cache_folder, find_compiler
from collegium_kernels.cpu.native import NativeMoE
from collegium_kernels.quant import Quantised
from collegium_kernels.ragged import Routing, by_expert
from torch import Tensor
from torch.nn import functional

from evals.kernels.shape import Shape

Run = Callable[[Tensor, Routing], Tensor]
# What pip found for Python 3.11, and why it is not in the table. llama.cpp's line goes when its libraries are there.
NOT_BESIDE = {
    "zentorch": "not run: 2.14.0.1 is the only version on the index, vLLM 0.29 pins torch 2.13",
    "kt-kernel": "not run: 0.7.2 asks for torch 2.9.1; its AVX512 extension imports, and is not wired in",
    "llama.cpp": "not run: install llama-cpp-python, or pass the folder of its libraries with --llama-cpp",
}


def bf16_weights(shape: Shape) -> ExpertWeights:
    gate_up = torch.randn(shape.E, 2 * shape.F, shape.D, dtype=torch.bfloat16) / 45
    return ExpertWeights(
        gate_up_EGD=gate_up, down_EDF=torch.randn(shape.E, shape.D, shape.F, dtype=torch.bfloat16) / 32
    )


def codes(shape: Shape, bits: int, group: int) -> tuple[Quantised, Quantised]:
    """Random codes: the time does not depend on their values."""

    def make(N: int, K: int) -> Quantised:
        drawn = torch.randint(0, 1 << bits, (shape.E, N, K), dtype=torch.uint8)
        scales = torch.full((shape.E, N, K // (group or K)), 1e-3, dtype=torch.bfloat16)
        return Quantised(codes_ENK=drawn, scales_ENG=scales, bits=bits, group=group, inputs=K)

    return make(2 * shape.F, shape.D), make(shape.D, shape.F)


def ours(shape: Shape, bits: int, group: int, *, planes: int = 1) -> Run:
    drawn = codes(shape, bits, group)
    return native_runner(_native(), *drawn, expert_width=shape.F, num_experts=shape.E, planes=planes)


def ours_bf16(weights: ExpertWeights) -> Run:
    native = _native()
    if not native.runs_floats:
        raise RuntimeError("the bf16 kernel needs AVX512 to be measured")
    return float_runner(native, weights)


def _native() -> NativeMoE:
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("our kernels need a C++ compiler to be measured")
    return NativeMoE(build(compiler, cache_folder()))


def bound_bf16(weights: ExpertWeights) -> Run:
    reason = vllm_bf16.why_not(weights)
    if reason:
        raise RuntimeError(reason)
    return vllm_bf16.prepare(weights)


def torch_grouped_mm(weights: ExpertWeights) -> Run:
    up, down = weights.gate_up_EGD.mT, weights.down_EDF.mT

    def run(x_TD: Tensor, routing: Routing) -> Tensor:
        rows = by_expert(routing)
        offsets = rows.indptr_E1[1:].int()
        gate_PF, up_PF = functional.grouped_mm(x_TD[rows.tokens_P], up, offs=offsets).chunk(2, dim=1)
        y_PD = functional.grouped_mm(functional.silu(gate_PF) * up_PF, down, offs=offsets)
        weighted = y_PD * routing.weights_P[rows.pairs_P, None].to(y_PD.dtype)
        return torch.zeros_like(x_TD).index_add_(0, rows.tokens_P, weighted)

    return run


def vllm_default(weights: ExpertWeights) -> Run:
    """vLLM's own choice on CPUs without AMX: the "vec" code of its grouped products."""
    vllm_bf16.load()
    ops: Any = torch.ops._C
    packed = []
    for weight in (weights.gate_up_EGD, weights.down_EDF):
        target = torch.empty_like(weight)
        ops.prepack_moe_weight(weight, target, "vec")
        packed.append(target)

    def run(x_TD: Tensor, routing: Routing) -> Tensor:
        out = torch.empty_like(x_TD)
        K = routing.num_pairs // len(x_TD)
        ids, scale = routing.expert_ids_P.view(-1, K).int(), routing.weights_P.view(-1, K)
        ops.cpu_fused_moe(out, x_TD, *packed, None, None, scale, ids, False, "silu", "vec")
        return out

    return run


def vllm_int8(shape: Shape) -> Run:
    """The int8 kernel in vLLM's binary, which vLLM itself refuses without AMX."""
    vllm_bf16.load()
    ops: Any = torch.ops._C
    sizes = ((2 * shape.F, shape.D), (shape.D, shape.F))
    packed = [ops.convert_weight_packed(torch.randint(-127, 128, (shape.E, *s), dtype=torch.int8)) for s in sizes]
    scales = [torch.full((shape.E, s[0]), 1e-3) for s in sizes]

    def run(x_TD: Tensor, routing: Routing) -> Tensor:
        K = routing.num_pairs // len(x_TD)
        ids, weight = routing.expert_ids_P.view(-1, K).int(), routing.weights_P.view(-1, K)
        y_TD: Tensor = ops.fused_experts_cpu(x_TD, *packed, weight, ids, False, 1, *scales, *(None,) * 7, True)
        return y_TD

    return run
