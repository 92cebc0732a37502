"""Losses and weights of the gates against the papers' formulas, worked out apart from the code."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from collegium_kernels.gates.adamoe import AdaMoEGate
from collegium_kernels.gates.adaptive import AdaptiveGate
from collegium_kernels.gates.aoe import AoELayer
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.comet import CometGate, sinkhorn
from collegium_kernels.gates.da_moe import DAMoEGate, importance
from collegium_kernels.gates.dselect_k import DSelectKGate
from collegium_kernels.gates.dynmoe import DynMoEGate
from collegium_kernels.gates.expert_choice import ExpertChoiceGate
from collegium_kernels.gates.moa import MixtureOfHeads
from collegium_kernels.gates.mod import MoDLayer
from collegium_kernels.gates.moe_plus_plus import MoEPlusPlusGate
from collegium_kernels.gates.peer import PeerLayer
from collegium_kernels.gates.pregated import PreGate
from collegium_kernels.gates.remoe import ReMoEGate
from collegium_kernels.gates.rmoe import RMoEGate
from collegium_kernels.gates.smile import SmileGate
from collegium_kernels.gates.switch import SwitchGate
from collegium_kernels.gates.thor import consistency_loss
from collegium_kernels.gates.xmoe import XMoEGate
from torch import Tensor, nn

NOTHING = Context()


def identity_gate(gate: nn.Module, E: int) -> nn.Module:
    """The gate whose logits are its input."""
    with torch.no_grad():
        gate.weight_ED.copy_(torch.eye(gate.weight_ED.shape[0], E))
    return gate.eval()


def balance(probs_TE: Tensor, load_E: list[int]) -> Tensor:
    """E x sum of f_i P_i."""
    share = torch.tensor(load_E) / sum(load_E)
    return len(load_E) * (share * probs_TE.mean(dim=0)).sum()


def test_switch_adds_both_losses_and_rounds_its_capacity_up() -> None:
    z = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    loss = 0.01 * balance(z.softmax(dim=1), [1, 1, 0]) + 0.001 * z.exp().sum(dim=1).log().square().mean()
    torch.testing.assert_close(identity_gate(SwitchGate(3, 3), 3)(z, NOTHING).loss, loss)
    full = identity_gate(SwitchGate(2, 2, capacity_factor=1.0), 2)
    assert full(torch.tensor([[3.0, 0.0]]).repeat(3, 1), NOTHING).routing.counts_T().tolist() == [1, 1, 0]


def test_expert_choice_scores_each_token_over_the_experts() -> None:
    z = torch.randn(6, 3)
    routed = identity_gate(ExpertChoiceGate(3, 3, capacity_factor=1.0), 3)(z, NOTHING)
    probs, wanted = z.softmax(dim=1), torch.zeros(6, 3)
    for e in range(3):
        for t in probs[:, e].topk(2).indices:
            wanted[t, e] = probs[t, e]
    torch.testing.assert_close(routed.routing.dense_TE(), wanted)


@pytest.mark.parametrize(("experts", "loss"), [(4, 0.01 * math.log(4)), (3, 0.01 * 0.75 * math.log(4) + 1 / 0.75)])
def test_dselect_pays_for_indecision_and_for_numbers_without_an_expert(experts: int, loss: float) -> None:
    """Undecided bits: each of four numbers has a quarter; of three experts' selectors a quarter goes nowhere."""
    gate = DSelectKGate(5, experts)
    with torch.no_grad():
        gate.weight_bits.zero_()
    torch.testing.assert_close(gate(torch.randn(2, 5), NOTHING).loss, torch.tensor(loss))


def test_comet_is_one_softmax_over_the_leaves_of_all_trees() -> None:
    gate, x = CometGate(5, 4, k=2), torch.randn(3, 5)
    routed, wanted, entropy = gate(x, NOTHING), torch.zeros(3, 4), torch.zeros(())
    for t in range(3):
        step = [0.5 + 1.5 * v - 2 * v**3 for v in (gate.nodes @ x[t]).clamp(-0.5, 0.5).tolist()]
        leaves = (gate.leaves @ x[t]).tolist()
        top, weight = {}, {}
        for s, leaf in itertools.product(range(2), range(4)):
            root, below = step[3 * s], step[3 * s + (1 if leaf < 2 else 2)]
            top[s, leaf] = (root if leaf < 2 else 1 - root) * (below if leaf % 2 == 0 else 1 - below)
            weight[s, leaf] = top[s, leaf] * math.exp(leaves[4 * s + leaf])
        for (_, leaf), value in weight.items():
            wanted[t, leaf] += value / sum(weight.values())
        entropy -= sum(v * math.log(v) for v in top.values() if v > 0) / (3 * 2)
    torch.testing.assert_close(routed.scores_TE, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(routed.loss, 0.01 * entropy, atol=1e-6, rtol=1e-4)


def test_comet_explores_with_gumbel_noise() -> None:
    gate, x = CometGate(5, 4, search=True, temperature=0.5), torch.randn(3, 5)
    made = gate._to_experts(leaves := torch.rand(3, 2, 4), torch.Generator().manual_seed(3))
    u = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3))
    near = sinkhorn(gate.search_KEE + 0.5 * -torch.log(-torch.log(u)), temperature=0.5)
    torch.testing.assert_close(made, torch.einsum("tke,kef->tkf", leaves, near))
    assert gate(x, NOTHING).scores_TE.shape == (3, 4)


def test_remoe_charges_busy_experts() -> None:
    """E / (k T) x count of each, times the mean of its weights: 4 / (2 x 2) x (2 x 2 + 1 x 1.5)."""
    gate = identity_gate(ReMoEGate(4, 4, k=2, penalty=0.1), 4)
    routed = gate(torch.tensor([[1.0, 3.0, -1.0, 0.0], [3.0, -2.0, -1.0, -1.0]]), NOTHING)
    torch.testing.assert_close(routed.loss, torch.tensor(0.1 * 4 / (2 * 2) * (2 * 2 + 1 * 1.5)))


def test_dynmoe_scales_cosines_and_keeps_its_experts_apart_and_short() -> None:
    gate = DynMoEGate(3, 2, scale=4.0)
    with torch.no_grad():
        gate.weight_ED.copy_(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
    overlap = torch.tensor([[4.0 - 1, 2.0], [2.0, 2.0 - 1]])
    loss = 0.01 * (overlap.square().sum().sqrt() + (2 + math.sqrt(2)) / 2)
    routed = gate(torch.tensor([[0.0, 5.0, 0.0]]), NOTHING)
    torch.testing.assert_close(routed.loss, loss)
    torch.testing.assert_close(routed.scores_TE, torch.tensor([[0.0, 4 / math.sqrt(2)]]).sigmoid())


def test_adamoes_null_experts_share_their_load() -> None:
    """All the load is on the null expert 2, whose scores are the higher: the loss counts half of it on each."""
    z = torch.tensor([[0.0, 0.0, 3.0, 1.0]])
    routed = identity_gate(AdaMoEGate(4, 2, null_experts=2, k=1), 4)(z, NOTHING)
    probs = z.softmax(dim=1)[0]
    torch.testing.assert_close(routed.loss, 0.01 * 4 * (probs[2] + probs[3]) / 2)


def test_moe_plus_plus_asks_less_of_cheap_experts() -> None:
    """f counts a token once for each of its two experts, 0 and the zero expert 2; the latter weighs tau."""
    z = torch.tensor([[3.0, 0.0, 2.0, 0.0, 0.0, 0.0]])
    routed = identity_gate(MoEPlusPlusGate(6, 2, tau=0.25), 6)(z, NOTHING)
    probs = z.softmax(dim=1)[0]
    torch.testing.assert_close(routed.loss, 0.01 * (probs[0] + 0.25 * probs[2]))
    assert routed.routing.weights_P.tolist() == [1.0]  # the zero expert's share goes to the other


def test_xmoe_balances_all_the_experts_it_chose() -> None:
    z = torch.tensor([[2.0, 1.9, -5.0], [4.0, -5.0, -5.0]])
    routed = identity_gate(XMoEGate(3, 3, threshold=0.9), 3)(z, NOTHING)
    assert routed.routing.counts_T().tolist() == [2, 1]
    torch.testing.assert_close(routed.loss, 0.01 * balance(z.softmax(dim=1), [2, 1, 0]))


def test_da_moe_rounds_the_number_of_experts_to_the_nearest() -> None:
    gate = DAMoEGate(4, 8, k_max=4).eval()
    given = Context(importance_T=torch.tensor([0.0, 0.3, 0.4, 0.6, 0.65, 1.0]))
    assert gate(torch.randn(6, 4), given).routing.counts_T().tolist() == [1, 1, 2, 2, 3, 4]


def test_da_moes_importance_is_the_mean_over_the_queries_that_could_see_a_token() -> None:
    """Of two tokens the second is seen by itself alone, with half of its attention; the first by both."""
    attention = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    torch.testing.assert_close(importance(attention), torch.tensor([1.0, 0.5 / 0.75]))


@pytest.mark.parametrize("detach", [False, True])
def test_rmoe_is_a_gru_of_the_layer_belows_state(detach: bool) -> None:
    gate, theirs = RMoEGate(4, 3, state=5, detach=detach).eval(), nn.GRUCell(5, 5)
    with torch.no_grad():
        theirs.weight_ih.copy_(gate.gru.weight_input)
        theirs.weight_hh.copy_(gate.gru.weight_state)
        theirs.bias_ih.zero_()
        theirs.bias_hh.zero_()
    x, below = torch.randn(6, 4), torch.randn(6, 5, requires_grad=True)
    state = gate(x, Context(state_TS=below)).state_TS
    torch.testing.assert_close(state, theirs(x @ gate.project_SD.t(), below), atol=1e-6, rtol=1e-5)
    state.sum().backward()
    assert (below.grad is None) is detach


def test_smile_balances_nodes_and_places_apart() -> None:
    gate, x = SmileGate(6, 4, nodes=2).eval(), torch.randn(5, 6)
    node, place = (part.logits(x).softmax(dim=1) for part in (gate.inter, gate.intra))
    loads = [torch.bincount(p.argmax(dim=1), minlength=2).tolist() for p in (node, place)]
    torch.testing.assert_close(gate(x, NOTHING).loss, 0.01 * (balance(node, loads[0]) + balance(place, loads[1])))


def test_aoe_scores_by_the_euclidean_norm() -> None:
    layer, x = AoELayer(6, 3, rank=4), torch.randn(5, 6)
    norms = torch.stack([torch.linalg.vector_norm(x @ layer.down_ERD[e].t(), dim=1) for e in range(3)], dim=1)
    torch.testing.assert_close(layer(x)[1].scores_TE, norms.softmax(dim=1))


@pytest.mark.parametrize(("score", "of"), [("softmax", lambda v: v.softmax(dim=0)), ("relu", torch.relu)])
def test_peer_scores_the_best_sums_of_both_halves_of_a_query(score: Any, of: Callable[[Tensor], Tensor]) -> None:
    layer, x = PeerLayer(8, 5, heads=2, k=3, query=6, score=score), torch.randn(4, 8)
    scores, numbers = layer.retrieve(x)
    for t, h in itertools.product(range(4), range(2)):
        query = nn.functional.layer_norm(layer.query[6 * h : 6 * h + 6] @ x[t], (6,))
        sums = (layer.keys_2NQ[0] @ query[:3])[:, None] + (layer.keys_2NQ[1] @ query[3:])[None, :]
        best = sums.flatten().topk(3)
        assert torch.equal(numbers[t, h], best.indices)
        torch.testing.assert_close(scores[t, h], of(best.values), atol=1e-5, rtol=1e-4)


def test_the_three_losses_of_heads() -> None:
    layer, x = MixtureOfHeads(8, 4, cv=0.1, switch=0.2, z=0.3), torch.randn(5, 8)
    logits = layer.gate.logits(x)
    probs, load = logits.softmax(dim=1), torch.bincount(logits.topk(2).indices.flatten(), minlength=4)
    total = probs.sum(dim=0)
    spread = ((total - total.mean()) ** 2).mean() / total.mean() ** 2
    wanted = 0.1 * spread + 0.2 * balance(probs, load.tolist()) + 0.3 * logits.logsumexp(dim=1).square().mean()
    torch.testing.assert_close(layer(x)[1].loss, wanted)


def test_mods_predictor_does_not_pull_at_the_tokens() -> None:
    layer, x = MoDLayer(nn.Identity(), 8), torch.randn(5, 8, requires_grad=True)
    nn.init.ones_(layer.predictor)
    layer(x)[1].backward()
    assert x.grad is None or not x.grad.any()


def test_thors_divergence_is_the_mean_of_both_directions() -> None:
    one, two, labels = torch.randn(4, 5), torch.randn(4, 5), torch.randint(0, 5, (4,))
    p, q = one.softmax(dim=1), two.softmax(dim=1)
    divergence = ((p * (p / q).log()).sum(dim=1) + (q * (q / p).log()).sum(dim=1)).mean() / 2
    errors = sum(-r.log()[torch.arange(4), labels].mean() for r in (p, q))
    torch.testing.assert_close(consistency_loss(one, two, labels), errors + 5 * divergence)


def test_a_pregate_scores_for_the_block_above_with_weights_of_its_own() -> None:
    gate, x = PreGate(4, 6).eval(), torch.randn(5, 4)
    routed = gate(x, NOTHING)
    torch.testing.assert_close(routed.state_TS, x @ gate.ahead.weight_ED.t())
    torch.testing.assert_close(routed.scores_TE, (x @ gate.here.weight_ED.t()).softmax(dim=1))


def test_adaptive_weights_are_the_probability_alone_or_renormalised_together() -> None:
    routing = identity_gate(AdaptiveGate(3, 3), 3)(torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]).log(), NOTHING)
    torch.testing.assert_close(routing.routing.weights_P, torch.tensor([0.7, 0.4 / 0.75, 0.35 / 0.75]))
