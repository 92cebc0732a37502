"""vLLM's bf16 expert kernel, from the shared library in its wheel; vLLM itself is not imported.

Legend: T tokens, D width, P pairs, K slots.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from collegium_kernels.backends import ExpertWeights, Runner
from collegium_kernels.errors import BackendUnavailable
from collegium_kernels.grouped import add_cheap_experts
from collegium_kernels.ragged import Routing, rectangular
from collegium_kernels.reference import reference_moe
from collegium_kernels.steady import segment_sum

ALIGNMENT = 32
# A kernel that is off by more than this in the self-test is not the kernel we know.
TOLERANCE = 0.006


def why_not(weights: ExpertWeights) -> str | None:
    """Why the kernel cannot run these weights; None once it has passed the self-test at their width."""
    _, D, F = weights.shape
    if weights.gate_up_EGD.dtype != torch.bfloat16:
        return f"vLLM's kernel is for bf16, not {weights.gate_up_EGD.dtype}"
    if D % ALIGNMENT or F % ALIGNMENT:
        return f"vLLM's bf16 kernel needs widths in multiples of {ALIGNMENT}, not {D} and {F}"
    try:
        load()
    except BackendUnavailable as exc:
        return str(exc)
    error = self_test(D, F)
    return None if error <= TOLERANCE else f"vLLM's bf16 kernel is off by {error:.2%} in the self-test"


def load() -> None:
    """Register the operators, once a process: torch loads a library only once."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise BackendUnavailable("vLLM is not installed, whose bf16 kernel runs here")
    library = Path(spec.origin).parent / "_C.abi3.so"
    if not torch.cpu._is_avx512_bf16_supported():
        raise BackendUnavailable("this CPU has no AVX512-BF16, for which vLLM's kernel is compiled")
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        torch.ops._C.fused_experts_cpu  # noqa: B018 - raises when the library has no such kernel
    except (OSError, AttributeError) as exc:
        raise BackendUnavailable(f"{library.name} of vLLM has no bf16 expert kernel here: {exc}") from exc


@cache
def self_test(D: int, F: int) -> float:
    """The relative error of two experts against the loop in fp32, once a process: at Mixtral's width it takes seconds,
    and every layer asks more than once."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down = ((torch.randn(2, n, k, generator=generator) / k**0.5).bfloat16() for n, k in ((2 * F, D), (D, F)))
    x = torch.randn(3, D, generator=generator).bfloat16()
    routing = rectangular(torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.rand(3, 2, generator=generator), num_experts=2)
    wanted = reference_moe(x, gate_up, down, routing, dtype=torch.float32).float()
    got = prepare(ExpertWeights(gate_up_EGD=gate_up, down_EDF=down))(x, routing).float()
    return float((got - wanted).norm() / wanted.norm())


def prepare(weights: ExpertWeights) -> Runner:
    packed = [
        torch.ops._C.convert_weight_packed(w.contiguous())
        for w in (weights.gate_up_EGD.detach(), weights.down_EDF.detach())
    ]

    def run(x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = _run(x_TD.contiguous(), packed, routing).to(x_TD.dtype)
        return add_cheap_experts(y_TD, x_TD, routing).to(x_TD.dtype)

    return run


def _run(x_TD: Tensor, packed: list[Tensor], routing: Routing) -> Tensor:
    """One call for a rectangle; otherwise every pair is a token of its own, so that no slot is filled up.

    Which of the two depends on the gate alone: rounding differs, and must not change with the batch.
    """
    if not bool((routing.expert_ids_P < routing.num_experts).any()):  # the kernel would divide by zero
        return torch.zeros_like(x_TD)
    ids, weights = routing.expert_ids_P.int(), routing.weights_P.detach().float()
    if routing.fixed_k is not None:
        return _kernel(x_TD, packed, weights.view(-1, routing.fixed_k), ids.view(-1, routing.fixed_k))
    keep_P = ids < routing.num_experts if routing.static else slice(None)
    tokens_P = routing.tokens_P()[keep_P]
    y_PD = _kernel(x_TD[tokens_P], packed, weights[keep_P, None], ids[keep_P, None])
    counts_T = torch.bincount(tokens_P, minlength=routing.num_tokens)
    indptr_T1 = torch.nn.functional.pad(counts_T.cumsum(0), (1, 0))
    return segment_sum(y_PD, torch.ones(len(tokens_P)), indptr_T1, torch.arange(len(tokens_P)))


def _kernel(x_TD: Tensor, packed: list[Tensor], weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    nothing = (None,) * 9
    y_TD: Tensor = torch.ops._C.fused_experts_cpu(
        x_TD, *packed, weights_TK.contiguous(), ids_TK.contiguous(), False, 0, *nothing, True
    )
    return y_TD
