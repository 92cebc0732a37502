"""Gates and losses beside the same ones in transformers, which were written by others."""

from typing import Any

import pytest
import torch
from collegium_kernels.gates import load
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.losses import balance_loss, z_loss
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.ragged import Routing, rectangular
from torch import Tensor

pytest.importorskip("transformers")
D, E, T = 32, 8, 200


def with_logits(name: str, **options: Any) -> torch.nn.Module:
    """The gate whose logits are its input."""
    gate: torch.nn.Module = load(name)(E, E, **options)
    with torch.no_grad():
        gate.weight_ED.copy_(torch.eye(E))
    return gate.eval()


def same_experts(routing: Routing, ids_TK: Tensor, weights_TK: Tensor) -> None:
    assert torch.equal(routing.expert_ids_P.view(ids_TK.shape), ids_TK)
    torch.testing.assert_close(routing.weights_P.view(weights_TK.shape), weights_TK)


def test_mixtral_and_its_loss() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=2))
    gate, x = MixtralGate(D, E).eval(), torch.randn(T, D)
    with torch.no_grad():
        theirs.weight.copy_(gate.weight_ED)
    routed = gate(x, Context())
    same_experts(routed.routing, *reversed(theirs(x)[1:]))
    wanted = load_balancing_loss_func((gate.logits(x),), E, 2)  # counts each of the k choices as a whole one
    torch.testing.assert_close(routed.loss, 0.001 * wanted / 2)


def test_softmax_before_the_choice_without_renormalising() -> None:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    config = OlmoeConfig(hidden_size=D, num_experts=E, num_experts_per_tok=3, norm_topk_prob=False)
    theirs = OlmoeTopKRouter(config)
    gate, x = MixtralGate(D, E, k=3, order="pre", renormalise=False).eval(), torch.randn(T, D)
    with torch.no_grad():
        theirs.weight.copy_(gate.weight_ED)
    same_experts(gate(x, Context()).routing, *reversed(theirs(x)[1:]))


@pytest.mark.parametrize("epsilon", [0.01, 0.1])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_sparse_mixer_is_the_routing_of_phimoe(epsilon: float, scale: float) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = scale * torch.randn(T, E)
    logits[0], logits[1] = 0, -logits[1].abs()
    weights, ids = sparsemixer(logits.clone(), jitter_eps=epsilon, training=False)
    routed = with_logits("sparse_mixer", epsilon=epsilon)(logits, Context())
    same_experts(routed.routing, ids, weights)


def test_the_losses_of_switch() -> None:
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    logits = torch.randn(T, E)
    probs = logits.softmax(dim=1)
    first = probs.argmax(dim=1, keepdim=True)
    routing = rectangular(first, torch.ones(T, 1), num_experts=E)
    torch.testing.assert_close(balance_loss(probs, routing), switch.load_balancing_loss_func(probs[None], first[None]))
    torch.testing.assert_close(z_loss(logits), switch.router_z_loss_func(logits[None]))
