"""Bad ids in a process of their own, and the C++ under the sanitizers: an answer or an exception, never a crash."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels.cpu.build import FOLDER, find_compiler
from collegium_kernels.errors import BackendUnavailable, KernelInputError
from collegium_kernels.gates.base import Context, Routed
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.moe import FusedMoE, MoELayer, SwiGLUExperts
from collegium_kernels.ragged import Routing, from_topk, rectangular, static_from_topk

SCRIPT = """
import torch
from collegium_kernels.moe import FusedMoE
from collegium_kernels.ragged import from_topk, static_from_topk
torch.manual_seed(0)
wild = [-1, -2**40, 4, 5, 2**31, 2**32, 2**32 + 1, 2**62, 0, 3]
ids = torch.tensor(wild).view(-1, 1)
kinds = ("float32", "native"), ("bfloat16", "native"), ("float32", "int8"), ("bfloat16", "int4")
for name, precision in kinds:
    dtype = getattr(torch, name)
    moe = FusedMoE(torch.randn(4, 64, 64).to(dtype), torch.randn(4, 64, 32).to(dtype), precision=precision)
    x = torch.randn(10, 64).to(dtype)
    for make in (from_topk, static_from_topk):
        y = moe(x, make(ids, torch.ones(10, 1), num_experts=4))
        assert y[:8].abs().sum() == 0, (precision, y[:8])
        assert y[8:].isfinite().all() and y[8:].abs().sum() > 0
    for some in (ids[:0], ids[:3, :0]):
        more = from_topk(some, torch.ones(some.shape), num_experts=4)
        assert moe(x[: more.num_tokens], more).abs().sum() == 0
print("alive")
"""


def test_wild_ids_in_every_backend_leave_the_process_alive() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=300, env=_env()
    )
    assert done.stdout.strip().endswith("alive"), done.stderr[-2000:]


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_is_an_id(dtype: torch.dtype) -> None:
    routing = from_topk(torch.tensor([[1, -1], [7, 0]], dtype=dtype), torch.ones(2, 2), num_experts=4)
    assert routing.expert_ids_P.tolist() == [1, 0]
    assert routing.expert_ids_P.dtype == torch.int64


@pytest.mark.parametrize("make", [from_topk, static_from_topk])
@pytest.mark.parametrize(("dtype", "experts"), [(torch.uint8, 256), (torch.int8, 128), (torch.int8, 300)])
def test_more_experts_than_the_ids_dtype_can_say(make: Any, dtype: torch.dtype, experts: int) -> None:
    routing = make(torch.tensor([[100, 3]], dtype=dtype), torch.ones(1, 2), num_experts=experts)
    assert routing.expert_ids_P.tolist() == [100, 3]


@pytest.mark.parametrize("make", [from_topk, static_from_topk])
def test_an_identity_expert_is_none_of_the_experts(make: Any) -> None:
    with pytest.raises(KernelInputError, match=r"identity_ids \[3, 4\] must lie outside"):
        make(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2), num_experts=4, identity_ids=[4, 3])


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_a_routing_of_another_device_or_shape_is_refused(precision: Any) -> None:
    """A kernel takes addresses: what lies on another device ended the process."""
    moe = FusedMoE(torch.randn(4, 64, 32), torch.randn(4, 32, 32), precision=precision)
    good = from_topk(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), num_experts=4)
    for name in ("indptr_T1", "expert_ids_P", "weights_P"):
        bad = replace(good, **{name: getattr(good, name).to("meta")})
        with pytest.raises(KernelInputError, match=rf"routing.{name} of .* on meta: on cpu"):
            moe(torch.zeros(5, 32), bad)
    for wrong in ({"copy_T": torch.ones(1)}, {"add_TD": torch.ones(5, 1)}):
        with pytest.raises(KernelInputError, match=f"routing.{next(iter(wrong))}"):
            moe(torch.zeros(5, 32), replace(good, **wrong))


@pytest.mark.parametrize(
    ("experts", "shape", "words"),
    [(3, (9, 8), "w_gate_up_EGD of shape .* 5 experts"), (7, (9, 8), "5 experts"), (5, (2, 9, 8), "flatten sequences")],
)
def test_a_layer_whose_parts_do_not_fit(experts: int, shape: tuple[int, ...], words: str) -> None:
    layer = MoELayer(MixtralGate(8, 5), SwiGLUExperts(experts, 8, 4))
    with pytest.raises(KernelInputError, match=words):
        layer(torch.randn(shape))


class HandMade(torch.nn.Module):
    """A gate of the user's own, which says the same of any tokens."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing, self.num_experts = routing, routing.num_experts

    def forward(self, x_TD: torch.Tensor, context: Context) -> Routed:
        return Routed(routing=self.routing, scores_TE=x_TD, loss=torch.zeros(()))


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        (rectangular(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), num_experts=4), "than 5 tokens"),
        (rectangular(torch.full((5, 1), 99), torch.ones(5, 1), num_experts=4), "found 99 to 99"),
        (rectangular(torch.full((5, 1), -1), torch.ones(5, 1), num_experts=4), "found -1 to -1"),
    ],
)
def test_a_gate_of_ones_own_that_is_wrong_is_told_so(routing: Routing, words: str) -> None:
    """Three tokens' routing for five tokens gave three outputs."""
    layer = MoELayer(HandMade(routing), SwiGLUExperts(4, 8, 4))
    with pytest.raises(KernelInputError, match=words):
        layer(torch.randn(5, 8))


def test_eight_bit_floats_have_no_products_in_torch() -> None:
    weights = torch.zeros(2, 8, 4).to(torch.float8_e4m3fn), torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(BackendUnavailable, match="no products of"):
        FusedMoE(*weights, backend="torch")


@pytest.mark.parametrize("shape", [(0, 8, 4), (2, 0, 4), (2, 8, 0)])
def test_nothing_to_quantise_is_an_input_error(shape: tuple[int, int, int]) -> None:
    E, G, D = shape
    with pytest.raises(KernelInputError, match="at least one of everything"):
        FusedMoE(torch.zeros(shape), torch.zeros(E, D, G // 2), precision="int8")


def test_sizes_past_32_bits_stay_shapes() -> None:
    """Nothing here narrows a size: experts of more than 2^31 numbers are described, not wrapped."""
    from collegium_kernels.backends import ExpertWeights

    big = ExpertWeights(
        gate_up_EGD=torch.empty(256, 2 * 8192, 8192, device="meta"),
        down_EDF=torch.empty(256, 8192, 8192, device="meta"),
    )
    assert big.gate_up_EGD.numel() > 2**31
    assert big.shape == (256, 8192, 8192)
    with pytest.raises(KernelInputError, match=r"w_down_EDF of shape \(256, 8192, 4096\)"):
        ExpertWeights(gate_up_EGD=big.gate_up_EGD, down_EDF=torch.empty(256, 8192, 4096, device="meta"))


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "kinds", ["address,undefined,float-cast-overflow", pytest.param("thread", marks=pytest.mark.slow)]
)
def test_sanitizers_find_nothing(kinds: str, tmp_path: Path) -> None:
    driver, made = Path(__file__).with_name("sanitize.cpp"), tmp_path / "sanitize"
    flags = [
        "-O1",
        "-g",
        "-std=c++17",
        "-pthread",
        "-w",
        f"-fsanitize={kinds}",
        "-fno-sanitize-recover=all",
    ]
    compiled = subprocess.run(
        [str(find_compiler()), *flags, f"-I{FOLDER}", str(driver), "-o", str(made)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if compiled.returncode != 0 and ("asan" in compiled.stderr or "tsan" in compiled.stderr):
        pytest.skip("the compiler has no sanitizer library")
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    # vLLM, once started in this process, preloads libraries into its children; the sanitizer must come first.
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(made)], capture_output=True, text=True, check=False, timeout=300, env=alone)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel lays memory out as the thread sanitizer cannot take it")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "570 calls"
