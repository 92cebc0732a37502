"""What a gate is: tokens in, a routing out. One file in this folder holds one gate.

Legend: T tokens, D width, E experts, P pairs.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from collegium_kernels.ragged import Routing
from collegium_kernels.steady import steady_mm
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A gate in one line of docs/gates.md. ``cost`` is in multiplications a token, beyond the experts."""

    title: str
    source: str
    k: str
    cost: str
    batch_dependent: bool = False
    kind: str = "gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What some gates read beside the token itself."""

    token_ids_T: Tensor | None = None
    importance_T: Tensor | None = None
    state_TS: Tensor | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """A routing, the scores it came from, the gate's own loss, and what the next layer's gate may read."""

    routing: Routing
    scores_TE: Tensor
    loss: Tensor
    state_TS: Tensor | None = None


class Gate(Protocol):
    """Every gate is an nn.Module with a card."""

    card: ClassVar[Card]
    num_experts: int

    def __call__(self, x_TD: Tensor, context: Context) -> Routed: ...


class LinearGate(nn.Module):
    """A base for gates that score with one matrix, in fp32 whatever the tokens are in."""

    card: ClassVar[Card]

    def __init__(self, width: int, num_experts: int, num_scores: int | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight_ED = nn.Parameter(torch.randn(num_scores or num_experts, width) / width**0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        return steady_mm(x_TD.float(), self.weight_ED.float())


def no_loss(x_TD: Tensor) -> Tensor:
    return torch.zeros((), device=x_TD.device)


def needed(value: Tensor | None, name: str) -> Tensor:
    """The context's tensor, or an error that names it."""
    if value is None:
        raise ValueError(f"this gate reads context.{name}, which is None")
    return value
