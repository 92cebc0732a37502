"""Building the library, falling back without it, and vLLM's bf16 kernel behind its self-test."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels.backends import ExpertWeights, choose
from collegium_kernels.cpu import vllm_bf16
from collegium_kernels.cpu.backend import CpuBackend
from collegium_kernels.cpu.build import build, cache_folder, find_compiler
from collegium_kernels.cpu.emulated import emulated_moe
from collegium_kernels.cpu.native import NativeMoE
from collegium_kernels.cpu.pack import pack
from collegium_kernels.errors import BackendUnavailable, KernelInputError
from collegium_kernels.moe import FusedMoE
from collegium_kernels.quant import quantise, quantise_rows
from collegium_kernels.ragged import Routing, from_topk, rectangular, static_from_topk
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


def weights_of(gate_up: torch.Tensor, down: torch.Tensor, precision: Any = "int8", group: int = 128) -> ExpertWeights:
    return ExpertWeights(gate_up_EGD=gate_up, down_EDF=down, precision=precision, group=group)


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


# Building and falling back


@needs_compiler
def test_the_library_is_built_once(folder: Path) -> None:
    compiler = find_compiler()
    assert compiler is not None
    first = build(compiler, folder)
    stamp = first.stat().st_mtime_ns
    assert build(compiler, folder) == first
    assert first.stat().st_mtime_ns == stamp
    assert build(compiler, folder, extra_flags=("-O0",)) != first


def test_a_library_is_for_other_users_too_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    """An image may be built by root and run by someone else; the file had the mode of a temporary one."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho > "$last"\n')
    compiler.chmod(0o755)
    before = os.umask(0o022)
    try:
        library = build(str(compiler), tmp_path / "cache")
    finally:
        os.umask(before)
    assert library.stat().st_mode & 0o444 == 0o444
    with pytest.raises(BackendUnavailable, match="Could not run"):
        build(str(tmp_path / "none"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [library]


def test_a_compiler_that_fails_is_quoted_and_the_backend_falls_back(tmp_path: Path, make_experts: Make) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no room at the inn' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(BackendUnavailable, match="no room at the inn"):
        build(str(broken), tmp_path / "cache")
    calls = tmp_path / "calls"
    broken.write_text(f"#!/bin/sh\necho >> {calls}\nexit 1\n")
    for _ in range(3):  # a model's layers
        fallback = CpuBackend(compiler=str(broken), folder=tmp_path / "cache")
        assert "emulated in torch: " in fallback.how(weights_of(*make_experts(2, 32, 32)))
    assert calls.read_text() == "\n"


def test_without_a_compiler_it_says_so_and_still_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_experts: Make, make_routing: Make
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    moe = FusedMoE(*make_experts(3, 32, 32), precision="int4", group=32)
    assert "emulated in torch: no C++ compiler on PATH" in moe.explain()
    assert moe(torch.randn(5, 32), make_routing(5, 3)).isfinite().all()


def test_a_cache_that_cannot_be_written_is_named_and_the_slow_way_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make_experts: Make
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("collegium_kernels.cpu.backend.find_compiler", lambda: "g++")
    for _ in range(3):  # a model's layers
        moe = FusedMoE(*make_experts(2, 32, 32), precision="int8")
    assert "Cannot write to" in moe.explain()
    assert "XDG_CACHE_HOME" in moe.explain()
    assert caplog.text.count("run in torch here") == 1


def test_a_file_that_is_no_library_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "moe.so").write_text("nothing")
    with pytest.raises(BackendUnavailable, match="Delete it"):
        NativeMoE(tmp_path / "moe.so")


@needs_compiler
def test_the_library_checks_the_row_pointers_itself(folder: Path, make_experts: Make) -> None:
    gate_up, down = (quantise(w, bits=8, group=32) for w in make_experts(2, 32, 32))
    native = NativeMoE(build(str(find_compiler()), folder))
    bad = Routing(
        indptr_T1=torch.tensor([0, 9, 2]), expert_ids_P=torch.tensor([0, 1]), weights_P=torch.ones(2), num_experts=2
    )
    with pytest.raises(KernelInputError, match="indptr_T1"):
        native(
            torch.randn(2, 32),
            pack(gate_up, gate_up=True),
            pack(down, gate_up=False),
            bad,
            expert_width=32,
            num_experts=2,
        )
    wild = Routing(
        indptr_T1=torch.tensor([0, 1, 2]), expert_ids_P=torch.tensor([-5, 77]), weights_P=torch.ones(2), num_experts=2
    )
    packed = pack(gate_up, gate_up=True), pack(down, gate_up=False)
    assert (native(torch.randn(2, 32), *packed, wild, expert_width=32, num_experts=2) == 0).all()


def test_explain_and_gradients(make_experts: Make, make_routing: Make) -> None:
    moe = FusedMoE(*make_experts(3, 32, 32), precision="int8")
    assert moe.explain().startswith("cpu: chosen, int8 ")
    with pytest.raises(KernelInputError, match="no gradients"):
        moe(torch.randn(5, 32, requires_grad=True), make_routing(5, 3))
    constant = torch.randn(5, 32, requires_grad=True)
    with pytest.raises(KernelInputError, match="no gradients"):
        moe(torch.randn(5, 32), replace(make_routing(5, 3), add_TD=constant))
    with torch.no_grad():
        moe(torch.randn(5, 32, requires_grad=True), make_routing(5, 3))


# bf16 in vLLM's kernel


def theirs(gate_up: torch.Tensor, down: torch.Tensor) -> Any:
    """Without a compiler there is no other."""
    weights = weights_of(gate_up, down, precision="native")
    assert CpuBackend(compiler=None).how(weights) == "vLLM's bf16 kernel"
    return CpuBackend(compiler=None).prepare(weights)


def needs_vllm(D: int, F: int) -> None:
    reason = vllm_bf16.why_not(weights_of(torch.zeros(1, 2 * F, D).bfloat16(), torch.zeros(1, D, F).bfloat16()))
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("T", [0, 1, 9, 65])
def test_bf16_kernel_equals_the_reference(T: int, make_experts: Make, make_routing: Make) -> None:
    needs_vllm(64, 32)
    x, (gate_up, down) = torch.randn(T, 64).bfloat16(), make_experts(5, 64, 32, torch.bfloat16)
    moe = theirs(gate_up, down)
    ids = torch.rand(T, 5).argsort(1)[:, :2]
    for routing in (make_routing(T, 5, drop=0.3), rectangular(ids, torch.rand(T, 2), num_experts=5)):
        assert off(moe(x, routing), reference_moe(x, gate_up, down, routing)) <= 0.006


def test_bf16_kernel_is_steady_and_takes_every_kind_of_routing(make_experts: Make) -> None:
    needs_vllm(64, 32)
    x, (gate_up, down) = torch.randn(33, 64).bfloat16(), make_experts(5, 64, 32, torch.bfloat16)
    moe, ids, weights = theirs(gate_up, down), torch.randint(-1, 7, (33, 3)), torch.rand(33, 3)
    for make in (from_topk, static_from_topk):
        whole = moe(x, make(ids, weights, num_experts=5, identity_ids=(5,)))
        for some in (slice(0, 1), slice(4, 13)):
            alone = moe(x[some].clone(), make(ids[some], weights[some], num_experts=5, identity_ids=(5,)))
            assert torch.equal(alone, whole[some])
    exact, static = (make(ids, weights, num_experts=5) for make in (from_topk, static_from_topk))
    assert torch.equal(moe(x, exact), moe(x, static))


def test_bf16_kernel_without_any_expert(make_experts: Make) -> None:
    """A static routing has pairs all the same. The kernel divided by none of them, which ended the process."""
    needs_vllm(64, 32)
    moe, nobody = theirs(*make_experts(3, 64, 32, torch.bfloat16)), torch.full((2, 1), 3)
    for make in (from_topk, static_from_topk):
        assert (moe(torch.randn(2, 64).bfloat16(), make(nobody, torch.ones(2, 1), num_experts=3)) == 0).all()


def test_bf16_widths_nobody_takes_go_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_experts: Make
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    choice = choose(weights_of(*make_experts(2, 33, 16, torch.bfloat16), precision="native"))
    assert choice.backend.name == "torch"
    assert "no C++ compiler on PATH" in str(choice)
    assert "multiples of 32" in str(choice)


def test_a_kernel_that_fails_its_self_test_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_experts: Make
) -> None:
    needs_vllm(64, 32)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(vllm_bf16, "self_test", vllm_bf16.self_test.__wrapped__)
    real = vllm_bf16._kernel
    monkeypatch.setattr(vllm_bf16, "_kernel", lambda *args: real(*args) * 1.05)
    choice = choose(weights_of(*make_experts(2, 64, 32, torch.bfloat16), precision="native"))
    assert choice.backend.name == "torch"
    assert "in the self-test" in str(choice)


def test_a_width_is_tested_once_a_process(monkeypatch: pytest.MonkeyPatch, make_experts: Make) -> None:
    """Every layer of a model asks, and at the width of a large one the answer takes seconds."""
    needs_vllm(64, 96)
    monkeypatch.setattr(vllm_bf16, "reference_moe", lambda *_, **__: pytest.fail("tested again"))
    assert vllm_bf16.why_not(weights_of(*make_experts(3, 64, 96, torch.bfloat16), precision="native")) is None


def test_emulation_is_its_own_definition(make_experts: Make, make_routing: Make) -> None:
    x, (gate_up, down), routing = torch.randn(6, 40), make_experts(3, 40, 24), make_routing(6, 3)
    q1, q2 = quantise(gate_up, bits=8, group=32), quantise(down, bits=8, group=32)
    codes, scales = quantise_rows(x, 32)
    wanted = torch.zeros_like(x)
    for t in range(6):
        for p in range(int(routing.indptr_T1[t]), int(routing.indptr_T1[t + 1])):
            e = int(routing.expert_ids_P[p])
            gate, up = (q1.dequantise()[e] @ (codes[t] * scales[t])).chunk(2)
            hidden, hidden_scales = quantise_rows((torch.nn.functional.silu(gate) * up)[None], 32)
            wanted[t] += routing.weights_P[p] * (q2.dequantise()[e] @ (hidden[0] * hidden_scales[0]))
    torch.testing.assert_close(emulated_moe(x, q1, q2, routing), wanted, atol=1e-5, rtol=1e-4)
