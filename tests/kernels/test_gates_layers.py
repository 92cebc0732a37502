"""Each layer's own test: what its paper's formula gives in a case one can check."""

import itertools
import math
from typing import Any

import pytest
import torch
from collegium_kernels.gates.aoe import AoELayer
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.cartesian import CartesianLayer
from collegium_kernels.gates.comet import CometGate, sinkhorn
from collegium_kernels.gates.dselect_k import DSelectKGate
from collegium_kernels.gates.hashed import HashGate
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.gates.mh_moe import MultiHeadMoELayer
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.gates.peer import PeerLayer, product_top_k
from collegium_kernels.gates.smooth_step import code_probabilities, smooth_step
from collegium_kernels.gates.ultramem import UltraMemLayer, second_singular_penalty, tucker_top_k
from collegium_kernels.gates.vqmoe import VQMoELayer
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from collegium_kernels.reference import swiglu
from torch.nn import functional

NOTHING = Context()


def moe(width: int, E: int = 4, F: int = 6, k: int = 2) -> MoELayer:
    return MoELayer(MixtralGate(width, E, k=k), SwiGLUExperts(E, width, F)).eval()


# Smooth steps: DSelect-k and COMET


def test_smooth_step_values_and_slope() -> None:
    torch.testing.assert_close(smooth_step(torch.tensor([-9.0, -0.5, 0, 0.5, 9])), torch.tensor([0, 0, 0.5, 1, 1]))
    t = torch.tensor([0.0, 0.2, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(smooth_step, (t,))
    smooth_step(t, 2.0).sum().backward()
    assert float(t.grad[0]) == pytest.approx(1.5 / 2)


def test_selectors_are_distributions_and_saturate_to_one_expert() -> None:
    inner = code_probabilities(smooth_step(torch.rand(7, 3) - 0.5), 8)
    torch.testing.assert_close(inner.sum(1), torch.ones(7))
    hard = code_probabilities(smooth_step(torch.tensor([[1.0, -1, 1]])), 8)
    assert hard.argmax().item() == 0b101
    assert hard.sum() == hard.max() == 1


def test_dselect_k_has_at_most_k_experts_when_saturated() -> None:
    gate = DSelectKGate(6, 8, k=3)
    with torch.no_grad():
        gate.weight_bits.mul_(1e4)
    routing = gate(torch.randn(20, 6), NOTHING).routing
    assert int(routing.counts_T().max()) <= 3
    torch.testing.assert_close(routing.dense_TE().sum(1), torch.ones(20))


def test_comet_has_at_most_k_experts_when_saturated() -> None:
    gate = CometGate(6, 8, k=2)
    with torch.no_grad():
        gate.nodes.mul_(1e4)
    routing = gate(torch.randn(20, 6), NOTHING).routing
    assert int(routing.counts_T().max()) <= 2
    torch.testing.assert_close(routing.dense_TE().sum(1), torch.ones(20))
    with pytest.raises(ValueError, match="power of two"):
        CometGate(6, 6)


def test_sinkhorn_is_doubly_stochastic_and_near_the_best_permutation() -> None:
    scores = torch.rand(5, 5)
    matrix = sinkhorn(scores, temperature=0.01, iterations=4000)
    torch.testing.assert_close(matrix.sum(0), torch.ones(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(matrix.sum(1), torch.ones(5), atol=1e-3, rtol=0)
    exact = max(itertools.permutations(range(5)), key=lambda p: sum(float(scores[i, j]) for i, j in enumerate(p)))
    assert tuple(matrix.argmax(1).tolist()) == exact


# AoE, VQMoE, Cartesian, MH-MoE


def test_aoe_louder_experts_win_and_equal_a_dense_loop() -> None:
    layer, x = AoELayer(10, 5, k=2, rank=3, expert_width=7), torch.randn(9, 10)
    y, routed = layer(x)
    dense = routed.routing.dense_TE()
    wanted = torch.zeros_like(x)
    for e in range(5):
        a = x @ layer.down_ERD[e].t()
        wanted += dense[:, e, None] * (
            (functional.silu(a @ layer.up_EFR[e].t()) * (x @ layer.value_EFD[e].t())) @ layer.out_EDF[e].t()
        )
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        layer.down_ERD[3].mul_(1000)
    assert (layer(x)[1].routing.dense_TE()[:, 3] > 0).all()


def test_aoe_weights_sum_to_one_when_asked_and_its_load_is_balanced() -> None:
    layer, x = AoELayer(10, 5, renormalise=True), torch.randn(9, 10)
    routed = layer(x)[1]
    torch.testing.assert_close(routed.routing.dense_TE().sum(dim=1), torch.ones(9))
    torch.testing.assert_close(routed.loss, 0.01 * balance_loss(routed.scores_TE, routed.routing))
    assert (AoELayer(10, 5)(x)[1].routing.dense_TE().sum(dim=1) < 1).all()


def test_aoe_computes_the_low_rank_activations_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = AoELayer(10, 5), []
    real = layer.activations
    monkeypatch.setattr(layer, "activations", lambda x: calls.append(len(x)) or real(x))
    layer(torch.randn(9, 10))
    assert calls == [9]


def test_vqmoe_routes_codes_by_their_number() -> None:
    layer = VQMoELayer(moe(8), 8, codes=16)
    numbers = torch.tensor([3, 7, 9, 0])
    assert torch.equal(layer.codes(layer.codebook_CD[numbers].detach()), numbers)
    y, loss = layer(torch.randn(5, 8))
    loss.backward()
    assert layer.codebook_CD.grad.abs().sum() > 0
    layer.discrete_only = True
    with torch.no_grad():
        layer.layer.gate.weight_ED.fill_(float("nan"))
    assert layer(torch.randn(5, 8))[0].isfinite().all()
    assert y.shape == (5, 8)


def test_vqmoe_equals_a_loop_over_both_branches() -> None:
    inner, x, rho = moe(8), torch.randn(5, 8), 0.1
    layer, w = VQMoELayer(inner, 8, codes=16), inner.experts
    y, loss = layer(x)
    codes = torch.cdist(x, layer.codebook_CD).argmin(dim=1)
    mix = (x @ layer.mix_2D.t()).softmax(dim=1)
    for t, c in enumerate(codes.tolist()):
        mixed = functional.layer_norm((1 - 2 * rho) * x[t] + rho * layer.codebook_CD[c], (8,))
        discrete = swiglu(mixed, w.w_gate_up_EGD[c % 4], w.w_down_EDF[c % 4])
        torch.testing.assert_close(y[t], mix[t, 0] * inner(x)[0][t] + mix[t, 1] * discrete, atol=1e-5, rtol=1e-4)
    distance = (x - layer.codebook_CD[codes]).square().mean()
    torch.testing.assert_close(loss, 1.25 * distance + inner(x)[1].loss)


def test_vqmoe_finds_the_nearest_code_in_fp32() -> None:
    layer, x = VQMoELayer(moe(8), 8, codes=64).bfloat16(), torch.randn(300, 8).bfloat16()
    nearest = torch.cdist(x.double(), layer.codebook_CD.double()).argmin(dim=1)
    assert torch.equal(layer.codes(x), nearest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.float().codes(x.float()), nearest)


def test_the_codes_of_vqmoe_cannot_collapse_on_one_expert() -> None:
    """Tokens that are spread over the codes are spread over the experts, whatever the router has learnt."""
    layer, count = VQMoELayer(moe(8, E=4), 8, codes=16), []
    layer.discrete_only = True
    real = layer.experts.forward
    layer.experts.forward = lambda x, indptr: count.append(indptr.diff().tolist()) or real(x, indptr)
    with torch.no_grad():
        layer.layer.gate.weight_ED.zero_()
    layer(layer.codebook_CD.detach())
    assert count == [[4, 4, 4, 4]]


def test_cartesian_counts_paths_and_falls_back_to_its_first_half() -> None:
    first, second, x = moe(8, E=4), moe(8, E=4), torch.randn(400, 8)
    layer = CartesianLayer(first, second, 8)
    h = x + first(x)[0]
    ids_a = first.gate(x, NOTHING).routing.expert_ids_P.view(-1, 2).sort(1).values
    ids_b = second.gate(layer.norm(h), NOTHING).routing.expert_ids_P.view(-1, 2).sort(1).values
    paths = {tuple(p) for p in torch.cat([ids_a, ids_b], 1).tolist()}
    assert math.comb(4, 2) < len(paths) <= math.comb(4, 2) ** 2
    torch.testing.assert_close(layer(x)[0], h + second(functional.rms_norm(h, (8,)))[0])
    with torch.no_grad():
        second.experts.w_down_EDF.zero_()
    torch.testing.assert_close(layer(x)[0], h)


def test_mh_moe_with_one_head_and_identities_is_the_plain_layer() -> None:
    inner, x = moe(8), torch.randn(5, 8)
    layer = MultiHeadMoELayer(inner, 8, heads=1)
    with torch.no_grad():
        layer.split.weight.copy_(torch.eye(8))
        layer.merge.weight.copy_(torch.eye(8))
    torch.testing.assert_close(layer(x)[0], inner(x)[0])
    largest = 2**-0.5 * (6 / (400 + 400)) ** 0.5  # Xavier, with the gain 1 / sqrt(2)
    assert 0.9 * largest < MultiHeadMoELayer(moe(200), 400, heads=2).split.weight.abs().max() <= largest
    split = MultiHeadMoELayer(moe(4), 8, heads=2)
    assert split(x)[0].shape == (5, 8)
    with pytest.raises(ValueError, match="does not divide"):
        MultiHeadMoELayer(inner, 8, heads=3)


def test_the_parts_of_a_token_have_its_id() -> None:
    inner = MoELayer(HashGate(4, 4, vocab_size=9), SwiGLUExperts(4, 4, 6))
    layer, x, ids = MultiHeadMoELayer(inner, 8, heads=2), torch.randn(5, 8), torch.tensor([3, 1, 3, 0, 8])
    parts = (x @ layer.split.weight.t()).view(10, 4)
    chosen = inner.gate.table_V[ids].repeat_interleave(2)
    experts = inner.experts
    outputs = [swiglu(p, experts.w_gate_up_EGD[e], experts.w_down_EDF[e]) for p, e in zip(parts, chosen, strict=True)]
    wanted = torch.cat(outputs).view(5, 8) @ layer.merge.weight.t()
    torch.testing.assert_close(layer(x, Context(token_ids_T=ids))[0], wanted, atol=1e-5, rtol=1e-4)


# Product keys and memory


def test_product_keys_find_what_brute_force_finds() -> None:
    first, second = torch.randn(11, 32), torch.randn(11, 32)
    values, numbers = product_top_k(first, second, 16)
    brute = (first[:, :, None] + second[:, None, :]).flatten(1).topk(16)
    torch.testing.assert_close(values, brute.values)
    assert torch.equal(numbers.sort(1).values, brute.indices.sort(1).values)


@pytest.mark.parametrize("score", ["softmax", "relu"])
def test_peer_equals_a_loop_over_its_experts(score: Any) -> None:
    layer, x = PeerLayer(8, 6, heads=2, k=3, query=10, score=score), torch.randn(4, 8)
    scores, numbers = layer.retrieve(x)
    wanted = torch.zeros_like(x)
    for t, h, k in itertools.product(range(4), range(2), range(3)):
        expert = int(numbers[t, h, k])
        dot = layer.u.weight[expert] @ x[t]
        wanted[t] += scores[t, h, k] * functional.gelu(dot) * layer.v.weight[expert]
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)
    layer(x).sum().backward()
    assert layer.keys_2NQ.grad.abs().sum() > 0


def test_tucker_of_rank_one_is_exact_and_rescoring_is_never_worse() -> None:
    rows, columns = torch.rand(6, 10, 1), torch.rand(6, 10, 1)
    values, _ = tucker_top_k(rows, columns, torch.ones(1, 1), 4)
    brute = (rows * columns.transpose(1, 2)).flatten(1).topk(4).values
    torch.testing.assert_close(values, brute)
    rows, columns, core = torch.randn(6, 10, 2), torch.randn(6, 10, 2), torch.randn(2, 2)
    values, numbers = tucker_top_k(rows, columns, core, 4)
    exact = torch.einsum("tir,rs,tjs->tij", rows, core, columns).flatten(1)
    torch.testing.assert_close(values, exact.gather(1, numbers))
    u, _, vh = torch.linalg.svd(core)
    row_order = (rows @ u[:, 0]).topk(4).indices
    column_order = (columns @ vh[0]).topk(4).indices
    first_choices = exact.gather(1, row_order * 10 + column_order)
    assert (values.sum(1) >= first_choices.sum(1) - 1e-5).all()


def test_tucker_looks_up_whatever_sign_the_singular_vectors_have() -> None:
    """A core of rank one over positive scores: the best slots are where rows and columns are largest."""
    rows, columns = torch.rand(6, 10, 2), torch.rand(6, 10, 2)
    for core in (torch.ones(2, 2), torch.tensor([[1.0, 2.0], [0.5, 1.0]])):
        values, _ = tucker_top_k(rows, columns, core, 4)
        brute = torch.einsum("tir,rs,tjs->tij", rows, core, columns).flatten(1).topk(4).values
        torch.testing.assert_close(values, brute)


def test_ultramem_addresses_are_a_permutation_and_the_table_is_shared() -> None:
    layer, x = UltraMemLayer(8, 8, k=4, query=6, value=6), torch.randn(5, 8)
    assert torch.equal(layer.shuffle.sort().values, torch.arange(64))
    assert layer.table.num_embeddings == 16
    scores, slots = layer.retrieve(x)
    wanted = torch.zeros(5, 4, 6)
    for t, k in itertools.product(range(5), range(4)):
        value = layer.table.weight[slots[t, k] % 16].view(2, 3) * scores[t, k, :, None]
        wanted[t, slots[t, k] // 16] += value.flatten()
    torch.testing.assert_close(layer(x), wanted.flatten(1) @ layer.out.weight.t(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second_singular_penalty(torch.diag(torch.tensor([1.0, 0.25]))), torch.tensor(0.01))


def test_comet_learns_an_order_of_the_leaves_and_hardens_it() -> None:
    gate, x = CometGate(6, 8, k=2, search=True, iterations=60).eval(), torch.randn(5, 6)
    plain = CometGate(6, 8, k=2).eval()
    plain.load_state_dict(gate.state_dict(), strict=False)
    order = torch.stack([torch.randperm(8), torch.randperm(8)])
    with torch.no_grad():
        gate.search_KEE.copy_(torch.nn.functional.one_hot(order, 8) * 0.1)
    soft = gate(x, Context()).scores_TE
    gate.harden()
    assert torch.equal(gate.order_KE, order)
    assert gate.order_KE.sort(dim=1).values.tolist() == [list(range(8))] * 2
    hard = gate(x, Context()).scores_TE
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(hard.sum(dim=1), torch.ones(5))
    assert (hard - plain(x, Context()).scores_TE).abs().max() > 1e-3
    loaded = CometGate(6, 8, k=2, search=True).eval()
    loaded.load_state_dict(gate.state_dict())
    assert torch.equal(loaded(x, Context()).scores_TE, hard)
    loaded.load_state_dict(CometGate(6, 8, k=2, search=True).state_dict())
    assert loaded.order_KE is None
    with pytest.warns(UserWarning, match="meta"):  # another device than the checkpoint's
        loaded.to("meta").load_state_dict(gate.state_dict())
    assert loaded.order_KE.is_meta
    with torch.no_grad():
        gate.nodes.mul_(1e4)
    assert (gate(x, Context()).scores_TE > 0).sum(dim=1).max() <= 2


def test_comet_search_has_gradients_and_needs_asking_for() -> None:
    gate = CometGate(6, 8, k=2, search=True, temperature=0.5)
    gate(torch.randn(5, 6), Context(generator=torch.Generator().manual_seed(0))).scores_TE[:, 0].sum().backward()
    assert gate.search_KEE.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="without search"):
        CometGate(6, 8).harden()
