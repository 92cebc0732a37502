"""What every layer must do, run over the registry as the harness of the gates is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from collegium_kernels import gates
from collegium_kernels.gates.deepseek import SharedExpert
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.gates.moba import moba_attention
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from torch import Tensor, nn

D, E, F = 16, 4, 6


def moe(width: int = D) -> MoELayer:
    return MoELayer(MixtralGate(width, E), SwiGLUExperts(E, width, F))


def layer(name: str, *arguments: Any) -> nn.Module:
    made: nn.Module = gates.load(name)(*arguments)
    return made


# Each with its published defaults where a width of 16 allows them, and the names of what routes.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "aoe": (lambda: layer("aoe", D, E), ("down_ERD",)),
    "vqmoe": (lambda: layer("vqmoe", moe(), D), ("mix_2D", "layer.gate.weight_ED")),
    "cartesian": (lambda: layer("cartesian", moe(), moe(), D), ("first.gate.weight_ED", "second.gate.weight_ED")),
    "mh_moe": (lambda: layer("mh_moe", moe(D // 2), D), ("layer.gate.weight_ED",)),
    "peer": (lambda: layer("peer", D, 20), ("keys_2NQ", "query")),
    "ultramem": (lambda: layer("ultramem", D, 16), ("keys", "query", "cores")),
    "mod": (lambda: layer("mod", nn.Linear(D, D), D), ("router",)),
    "moa": (lambda: layer("moa", D, E), ("gate.weight_ED",)),
    "mixture_of_tokens": (lambda: layer("mixture_of_tokens", SwiGLUExperts(E, D, F), D), ("weight_ED",)),
    "meo": (lambda: layer("meo", D, E), ("gate.weight_ED",)),
    "shortcut": (lambda: layer("shortcut", moe(), SharedExpert(D, F)), ("routed.gate.weight_ED",)),
}
# A function without parameters, and a gate that the harness of the gates does not know the tasks of.
OTHERWISE = {"moba", "task_level"}
# Its tokens attend to those before them.
ATTENTION = {"moa"}
# A user's own nn.Linear decides there.
NOT_STEADY = {"shortcut"}
NAMES = sorted(LAYERS)


def run(name: str, module: nn.Module, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the loss, whichever way the layer gives them."""
    if name == "mixture_of_tokens":
        return module(x_TD[None])[0], torch.zeros(())
    made = module(x_TD, x_TD) if name == "shortcut" else module(x_TD)
    y_TD, extra = made if isinstance(made, tuple) else (made, torch.zeros(()))
    return y_TD, getattr(extra, "loss", extra)


def test_every_layer_of_the_registry_is_here() -> None:
    assert set(LAYERS) | OTHERWISE == {name for name in gates.OTHERS if gates.card(name).kind == "layer"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 2, 9, 65])
def test_shapes_dtypes_and_finite(name: str, dtype: torch.dtype, T: int) -> None:
    x = torch.randn(T, D).to(dtype)
    y, loss = run(name, LAYERS[name][0]().to(dtype), x)
    assert y.shape[0] == T
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert loss.isfinite()
    assert loss.dim() == 0


@pytest.mark.parametrize("name", NAMES)
def test_autocast_runs(name: str) -> None:
    module, x = LAYERS[name][0](), torch.randn(9, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, loss = run(name, module, x)
    assert y.isfinite().all()
    assert loss.isfinite()


@pytest.mark.parametrize("name", sorted(set(NAMES) - ATTENTION))
def test_token_order_does_not_matter(name: str) -> None:
    module, x, order = LAYERS[name][0](), torch.randn(33, D), torch.randperm(33)
    torch.testing.assert_close(run(name, module, x)[0][order], run(name, module, x[order])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_other_tokens_change_nothing_unless_the_card_says_so(name: str) -> None:
    module, x = LAYERS[name][0](), torch.randn(33, D)
    first, others = x[:4], torch.cat([x[:4], 3 * torch.randn(29, D)])
    with torch.no_grad():
        mine, theirs, alone = (run(name, module, tokens)[0][:4] for tokens in (x, others, first))
    if name in ATTENTION | NOT_STEADY:
        same = torch.allclose(mine, theirs, atol=1e-5) and torch.allclose(mine, alone, atol=1e-5)
    else:
        same = torch.equal(mine, theirs) and torch.equal(mine, alone)
    assert same is not gates.card(name).batch_dependent


@pytest.mark.parametrize("name", sorted(n for n in NAMES if not gates.card(n).batch_dependent and n not in ATTENTION))
def test_a_broken_token_reaches_no_other(name: str) -> None:
    module, x = LAYERS[name][0](), torch.randn(9, D)
    broken = x.clone()
    broken[3], broken[5] = torch.nan, torch.inf
    with torch.no_grad():
        whole, hurt = (run(name, module, tokens)[0] for tokens in (x, broken))
    others = [t for t in range(9) if t not in (3, 5)]
    assert torch.equal(whole[others], hurt[others])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_router(name: str) -> None:
    module = LAYERS[name][0]().train()
    run(name, module, torch.randn(19, D))[0].square().sum().backward()
    for router in LAYERS[name][1]:
        assert module.get_parameter(router).grad.abs().sum() > 0, router


@pytest.mark.parametrize("T", [0, 1, 5])
def test_moba_of_few_tokens(T: int) -> None:
    assert moba_attention(*torch.randn(3, 2, T, 8)).shape == (2, T, 8)
