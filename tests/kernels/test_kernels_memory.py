"""A layer of experts may be a large part of the memory: what packing it holds on the way, and what it lets go."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from collegium_kernels.backends import ExpertWeights
from collegium_kernels.cpu.backend import CpuBackend
from collegium_kernels.cpu.build import find_compiler
from collegium_kernels.quant import quantise
from torch.utils._python_dispatch import TorchDispatchMode

Make = Callable[..., Any]
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
E, D, F = 8, 640, 320


class Large(TorchDispatchMode):
    """The buffers of at least ``size`` bytes that operators make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.sizes, self.alive = size, dict[int, int](), list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and (nbytes := made.untyped_storage().nbytes()) >= self.size:
            self.sizes[made.untyped_storage().data_ptr()] = nbytes
            self.alive.append(made.detach())  # so that no address is used again
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_floats_holds_one_copy(dtype: torch.dtype, make_experts: Make) -> None:
    gate_up, down = make_experts(E, D, F, dtype)
    backend = CpuBackend()
    weights = ExpertWeights(gate_up_EGD=gate_up, down_EDF=down)
    if "in C++" not in backend.how(weights):
        pytest.skip(backend.how(weights))
    known = {w.untyped_storage().data_ptr() for w in (gate_up, down)}
    with Large(down.nbytes // 2) as large:
        backend.prepare(weights)
    assert sorted(size for at, size in large.sizes.items() if at not in known) == [down.nbytes, gate_up.nbytes]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantising_holds_codes_and_what_is_packed(
    precision: Any, make_experts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium_kernels.quant.ELEMENTS", 16 * D)
    gate_up, down = make_experts(E, D, F)
    weights = ExpertWeights(gate_up_EGD=gate_up, down_EDF=down, precision=precision, group=32)
    known = {w.untyped_storage().data_ptr() for w in (gate_up, down)}
    with Large(down.numel() // 2) as large:
        CpuBackend().prepare(weights)
    codes, packed = [down.numel(), gate_up.numel()], {"int8": 1, "int4": 2}[precision]
    assert sorted(size for at, size in large.sizes.items() if at not in known) == sorted(
        codes + [size // packed for size in codes]
    )


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
def test_rows_at_a_time_are_quantised_as_all_together(
    bits: int, group: int, monkeypatch: pytest.MonkeyPatch, make_experts: Make
) -> None:
    w, _ = make_experts(3, 70, 10)
    whole = quantise(w, bits=bits, group=group)
    monkeypatch.setattr("collegium_kernels.quant.ELEMENTS", 7 * 96)
    parts = quantise(w, bits=bits, group=group)
    assert torch.equal(whole.codes_ENK, parts.codes_ENK)
    assert torch.equal(whole.scales_ENG, parts.scales_ENG)


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
def test_the_weights_are_free_to_go_once_packed(precision: Any, make_experts: Make) -> None:
    gate_up, down = make_experts(3, 64, 32)
    weights = ExpertWeights(gate_up_EGD=gate_up, down_EDF=down, precision=precision)
    backend = CpuBackend()
    if backend.refuses(weights):
        pytest.skip(str(backend.refuses(weights)))
    run = backend.prepare(weights)
    left = weakref.ref(gate_up), weakref.ref(down)
    del gate_up, down, weights
    assert [ref() for ref in left] == [None, None]
    assert callable(run)
