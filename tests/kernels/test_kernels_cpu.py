"""The CPU backend: C++ in both its codes, the emulation without a compiler, and vLLM's bf16 kernel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels.backends import ExpertWeights
from collegium_kernels.cpu.backend import BITS, CpuBackend
from collegium_kernels.cpu.build import cache_folder, find_compiler
from collegium_kernels.errors import KernelInputError
from collegium_kernels.quant import quantise, quantise_rows, relative_error
from collegium_kernels.ragged import from_topk, rectangular, static_from_topk
from collegium_kernels.reference import reference_moe

Make = Callable[..., Any]
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
PRECISIONS = ["int8", "int4"]


@pytest.fixture(scope="session")
def folder(user_cache: None) -> Path:
    return cache_folder()


def backend(way: str, folder: Path) -> CpuBackend:
    if way == "emulated":
        return CpuBackend(compiler=None)
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    return CpuBackend(folder=folder, portable=way == "portable")


def weights_of(
    gate_up: torch.Tensor, down: torch.Tensor, precision: Any = "int8", group: int = 128, activation_bits: int = 8
) -> ExpertWeights:
    return ExpertWeights(
        gate_up_EGD=gate_up, down_EDF=down, precision=precision, group=group, activation_bits=activation_bits
    )


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


# Quantisation


@pytest.mark.parametrize(("bits", "group", "bound"), [(8, 0, 0.008), (8, 32, 0.0054), (4, 32, 0.084), (4, 128, 0.1)])
def test_measured_error_of_gaussian_weights(bits: int, group: int, bound: float) -> None:
    w = torch.randn(3, 64, 256)
    assert 0 < relative_error(w, quantise(w, bits=bits, group=group)) < bound


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_come_back_within_half_a_step(bits: int) -> None:
    w = torch.randn(2, 5, 70)
    q = quantise(w, bits=bits, group=32)
    assert q.codes_ENK.shape == (2, 5, 96)
    top = torch.nn.functional.pad(w, (0, 26)).view(2, 5, 3, 32).abs().amax(3)
    scales = q.scales_ENG.float().abs()
    assert (scales / top.clamp(min=1e-9) <= 1.07 / (1 << (bits - 1))).all()
    inside = (q.codes_ENK > 0) & (q.codes_ENK < (1 << bits) - 1)
    error = (q.dequantise() - w).abs() / scales.repeat_interleave(32, 2)[:, :, :70]
    assert error[inside[:, :, :70]].max() <= 0.5001


def test_zero_weights_and_nan_weights() -> None:
    w = torch.zeros(2, 4, 64)
    w[1, 2, 40] = float("nan")
    q = quantise(w, bits=4, group=32)
    assert (q.dequantise()[0] == 0).all()
    assert q.dequantise()[1, 2, 32:].isnan().all()
    assert (q.dequantise()[1, 2, :32] == 0).all()


def test_activation_codes() -> None:
    codes, scales = quantise_rows(torch.tensor([[1.0, -2.0, 0.5], [0, 0, 0], [float("nan"), 1, 1]]), 2)
    assert codes[0].tolist() == [64, -127, 127]
    torch.testing.assert_close(scales[0], torch.tensor([2, 2, 0.5]) / 127)
    assert codes[1].tolist() == [0, 0, 0]
    assert scales[2].isnan().tolist() == [True, True, False]
    assert quantise_rows(torch.zeros(0, 5), 32)[0].shape == quantise_rows(torch.zeros(0, 5), 32)[1].shape == (0, 5)


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (8, 16), (4, 256)])
def test_unknown_bits_and_groups_are_refused(bits: int, group: int) -> None:
    with pytest.raises(KernelInputError, match="is not one of"):
        quantise(torch.randn(1, 4, 32), bits=bits, group=group)
    with pytest.raises(KernelInputError, match="w_ENK"):
        quantise(torch.randn(4, 32), bits=8, group=32)
    with pytest.raises(KernelInputError, match="at most 65536 inputs, or a group"):
        quantise(torch.randn(1, 1, 65537), bits=8, group=0)


# The three ways to compute


@pytest.mark.parametrize("way", ["avx512", "portable", "emulated"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize(("activation_bits", "bound"), [(8, 0.03), (16, 1e-4)])
def test_close_to_the_dequantised_reference(
    way: str,
    precision: str,
    group: int,
    activation_bits: int,
    bound: float,
    folder: Path,
    make_experts: Make,
    make_routing: Make,
) -> None:
    x, (gate_up, down), routing = torch.randn(23, 70), make_experts(5, 70, 37), make_routing(23, 5, drop=0.2)
    run = backend(way, folder).prepare(weights_of(gate_up, down, precision, group, activation_bits))
    known = [quantise(w, bits=BITS[precision], group=group).dequantise() for w in (gate_up, down)]
    assert off(run(x, routing), reference_moe(x, *known, routing)) <= bound


@needs_compiler
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("T", [0, 1, 2, 7, 9, 65, 257])
@pytest.mark.parametrize(("E", "D", "F"), [(1, 1, 1), (7, 33, 17), (64, 8, 8), (2, 600, 300)])
@pytest.mark.parametrize(("activation_bits", "bound"), [(8, 0.01), (16, 1e-4)])
def test_native_equals_the_emulation_on_edge_shapes(
    precision: str,
    T: int,
    E: int,
    D: int,
    F: int,
    activation_bits: int,
    bound: float,
    folder: Path,
    make_experts: Make,
    make_routing: Make,
) -> None:
    x, (gate_up, down), routing = torch.randn(T, D), make_experts(E, D, F), make_routing(T, E, min(2, E), drop=0.2)
    weights = weights_of(gate_up, down, precision, activation_bits=activation_bits)
    got, wanted = (backend(way, folder).prepare(weights)(x, routing) for way in ("avx512", "emulated"))
    assert got.shape == wanted.shape
    assert off(got, wanted) <= bound


@pytest.mark.parametrize("way", ["avx512", "portable", "emulated"])
def test_identity_zero_and_static_pairs(way: str, folder: Path, make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(4, 40), make_experts(3, 40, 24)
    ids, weights = torch.tensor([[0, 3], [3, 4], [4, 4], [1, 2]]), torch.rand(4, 2)
    run = backend(way, folder).prepare(weights_of(gate_up, down))
    exact, static = (make(ids, weights, num_experts=3, identity_ids=(3,)) for make in (from_topk, static_from_topk))
    got = run(x, exact)
    torch.testing.assert_close(got[1], weights[1, 0] * x[1])
    assert (got[2] == 0).all()
    assert torch.equal(got, run(x, static))


@pytest.mark.parametrize("way", ["avx512", "portable", "emulated"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("E", "D", "F", "group"), [(6, 70, 40, 128), (1, 700, 300, 0), (1, 700, 300, 64)])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_a_token_has_the_same_bits_alone_in_a_batch_and_on_two_threads(
    way: str,
    precision: str,
    E: int,
    D: int,
    F: int,
    group: int,
    activation_bits: int,
    folder: Path,
    make_experts: Make,
) -> None:
    """One expert has rows for several tiles, which share unpacked slices; a row alone does not."""
    x, (gate_up, down) = torch.randn(29, D), make_experts(E, D, F)
    ids, weights = torch.randint(-1, E, (29, 2)), torch.rand(29, 2)
    run = backend(way, folder).prepare(weights_of(gate_up, down, precision, group, activation_bits))
    whole = run(x, from_topk(ids, weights, num_experts=E))
    for some in (slice(0, 1), slice(4, 9), slice(28, 29)):
        assert torch.equal(run(x[some], from_topk(ids[some], weights[some], num_experts=E)), whole[some])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(x, from_topk(ids, weights, num_experts=E)), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("way", ["avx512", "portable", "emulated"])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_nan_stays_with_its_token_and_its_expert(
    way: str, activation_bits: int, folder: Path, make_experts: Make
) -> None:
    x, (gate_up, down) = torch.randn(4, 40), make_experts(3, 40, 24)
    gate_up[1, 3, 5], x[2, 7] = float("nan"), float("inf")
    routing = rectangular(torch.tensor([[0], [1], [0], [2]]), torch.ones(4, 1), num_experts=3)
    got = backend(way, folder).prepare(weights_of(gate_up, down, activation_bits=activation_bits))(x, routing)
    assert got.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("way", ["avx512", "portable", "emulated"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_large_activation_costs_its_own_group_precision_and_no_other(
    way: str, precision: str, folder: Path, make_experts: Make
) -> None:
    """Models have such activations: one scale for the row would cost every input its bits."""
    x, experts = torch.randn(16, 512), make_experts(1, 512, 256)
    x[:, 3] *= 100
    routing = rectangular(torch.zeros(16, 1, dtype=torch.long), torch.ones(16, 1), num_experts=1)
    errors = []
    for group in (32, 0):
        known = [quantise(w, bits=BITS[precision], group=group).dequantise() for w in experts]
        run = backend(way, folder).prepare(weights_of(*experts, precision, group))
        errors.append(off(run(x, routing), reference_moe(x, *known, routing)))
    assert errors[0] <= 0.04
    assert errors[1] >= 3 * errors[0]


@needs_compiler
def test_portable_and_fast_code_round_alike(folder: Path, make_experts: Make, make_routing: Make) -> None:
    x, (gate_up, down), routing = torch.randn(31, 64), make_experts(4, 64, 48), make_routing(31, 4)
    fast, portable = (backend(way, folder).prepare(weights_of(gate_up, down, "int4")) for way in ("avx512", "portable"))
    assert off(fast(x, routing), portable(x, routing)) <= 0.005


@needs_compiler
@pytest.mark.parametrize("way", ["avx512", "portable"])
def test_bf16_tokens_are_widened_and_rounded_as_by_torch(way: str, folder: Path, make_experts: Make) -> None:
    x, experts = (torch.randn(17, 70) * torch.logspace(-30, 30, 17)[:, None]).bfloat16(), make_experts(4, 70, 48)
    x[3, 1], x[4, 2] = float("nan"), float("inf")
    run = backend(way, folder).prepare(weights_of(*experts))
    ids, weights = torch.randint(0, 5, (17, 2)), torch.rand(17, 2)
    for identity in ((), (4,)):  # with identity experts the sum goes on in fp32
        routing = from_topk(ids, weights, num_experts=4, identity_ids=identity)
        got, wanted = run(x, routing), run(x.float(), routing).bfloat16()
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
