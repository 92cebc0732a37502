"""Ragged dispatch: which token goes to which expert, as compressed sparse rows, both ways.

Legend: T tokens, K slots of a rectangular top-k, P (token, expert) pairs, E experts, D width.
``_T1`` has T + 1 entries.

Ids outside [0, E) are not experts. Null and zero experts are such ids, and so never become rows of a GEMM. The weight
of identity experts is gathered in ``copy_T`` and costs one multiplication a token.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from collegium_kernels.errors import KernelInputError, require

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Token t goes to ``expert_ids_P[indptr_T1[t]:indptr_T1[t + 1]]`` with the weights beside them.

    A static routing has the same P whatever the gate said: the pairs it did not want carry the id E and weight 0.
    ``fixed_k`` is set by gates that give every token k experts in every batch: kernels for a rectangle may then run.
    """

    indptr_T1: Tensor
    expert_ids_P: Tensor
    weights_P: Tensor
    num_experts: int
    copy_T: Tensor | None = None
    add_TD: Tensor | None = None
    static: bool = False
    fixed_k: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.indptr_T1.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        """How many rows the experts compute; a static routing has only this bound on the host."""
        return self.expert_ids_P.shape[0]

    def counts_T(self) -> Tensor:
        """Experts of each token."""
        return self.indptr_T1.diff()

    def tokens_P(self) -> Tensor:
        """The token of each pair."""
        tokens = torch.arange(self.num_tokens, device=self.indptr_T1.device)
        return torch.repeat_interleave(tokens, self.counts_T(), output_size=self.num_pairs)

    def dense_TE(self) -> Tensor:
        """The weights as a matrix: for tests and losses."""
        dense = self.weights_P.new_zeros(self.num_tokens, self.num_experts + 1)
        dense = dense.index_put((self.tokens_P(), self.expert_ids_P), self.weights_P, accumulate=True)
        return dense[:, : self.num_experts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByExpert:
    """The transpose: expert e computes rows ``indptr_E1[e]:indptr_E1[e + 1]``; row r is pair ``pairs_P[r]``."""

    indptr_E1: Tensor
    pairs_P: Tensor
    tokens_P: Tensor


def from_topk(
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    num_experts: int,
    identity_ids: Collection[int] = (),
    bad_ids: Literal["drop", "raise"] = "drop",
) -> Routing:
    """A routing from a rectangular top-k. Ids outside [0, E) are dropped, or refused with ``bad_ids="raise"``."""
    _check_topk(ids_TK, weights_TK)
    if bad_ids not in ("drop", "raise"):
        raise KernelInputError(f"bad_ids '{bad_ids}' is not one of drop, raise.")
    ids_TK = ids_TK.long()  # E may be more than a narrow dtype holds, and torch would wrap it around
    copy_T = _copy_weights(ids_TK, weights_TK, identity_ids, num_experts)
    keep_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    if bad_ids == "raise":
        _refuse(ids_TK, keep_TK, identity_ids, num_experts)
    counts_T = keep_TK.sum(dim=1)
    return Routing(
        indptr_T1=_indptr(counts_T),
        expert_ids_P=ids_TK[keep_TK],
        weights_P=weights_TK[keep_TK],
        num_experts=num_experts,
        copy_T=copy_T,
    )


def rectangular(ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> Routing:
    """A routing for gates whose ids are in range and whose k is the same in every batch: nothing is read back."""
    _check_topk(ids_TK, weights_TK)
    T, K = ids_TK.shape
    return Routing(
        indptr_T1=torch.arange(T + 1, device=ids_TK.device) * K,
        expert_ids_P=ids_TK.long().reshape(-1),
        weights_P=weights_TK.reshape(-1),
        num_experts=num_experts,
        fixed_k=K,
    )


def static_from_topk(
    ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int, identity_ids: Collection[int] = ()
) -> Routing:
    """The same without reading a size back from the device: always T x K pairs, as CUDA graphs need."""
    _check_topk(ids_TK, weights_TK)
    ids_TK = ids_TK.long()
    T, K = ids_TK.shape
    keep_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    return Routing(
        indptr_T1=torch.arange(T + 1, device=ids_TK.device) * K,
        expert_ids_P=torch.where(keep_TK, ids_TK, num_experts).reshape(-1),
        weights_P=weights_TK.masked_fill(~keep_TK, 0).reshape(-1),
        num_experts=num_experts,
        copy_T=_copy_weights(ids_TK, weights_TK, identity_ids, num_experts),
        static=True,
    )


def from_dense(weights_TE: Tensor, active_TE: Tensor, *, num_experts: int | None = None) -> Routing:
    """A routing from a matrix of weights and the mask of what is active; columns from ``num_experts`` on are null."""
    require(weights_TE.dim() == 2, "weights_TE", weights_TE, "two dimensions (tokens, experts)")
    require(weights_TE.is_floating_point(), "weights_TE", weights_TE, "a floating-point dtype")
    wanted = f"a mask of the shape of weights_TE, {tuple(weights_TE.shape)}"
    require(active_TE.shape == weights_TE.shape and active_TE.dtype == torch.bool, "active_TE", active_TE, wanted)
    num_experts = weights_TE.shape[1] if num_experts is None else num_experts
    active_TE = active_TE[:, :num_experts]
    return Routing(
        indptr_T1=_indptr(active_TE.sum(dim=1)),
        expert_ids_P=active_TE.nonzero()[:, 1],
        weights_P=weights_TE[:, :num_experts][active_TE],
        num_experts=num_experts,
    )


def by_expert(routing: Routing) -> ByExpert:
    """Transpose. The sort is stable: within an expert the rows stay in token order.

    Ids outside the experts raise KernelInputError; values are read on the host only for CPU tensors."""
    E = routing.num_experts
    check_ids(routing.expert_ids_P, "routing.expert_ids_P", most=E)
    pairs_P = torch.sort(routing.expert_ids_P, stable=True).indices
    counts_E = torch.zeros(E + 1, dtype=torch.int64, device=pairs_P.device)
    counts_E = counts_E.scatter_add(0, routing.expert_ids_P, torch.ones_like(routing.expert_ids_P))
    return ByExpert(indptr_E1=_indptr(counts_E[:E]), pairs_P=pairs_P, tokens_P=routing.tokens_P()[pairs_P])


def by_token(rows: ByExpert, weights_P: Tensor, *, num_tokens: int) -> Routing:
    """Back again: the weights are in the order of the rows, and so are the experts of each token."""
    num_experts = rows.indptr_E1.shape[0] - 1
    ids_P = torch.repeat_interleave(torch.arange(num_experts, device=rows.tokens_P.device), rows.indptr_E1.diff())
    order_P = torch.sort(rows.tokens_P, stable=True).indices
    counts_T = torch.zeros(num_tokens, dtype=torch.int64, device=order_P.device)
    counts_T = counts_T.scatter_add(0, rows.tokens_P, torch.ones_like(rows.tokens_P))
    return Routing(
        indptr_T1=_indptr(counts_T),
        expert_ids_P=ids_P[order_P],
        weights_P=weights_P[order_P],
        num_experts=num_experts,
    )


def limit_capacity(routing: Routing, capacity: int, *, rank_P: Tensor | None = None) -> Routing:
    """Keep at most ``capacity`` pairs an expert: the lowest ``rank_P`` first, then the earliest token.

    What a token gets then depends on the rest of the batch: never the default. A static routing keeps its size: what
    is over the capacity becomes a pair it did not want.
    """
    rank_P = torch.zeros_like(routing.expert_ids_P) if rank_P is None else rank_P
    wanted = f"the shape of expert_ids_P, {tuple(routing.expert_ids_P.shape)}"
    require(rank_P.shape == routing.expert_ids_P.shape, "rank_P", rank_P, wanted)
    order_P = torch.sort(rank_P, stable=True).indices
    order_P = order_P[torch.sort(routing.expert_ids_P[order_P], stable=True).indices]
    starts_E1 = by_expert(routing).indptr_E1
    position_P = torch.empty_like(order_P)
    position_P[order_P] = torch.arange(routing.num_pairs, device=order_P.device)
    keep_P = position_P - starts_E1[routing.expert_ids_P] < capacity
    if routing.static:
        ids_P = torch.where(keep_P, routing.expert_ids_P, routing.num_experts)
        return replace(routing, expert_ids_P=ids_P, weights_P=routing.weights_P.masked_fill(~keep_P, 0))
    counts_T = torch.zeros_like(routing.counts_T()).scatter_add(0, routing.tokens_P(), keep_P.long())
    return replace(
        routing,
        indptr_T1=_indptr(counts_T),
        expert_ids_P=routing.expert_ids_P[keep_P],
        weights_P=routing.weights_P[keep_P],
        fixed_k=None,
    )


def concatenate(parts: Sequence[Routing]) -> Routing:
    """One routing for the tokens of all parts, one part after the other: at least one part, all of the same experts. Of
    identity and constant experts there must be none."""
    if any(part.copy_T is not None or part.add_TD is not None for part in parts):
        raise KernelInputError("routings with copy_T or add_TD cannot be put together.")
    if len(sizes := {part.num_experts for part in parts}) != 1:
        raise KernelInputError(f"routings of {sorted(sizes)} experts cannot be put together.")
    return Routing(
        indptr_T1=_indptr(torch.cat([part.counts_T() for part in parts])),
        expert_ids_P=torch.cat([part.expert_ids_P for part in parts]),
        weights_P=torch.cat([part.weights_P for part in parts]),
        num_experts=parts[0].num_experts,
        static=any(part.static for part in parts),
    )


def check_routing(routing: Routing, *, num_tokens: int, num_experts: int, device: torch.device | None = None) -> None:
    """Raise KernelInputError for what would read outside a buffer, or is not on ``device`` (None: where the ids are).
    Values are read on the host only for CPU tensors."""
    indptr, ids, weights = routing.indptr_T1, routing.expert_ids_P, routing.weights_P
    _check_device(routing, device or ids.device)
    require(routing.num_experts == num_experts, "routing.expert_ids_P", ids, f"made for {num_experts} experts")
    require(indptr.shape == (num_tokens + 1,), "routing.indptr_T1", indptr, f"one entry more than {num_tokens} tokens")
    require(ids.dtype == torch.int64 and ids.dim() == 1, "routing.expert_ids_P", ids, "one dimension of int64")
    require(indptr.dtype == torch.int64, "routing.indptr_T1", indptr, "int64")
    require(weights.shape == ids.shape, "routing.weights_P", weights, f"the shape of expert_ids_P, {tuple(ids.shape)}")
    require(weights.is_floating_point(), "routing.weights_P", weights, "a floating-point dtype")
    if routing.copy_T is not None:
        require(
            routing.copy_T.shape == (num_tokens,), "routing.copy_T", routing.copy_T, f"one weight a token, {num_tokens}"
        )
    if routing.fixed_k is not None:
        whole = ids.shape[0] == num_tokens * routing.fixed_k
        require(whole, "routing.expert_ids_P", ids, f"{routing.fixed_k} pairs for each of {num_tokens} tokens")
    if ids.device.type == "cpu":
        _check_values(routing)


def _check_device(routing: Routing, device: torch.device) -> None:
    """A kernel is given addresses, and would read another device's as its own."""
    for name in ("indptr_T1", "expert_ids_P", "weights_P", "copy_T", "add_TD"):
        tensor: Tensor | None = getattr(routing, name)
        if tensor is not None:
            require(tensor.device == device, f"routing.{name}", tensor, f"on {device}, as the rest")


def _check_values(routing: Routing) -> None:
    indptr, ids = routing.indptr_T1, routing.expert_ids_P
    ends = bool(indptr[0] == 0) and int(indptr[-1]) == ids.shape[0]
    require(ends and bool((indptr.diff() >= 0).all()), "routing.indptr_T1", indptr, "rising from 0 to the pairs")
    if routing.fixed_k is not None:
        even = bool((indptr.diff() == routing.fixed_k).all())
        require(even, "routing.indptr_T1", indptr, f"{routing.fixed_k} pairs for every token, as fixed_k says")
    check_ids(ids, "routing.expert_ids_P", most=routing.num_experts if routing.static else routing.num_experts - 1)


def check_ids(ids: Tensor, name: str, *, most: int) -> None:
    """Raise KernelInputError for ids outside [0, ``most``]. Values are read on the host only for CPU tensors."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        require(low >= 0 and high <= most, name, ids, f"ids in [0, {most}], found {low} to {high}")


def _check_topk(ids_TK: Tensor, weights_TK: Tensor) -> None:
    require(ids_TK.dim() == 2, "ids_TK", ids_TK, "two dimensions (tokens, slots)")
    require(ids_TK.dtype in INTEGERS, "ids_TK", ids_TK, "an integer dtype")
    require(weights_TK.shape == ids_TK.shape, "weights_TK", weights_TK, f"the shape of ids_TK, {tuple(ids_TK.shape)}")
    require(weights_TK.is_floating_point(), "weights_TK", weights_TK, "a floating-point dtype")


def _copy_weights(ids_TK: Tensor, weights_TK: Tensor, identity_ids: Collection[int], num_experts: int) -> Tensor | None:
    if not identity_ids:
        return None
    if any(0 <= each < num_experts for each in identity_ids):
        raise KernelInputError(f"identity_ids {sorted(identity_ids)} must lie outside the experts' [0, {num_experts}).")
    identity = torch.tensor(sorted(identity_ids), device=ids_TK.device)
    return weights_TK.masked_fill(~torch.isin(ids_TK, identity), 0).sum(dim=1)


def _refuse(ids_TK: Tensor, keep_TK: Tensor, identity_ids: Collection[int], num_experts: int) -> None:
    known_TK = keep_TK | torch.isin(ids_TK, torch.tensor(sorted(identity_ids), dtype=torch.int64, device=ids_TK.device))
    if not bool(known_TK.all()):
        found = sorted(set(ids_TK[~known_TK].tolist()))[:8]
        raise KernelInputError(f"ids_TK of shape {tuple(ids_TK.shape)} holds {found}, outside [0, {num_experts}).")


def _indptr(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
