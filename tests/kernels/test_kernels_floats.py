"""Float experts in our C++: as exact as fp32, the same bits in any company, and chosen where they are faster."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from collegium_kernels.backends import ExpertWeights, choose
from collegium_kernels.cpu import vllm_bf16
from collegium_kernels.cpu.backend import CpuBackend
from collegium_kernels.cpu.build import build, cache_folder, find_compiler
from collegium_kernels.cpu.native import NativeMoE
from collegium_kernels.errors import KernelError, KernelInputError
from collegium_kernels.moe import FusedMoE
from collegium_kernels.ragged import Routing, from_topk, rectangular, static_from_topk
from collegium_kernels.reference import reference_moe

Make = Callable[..., Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def native(user_cache: None) -> NativeMoE:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = NativeMoE(build(compiler, cache_folder()))
    if not library.runs_floats:
        pytest.skip("this CPU has no AVX512")
    return library


@pytest.fixture
def run_floats(native: NativeMoE) -> Callable[..., torch.Tensor]:
    from collegium_kernels.cpu.backend import float_runner

    def run(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, routing: Routing) -> torch.Tensor:
        return float_runner(native, ExpertWeights(gate_up_EGD=gate_up, down_EDF=down))(x, routing)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 1, 2, 9, 65, 257])
@pytest.mark.parametrize(("E", "D", "F"), [(1, 1, 1), (7, 33, 17), (64, 8, 8), (2, 600, 300)])
def test_equal_to_the_reference_on_edge_shapes(
    dtype: torch.dtype, T: int, E: int, D: int, F: int, run_floats: Any, make_experts: Make, make_routing: Make
) -> None:
    """The inputs are the dtype's, the arithmetic is fp32's: rounding comes once, at the end."""
    x, (gate_up, down) = torch.randn(T, D).to(dtype), make_experts(E, D, F, dtype)
    routing = make_routing(T, E, min(2, E), drop=0.2)
    got = run_floats(x.float(), gate_up, down, routing)
    wanted = reference_moe(x.float(), gate_up.float(), down.float(), routing)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1.3e-6)
    rounded = run_floats(x, gate_up, down, routing)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, got.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("E", "D", "F"), [(6, 70, 40), (1, 700, 300)])
def test_a_token_has_the_same_bits_alone_in_a_batch_and_on_two_threads(
    dtype: torch.dtype, E: int, D: int, F: int, run_floats: Any, make_experts: Make
) -> None:
    """One expert has more rows than a block, which share unpacked slices; a row alone does not."""
    x, experts = torch.randn(90, D).to(dtype), make_experts(E, D, F, dtype)
    ids, weights = torch.randint(-1, E, (90, 2)), torch.rand(90, 2)
    whole = run_floats(x, *experts, from_topk(ids, weights, num_experts=E))
    for some in (slice(0, 1), slice(4, 9), slice(20, 40), slice(89, 90)):
        assert torch.equal(
            run_floats(x[some], *experts, from_topk(ids[some], weights[some], num_experts=E)), whole[some]
        )
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run_floats(x, *experts, from_topk(ids, weights, num_experts=E)), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_with_its_token_and_its_expert(dtype: torch.dtype, run_floats: Any, make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(4, 40).to(dtype), make_experts(3, 40, 24, dtype)
    gate_up[1], down[1], x[2, 7] = float("nan"), float("nan"), float("inf")
    routing = rectangular(torch.tensor([[0], [1], [0], [2]]), torch.ones(4, 1), num_experts=3)
    assert run_floats(x, gate_up, down, routing).isfinite().all(1).tolist() == [True, False, False, True]


def test_identity_zero_and_static_pairs(run_floats: Any, make_experts: Make) -> None:
    x, experts = torch.randn(4, 40), make_experts(3, 40, 24)
    ids, weights = torch.tensor([[0, 3], [3, 4], [4, 4], [1, 2]]), torch.rand(4, 2)
    exact, static = (make(ids, weights, num_experts=3, identity_ids=(3,)) for make in (from_topk, static_from_topk))
    got = run_floats(x, *experts, exact)
    torch.testing.assert_close(got[1], weights[1, 0] * x[1])
    assert (got[2] == 0).all()
    assert torch.equal(got, run_floats(x, *experts, static))


def test_the_library_checks_the_row_pointers_itself(run_floats: Any, make_experts: Make) -> None:
    bad = Routing(
        indptr_T1=torch.tensor([0, 9, 2]), expert_ids_P=torch.tensor([0, 1]), weights_P=torch.ones(2), num_experts=2
    )
    with pytest.raises(KernelInputError, match="indptr_T1"):
        run_floats(torch.randn(2, 32), *make_experts(2, 32, 32), bad)


# Threads: those of torch's OpenMP


TEAM = ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@pytest.mark.parametrize("size", [1, 3, None])
def test_any_team_does_all_the_work(
    size: int | None, native: NativeMoE, monkeypatch: pytest.MonkeyPatch, run_floats: Any, make_experts: Make
) -> None:
    """OpenMP may grant fewer threads than it is asked for; without it there are threads of our own."""
    asked: list[int] = []

    @TEAM
    def team(work: Any, data: int, threads: int, _: int) -> None:
        asked.append(threads)
        for _ in range(size or 0):
            work(data)

    x, experts = torch.randn(40, 200), make_experts(5, 200, 100)
    routing = from_topk(torch.randint(-1, 5, (40, 2)), torch.rand(40, 2), num_experts=5)
    whole = run_floats(x, *experts, routing)
    address = ctypes.cast(team, ctypes.c_void_p).value if size else None
    monkeypatch.setattr(native, "_team", address)
    torch.set_num_threads(3)
    assert torch.equal(run_floats(x, *experts, routing), whole)
    assert set(asked) == ({3} if size else set())


@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch has other threads")
def test_the_team_is_torchs(native: NativeMoE) -> None:
    assert native._team is not None


# Who runs them


def weights_of(make_experts: Make, dtype: torch.dtype = torch.bfloat16) -> ExpertWeights:
    gate_up, down = make_experts(2, 64, 32, dtype)
    return ExpertWeights(gate_up_EGD=gate_up, down_EDF=down)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_choice_is_explained(dtype: torch.dtype, native: NativeMoE, make_experts: Make) -> None:
    ours = f"{dtype} in C++ by fp32 products for AVX512".removeprefix("torch.")
    known = [ours, "vLLM's bf16 kernel"] if dtype == torch.bfloat16 else [ours]
    assert CpuBackend().how(weights_of(make_experts, dtype)) in known


@pytest.mark.parametrize(("intel", "amx", "ours"), [(True, False, True), (True, True, False), (False, False, False)])
def test_the_faster_bf16_comes_first(
    intel: bool, amx: bool, ours: bool, native: NativeMoE, monkeypatch: pytest.MonkeyPatch, make_experts: Make
) -> None:
    weights, backend = weights_of(make_experts), CpuBackend()
    if reason := vllm_bf16.why_not(weights):
        pytest.skip(reason)
    monkeypatch.setattr(native, "on_intel", intel)
    monkeypatch.setattr(backend, "_native", lambda: (native, ""))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert ("C++" in backend.how(weights)) == ours


def test_without_avx512_there_are_vllm_and_torch(native: NativeMoE, make_experts: Make) -> None:
    old = CpuBackend(portable=True)
    reason = old.refuses(weights_of(make_experts, torch.float32))
    assert reason is not None
    assert "this CPU has no AVX512" in reason
    assert "for bf16, not torch.float32" in reason
    if vllm_bf16.why_not(weights_of(make_experts)) is None:
        assert old.how(weights_of(make_experts)) == "vLLM's bf16 kernel"


def test_weights_that_train_go_to_torch(native: NativeMoE, make_experts: Make, make_routing: Make) -> None:
    gate_up, down = (w.requires_grad_() for w in make_experts(3, 32, 32))
    moe = FusedMoE(gate_up, down)
    assert moe.explain().startswith("torch: chosen")
    assert "cpu: the weights ask for gradients: detach() them" in moe.explain()
    moe(torch.randn(5, 32), make_routing(5, 3)).sum().backward()
    assert gate_up.grad is not None
    with torch.no_grad():  # to serve only: the faster one, which refuses gradients later
        served = FusedMoE(gate_up, down)
        assert served.explain().startswith("cpu: chosen")
        served(torch.randn(5, 32), make_routing(5, 3))
    with pytest.raises(KernelInputError, match="no gradients"):
        served(torch.randn(5, 32), make_routing(5, 3))
    frozen = FusedMoE(gate_up.detach(), down.detach())
    with pytest.raises(KernelInputError, match="use backend='torch'"):
        frozen(torch.randn(5, 32, requires_grad=True), make_routing(5, 3))
    assert choose(ExpertWeights(gate_up_EGD=gate_up[:0].detach(), down_EDF=down[:0].detach())).backend.name == "torch"


def test_a_cpu_without_avx512_is_an_error_not_a_crash(
    native: NativeMoE, monkeypatch: pytest.MonkeyPatch, make_experts: Make, make_routing: Make
) -> None:
    class Old:
        @staticmethod
        def collegium_moe_floats(*_: Any) -> int:
            return 3

    monkeypatch.setattr(native, "_library", Old)
    with pytest.raises(KernelError, match="this CPU has no AVX512"):
        native.floats(
            torch.randn(5, 32), torch.zeros(1), torch.zeros(1), make_routing(5, 3), expert_width=32, num_experts=3
        )
