"""Each token-choice gate's own test: the numbers its paper's formula gives by hand."""

import math
from typing import Any

import pytest
import torch
from collegium_kernels import gates
from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates import losses
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.deepseek import DeepSeekGate, SharedExpert
from collegium_kernels.gates.expert_choice import ExpertChoiceGate
from collegium_kernels.gates.gshard import GShardGate
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.gates.sparse_mixer import SparseMixerGate
from collegium_kernels.gates.stable_moe import StableMoEGate
from collegium_kernels.gates.switch import SwitchGate
from collegium_kernels.gates.yuan import YuanGate
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from collegium_kernels.ragged import check_routing, from_topk
from torch import Tensor

NOTHING = Context()


def identity_gate(gate: torch.nn.Module, E: int) -> torch.nn.Module:
    """The gate whose logits are its input."""
    with torch.no_grad():
        gate.weight_ED.copy_(torch.eye(gate.weight_ED.shape[0], E))
    return gate.eval()


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


# Switch


def test_switch_drops_what_exceeds_the_capacity_and_nothing_by_default() -> None:
    x = torch.tensor([[3.0, 0.0]]).repeat(4, 1)
    full = identity_gate(SwitchGate(2, 2, capacity_factor=1.0), 2)
    assert full(x, NOTHING).routing.counts_T().tolist() == [1, 1, 0, 0]
    layer = MoELayer(full, SwiGLUExperts(2, 2, 3))
    assert (layer(x)[0][2:] == 0).all()
    assert identity_gate(SwitchGate(2, 2), 2)(x, NOTHING).routing.counts_T().tolist() == [1, 1, 1, 1]


def test_switch_weight_is_the_probability_and_even_load_costs_alpha() -> None:
    gate = identity_gate(SwitchGate(2, 2, z=0.0), 2)
    routed = gate(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), NOTHING)
    torch.testing.assert_close(routed.routing.weights_P, torch.full((2,), math.e / (1 + math.e)))
    torch.testing.assert_close(routed.loss, torch.tensor(0.01))
    even = from_topk(torch.tensor([[0], [1]]), torch.ones(2, 1), num_experts=2)
    torch.testing.assert_close(losses.balance_loss(torch.full((2, 2), 0.5), even), torch.tensor(1.0))


def test_switch_jitters_only_in_training() -> None:
    gate, x = SwitchGate(4, 4, jitter=0.1), torch.randn(5, 4)
    gate.eval()
    assert torch.equal(gate(x, NOTHING).scores_TE, gate(x, NOTHING).scores_TE)
    gate.train()
    assert not torch.equal(gate(x, NOTHING).scores_TE, gate(x, NOTHING).scores_TE)


# Top-2


def test_top2_before_and_after_the_softmax() -> None:
    z = torch.tensor([[2.0, 1.0, 0.0]])
    pre = identity_gate(MixtralGate(3, 3, order="pre", renormalise=False), 3)(z, NOTHING)
    torch.testing.assert_close(pre.routing.weights_P, torch.tensor([0.665, 0.245]), atol=5e-4, rtol=0)
    for gate in (MixtralGate(3, 3, order="pre"), MixtralGate(3, 3), GShardGate(3, 3)):
        weights = identity_gate(gate, 3)(z, NOTHING).routing.weights_P
        torch.testing.assert_close(weights, torch.tensor([0.731, 0.269]), atol=5e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mixtral", {"order": "before"}, "order 'before'"),
        ("mixtral", {"renormalise": False}, "sums to 1 by itself"),
        ("mixtral", {"k": -1}, "k is -1"),
        ("deepseek", {"devices": 2}, "3 experts do not divide among 2 devices"),
        ("smile", {"nodes": 2}, "3 experts do not divide among 2 nodes"),
        ("mask_moe", {"visible": 0}, "visible is 0"),
        ("mask_moe", {"visible": 4}, "visible is 4"),
        ("mowe", {"frequency_V": torch.ones(9)}, r"frequency_V of shape \(9,\)"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(KernelInputError, match=words):
        gates.load(name)(3, 3, **options)(torch.randn(2, 3), NOTHING)


def test_only_weights_that_are_not_renormalised_pull_at_every_score() -> None:
    for options, pulled in (({"order": "pre", "renormalise": False}, 3), ({"order": "pre"}, 2), ({}, 2)):
        gate, z = identity_gate(MixtralGate(3, 3, balance=0.0, **options), 3), torch.tensor([[2.0, 1.0, 0.0]])
        z.requires_grad_()
        gate(z, NOTHING).routing.weights_P[0].backward()
        assert int((z.grad.abs() > 1e-6).sum()) == pulled


def test_gshard_keeps_the_second_expert_in_proportion_to_its_weight() -> None:
    gate = identity_gate(GShardGate(2, 2), 2).train()
    x = logits_of(0.9, 0.1).repeat(4000, 1)
    counts = gate(x, Context(generator=torch.Generator().manual_seed(0))).routing.counts_T()
    assert float((counts == 2).float().mean()) == pytest.approx(0.2, abs=0.03)


def test_gshard_fills_capacity_with_first_choices_first() -> None:
    gate = identity_gate(GShardGate(2, 2, capacity_factor=0.5), 2)
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    routing = gate(x, NOTHING).routing
    assert routing.counts_T().tolist() == [1, 1, 1, 1]
    assert routing.expert_ids_P.tolist() == [0, 0, 1, 1]


def test_gshards_groups_have_their_own_capacity() -> None:
    """All eight tokens want expert 0 and then 1: two of each half of them get in, not the first four."""
    x = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    one, two = (identity_gate(GShardGate(2, 2, capacity_factor=0.5, groups=g), 2)(x, NOTHING) for g in (1, 2))
    assert one.routing.counts_T().tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert two.routing.counts_T().tolist() == [2, 2, 0, 0, 2, 2, 0, 0]
    torch.testing.assert_close(two.scores_TE, one.scores_TE)
    torch.testing.assert_close(two.loss, one.loss)
    check_routing(two.routing, num_tokens=8, num_experts=2)
    few = identity_gate(GShardGate(2, 2, groups=3), 2)(x[:2], NOTHING).routing
    assert torch.equal(few.dense_TE(), identity_gate(GShardGate(2, 2), 2)(x[:2], NOTHING).routing.dense_TE())


# DeepSeekMoE


def test_deepseek_has_more_combinations_at_the_same_work() -> None:
    assert math.comb(16, 2) == 120
    assert math.comb(64, 8) == 4_426_165_368
    coarse, fine = SwiGLUExperts(16, 8, 32), SwiGLUExperts(64, 8, 8)
    assert sum(p.numel() for p in coarse.parameters()) == sum(p.numel() for p in fine.parameters())
    assert 2 * coarse.w_down_EDF[0].numel() == 8 * fine.w_down_EDF[0].numel()


def test_deepseek_balance_is_alpha_when_even_and_weights_are_raw_probabilities() -> None:
    gate = identity_gate(DeepSeekGate(4, 4, k=2, balance=0.01, device_balance=0.05, devices=2), 4)
    even = gate(torch.eye(4)[[0, 1, 2, 3]] + torch.eye(4)[[1, 2, 3, 0]], NOTHING)
    torch.testing.assert_close(even.loss, torch.tensor(0.01 + 0.05))
    assert (even.routing.dense_TE().sum(1) < 1).all()


def test_a_shared_expert_is_added_to_every_token() -> None:
    shared, x = SharedExpert(8, 6), torch.randn(5, 8)
    gate, experts = DeepSeekGate(8, 4, k=2).eval(), SwiGLUExperts(4, 8, 6)
    with_shared, without = MoELayer(gate, experts, shared)(x)[0], MoELayer(gate, experts)(x)[0]
    torch.testing.assert_close(with_shared, without + shared(x))


# Yuan


def test_yuan_breaks_ties_by_the_lowest_id() -> None:
    gate = YuanGate(6, 4).eval()
    with torch.no_grad():
        gate.weight_qkv[4:8] = 0
    routed = gate(torch.randn(5, 6), NOTHING)
    torch.testing.assert_close(routed.scores_TE, torch.full((5, 4), 0.25))
    assert (routed.routing.expert_ids_P.view(5, 2) == torch.tensor([0, 1])).all()


def test_yuan_scores_are_attention_over_experts() -> None:
    gate, x = YuanGate(6, 3).eval(), torch.randn(1, 6)
    q, k, v = (gate.weight_qkv @ x[0]).chunk(3)
    z = torch.stack([(q[i] * k).softmax(0) @ v for i in range(3)])
    torch.testing.assert_close(gate(x, NOTHING).scores_TE[0], z.softmax(0))


# Expert choice


def test_expert_choice_gives_every_expert_the_same_number_of_tokens() -> None:
    gate, x = ExpertChoiceGate(8, 4, capacity_factor=2.0).eval(), torch.randn(10, 8)
    routed = gate(x, NOTHING)
    assert torch.bincount(routed.routing.expert_ids_P, minlength=4).tolist() == [5, 5, 5, 5]
    changed = x.clone()
    changed[9] += 5
    assert not torch.equal(gate(changed, NOTHING).routing.dense_TE()[:9], routed.routing.dense_TE()[:9])


def test_expert_choice_may_score_over_the_tokens() -> None:
    """An expert then ranks by its logits alone, whatever the others' are."""
    gate, x = ExpertChoiceGate(8, 4, over="tokens").eval(), torch.randn(10, 8)
    routed = gate(x, NOTHING)
    torch.testing.assert_close(routed.scores_TE.sum(dim=0), torch.ones(4))
    best_five = gate.logits(x).topk(5, dim=0).indices
    for e in range(4):
        assert routed.routing.dense_TE()[:, e].nonzero().flatten().tolist() == best_five[:, e].sort().values.tolist()
    with pytest.raises(ValueError, match="over 'both' is not one of"):
        ExpertChoiceGate(8, 4, over="both")  # type: ignore[arg-type]


# StableMoE


def test_stable_moe_drops_the_overflow_in_stage_one_if_asked() -> None:
    gate = StableMoEGate(8, 4, vocab_size=10, capacity_factor=2.0)
    x, context = torch.ones(8, 8), Context(token_ids_T=torch.arange(8))  # all to one expert, which takes four
    routing = gate(x, context).routing
    assert routing.counts_T().tolist() == [1] * 4 + [0] * 4
    assert routing.copy_T is not None
    torch.testing.assert_close(routing.copy_T, 1 - routing.weights_P[:1].expand(8))
    gate.freeze()
    assert (gate(x, context).routing.counts_T() == 1).all()


def test_stable_moe_routes_by_token_id_in_stage_two() -> None:
    gate = StableMoEGate(8, 4, vocab_size=10)
    ids = torch.tensor([3, 1, 3, 3, 1])
    gate.freeze()
    routed = gate(torch.randn(5, 8), Context(token_ids_T=ids))
    experts = routed.routing.expert_ids_P
    assert experts[0] == experts[2] == experts[3]
    assert experts[1] == experts[4]
    assert float(routed.loss) == 0
    layer = MoELayer(gate, SwiGLUExperts(4, 8, 6))
    layer(torch.randn(5, 8), Context(token_ids_T=ids))[0].sum().backward()
    assert gate.embedding.weight.grad is None
    assert gate.light_ES.grad is None


def test_stable_moe_learns_balance_and_distils_in_stage_one() -> None:
    """Expert 0 has three of four tokens, 2 more than the mean of 1; experts 2 and 3 none."""
    gate = identity_gate(StableMoEGate(4, 4, vocab_size=10), 4)
    x, ids = torch.eye(4)[[0, 0, 0, 1]], torch.arange(4)
    routed = gate(x, Context(token_ids_T=ids))
    strong = torch.tensor(1.0).sigmoid()
    light = gate.embedding(ids) @ gate.light_ES.t()
    distil = torch.nn.functional.cross_entropy(light, torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(routed.loss, 0.3 * 2 * 3 * strong / 4 + 0.3 * distil)


def test_stable_moe_keeps_the_rest_of_the_token() -> None:
    gate = StableMoEGate(8, 4, vocab_size=10)
    routing = gate(torch.randn(5, 8), Context(token_ids_T=torch.arange(5))).routing
    torch.testing.assert_close(routing.weights_P + routing.copy_T, torch.ones(5))


def test_gshards_loss_counts_first_choices() -> None:
    """Everybody's second choice is expert 1: no business of the loss."""
    gate = GShardGate(2, 4).eval()
    with torch.no_grad():
        gate.weight_ED.copy_(torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, 3.0], [0.0, 0.0]]))
    x = torch.eye(2)
    probs = (x @ gate.weight_ED.T).softmax(dim=1)
    routed = gate(x, Context())
    assert routed.routing.expert_ids_P.tolist() == [0, 1, 2, 1]
    wanted = 0.01 * 4 * (probs.mean(dim=0) * torch.tensor([0.5, 0, 0.5, 0])).sum()
    torch.testing.assert_close(routed.loss, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_sparse_mixer_chooses_no_expert_twice(training: bool) -> None:
    gate = SparseMixerGate(4, 2, k=5).train(training)
    routed = gate(torch.randn(7, 4), Context())
    assert routed.routing.expert_ids_P.view(7, -1).sort(dim=1).values.tolist() == [[0, 1]] * 7
    assert routed.routing.weights_P.isfinite().all()
