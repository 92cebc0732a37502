"""ReMoE and DynMoE, which adapt how many experts there are for a token: their own tests."""

import pytest
import torch
from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.dynmoe import DynMoEGate, adapt_experts
from collegium_kernels.gates.remoe import ReMoEGate
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from collegium_kernels.ragged import from_topk

NOTHING = Context()


def test_remoe_trains_to_k_active_experts() -> None:
    gate = ReMoEGate(16, 16, k=2, penalty=1e-3)
    teacher = torch.randn(16, 16) / 4
    optimiser = torch.optim.SGD(gate.parameters(), lr=0.3)
    active = []
    for _ in range(250):
        tokens = torch.cat([torch.randn(64, 15), torch.ones(64, 1)], dim=1)
        routed = gate(tokens, NOTHING)
        keep_useful = (routed.scores_TE - (tokens @ teacher).relu()).square().mean()
        optimiser.zero_grad()
        (keep_useful + routed.loss).backward()
        optimiser.step()
        gate.control(routed.routing)
        active.append(routed.routing.num_pairs / 64)
    assert active[0] > 4
    assert sum(active[-100:]) / 100 == pytest.approx(2, rel=0.1)


def test_remoe_raises_the_penalty_only_while_too_many_are_active() -> None:
    gate = ReMoEGate(4, 4, k=1, penalty=1.0)
    dense = from_topk(torch.arange(4).repeat(2, 1), torch.ones(2, 4), num_experts=4)
    gate.control(dense)
    assert float(gate.penalty) == pytest.approx(1.2)
    gate.control(from_topk(torch.tensor([[0], [-1]]), torch.ones(2, 1), num_experts=4))
    assert float(gate.penalty) == pytest.approx(1.0)
    gate.control(from_topk(torch.zeros(0, 1, dtype=torch.long), torch.ones(0, 1), num_experts=4))
    assert float(gate.penalty) == pytest.approx(1.0)


def test_remoe_layers_may_share_their_k() -> None:
    """One layer uses three experts, one none: with k = 2 too many for the first alone, too few for both together."""
    gates = [ReMoEGate(4, 4, k=2, penalty=1.0) for _ in range(2)]
    routings = [
        from_topk(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), num_experts=4),
        from_topk(torch.tensor([[-1]]), torch.ones(1, 1), num_experts=4),
    ]
    for gate in gates:
        gate.control(*routings)
    assert [float(gate.penalty) for gate in gates] == pytest.approx([1 / 1.2, 1 / 1.2])
    gates[0].control(routings[0])
    assert float(gates[0].penalty) == pytest.approx(1.0)


def test_dynmoe_adds_an_expert_for_orphans_and_drops_the_dead() -> None:
    gate, experts = DynMoEGate(4, 3), SwiGLUExperts(3, 4, 5)
    with torch.no_grad():
        gate.weight_ED.copy_(torch.eye(3, 4))
        gate.threshold_E.fill_(0.5)
    tokens = torch.cat([torch.eye(4)[[0, 0, 1]], 2 * torch.eye(4)[[3, 3]]])
    kept, added = gate.adapt(tokens)
    assert kept.tolist() == [0, 1]
    assert added
    assert gate.num_experts == 3
    torch.testing.assert_close(gate.weight_ED[2], torch.eye(4)[3])
    assert gate.threshold_E[2].item() == 0
    follow = adapt_experts(experts, kept, added)
    assert torch.equal(follow.w_down_EDF[:2], experts.w_down_EDF[[0, 1]])
    assert torch.equal(follow.w_gate_up_EGD[:2], experts.w_gate_up_EGD[[0, 1]])
    # The checkpoint has the new shapes, and loads where the number of experts is known.
    layer, saved = MoELayer(gate, follow).eval(), MoELayer(gate, follow).state_dict()
    loaded = MoELayer(DynMoEGate(4, 3), SwiGLUExperts(3, 4, 5)).eval()
    loaded.load_state_dict(saved)
    assert torch.equal(layer(tokens)[0], loaded(tokens)[0])
    with pytest.raises(KernelInputError, match=r"x_TD of shape \(0, 4\)"):
        gate.adapt(tokens[:0])
    assert gate.num_experts == 3


def test_dynmoe_leaves_orphans_alone_in_training() -> None:
    """What adapts the experts to them is that they have none; only afterwards the nearest serves them."""
    gate, x = DynMoEGate(4, 3), torch.randn(6, 4)
    with torch.no_grad():
        gate.threshold_E.fill_(5.0)
    assert gate.train()(x, NOTHING).routing.counts_T().tolist() == [0] * 6
    assert gate.eval()(x, NOTHING).routing.counts_T().tolist() == [1] * 6


def test_dynmoe_averages_and_never_leaves_a_token_alone() -> None:
    gate = DynMoEGate(4, 3).eval()
    with torch.no_grad():
        gate.threshold_E.fill_(5.0)
    routing = gate(torch.randn(6, 4), NOTHING).routing
    assert routing.counts_T().tolist() == [1] * 6
    with torch.no_grad():
        gate.threshold_E.fill_(-5.0)
    torch.testing.assert_close(gate(torch.randn(6, 4), NOTHING).routing.weights_P, torch.full((18,), 1 / 3))
