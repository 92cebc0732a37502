"""A matrix product whose rows do not depend on how many rows there are.

BLAS picks its code by the number of rows and by how they lie in memory, and sums in another order. Which numbers take
the same path differs from one CPU to the next, so that every product here has the same number of rows, of whole cache
lines: a token's logits do not change with its neighbours. It costs speed where rows are many.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from collegium_kernels.errors import require

ROWS = 16
LINE_BYTES = 64
# Elements to fill up to, and the most that torch computes without splitting them among threads.
VECTOR, SERIAL = 64, 32768


def steady_mm(x_RD: Tensor, w_ND: Tensor) -> Tensor:
    """``x @ w.T``, each row bitwise the same whatever the other rows are."""
    R, D = x_RD.shape
    require(
        w_ND.shape[1] == D, "x_RD", x_RD, f"{w_ND.shape[1]} columns, as the weights of shape {tuple(w_ND.shape)} have"
    )
    line = LINE_BYTES // x_RD.element_size()
    x = _laid_out(x_RD, -R % ROWS, -D % line)
    # Few outputs take other paths too: on some CPUs a product with two of them depends on its rows.
    w = _laid_out(w_ND, -w_ND.shape[0] % ROWS, -D % line)
    blocks = [x[start : start + ROWS] @ w.t() for start in range(0, len(x), ROWS)] or [x @ w.t()]
    return torch.cat(blocks)[:R, : w_ND.shape[0]].contiguous()


def _laid_out(matrix: Tensor, more_rows: int, more_columns: int) -> Tensor:
    """Padded with zeros, contiguous and starting on a cache line; itself when it already is."""
    if more_rows or more_columns:
        return functional.pad(matrix, (0, more_columns, 0, more_rows))
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % LINE_BYTES == 0 else matrix.clone()


def segment_sum(y_PD: Tensor, weights_P: Tensor, indptr_T1: Tensor, rows_P: Tensor) -> Tensor:
    """``out[t] = sum of weights_P[p] * y_PD[rows_P[p]]`` over the pairs of t, in their order, without atomics; in fp32,
    or in fp64 where ``y_PD`` is."""
    wide = torch.float64 if y_PD.dtype == torch.float64 else torch.float32
    if rows_P.shape[0] == 0:
        return y_PD.new_zeros(indptr_T1.shape[0] - 1, y_PD.shape[1], dtype=wide)
    return functional.embedding_bag(
        rows_P,
        y_PD.to(wide),
        indptr_T1,
        mode="sum",
        per_sample_weights=weights_P.to(wide),
        include_last_offset=True,
    )


def steady_map(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of each element, bitwise the same wherever the element lies.

    Vectorised loops compute the last few elements of a buffer with other instructions, so the buffer is filled up.
    """
    flat = x.reshape(-1)
    filled = functional.pad(flat, (0, -flat.shape[0] % VECTOR))
    done = [function(filled[start : start + SERIAL]) for start in range(0, max(1, len(filled)), SERIAL)]
    return torch.cat(done)[: flat.shape[0]].reshape(x.shape)
