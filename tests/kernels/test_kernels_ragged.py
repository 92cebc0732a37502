"""Dispatch: rows of the experts, their order, bounds and capacity."""

import pytest
import torch
from collegium_kernels.errors import KernelInputError
from collegium_kernels.ragged import (
    Routing,
    by_expert,
    by_token,
    check_routing,
    concatenate,
    from_dense,
    from_topk,
    limit_capacity,
    static_from_topk,
)
from hypothesis import given, settings
from hypothesis import strategies as st

TOPKS = st.tuples(st.integers(0, 20), st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**31))


def any_topk(T: int, K: int, E: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, E + 3, (T, K), generator=generator)
    return ids, torch.rand(T, K, generator=generator)


@given(TOPKS)
@settings(max_examples=60, deadline=None)
def test_rows_are_the_pairs_in_range_and_nothing_else(case: tuple[int, int, int, int]) -> None:
    T, K, E, seed = case
    ids, weights = any_topk(T, K, E, seed)
    routing = from_topk(ids, weights, num_experts=E)
    wanted = torch.zeros(T, E)
    for t in range(T):
        for k in range(K):
            if 0 <= ids[t, k] < E:
                wanted[t, ids[t, k]] += weights[t, k]
    assert routing.num_pairs == int(((ids >= 0) & (ids < E)).sum())
    torch.testing.assert_close(routing.dense_TE(), wanted)
    check_routing(routing, num_tokens=T, num_experts=E)


@given(TOPKS)
@settings(max_examples=60, deadline=None)
def test_transpose_sorts_by_expert_and_comes_back(case: tuple[int, int, int, int]) -> None:
    T, K, E, seed = case
    routing = from_topk(*any_topk(T, K, E, seed), num_experts=E)
    rows = by_expert(routing)
    assert torch.equal(rows.pairs_P.sort().values, torch.arange(routing.num_pairs))
    assert torch.equal(rows.indptr_E1.diff(), torch.bincount(routing.expert_ids_P, minlength=E))
    for e in range(E):
        mine = slice(int(rows.indptr_E1[e]), int(rows.indptr_E1[e + 1]))
        assert (routing.expert_ids_P[rows.pairs_P[mine]] == e).all()
        assert torch.equal(rows.tokens_P[mine], rows.tokens_P[mine].sort().values)
    back = by_token(rows, routing.weights_P[rows.pairs_P], num_tokens=T)
    assert torch.equal(back.indptr_T1, routing.indptr_T1)
    torch.testing.assert_close(back.dense_TE(), routing.dense_TE())


@given(TOPKS)
@settings(max_examples=40, deadline=None)
def test_static_routing_has_a_fixed_size_and_the_same_meaning(case: tuple[int, int, int, int]) -> None:
    T, K, E, seed = case
    ids, weights = any_topk(T, K, E, seed)
    static = static_from_topk(ids, weights, num_experts=E)
    exact = from_topk(ids, weights, num_experts=E)
    assert static.num_pairs == T * K
    assert int(by_expert(static).indptr_E1[-1]) == exact.num_pairs
    torch.testing.assert_close(static.dense_TE(), exact.dense_TE())


def test_identity_and_zero_experts_never_become_rows() -> None:
    ids = torch.tensor([[0, 4], [4, 5], [5, 5]])
    routing = from_topk(ids, torch.tensor([[0.5, 0.5], [0.7, 0.3], [0.6, 0.4]]), num_experts=4, identity_ids=(4,))
    assert routing.num_pairs == 1
    assert routing.copy_T is not None
    torch.testing.assert_close(routing.copy_T, torch.tensor([0.5, 0.7, 0.0]))


def test_from_dense_leaves_null_columns_out() -> None:
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    routing = from_dense(weights, weights > 0, num_experts=2)
    assert routing.expert_ids_P.tolist() == [0, 1, 1]
    assert routing.indptr_T1.tolist() == [0, 2, 3]


def test_bad_ids_are_refused_when_asked_and_named() -> None:
    ids = torch.tensor([[0, -1], [7, 1]])
    with pytest.raises(KernelInputError, match=r"ids_TK of shape \(2, 2\) holds \[-1, 7\], outside \[0, 4\)"):
        from_topk(ids, torch.ones(2, 2), num_experts=4, bad_ids="raise")
    assert from_topk(ids, torch.ones(2, 2), num_experts=4).expert_ids_P.tolist() == [0, 1]


def test_capacity_keeps_the_earliest_tokens_or_the_best_ranks() -> None:
    routing = from_topk(torch.zeros(4, 1, dtype=torch.long), torch.rand(4, 1), num_experts=2)
    assert limit_capacity(routing, 2).counts_T().tolist() == [1, 1, 0, 0]
    ranks = torch.tensor([1, 0, 1, 0])
    assert limit_capacity(routing, 2, rank_P=ranks).counts_T().tolist() == [0, 1, 0, 1]
    assert limit_capacity(routing, 0).num_pairs == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"indptr_T1": torch.tensor([0, 2, 1])}, "indptr_T1"),
        ({"indptr_T1": torch.tensor([0, 1])}, "indptr_T1"),
        ({"indptr_T1": torch.tensor([0, 1, 9])}, "indptr_T1"),
        ({"expert_ids_P": torch.tensor([0, 9])}, "expert_ids_P"),
        ({"expert_ids_P": torch.tensor([0, -1])}, "expert_ids_P"),
        ({"expert_ids_P": torch.tensor([0, 1], dtype=torch.int32)}, "expert_ids_P"),
        ({"weights_P": torch.ones(3)}, "weights_P"),
        ({"weights_P": torch.ones(2, dtype=torch.long)}, "weights_P"),
        ({"num_experts": 5}, "expert_ids_P"),
        ({"expert_ids_P": torch.tensor([[0], [3]]), "weights_P": torch.ones(2, 1)}, "expert_ids_P"),
        ({"indptr_T1": torch.tensor([0, 0, 2]), "fixed_k": 1}, "indptr_T1.*as fixed_k says"),
    ],
)
def test_a_hand_made_routing_that_would_read_outside_is_refused(change: dict[str, object], named: str) -> None:
    good = {
        "indptr_T1": torch.tensor([0, 1, 2]),
        "expert_ids_P": torch.tensor([0, 3]),
        "weights_P": torch.ones(2),
        "num_experts": 4,
    }
    check_routing(Routing(**good), num_tokens=2, num_experts=4)  # type: ignore[arg-type]
    with pytest.raises(KernelInputError, match=named):
        check_routing(Routing(**{**good, **change}), num_tokens=2, num_experts=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "weights", "named"),
    [
        (torch.zeros(3, dtype=torch.long), torch.ones(3), "ids_TK"),
        (torch.zeros(2, 2), torch.ones(2, 2), "ids_TK"),
        (torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 3), "weights_TK"),
        (torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.long), "weights_TK"),
    ],
)
def test_a_top_k_of_the_wrong_kind_is_refused(ids: torch.Tensor, weights: torch.Tensor, named: str) -> None:
    with pytest.raises(KernelInputError, match=named):
        from_topk(ids, weights, num_experts=4)


def test_a_typing_error_does_not_drop_ids() -> None:
    with pytest.raises(KernelInputError, match="bad_ids 'refuse'"):
        from_topk(torch.full((2, 2), 9), torch.ones(2, 2), num_experts=4, bad_ids="refuse")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "active", "named"),
    [
        (torch.rand(3, 4), torch.ones(3, 5, dtype=torch.bool), "active_TE"),
        (torch.rand(3, 4), torch.ones(2, 4, dtype=torch.bool), "active_TE"),
        (torch.rand(3, 4), torch.ones(3, 4, dtype=torch.long), "active_TE"),
        (torch.rand(4), torch.ones(4, dtype=torch.bool), "weights_TE"),
        (torch.ones(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool), "weights_TE"),
    ],
)
def test_a_matrix_of_the_wrong_kind_is_refused(weights: torch.Tensor, active: torch.Tensor, named: str) -> None:
    with pytest.raises(KernelInputError, match=named):
        from_dense(weights, active)


@given(TOPKS, st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_capacity_of_a_static_routing_means_the_same_at_its_own_size(
    case: tuple[int, int, int, int], capacity: int
) -> None:
    T, K, E, seed = case
    ids, weights = any_topk(T, K, E, seed)
    static = limit_capacity(static_from_topk(ids, weights, num_experts=E), capacity)
    exact = limit_capacity(from_topk(ids, weights, num_experts=E), capacity)
    check_routing(static, num_tokens=T, num_experts=E)
    assert static.num_pairs == T * K
    torch.testing.assert_close(static.dense_TE(), exact.dense_TE())


def test_a_rank_for_each_pair() -> None:
    routing = from_topk(torch.zeros(4, 1, dtype=torch.long), torch.rand(4, 1), num_experts=2)
    with pytest.raises(KernelInputError, match="rank_P of shape"):
        limit_capacity(routing, 1, rank_P=torch.zeros(3, dtype=torch.long))


def test_routings_with_cheap_experts_are_not_put_together() -> None:
    plain = from_topk(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), num_experts=2)
    copying = from_topk(torch.full((2, 1), 2), torch.ones(2, 1), num_experts=2, identity_ids=(2,))
    with pytest.raises(KernelInputError, match="copy_T"):
        concatenate([plain, copying])


def test_static_routings_put_together_are_static() -> None:
    """The pairs they do not want carry the id E, which only a static routing may."""
    one = static_from_topk(torch.tensor([[0, 9]]), torch.ones(1, 2), num_experts=3)
    both = concatenate([one, from_topk(torch.tensor([[1]]), torch.ones(1, 1), num_experts=3)])
    check_routing(both, num_tokens=2, num_experts=3)
    assert both.dense_TE().tolist() == [[1, 0, 0], [0, 1, 0]]


def test_routings_of_other_experts_are_not_put_together() -> None:
    parts = [from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=n) for n in (3, 5)]
    for wrong in (parts, []):
        with pytest.raises(KernelInputError, match="cannot be put together"):
            concatenate(wrong)
