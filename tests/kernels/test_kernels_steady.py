"""Rows of a product do not depend on their neighbours, on this machine's BLAS."""

import pytest
import torch
from collegium_kernels.steady import segment_sum, steady_mm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "N"), [(1, 1), (5, 8), (7, 3), (17, 1), (64, 33), (576, 9), (2048, 64)])
def test_rows_are_bitwise_the_same_in_any_company(dtype: torch.dtype, D: int, N: int) -> None:
    x, w = torch.randn(70, D).to(dtype), torch.randn(N, D).to(dtype)
    whole = steady_mm(x, w)
    torch.testing.assert_close(whole, x @ w.t())
    for rows in (1, 2, 3, 7, 8, 9, 33, 70):
        chosen = torch.randperm(70)[:rows]
        assert torch.equal(steady_mm(x[chosen], w), whole[chosen])
    assert torch.equal(steady_mm(x[3:6], w), whole[3:6])


def test_segment_sum_equals_a_loop_and_is_zero_for_empty_segments() -> None:
    y, weights, rows = torch.randn(5, 3), torch.rand(6), torch.tensor([4, 0, 0, 2, 1, 3])
    indptr = torch.tensor([0, 2, 2, 5, 6])
    wanted = torch.stack([(weights[a:b, None] * y[rows[a:b]]).sum(0) for a, b in ((0, 2), (2, 2), (2, 5), (5, 6))])
    torch.testing.assert_close(segment_sum(y, weights, indptr, rows), wanted)
    assert segment_sum(y, weights[:0], torch.zeros(4, dtype=torch.long), rows[:0]).shape == (3, 3)
