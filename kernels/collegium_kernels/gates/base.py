"""What a gate is: tokens in, a routing out. One file in this folder holds one gate and its card.

Legend: T tokens, D width, E experts, K slots, S state, P pairs.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from collegium_kernels.errors import KernelInputError, require
from collegium_kernels.ragged import INTEGERS, Routing, check_ids, rectangular
from collegium_kernels.steady import steady_mm


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One line of docs/gates.md. ``cost`` counts multiplications a token beside those of the experts."""

    title: str
    source: str
    k: str
    cost: str
    batch_dependent: bool = False
    kind: Literal["gate", "layer", "loss", "decoding"] = "gate"


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
    """Every gate is an nn.Module with this call."""

    num_experts: int

    def __call__(self, x_TD: Tensor, context: Context) -> Routed: ...


class LinearGate(nn.Module):
    """A base for gates that score with one matrix, in fp32 whatever the tokens are in."""

    def __init__(self, width: int, num_experts: int, num_scores: int | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight_ED = nn.Parameter(torch.randn(num_scores or num_experts, width) / width**0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        return fp32_mm(x_TD, self.weight_ED)


def fp32_mm(x_RD: Tensor, w_ND: Tensor) -> Tensor:
    """``x @ w.T`` in fp32, whatever they are in and under autocast too, which would round what a router decides by."""
    if x_RD.is_meta:  # shapes alone, and torch has no autocast there
        return steady_mm(x_RD.float(), w_ND.float())
    with torch.autocast(x_RD.device.type, enabled=False):
        return steady_mm(x_RD.float(), w_ND.float())


def best(scores_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores and their ids, highest first; all of them when there are fewer.

    Ties go to the lowest id, on every device."""
    if k < 0:
        raise KernelInputError(f"k is {k}: it must be at least 0.")
    ordered = torch.sort(scores_TE, dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def top_k(scores_TE: Tensor, k: int, *, renormalise: bool = False) -> Routing:
    """A routing to the k best, weighted by their scores."""
    weights_TK, ids_TK = best(scores_TE, k)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    return rectangular(ids_TK, weights_TK, num_experts=scores_TE.shape[1])


def zero(x_TD: Tensor) -> Tensor:
    return torch.zeros((), device=x_TD.device)


def needed(value: Tensor | None, name: str, num_tokens: int) -> Tensor:
    """The context's tensor, one entry a token, or an error that names it."""
    if value is None:
        raise ValueError(f"this gate reads Context.{name}, which is None")
    require(value.shape == (num_tokens,), f"Context.{name}", value, f"one entry for each of {num_tokens} tokens")
    return value


def needed_ids(context: Context, num_tokens: int, vocab_size: int | None) -> Tensor:
    """The context's token ids as int64."""
    ids_T = needed(context.token_ids_T, "token_ids_T", num_tokens)
    require(ids_T.dtype in INTEGERS, "Context.token_ids_T", ids_T, "an integer dtype")
    if vocab_size is not None:
        check_ids(ids_T, "Context.token_ids_T", most=vocab_size - 1)
    return ids_T.long()


def state_of(context: Context, num_tokens: int, size: int) -> Tensor | None:
    """What the layer below handed on, (tokens, ``size``); None in the first layer."""
    state_TS = context.state_TS
    if state_TS is not None:
        require(state_TS.shape == (num_tokens, size), "Context.state_TS", state_TS, f"shape {(num_tokens, size)}")
    return state_TS
