"""What every gate must do, run over the registry."""

from pathlib import Path
from typing import Any

import pytest
import torch
from collegium_kernels import gates
from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Context, Routed
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.gates.table import table
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from collegium_kernels.ragged import check_routing
from collegium_kernels.reference import reference_moe, swiglu
from torch import nn

D, E, F, V = 12, 8, 6, 50
NEED_TOKEN_IDS = {"stable_moe", "hash", "read_me", "mowe", "mask_moe"}
OPTIONS: dict[str, dict[str, Any]] = {name: {"vocab_size": V} for name in NEED_TOKEN_IDS - {"mowe"}}
OPTIONS["mowe"] = {"routing_vocab": V}
# Their routing is drawn or looked up, so no gradient reaches it.
WITHOUT_GRADIENT = {"hash", "thor", "mowe"}
# Parameters that the output does not pull at: distilled into, reading the layer below, choosing for the one above, or
# of the other variant.
WITHOUT_PULL = {
    "stable_moe": {"light_ES", "embedding.weight"}, "moe_plus_plus": {"residual_EE"}, "rmoe": {"gru.weight_state"},
    "pregated": {"ahead.weight_ED"}, "sparse_mixer": {"omega_E"},
}  # fmt: skip
# Weights that do not sum to 1 by definition: raw probabilities, ReLU, zero experts, own softmax for each choice.
NOT_NORMALISED = {
    "switch", "deepseek", "expert_choice", "remoe", "top_p", "xmoe", "adaptive", "da_moe",
    "read_me", "smile", "sparse_mixer", "moe_plus_plus", "mask_moe", "adamoe",
}  # fmt: skip
# A sequence model: its decision for a token reads the tokens before it.
READS_THE_SEQUENCE = {"read_me"}
NAMES = sorted(gates.GATES)


def make(name: str) -> nn.Module:
    module: nn.Module = gates.load(name)(D, E, **OPTIONS.get(name, {}))
    return module.eval()


def context(name: str, ids: torch.Tensor) -> Context:
    importance = (ids % 7 + 1) / 7
    return Context(token_ids_T=ids, importance_T=importance, generator=torch.Generator().manual_seed(5))


def run(name: str, gate: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> Routed:
    routed: Routed = gate(x, context(name, ids))
    return routed


def token_choice() -> list[str]:
    return [n for n in NAMES if not gates.card(n).batch_dependent]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [0, 1, 2, 9, 65])
def test_shapes_bounds_and_finite(name: str, T: int) -> None:
    routed = run(name, make(name), torch.randn(T, D), torch.randint(0, V, (T,)))
    check_routing(routed.routing, num_tokens=T, num_experts=E)
    assert routed.scores_TE.shape[0] == T
    assert routed.routing.weights_P.isfinite().all()
    assert routed.loss.isfinite()
    assert routed.loss.dim() == 0


@pytest.mark.parametrize("name", sorted(set(token_choice()) - READS_THE_SEQUENCE))
def test_token_order_does_not_matter(name: str) -> None:
    gate, x, ids, order = make(name), torch.randn(33, D), torch.randint(0, V, (33,)), torch.randperm(33)
    plain, mixed = run(name, gate, x, ids), run(name, gate, x[order], ids[order])
    assert torch.equal(plain.routing.dense_TE()[order], mixed.routing.dense_TE())


@pytest.mark.parametrize("name", NAMES)
def test_other_tokens_change_nothing_unless_the_card_says_so(name: str) -> None:
    gate, x, ids = make(name), torch.randn(33, D), torch.randint(0, V, (33,))
    others = torch.cat([x[:4], 3 * torch.randn(29, D)])
    one, two = run(name, gate, x, ids), run(name, gate, others, ids)
    alone = run(name, gate, x[:4], ids[:4])
    same = torch.equal(one.routing.dense_TE()[:4], two.routing.dense_TE()[:4])
    same &= torch.equal(one.routing.dense_TE()[:4], alone.routing.dense_TE()) or name in READS_THE_SEQUENCE
    assert same is not gates.card(name).batch_dependent


@pytest.mark.parametrize("name", NAMES)
def test_how_tokens_lie_in_memory_changes_no_bit(name: str) -> None:
    gate, x, ids = make(name), torch.randn(33, D), torch.randint(0, V, (33,))
    wanted = run(name, gate, x, ids).routing.dense_TE()
    strided, unaligned = x.t().contiguous().t(), torch.empty(33 * D + 1)[1:].view(33, D).copy_(x)
    for same in (strided, unaligned):
        assert torch.equal(run(name, gate, same, ids).routing.dense_TE(), wanted)


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_NORMALISED - {"stable_moe", "expert_choice"}))
def test_identical_experts_are_one_feed_forward_network(name: str) -> None:
    layer, x, ids = MoELayer(make(name), SwiGLUExperts(E, D, F)), torch.randn(9, D), torch.randint(0, V, (9,))
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight).clone())
    got, _ = layer(x, context(name, ids))
    wanted = torch.stack([swiglu(t, layer.experts.w_gate_up_EGD[0], layer.experts.w_down_EDF[0]) for t in x])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_equals_the_dense_loop(name: str) -> None:
    layer, x, ids = MoELayer(make(name), SwiGLUExperts(E, D, F)), torch.randn(9, D), torch.randint(0, V, (9,))
    got, routed = layer(x, context(name, ids))
    weights = layer.experts.w_gate_up_EGD, layer.experts.w_down_EDF
    torch.testing.assert_close(got, reference_moe(x, *weights, routed.routing), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(NAMES) - WITHOUT_GRADIENT))
def test_gradient_reaches_the_router(name: str) -> None:
    layer, x, ids = MoELayer(make(name), SwiGLUExperts(E, D, F)), torch.randn(19, D), torch.randint(0, V, (19,))
    layer.train()
    y, _ = layer(x, context(name, ids))
    y.square().sum().backward()
    found = layer.gate.named_parameters()
    assert {n for n, p in found if p.grad is None or p.grad.abs().sum() == 0} == WITHOUT_PULL.get(name, set())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("narrow_gate", [True, False])
def test_a_layer_in_bf16_routes_in_fp32(name: str, narrow_gate: bool) -> None:
    layer, x, ids = MoELayer(make(name), SwiGLUExperts(E, D, F).bfloat16()), torch.randn(9, D), torch.arange(9)
    if narrow_gate:
        layer.bfloat16()
    y, routed = layer(x.bfloat16(), context(name, ids))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    if name not in WITHOUT_GRADIENT | {"read_me", "stable_moe"}:  # whose weights are 1, and modules of torch
        assert routed.scores_TE.dtype == torch.float32


def test_scores_without_numbers_have_their_shape() -> None:
    """As of a model that is only laid out."""
    gate = MixtralGate(D, E).to("meta")
    assert gate.logits(torch.empty(9, D, device="meta")).shape == (9, E)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"read_me"}))
def test_autocast_changes_no_routing(name: str) -> None:
    """Training in mixed precision must not round the router; modules of torch, as in Read-ME, are torch's."""
    gate, x, ids = make(name), torch.randn(65, D), torch.randint(0, V, (65,))
    plain = run(name, gate, x, ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(name, gate, x, ids)
    assert torch.equal(cast.routing.dense_TE(), plain.routing.dense_TE())
    assert torch.equal(cast.scores_TE, plain.scores_TE)


@pytest.mark.parametrize("name", NAMES)
def test_training_draws_from_the_generator_it_is_given(name: str) -> None:
    gate, x, ids = make(name).train(), torch.randn(33, D), torch.randint(0, V, (33,))
    one, two = (run(name, gate, x, ids).routing.dense_TE() for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"comet"}))
@pytest.mark.parametrize("training", [True, False])
def test_one_expert_is_enough(name: str, training: bool) -> None:
    gate = gates.load(name)(D, 1, **OPTIONS.get(name, {})).train(training)
    routing = run(name, gate, torch.randn(9, D), torch.randint(0, V, (9,))).routing
    check_routing(routing, num_tokens=9, num_experts=1)


@pytest.mark.parametrize("name", token_choice())
def test_a_broken_token_reaches_no_other(name: str) -> None:
    layer, x, ids = MoELayer(make(name), SwiGLUExperts(E, D, F)), torch.randn(9, D), torch.randint(0, V, (9,))
    broken = x.clone()
    broken[3], broken[5] = torch.nan, torch.inf
    with torch.no_grad():
        whole, hurt = (layer(tokens, context(name, ids))[0] for tokens in (x, broken))
    others = [t for t in range(9) if t not in (3, 5)]
    assert torch.equal(whole[others], hurt[others])


WRONG_IDS = [
    (torch.arange(3), "one entry for each of 9 tokens"),
    (torch.tensor(1), "one entry for each of 9 tokens"),
    (torch.zeros(9, 1, dtype=torch.long), "one entry for each of 9 tokens"),
    (torch.zeros(9), "an integer dtype"),
    (torch.ones(9, dtype=torch.bool), "an integer dtype"),
    (torch.full((9,), -1), "found -1 to -1"),
    (torch.full((9,), V), f"found {V} to {V}"),
]


# For word experts any number has a hash.
WRONG = [(n, *w) for n in sorted(NEED_TOKEN_IDS) for w in WRONG_IDS if n != "mowe" or not w[1].startswith("found")]


@pytest.mark.parametrize(("name", "ids", "words"), WRONG)
def test_token_ids_that_do_not_fit_are_named(name: str, ids: torch.Tensor, words: str) -> None:
    """Three ids for nine tokens gave three outputs."""
    layer = MoELayer(make(name), SwiGLUExperts(E, D, F))
    with pytest.raises(KernelInputError, match=rf"Context.token_ids_T of shape .*{words}"):
        layer(torch.randn(9, D), Context(token_ids_T=ids))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", sorted(NEED_TOKEN_IDS))
def test_token_ids_of_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    gate, x, ids = make(name), torch.randn(9, D), torch.arange(9)
    wanted = run(name, gate, x, ids).routing.dense_TE()
    assert torch.equal(run(name, gate, x, ids.to(dtype)).routing.dense_TE(), wanted)


@pytest.mark.parametrize("name", ["rmoe", "pregated", "moe_plus_plus", "read_me"])
@pytest.mark.parametrize("shape", [(3, E), (1, E), (9, 1), (9, 999)])
def test_a_state_that_does_not_fit_is_named(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(KernelInputError, match=r"Context.state_TS of shape"):
        make(name)(torch.randn(9, D), Context(state_TS=torch.zeros(shape)))


@pytest.mark.parametrize("importance", [torch.ones(3), torch.ones(1), torch.ones(9, 1)])
def test_an_importance_that_does_not_fit_is_named(importance: torch.Tensor) -> None:
    with pytest.raises(KernelInputError, match=r"Context.importance_T of shape"):
        make("da_moe")(torch.randn(9, D), Context(importance_T=importance))


def test_a_token_of_another_width_or_dtype_is_named() -> None:
    layer = MoELayer(make("mixtral"), SwiGLUExperts(E, D, F))
    with pytest.raises(KernelInputError, match=rf"x_RD of shape \(9, {D + 1}\).*: {D} columns"):
        layer(torch.randn(9, D + 1))
    with pytest.raises(KernelInputError, match=r"x_PD of shape .*, torch.float64.*the dtype of the experts"):
        layer(torch.randn(9, D, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(NEED_TOKEN_IDS))
def test_a_missing_token_id_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="token_ids_T"):
        make(name)(torch.randn(2, D), Context())


def test_every_name_in_the_registry_loads_and_has_a_card() -> None:
    for name in (*gates.GATES, *gates.OTHERS):
        assert callable(gates.load(name))
        assert gates.card(name).source.startswith("arXiv ")
    assert set(gates.GATES) & set(gates.OTHERS) == set()


def test_a_name_that_is_no_gate_is_told_all_of_them() -> None:
    for ask in (gates.load, gates.card):
        with pytest.raises(KernelInputError, match=r"gate 'topp' is not one of .*top_p"):
            ask("topp")


def test_every_gate_file_is_in_the_registry() -> None:
    folder = Path(gates.__file__).parent
    helpers = {"__init__", "base", "table", "smooth_step"}
    files = {p.stem for p in folder.glob("*.py")} - helpers
    assert files == {target.partition(":")[0] for target in (gates.GATES | gates.OTHERS).values()}


DOCS = Path(__file__).parents[2] / "docs" / "gates.md"


def test_the_table_in_the_docs_is_the_registry() -> None:
    assert DOCS.read_text() == table(), "run: python -m collegium_kernels.gates.table > docs/gates.md"


def test_the_gate_of_ones_own_in_the_docs_runs() -> None:
    shown: dict[str, Any] = {}
    exec(DOCS.read_text().partition("```python\n")[2].partition("```")[0], shown)
    counts = shown["routed"].routing.counts_T()
    assert 1 <= counts.min() < counts.max()
    trained = shown["layer"](shown["x_TD"])[0]
    assert (shown["y_TD"] - trained).norm() <= 0.03 * trained.norm()
