"""The Triton kernels against the fp64 loop, on CUDA or in the interpreter; and the plan of tiles."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels.backends import ExpertWeights, choose
from collegium_kernels.ragged import Routing, from_topk, rectangular, static_from_topk
from collegium_kernels.reference import reference_moe
from collegium_kernels.triton.backend import TritonBackend
from collegium_kernels.triton.plan import CHUNK, choose_rows, plan
from collegium_kernels.triton.table import HOPPER, Config, Pair

Make = Callable[..., Any]
VARIABLE = "TRITON_INTERPRET"
CUDA = torch.cuda.is_available() and os.environ.get(VARIABLE) != "1"
DEVICE = "cuda" if CUDA else "cpu"
interpreted = pytest.mark.skipif(
    not CUDA and os.environ.get(VARIABLE) != "1", reason="runs in a process of its own, see the first test"
)
cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
# The interpreter truncates to bf16 where hardware rounds.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3 if CUDA else 1.3e-2}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(CUDA or os.environ.get(VARIABLE) == "1", reason="this is that process, or the GPU itself runs")
def test_the_kernels_in_the_interpreter() -> None:
    """Triton reads the variable when it is first imported, and vLLM's tests may have done that already here."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rN", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, VARIABLE: "1"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "43 passed, 16 skipped" in done.stdout


def run(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, routing: Routing, rows: int | None = None,
    pair: Pair | None = None,
) -> torch.Tensor:  # fmt: skip
    weights = ExpertWeights(gate_up_EGD=gate_up.to(DEVICE), down_EDF=down.to(DEVICE))
    backend = TritonBackend(interpret=not CUDA, rows=rows, pair=pair)
    return backend.prepare(weights)(x.to(DEVICE), there(routing)).cpu()


def there(routing: Routing) -> Routing:
    """The routing on the device of the test."""
    moved = {
        name: value.to(DEVICE)
        for name in ("indptr_T1", "expert_ids_P", "weights_P", "copy_T", "add_TD")
        if (value := getattr(routing, name)) is not None
    }
    return replace(routing, **moved)


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
    assert (got - wanted).norm() <= BOUND[dtype] * wanted.norm()


@interpreted
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("tma", [False, True])
def test_swapped_operands_and_the_copy_engine(swap: bool, tma: bool, make_experts: Make, make_routing: Make) -> None:
    config = Config(n=32, k=32, warps=4, stages=2, group=3, swap=swap, tma=tma)
    x, (gate_up, down) = torch.randn(21, 40).half(), make_experts(3, 40, 72, torch.float16)
    routing = make_routing(21, 3, 2, drop=0.2)
    got = run(x, gate_up, down, routing, rows=16, pair=Pair(gate_up=config, down=replace(config, n=16))).float()
    wanted = reference_moe(x, gate_up, down, routing).float()
    assert (got - wanted).norm() <= 2e-3 * wanted.norm()


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


@interpreted
@pytest.mark.parametrize("P", [1, 17, CHUNK, CHUNK + 1, 300])
@pytest.mark.parametrize("static", [False, True])
def test_the_sort_on_the_device_is_torchs(P: int, static: bool) -> None:
    """One chunk, two and more. Ids that are no experts get no row."""
    ids, weights = torch.randint(-1, 8, (P, 1)), torch.rand(P, 1)
    routing = there((static_from_topk if static else from_topk)(ids, weights, num_experts=7))
    mine, wanted = (plan(routing, rows=16, on_device=on_device) for on_device in (True, False))
    used = wanted.expert_N < 7
    assert torch.equal(mine.expert_N < 7, used)
    for name in ("expert_N", "start_N", "end_N"):
        assert torch.equal(getattr(mine, name)[used].long(), getattr(wanted, name)[used])
    rows = int(wanted.end_N[used].max()) if used.any() else 0
    for name in ("pairs_P", "tokens_P"):
        assert torch.equal(getattr(mine, name)[:rows].long(), getattr(wanted, name)[:rows])


@interpreted
def test_many_chunks_are_summed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium_kernels.triton.plan.SUMMED_HERE", 8)
    routing = there(from_topk(torch.randint(-1, 6, (150, 2)), torch.rand(150, 2), num_experts=5))
    mine, wanted = (plan(routing, rows=16, on_device=on_device) for on_device in (True, False))
    rows = int(wanted.end_N[wanted.expert_N < 5].max())
    assert torch.equal(mine.pairs_P[:rows].long(), wanted.pairs_P[:rows])


@cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 7, 64, 257, 2048])
def test_real_widths_on_the_gpu(T: int, dtype: torch.dtype, make_experts: Make, make_routing: Make) -> None:
    x, (gate_up, down) = torch.randn(T, 512).to(dtype), make_experts(16, 512, 256, dtype)
    routing = make_routing(T, 16, 4, drop=0.3)
    got, wanted = run(x, gate_up, down, routing).float(), reference_moe(x, gate_up, down, routing).float()
    assert (got - wanted).norm() <= BOUND[dtype] * wanted.norm()


@cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_token_has_the_same_bits_in_any_batch_on_the_gpu(dtype: torch.dtype, make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(3000, 512).to(dtype), make_experts(8, 512, 384, dtype)
    ids, weights = torch.rand(3000, 8).argsort(dim=1)[:, :2], torch.rand(3000, 2)
    whole = run(x, gate_up, down, from_topk(ids, weights, num_experts=8))
    assert torch.equal(run(x, gate_up, down, from_topk(ids, weights, num_experts=8)), whole)
    for size in (1, 5, 40, 100, 200, 700):
        alone = run(x[:size], gate_up, down, from_topk(ids[:size], weights[:size], num_experts=8))
        assert torch.equal(alone, whole[:size]), size


@cuda
def test_tile_sizes_do_not_change_the_bits(make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(500, 512).bfloat16(), make_experts(8, 512, 384, torch.bfloat16)
    ids, weights = torch.rand(500, 8).argsort(dim=1)[:, :2], torch.rand(500, 2)
    got = {rows: run(x, gate_up, down, from_topk(ids, weights, num_experts=8), rows=rows) for rows in HOPPER}
    assert {rows for rows, y in got.items() if not torch.equal(y, got[128])} == set()


@cuda
def test_a_static_routing_in_a_cuda_graph(make_experts: Make) -> None:
    """New ids are copied into the captured buffers; experts that are not wanted change between replays."""
    gate_up, down = (w.cuda() for w in make_experts(8, 256, 128, torch.bfloat16))
    x, ids = torch.randn(96, 256, device="cuda").bfloat16(), torch.randint(-1, 9, (96, 4), device="cuda")
    weights = torch.rand(96, 4, device="cuda")
    layer = TritonBackend().prepare(ExpertWeights(gate_up_EGD=gate_up, down_EDF=down))

    def call() -> torch.Tensor:
        return layer(x, static_from_topk(ids, weights, num_experts=8))

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        ids.copy_(torch.randint(-1, 9, ids.shape, device="cuda"))
        graph.replay()
        routing = from_topk(ids.cpu(), weights.cpu(), num_experts=8)
        wanted = reference_moe(x.cpu(), gate_up.cpu(), down.cpu(), routing).float()
        assert (y.cpu().float() - wanted).norm() <= 6e-3 * wanted.norm()


@cuda
def test_wild_ids_and_offsets_on_the_gpu_touch_nothing_else(make_experts: Make) -> None:
    """The host does not look at values on a GPU: the kernels themselves must stay inside."""
    gate_up, down = (w.cuda() for w in make_experts(4, 64, 32, torch.bfloat16))
    layer = TritonBackend(rows=16).prepare(ExpertWeights(gate_up_EGD=gate_up, down_EDF=down))
    x = torch.randn(32, 64, device="cuda").bfloat16()
    for T in (4, 32):
        ids = torch.tensor([-1, 4, -(2**40), 2**31, 2**62, 0, 3, 2**32 + 1], device="cuda").repeat(T, 1)
        wild = rectangular(ids, torch.ones(T, 8, device="cuda"), num_experts=4)
        kept = from_topk(ids, torch.ones(T, 8, device="cuda"), num_experts=4)
        assert torch.equal(layer(x[:T], wild), layer(x[:T], kept))


@pytest.mark.parametrize("P", [1, 16, 17, 200])
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
    assert choose_rows([28, 35] * 8) == 64
    assert choose_rows([60, 70] * 8) == 128


def test_without_cuda_it_is_refused_with_the_reason(make_experts: Make) -> None:
    gate_up, down = make_experts(2, 8, 4)
    choice = choose(ExpertWeights(gate_up_EGD=gate_up, down_EDF=down))
    assert ("triton", "the weights are on cpu, not on CUDA") in choice.refused
    quantised = ExpertWeights(gate_up_EGD=gate_up, down_EDF=down, precision="int8")
    assert TritonBackend(interpret=True).refuses(quantised) is not None
