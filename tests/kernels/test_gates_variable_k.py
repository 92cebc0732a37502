"""Gates whose k varies, that look ahead or sample, and the losses: their papers' formulas by hand."""

import math

import pytest
import torch
from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates import losses
from collegium_kernels.gates.adamoe import AdaMoEGate
from collegium_kernels.gates.adaptive import AdaptiveGate, curriculum
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.da_moe import DAMoEGate, importance
from collegium_kernels.gates.moe_plus_plus import MoEPlusPlusGate
from collegium_kernels.gates.pregated import PreGate, exposed_fetch_s
from collegium_kernels.gates.read_me import ReadMeGate
from collegium_kernels.gates.rmoe import GRU, RMoEGate
from collegium_kernels.gates.smile import SmileGate, messages
from collegium_kernels.gates.sparse_mixer import SparseMixerGate
from collegium_kernels.gates.top_p import TopPGate
from collegium_kernels.gates.xmoe import XMoEGate
from collegium_kernels.ragged import from_topk
from torch import Tensor

NOTHING = Context()


def identity_gate(gate: torch.nn.Module, E: int) -> torch.nn.Module:
    """The gate whose logits are its input."""
    with torch.no_grad():
        gate.weight_ED.copy_(torch.eye(gate.weight_ED.shape[0], E))
    return gate.eval()


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


# Top-p, XMoE, AdaMoE, MoE++, adaptive, DA-MoE


@pytest.mark.parametrize(("p", "count"), [(0.4, 1), (0.6, 2), (0.9, 3)])
def test_top_p_takes_the_shortest_prefix(p: float, count: int) -> None:
    routing = identity_gate(TopPGate(3, 3, p=p), 3)(logits_of(0.5, 0.3, 0.2), NOTHING).routing
    assert routing.num_pairs == count
    torch.testing.assert_close(routing.weights_P, torch.tensor([0.5, 0.3, 0.2])[:count])


def test_top_p_entropy_loss_makes_it_choose_fewer() -> None:
    def trained(entropy: float) -> float:
        torch.manual_seed(1)
        gate = TopPGate(8, 8, p=0.8, entropy=entropy, balance=0.0)
        optimiser = torch.optim.Adam(gate.parameters(), lr=0.02)
        for _ in range(50):
            optimiser.zero_grad()
            gate(torch.randn(64, 8), NOTHING).loss.backward()
            optimiser.step()
        return gate(torch.randn(256, 8), NOTHING).routing.num_pairs / 256

    assert trained(1.0) < trained(0.0)


def test_xmoe_differs_from_top_p_only_when_a_sum_is_exactly_the_threshold() -> None:
    x = logits_of(0.5, 0.25, 0.25)
    xmoe, top_p = (identity_gate(g, 3) for g in (XMoEGate(3, 3, threshold=0.5), TopPGate(3, 3, p=0.5)))
    assert xmoe(x, NOTHING).routing.num_pairs == 1
    assert top_p(x, NOTHING).routing.num_pairs == 2
    random = torch.randn(200, 3)
    assert torch.equal(xmoe(random, NOTHING).routing.dense_TE(), top_p(random, NOTHING).routing.dense_TE())


def test_xmoe_caps_k_and_serves_first_ranks_first() -> None:
    x = logits_of(0.4, 0.35, 0.25).repeat(4, 1)
    assert identity_gate(XMoEGate(3, 3, threshold=0.99, k_max=2), 3)(x, NOTHING).routing.num_pairs == 8
    mixed = torch.cat([x[:2], logits_of(0.35, 0.4, 0.25).repeat(2, 1)])
    full = identity_gate(XMoEGate(3, 3, threshold=0.7, capacity_factor=1.5), 3)
    assert full(mixed, NOTHING).routing.expert_ids_P.tolist() == [0, 0, 1, 1]


def test_adamoe_all_null_is_zero_and_means_follow_the_shares() -> None:
    gate = identity_gate(AdaMoEGate(6, 2, null_experts=4, k=2), 6)
    routing = gate(torch.tensor([[0.0, 0, 9, 8, 0, 0], [9.0, 0, 8, 0, 0, 0]]), NOTHING).routing
    assert routing.counts_T().tolist() == [0, 1]
    assert routing.weights_P.tolist() == [1.0]
    wide = AdaMoEGate(64, 8, null_experts=8, k=4).eval()
    mean = wide(torch.randn(4000, 64), NOTHING).routing.num_pairs / 4000
    assert mean == pytest.approx(4 * 8 / 16, rel=0.1)


def test_adamoe_may_choose_more_than_it_has_true_experts() -> None:
    """k counts null experts too."""
    gate = identity_gate(AdaMoEGate(6, 2, null_experts=4, k=4), 6)
    routing = gate(torch.tensor([[7.0, 1, 9, 8, 0, 6], [9.0, 8, 0, 0, 0, 0]]), NOTHING).routing
    assert routing.expert_ids_P.tolist() == [0, 0, 1]


def test_adamoe_does_not_care_how_load_falls_among_nulls() -> None:
    gate = identity_gate(AdaMoEGate(4, 2, null_experts=2, k=1), 4)
    probs = torch.full((2, 4), 0.25)
    one, two = (gate._loss(probs, torch.tensor(ids)) for ids in ([[2], [2]], [[2], [3]]))
    assert float(one) == float(two)


def test_moe_plus_plus_cheap_experts_are_no_rows() -> None:
    gate = identity_gate(MoEPlusPlusGate(6, 2, k=2), 6)
    x = torch.tensor([[0.0, 0, 9, 8, 0, 0], [0.0, 0, 0, 9, 8, 0], [9.0, 8, 0, 0, 0, 0]])
    routing = gate(x, NOTHING).routing
    assert routing.counts_T().tolist() == [0, 0, 2]
    torch.testing.assert_close(routing.copy_T[0], torch.tensor(1.0))
    share = gate.logits(x)[1, 3:5].softmax(0)[1].item()
    alphas = (gate.mix_ND.view(2, 2, 6)[0] @ x[1]).softmax(0)
    torch.testing.assert_close(routing.copy_T[1], 1 - share + share * alphas[0])
    torch.testing.assert_close(routing.add_TD[1], share * alphas[1] * gate.constant_ND[0])


def test_moe_plus_plus_residual_scores() -> None:
    gate, x = MoEPlusPlusGate(6, 2).eval(), torch.randn(4, 6)
    below = torch.randn(4, 6)
    plain = gate(x, NOTHING)
    assert torch.equal(gate(x, Context(state_TS=below)).scores_TE, plain.scores_TE)
    torch.nn.init.eye_(gate.residual_EE)
    torch.testing.assert_close(gate(x, Context(state_TS=below)).state_TS, plain.state_TS + below)


def test_moe_plus_plus_capacity_is_shared_tau_to_one() -> None:
    """E = 4 true and 4 zero-cost experts, tau 0.5: of 60 pairs 60 x 0.5 / 6 and 60 / 6."""
    gate = MoEPlusPlusGate(8, 4, k=2, tau=0.5, capacity_factor=1.0)
    assert gate.capacities_E(60).tolist() == [5] * 4 + [10] * 4
    x = torch.randn(1, 8).expand(30, -1)
    first, second = gate.logits(x)[0].topk(2).indices.tolist()
    kept = [min(30, gate.capacities_E(60)[e].item()) if e < 4 else 0 for e in (first, second)]
    routing = gate(x, NOTHING).routing
    assert routing.num_pairs == sum(kept)
    assert routing.counts_T()[0] == (first < 4) + (second < 4)
    assert routing.copy_T[29] == 0
    assert (routing.add_TD[29] == 0).all()
    unlimited = MoEPlusPlusGate(8, 4, k=2, tau=0.5)
    unlimited.load_state_dict(gate.state_dict())
    assert unlimited(x, NOTHING).routing.num_pairs == 30 * ((first < 4) + (second < 4))


def test_adaptive_threshold_decides_between_one_and_two() -> None:
    x = torch.randn(20, 4)
    for threshold, count in ((0.0, 1), (1.0, 2)):
        routing = AdaptiveGate(4, 6, threshold=threshold).eval()(x, NOTHING).routing
        assert routing.counts_T().tolist() == [count] * 20


def test_adaptive_curriculum_puts_easy_batches_first() -> None:
    easy = from_topk(torch.tensor([[0, -1], [1, -1]]), torch.ones(2, 2), num_experts=2)
    hard = from_topk(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2), num_experts=2)
    assert curriculum([hard, easy]) == [1, 0]


def test_da_moe_follows_attention() -> None:
    gate = DAMoEGate(4, 8, k_max=4).eval()
    x = torch.randn(4, 4)
    uniform = importance(torch.full((2, 4, 4), 0.25))
    assert gate(x, Context(importance_T=uniform)).routing.counts_T().tolist() == [4, 4, 4, 4]
    peaked = torch.zeros(2, 4, 4)
    peaked[:, :, 2] = 1
    assert gate(x, Context(importance_T=importance(peaked))).routing.counts_T().tolist() == [1, 1, 4, 1]


# Recurrent and ahead of time


def test_rmoe_with_an_open_input_is_a_linear_router_and_order_matters() -> None:
    gru = GRU(5)
    gate, x = RMoEGate(4, 3, state=5, gru=gru).eval(), torch.randn(6, 4)
    state = torch.randn(6, 5)
    with torch.no_grad():
        gru.bias_update.fill_(-1e4)
        gru.weight_state.zero_()
    linear = (torch.tanh((x @ gate.project_SD.t()) @ gru.weight_input[10:].t()) @ gate.score_ES.t()).softmax(1)
    torch.testing.assert_close(gate(x, Context(state_TS=state)).scores_TE, linear, atol=1e-5, rtol=1e-5)
    other = RMoEGate(4, 3, state=5).eval()
    first, second = other(x, NOTHING).state_TS, other(x.flip(1), NOTHING).state_TS
    assert not torch.allclose(
        other(x.flip(1), Context(state_TS=first)).scores_TE, other(x, Context(state_TS=second)).scores_TE
    )


def test_pregate_executes_what_the_block_below_decided() -> None:
    below, here = PreGate(4, 6).eval(), PreGate(4, 6).eval()
    decided = below(torch.randn(5, 4), NOTHING).state_TS
    executed = here(torch.randn(5, 4), Context(state_TS=decided)).routing
    assert torch.equal(executed.expert_ids_P.view(5, 2), decided.topk(2).indices)


def test_pregated_fetch_is_hidden_behind_longer_computation() -> None:
    assert exposed_fetch_s([1.0] * 4, [1.2] * 4) == 1.0
    assert exposed_fetch_s([1.0] * 4, [0.4] * 4) == pytest.approx(1.0 + 3 * 0.6)


def test_read_me_decides_once_for_all_layers_and_causally() -> None:
    gate, ids = ReadMeGate(4, 6, vocab_size=30).eval(), torch.randint(0, 30, (7,))
    first = gate(torch.randn(7, 4), Context(token_ids_T=ids))
    later = gate(torch.randn(7, 4), Context(state_TS=first.state_TS))
    assert torch.equal(first.routing.expert_ids_P, later.routing.expert_ids_P)
    torch.testing.assert_close(gate.decide(ids[:4]), first.state_TS[:4], atol=1e-5, rtol=1e-4)


# SMILE, SparseMixer


def test_smile_scores_nodes_and_locals_apart() -> None:
    gate, x = SmileGate(6, 12, nodes=3).eval(), torch.randn(8, 6)
    assert gate.inter.weight_ED.shape[0] + gate.intra.weight_ED.shape[0] == 3 + 4
    routed = gate(x, NOTHING)
    node, local = gate.inter.logits(x).argmax(1), gate.intra.logits(x).argmax(1)
    assert torch.equal(routed.routing.expert_ids_P, node * 4 + local)
    torch.testing.assert_close(routed.routing.weights_P, routed.scores_TE.amax(1))
    assert messages(16, 8) == (127, 22)


def test_sparse_mixer_masks_far_logits_and_gives_each_choice_its_own_softmax() -> None:
    gate = identity_gate(SparseMixerGate(3, 3), 3)
    routing = gate(torch.tensor([[2.0, 1.9, 0.0]]), NOTHING).routing
    assert routing.expert_ids_P.tolist() == [0, 1]
    torch.testing.assert_close(routing.weights_P, torch.tensor([0.525, 1.0]), atol=5e-4, rtol=0)


@pytest.mark.parametrize(("variant", "share", "factor"), [("v1", 0.5, 2.0), ("v2", 1 / 3, 1.0)])
def test_sparse_mixer_estimator(variant: str, share: float, factor: float) -> None:
    gate = SparseMixerGate(3, 3, k=1, variant=variant).train()
    z = torch.tensor([[1.0, 0.95, 0.9]]).repeat(3000, 1).requires_grad_()
    ids, weights = gate.choose(z, torch.Generator().manual_seed(0))
    probs = z.detach().softmax(1)
    ratio = (weights / probs.gather(1, ids))[:, 0].detach()
    leader = ids[:, 0] == 0
    torch.testing.assert_close(ratio[leader], torch.ones_like(ratio[leader]))
    assert torch.unique((ratio[~leader] * 1e4).round()).tolist() == [round(share * 1e4), 1e4]
    weights.sum().backward()
    chosen = probs.gather(1, ids)
    onehot = torch.nn.functional.one_hot(ids[:, 0], 3)
    torch.testing.assert_close(z.grad, factor * chosen * (onehot - probs))


def test_sparse_mixer_reaches_every_expert_where_argmax_reaches_one() -> None:
    """The exact gradient of E[f] is sum_a p_a f_a (onehot_a - p); sampling sees it, top-1 straight-through does not."""
    f = torch.tensor([0.2, 1.0, -0.7])
    z = torch.tensor([[1.0, 0.95, 0.9]])
    p = z.softmax(1)
    exact = (p.t() * f[:, None] * (torch.eye(3) - p)).sum(0)
    gate, samples = SparseMixerGate(3, 3, k=1).train(), z.repeat(20000, 1).requires_grad_()
    ids, weights = gate.choose(samples, torch.Generator().manual_seed(0))
    (weights[:, 0] * f[ids[:, 0]] / p[0, ids[:, 0]]).sum().backward()
    estimate = samples.grad.mean(0)
    straight_through = p[0, 0] * f[0] * (torch.eye(3)[0] - p[0])
    assert (estimate - exact).norm() < 0.1 * (straight_through - exact).norm()


# Losses


def test_global_balance_sees_what_micro_batches_do_not() -> None:
    probs = [torch.tensor([[0.5, 0.5, 0, 0]]).repeat(4, 1), torch.tensor([[0, 0, 0.5, 0.5]]).repeat(4, 1)]
    routings = [
        from_topk(torch.tensor([[a], [b], [a], [b]]), torch.ones(4, 1), num_experts=4) for a, b in ((0, 1), (2, 3))
    ]
    counts = losses.counts(routings[0]) + losses.counts(routings[1])
    for p, routing in zip(probs, routings, strict=True):
        torch.testing.assert_close(losses.balance_loss(p, routing), torch.tensor(2.0))
        torch.testing.assert_close(losses.global_balance_loss(p, counts), torch.tensor(1.0))


def test_z_loss_by_hand() -> None:
    torch.testing.assert_close(losses.z_loss(torch.zeros(3, 4)), torch.tensor(math.log(4) ** 2))


def test_mutual_information_is_largest_when_tasks_use_their_own_experts() -> None:
    tasks = torch.tensor([0, 0, 1, 1])
    own = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    torch.testing.assert_close(losses.mutual_information_loss(own, tasks), torch.tensor(-math.log(2)))
    assert float(losses.mutual_information_loss(own[:0], tasks[:0])) == 0
    with pytest.raises(KernelInputError, match="a task for each of 4"):
        losses.mutual_information_loss(own, tasks[:3])
    mixed = torch.full((4, 2), 0.5)
    torch.testing.assert_close(losses.mutual_information_loss(mixed, tasks), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_mutual_information_of_tokens_is_least_when_they_are_sure_and_experts_even() -> None:
    sure_and_even = torch.eye(8).repeat(3, 1)
    torch.testing.assert_close(losses.mutual_information_loss(sure_and_even), torch.tensor(-math.log(8)))
    for probs in (torch.full((4, 8), 1 / 8), torch.eye(8)[[2, 2, 2]]):
        torch.testing.assert_close(losses.mutual_information_loss(probs), torch.tensor(0.0), atol=1e-6, rtol=0)
    probs = torch.randn(9, 8).softmax(dim=1)
    each = losses.mutual_information_loss(probs, torch.arange(9))
    torch.testing.assert_close(losses.mutual_information_loss(probs), each)
