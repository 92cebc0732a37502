"""Who shares a batch with me must not matter. The attacks of the papers are real here: they work against the gates that
drop or compete, and find nothing against the default."""

from typing import Any

import pytest
import torch
from collegium_kernels import gates
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.expert_choice import ExpertChoiceGate
from collegium_kernels.gates.mixtral import MixtralGate
from collegium_kernels.gates.switch import SwitchGate
from collegium_kernels.moe import FusedMoE, MoELayer, SwiGLUExperts
from torch import Tensor

D, E = 16, 4


def layer_with(gate: Any) -> MoELayer:
    return MoELayer(gate, SwiGLUExperts(E, D, 8)).eval()


def output(layer: MoELayer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(tokens)[0]


# Buffer overflow (arXiv 2402.05526): fill the victim's expert before the victim comes.


def overflow_changes_the_victim(layer: MoELayer) -> bool:
    victim = torch.randn(1, D)
    favourite = layer.gate.logits(victim).argmax()
    crowd = torch.randn(400, D)
    crowd = crowd[layer.gate.logits(crowd).argmax(1) == favourite][:8]
    harmless = torch.randn(400, D)
    harmless = harmless[layer.gate.logits(harmless).argmax(1) != favourite][:8]
    attacked = output(layer, torch.cat([crowd, victim]))[-1]
    quiet = output(layer, torch.cat([harmless, victim]))[-1]
    return not torch.equal(attacked, quiet)


def test_overflow_works_against_limited_capacity() -> None:
    limited = layer_with(SwitchGate(D, E, capacity_factor=1.0))
    assert overflow_changes_the_victim(limited)


@pytest.mark.parametrize("gate", [SwitchGate, MixtralGate])
def test_overflow_finds_nothing_against_the_default(gate: Any) -> None:
    assert not overflow_changes_the_victim(layer_with(gate(D, E)))


# Stealing prompts (arXiv 2410.22884): in expert choice an equal token ties with the victim's, and order breaks ties.


def steal(layer: MoELayer, vocabulary: Tensor, secret: list[int]) -> list[set[int]]:
    """For each secret token, the guesses whose own output depends on whether they stand before or after the victim."""
    found = []
    for token in secret:
        suspects = set()
        for guess in range(len(vocabulary)):
            before = output(layer, vocabulary[[guess, token]])[0]
            after = output(layer, vocabulary[[token, guess]])[1]
            if not torch.equal(before, after):
                suspects.add(guess)
        found.append(suspects)
    return found


def test_prompts_are_stolen_through_expert_choice() -> None:
    layer = layer_with(ExpertChoiceGate(D, E, capacity_factor=E / 2))
    secret = [3, 17, 5, 0]
    assert steal(layer, torch.randn(20, D), secret) == [{token} for token in secret]


@pytest.mark.parametrize("gate", [SwitchGate, MixtralGate])
def test_prompts_are_not_stolen_from_the_default(gate: Any) -> None:
    assert steal(layer_with(gate(D, E)), torch.randn(20, D), [3, 17]) == [set(), set()]


# The property behind both, for every gate that claims it.


STEADY = sorted(n for n in gates.GATES if not gates.card(n).batch_dependent and n != "read_me")
OPTIONS = {name: {"vocab_size": 50} for name in ("hash", "stable_moe", "mask_moe")}


@pytest.mark.parametrize("name", STEADY)
def test_no_request_changes_another_one_bitwise(name: str) -> None:
    layer = layer_with(gates.load(name)(D, E, **OPTIONS.get(name, {})))
    mine, ids = torch.randn(3, D), torch.randint(0, 50, (12,))

    def run(tokens: Tensor) -> Tensor:
        context = Context(
            token_ids_T=ids[: len(tokens)],
            importance_T=torch.linspace(0.1, 1, 12)[: len(tokens)],
            generator=torch.Generator().manual_seed(1),
        )
        with torch.no_grad():
            return layer(tokens, context)[0][:3]

    alone = run(mine)
    for scale in (0.0, 1.0, 100.0):
        assert torch.equal(run(torch.cat([mine, scale * torch.randn(9, D)])), alone)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.float32)],
)
def test_served_experts_are_steady_with_any_gate(precision: Any, dtype: torch.dtype) -> None:
    """Ragged lists, copies and constants too."""
    moe = FusedMoE(
        (torch.randn(E, 64, 64) / 8).to(dtype), (torch.randn(E, 64, 32) / 6).to(dtype), precision=precision, group=32
    )
    for name in STEADY:
        gate = gates.load(name)(64, E, **OPTIONS.get(name, {})).eval()
        tokens, ids = torch.randn(20, 64).to(dtype), torch.randint(0, 50, (20,))

        def run(some: slice, gate: Any = gate, tokens: Tensor = tokens, ids: Tensor = ids) -> Tensor:
            context = Context(
                token_ids_T=ids[some],
                importance_T=torch.linspace(0.1, 1, 20)[some],
                generator=torch.Generator().manual_seed(1),
            )
            with torch.no_grad():
                return moe(tokens[some], gate(tokens[some], context).routing)

        whole = run(slice(None))
        for some in (slice(0, 1), slice(7, 12)):
            assert torch.equal(run(some), whole[some]), name


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("native", torch.float32), ("native", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.float32)],
)
def test_served_experts_are_steady_with_their_gate(precision: Any, dtype: torch.dtype) -> None:
    gate, width = MixtralGate(64, E).eval(), 64
    moe = FusedMoE(
        (torch.randn(E, 64, width) / 8).to(dtype), (torch.randn(E, width, 32) / 6).to(dtype), precision=precision
    )
    mine = torch.randn(3, width).to(dtype)
    with torch.no_grad():
        alone = moe(mine, gate(mine, Context()).routing)
        for size in (1, 6, 40):
            together = torch.cat([mine, 50 * torch.randn(size, width).to(dtype)])
            assert torch.equal(moe(together, gate(together, Context()).routing)[:3], alone)
