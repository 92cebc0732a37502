"""SCMoE: decode by contrasting a strong routing with a weak one. Legend: V vocabulary, T tokens, K slots."""

from dataclasses import replace

import torch
from torch import Tensor

from collegium_kernels.errors import KernelInputError
from collegium_kernels.gates.base import Card
from collegium_kernels.ragged import Routing

CARD = Card(
    title="SCMoE, self-contrast",
    source="arXiv 2405.14507",
    k="2 and 1: two passes",
    cost="a second pass",
    kind="decoding",
)


def weak_routing(routing: Routing, *, rank: int = 2) -> Routing:
    """The same tokens, each with only its expert of this rank, at weight 1. Every token needs that many."""
    if rank < 1:
        raise KernelInputError(f"rank is {rank}: the best expert has rank 1.")
    pairs_T = routing.indptr_T1[:-1] + rank - 1
    if bool((pairs_T >= routing.indptr_T1[1:]).any()):
        raise KernelInputError(f"a token has fewer than {rank} experts")
    ids_P = routing.expert_ids_P[pairs_T]
    indptr_T1 = torch.arange(len(pairs_T) + 1, device=ids_P.device)
    weights_P = torch.ones_like(routing.weights_P[pairs_T])
    return replace(routing, indptr_T1=indptr_T1, expert_ids_P=ids_P, weights_P=weights_P, fixed_k=None)


def self_contrast(strong_V: Tensor, weak_V: Tensor, *, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """Scores of the next token: (1 + beta) strong - beta weak, where the strong routing finds it likely at all."""
    likely_V = strong_V >= strong_V.max(dim=-1, keepdim=True).values + torch.tensor(alpha).log()
    return ((1 + beta) * strong_V - beta * weak_V).masked_fill(~likely_V, -torch.inf)
