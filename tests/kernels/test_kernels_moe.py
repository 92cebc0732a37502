"""fused_moe on every backend that needs no compiler and no GPU, against the fp64 loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from collegium_kernels.errors import BackendUnavailable, KernelInputError
from collegium_kernels.moe import FusedMoE, SwiGLUExperts, fused_moe
from collegium_kernels.ragged import Routing, from_topk, static_from_topk
from collegium_kernels.reference import reference_moe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

Make = Callable[..., Any]
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1.3e-6},
    torch.float16: {"atol": 1e-3, "rtol": 1e-3},
    torch.bfloat16: {"atol": 1.6e-2, "rtol": 1.6e-2},
}
TOKENS = [0, 1, 2, 7, 8, 9, 63, 64, 65, 257]


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("E", [1, 2, 7, 8, 64, 128])
def test_torch_equals_the_reference_on_edge_shapes(T: int, E: int, make_experts: Make, make_routing: Make) -> None:
    x, (gate_up, down) = torch.randn(T, 12), make_experts(E, 12, 7)
    routing = make_routing(T, E, min(E, 2), drop=0.3)
    torch.testing.assert_close(
        fused_moe(x, gate_up, down, routing, backend="torch"),
        reference_moe(x, gate_up, down, routing),
        **TOLERANCE[torch.float32],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("D", "F"), [(1, 1), (5, 3), (33, 17), (64, 32)])
def test_torch_equals_the_reference_for_each_dtype(
    dtype: torch.dtype, D: int, F: int, make_experts: Make, make_routing: Make
) -> None:
    x, (gate_up, down) = torch.randn(19, D).to(dtype), make_experts(5, D, F, dtype)
    routing = make_routing(19, 5)
    got, wanted = fused_moe(x, gate_up, down, routing), reference_moe(x, gate_up, down, routing)
    torch.testing.assert_close(got, wanted, **TOLERANCE[dtype])
    assert (got - wanted).float().norm() <= 0.006 * wanted.float().norm()


def test_identity_constant_and_skewed_experts(make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(6, 8), make_experts(4, 8, 5)
    ids = torch.tensor([[2, 2], [2, 5], [5, 5], [-1, 9], [2, -1], [2, 4]])
    routing = from_topk(ids, torch.rand(6, 2), num_experts=4, identity_ids=(5,))
    got = fused_moe(x, gate_up, down, routing, backend="torch")
    torch.testing.assert_close(got, reference_moe(x, gate_up, down, routing), **TOLERANCE[torch.float32])
    assert (got[3] == 0).all()


def test_static_routing_computes_the_same(make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(9, 8), make_experts(4, 8, 5)
    ids, weights = torch.randint(-1, 6, (9, 3)), torch.rand(9, 3)
    exact = fused_moe(x, gate_up, down, from_topk(ids, weights, num_experts=4), backend="torch")
    static = fused_moe(x, gate_up, down, static_from_topk(ids, weights, num_experts=4), backend="torch")
    assert torch.equal(exact, static)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nan_in_an_unselected_expert_does_not_leak(backend: str, make_experts: Make) -> None:
    x, (gate_up, down) = torch.randn(3, 8), make_experts(4, 8, 5)
    gate_up[1], down[1] = float("nan"), float("nan")
    ids = torch.tensor([[0, 2], [3, -1], [0, 3]])
    for routing in (from_topk(ids, torch.rand(3, 2), num_experts=4), static_from_topk(ids, ids * 1.0, num_experts=4)):
        assert fused_moe(x, gate_up, down, routing, backend=backend).isfinite().all()


@given(st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_token_is_bitwise_the_same_alone_and_in_a_batch(T: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, gate_up, down = torch.randn(T, 24), torch.randn(6, 18, 24), torch.randn(6, 24, 9)
    ids, weights = torch.randint(-1, 6, (T, 2)), torch.rand(T, 2)
    whole = fused_moe(x, gate_up, down, from_topk(ids, weights, num_experts=6), backend="torch")
    for t in {0, T // 2, T - 1}:
        one = from_topk(ids[t : t + 1], weights[t : t + 1], num_experts=6)
        assert torch.equal(fused_moe(x[t : t + 1], gate_up, down, one, backend="torch")[0], whole[t])


def test_token_order_does_not_matter(make_experts: Make) -> None:
    x, (gate_up, down), order = torch.randn(17, 8), make_experts(4, 8, 5), torch.randperm(17)
    ids, weights = torch.randint(0, 4, (17, 2)), torch.rand(17, 2)
    plain = fused_moe(x, gate_up, down, from_topk(ids, weights, num_experts=4))
    mixed = fused_moe(x[order], gate_up, down, from_topk(ids[order], weights[order], num_experts=4))
    assert torch.equal(plain[order], mixed)


def test_gradients_equal_the_reference(make_experts: Make, make_routing: Make) -> None:
    x, (gate_up, down), routing = torch.randn(9, 8), make_experts(4, 8, 5), make_routing(9, 4)
    grads = []
    for run in (reference_moe, fused_moe):
        leaves = [t.clone().requires_grad_() for t in (x, gate_up, down, routing.weights_P)]
        made = Routing(
            indptr_T1=routing.indptr_T1, expert_ids_P=routing.expert_ids_P, weights_P=leaves[3], num_experts=4
        )
        run(*leaves[:3], made).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, wanted in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_explain_names_the_backend_and_the_reasons(make_experts: Make) -> None:
    gate_up, down = make_experts(2, 8, 4)
    text = FusedMoE(gate_up.double(), down.double()).explain()
    assert text.startswith("torch: chosen")
    assert "cpu: no C++ here for torch.float64" in text


def test_a_backend_that_cannot_run_refuses_loudly(make_experts: Make) -> None:
    gate_up, down = make_experts(2, 8, 4)
    with pytest.raises(BackendUnavailable, match="unquantised"):
        FusedMoE(gate_up, down, precision="int8", backend="torch")
    with pytest.raises(KernelInputError, match="not one of auto"):
        FusedMoE(gate_up, down, backend="cuda")
    with pytest.raises(KernelInputError, match="activation_bits is for precision int8 and int4"):
        FusedMoE(gate_up, down, activation_bits=16)
    with pytest.raises(KernelInputError, match="activation_bits 12 is not one of 8, 16"):
        FusedMoE(gate_up, down, precision="int8", activation_bits=12)


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("x", torch.randn(3, 9), "x_TD of shape"),
        ("x", torch.randn(3), "x_TD"),
        ("x", torch.randn(3, 8, dtype=torch.float64), "x_TD"),
        ("gate_up", torch.randn(2, 7, 8), "w_gate_up_EGD"),
        ("gate_up", torch.randn(8, 8), "w_gate_up_EGD"),
        ("gate_up", torch.ones(2, 8, 8, dtype=torch.int8), "w_gate_up_EGD"),
        ("down", torch.randn(2, 4, 8), "w_down_EDF"),
        ("down", torch.randn(2, 8, 4).half(), "w_down_EDF"),
        ("down", torch.randn(3, 8, 4), "w_down_EDF"),
    ],
)
def test_wrong_tensors_are_named(argument: str, value: torch.Tensor, named: str, make_routing: Make) -> None:
    good = {"x": torch.randn(3, 8), "gate_up": torch.randn(2, 8, 8), "down": torch.randn(2, 8, 4)}
    given_tensors = {**good, argument: value}
    with pytest.raises(KernelInputError, match=named):
        fused_moe(given_tensors["x"], given_tensors["gate_up"], given_tensors["down"], make_routing(3, 2))


def test_what_is_no_tensor_or_has_no_numbers_is_named(make_experts: Make, make_routing: Make) -> None:
    gate_up, down = make_experts(2, 8, 4)
    with pytest.raises(KernelInputError, match="x_TD is a list"):
        fused_moe([[1.0] * 8], gate_up, down, make_routing(1, 2))  # type: ignore[arg-type]
    with pytest.raises(KernelInputError, match="a meta tensor has none"):
        FusedMoE(gate_up.to("meta"), down.to("meta"))


def test_non_contiguous_tensors_are_read_right(make_experts: Make, make_routing: Make) -> None:
    x, (gate_up, down), routing = torch.randn(8, 9).t(), make_experts(4, 8, 5), make_routing(9, 4)
    apart = gate_up.transpose(1, 2).contiguous().transpose(1, 2)
    got, wanted = fused_moe(x, apart, down, routing), reference_moe(x, gate_up, down, routing)
    torch.testing.assert_close(got, wanted, **TOLERANCE[torch.float32])


def test_gradients_in_fp64_are_exact_to_fp64() -> None:
    """The sum over a token's experts was in fp32 whatever they were in."""
    ids, active = torch.randint(-1, 4, (5, 3)), torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    experts = SwiGLUExperts(4, 6, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return fused_moe(x, gate_up, down, from_topk(ids, weights, num_experts=4), backend="torch")

    assert torch.autograd.gradcheck(layer, (x, active, experts.w_gate_up_EGD, experts.w_down_EDF))
