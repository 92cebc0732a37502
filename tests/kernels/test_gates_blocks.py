"""Layers over a whole sequence, decoding and the shortcut: each in a case one can check."""

import itertools
import math

import pytest
import torch
from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.deepseek import SharedExpert
from collegium_kernels.gates.meo import MergedExperts
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.gates.mixture_of_tokens import MixtureOfTokens
from collegium_kernels.gates.moa import MixtureOfHeads
from collegium_kernels.gates.moba import block_gate, moba_attention
from collegium_kernels.gates.mod import MoDLayer
from collegium_kernels.gates.scmoe import self_contrast, weak_routing
from collegium_kernels.gates.shortcut import ShortcutLayer, hidden_share
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from collegium_kernels.ragged import from_topk
from collegium_kernels.reference import swiglu
from torch.nn import functional

NOTHING = Context()


def moe(width: int, E: int = 4, F: int = 6, k: int = 2) -> MoELayer:
    return MoELayer(MixtralGate(width, E, k=k), SwiGLUExperts(E, width, F)).eval()


# Depth, heads, blocks, tokens


def test_mod_leaves_unselected_tokens_bit_identical() -> None:
    layer, x = MoDLayer(torch.nn.Linear(8, 8), 8, share=0.25), torch.randn(16, 8)
    y, loss = layer(x)
    changed = (y != x).any(1)
    assert int(changed.sum()) == 4
    chosen = (x @ layer.router[0]).topk(4).indices
    assert torch.equal(changed.nonzero()[:, 0], chosen.sort().values)
    loss.backward()
    assert layer.predictor.grad.abs().sum() > 0
    assert layer.router.grad is None


def test_mod_with_all_tokens_is_dense_and_its_predictor_is_causal() -> None:
    block, x = torch.nn.Linear(8, 8), torch.randn(16, 8)
    layer = MoDLayer(block, 8, share=1.0)
    torch.testing.assert_close(layer(x)[0], x + (x @ layer.router[0])[:, None] * block(x))
    with torch.no_grad():
        layer.predictor.normal_()
    # nn.Linear itself may differ in the last bit with its number of rows.
    torch.testing.assert_close(layer(x, causal=True)[0][:5], layer(x[:5], causal=True)[0])


def test_mod_chooses_in_fp32() -> None:
    """Under autocast the scores were rounded, and with them the choice."""
    layer, x = MoDLayer(torch.nn.Linear(8, 8), 8, share=0.25), torch.randn(400, 8)
    with torch.no_grad():
        plain = (layer(x)[0] != x).any(dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            cast = (layer(x)[0] != x).any(dim=1)
    assert torch.equal(plain, cast)


def test_heads_are_experts_and_equal_a_loop() -> None:
    layer, x = MixtureOfHeads(8, 5, k=2, head=4, cv=0.1), torch.randn(7, 8)
    y, routed = layer(x)
    weights = routed.routing.dense_TE()
    assert (weights.sum(1) < 1).all()
    key, value = (x @ layer.key_value.t()).chunk(2, 1)
    wanted = torch.zeros_like(x)
    for t, e in itertools.product(range(7), range(5)):
        attention = (key[: t + 1] @ (layer.query_EAD[e] @ x[t]) / 2).softmax(0)
        wanted[t] += weights[t, e] * (layer.out_EDA[e] @ (attention @ value[: t + 1]))
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
    assert routed.loss > 0


def test_moba_with_every_block_is_full_causal_attention() -> None:
    q, k, v = torch.randn(3, 2, 21, 8)
    full = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(moba_attention(q, k, v, block=4, k=6), full, atol=1e-5, rtol=1e-5)


def test_moba_reads_its_own_block_and_the_best_earlier_ones() -> None:
    q, k = torch.randn(2, 21, 8), torch.randn(2, 21, 8)
    picked = block_gate(q, k, block=4, k=2)
    own = torch.arange(21) // 4
    assert picked[:, torch.arange(21), own].all()
    assert (picked.sum(2) == (own + 1).clamp(max=2)).all()
    assert not picked[:, :4, 1:].any()
    means = k[:, :20].view(2, 5, 4, 8).mean(2)
    best = (q[:, 12:16] @ means[:, :3].transpose(1, 2)).argmax(2)
    assert picked[:, 12:16].gather(2, best[..., None]).all()


def test_a_group_of_one_token_is_every_expert_at_weight_one() -> None:
    experts, x = SwiGLUExperts(3, 8, 5), torch.randn(4, 1, 8)
    wanted = sum(
        torch.stack([swiglu(t[0], experts.w_gate_up_EGD[e], experts.w_down_EDF[e]) for t in x]) for e in range(3)
    )
    torch.testing.assert_close(MixtureOfTokens(experts, 8)(x)[:, 0], wanted, atol=1e-5, rtol=1e-4)


def test_mixtures_of_tokens_equal_a_loop() -> None:
    experts, x = SwiGLUExperts(3, 8, 5), torch.randn(2, 4, 8)
    layer = MixtureOfTokens(experts, 8)
    wanted = torch.zeros_like(x)
    for g, e in itertools.product(range(2), range(3)):
        mix = (x[g] @ layer.weight_ED[e]).softmax(0)
        wanted[g] += mix[:, None] * swiglu(mix @ x[g], experts.w_gate_up_EGD[e], experts.w_down_EDF[e])
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-4)


def test_meo_merging_equals_mixing_only_when_linear() -> None:
    x = torch.randn(6, 8)
    linear = MergedExperts(8, 4, activation=lambda y: y)
    torch.nn.init.normal_(linear.bias_EF)
    torch.testing.assert_close(linear(x), linear.mixture(x), atol=1e-5, rtol=1e-4)
    curved = MergedExperts(8, 4)
    assert (curved(x) - curved.mixture(x)).abs().max() > 1e-3


def test_meo_by_token_adds_a_bottleneck_that_starts_at_nothing() -> None:
    x, layer = torch.randn(6, 8), MergedExperts(8, 4, bottleneck=2)
    plain = MergedExperts(8, 4)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(layer(x), plain(x))
    torch.nn.init.ones_(layer.token_DS)
    torch.testing.assert_close(layer.attend(x), x + (x @ layer.token_SD.T).relu().sum(dim=1, keepdim=True))
    torch.testing.assert_close(layer(x), plain(layer.attend(x)))
    layer(x).sum().backward()
    assert layer.token_SD.grad.abs().sum() > 0


# Decoding and shortcut


def test_self_contrast_edges() -> None:
    strong, weak = torch.randn(20), torch.randn(20)
    assert self_contrast(strong, strong).argmax() == strong.argmax()
    assert self_contrast(strong, weak, beta=0.0).argmax() == strong.argmax()
    weak = torch.zeros(20)
    weak[strong.argmin()] = -100
    scores = self_contrast(strong, weak)
    assert scores[strong < strong.max() + math.log(0.1)].eq(-torch.inf).all()
    torch.testing.assert_close(scores[strong.argmax()], 1.5 * strong.max() - 0.5 * weak[strong.argmax()])


def test_weak_routing_is_the_second_expert_alone() -> None:
    routing = from_topk(torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]), num_experts=4)
    weak = weak_routing(routing)
    assert weak.expert_ids_P.tolist() == [0, 3]
    assert weak.weights_P.tolist() == [1, 1]
    for rank, words in ((3, "fewer than 3"), (0, "rank is 0"), (-1, "rank is -1")):
        with pytest.raises(KernelInputError, match=words):
            weak_routing(routing, rank=rank)


def test_shortcut_starts_without_this_layers_input() -> None:
    routed, shared = moe(8), SharedExpert(8, 5)
    layer, below = ShortcutLayer(routed, shared), torch.randn(4, 8)
    early, _ = layer.start(below)
    assert torch.equal(early, routed(below)[0])
    for here in (torch.randn(4, 8), torch.randn(4, 8)):
        torch.testing.assert_close(layer(below, here)[0], early + shared(here))
    assert hidden_share(2.0, 1.5, 0.5) == 1.0
    assert hidden_share(4.0, 1.5, 0.5) == 0.5
