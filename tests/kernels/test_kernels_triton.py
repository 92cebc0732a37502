"""The Triton kernels in the interpreter, against the fp64 loop; and the plan of tiles."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels.backends import ExpertWeights, choose
from collegium_kernels.ragged import Routing, from_topk, rectangular, static_from_topk
from collegium_kernels.reference import reference_moe
from collegium_kernels.triton.backend import TritonBackend
from collegium_kernels.triton.plan import TINY_PAIRS, choose_rows, plan

Make = Callable[..., Any]
VARIABLE = "TRITON_INTERPRET"
interpreted = pytest.mark.skipif(
    os.environ.get(VARIABLE) != "1", reason="runs in a process of its own, see the first test"
)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get(VARIABLE) == "1", reason="this is that process")
def test_the_kernels_in_the_interpreter() -> None:
    """Triton reads the variable when it is first imported, and vLLM's tests may have done that already here."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rN", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, VARIABLE: "1"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "28 passed, 1 skipped" in done.stdout


def run(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, routing: Routing, rows: int | None = None
) -> torch.Tensor:
    return TritonBackend(interpret=True, rows=rows).prepare(ExpertWeights(gate_up_EGD=gate_up, down_EDF=down))(
        x, routing
    )


@interpreted
@pytest.mark.parametrize(
    ("T", "E", "D", "F"),
    [(0, 3, 16, 16), (1, 1, 1, 1), (2, 7, 33, 17), (9, 4, 70, 20), (40, 2, 32, 65)],
    ids=["empty", "one", "odd", "tiny-edge", "many-rows"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_reference(
    T: int, E: int, D: int, F: int, dtype: torch.dtype, make_experts: Make, make_routing: Make
) -> None:
    x, (gate_up, down) = torch.randn(T, D).to(dtype), make_experts(E, D, F, dtype)
    routing = make_routing(T, E, min(2, E), drop=0.2)
    got, wanted = run(x, gate_up, down, routing).float(), reference_moe(x, gate_up, down, routing).float()
    assert got.shape == wanted.shape
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}[dtype]
    assert (got - wanted).norm() <= bound * wanted.norm()


@interpreted
@pytest.mark.parametrize("rows", [16, 32])
def test_tile_sizes_identity_static_and_skew(rows: int, make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(37, 24), make_experts(5, 24, 16)
    ids = torch.where(torch.rand(37, 2) < 0.6, 3, torch.randint(-1, 7, (37, 2)))
    weights = torch.rand(37, 2)
    for make in (from_topk, static_from_topk):
        routing = make(ids, weights, num_experts=5, identity_ids=(5,))
        got = run(x, gate_up, down, routing, rows=rows)
        torch.testing.assert_close(got, reference_moe(x, gate_up, down, routing), atol=1e-5, rtol=1e-5)


@interpreted
def test_nan_in_unselected_experts_and_company_change_nothing(make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(20, 16), make_experts(4, 16, 16)
    gate_up[1], down[1] = float("nan"), float("nan")
    ids = torch.tensor([[0, 2], [3, -1]]).repeat(10, 1)
    weights = torch.rand(20, 2)
    whole = run(x, gate_up, down, from_topk(ids, weights, num_experts=4))
    assert whole.isfinite().all()
    for size in (1, 12):
        alone = run(x[:size], gate_up, down, from_topk(ids[:size], weights[:size], num_experts=4))
        torch.testing.assert_close(alone, whole[:size], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("P", [1, TINY_PAIRS, TINY_PAIRS + 1, 200])
@pytest.mark.parametrize("rows", [16, 64])
def test_every_row_is_in_one_tile_of_its_expert(P: int, rows: int) -> None:
    routing = rectangular(torch.randint(0, 6, (P, 1)) % 5, torch.ones(P, 1), num_experts=6)
    tiles = plan(routing, rows=rows)
    seen = []
    for expert, start, end in zip(tiles.expert_N.tolist(), tiles.start_N.tolist(), tiles.end_N.tolist(), strict=True):
        if expert < 6:
            assert 0 < end - start <= tiles.rows
            pairs = tiles.pairs_P[start:end]
            assert (routing.expert_ids_P[pairs] == expert).all()
            seen += pairs.tolist()
    assert sorted(seen) == list(range(P))


def test_tile_size_follows_the_histogram() -> None:
    assert choose_rows([3] * 64) == 16
    assert choose_rows([512] * 8) == 128
    assert choose_rows([1] * 63 + [30]) == 16


def test_without_cuda_it_is_refused_with_the_reason(make_experts: Make) -> None:
    gate_up, down = make_experts(2, 8, 4)
    choice = choose(ExpertWeights(gate_up_EGD=gate_up, down_EDF=down))
    assert ("triton", "the weights are on cpu, not on CUDA") in choice.refused
    quantised = ExpertWeights(gate_up_EGD=gate_up, down_EDF=down, precision="int8")
    assert TritonBackend(interpret=True).refuses(quantised) is not None
