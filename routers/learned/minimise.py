"""L-BFGS over several arrays at once."""

from collections.abc import Callable, Sequence

import numpy as np

from routers.records import Array

Loss = Callable[[list[Array]], tuple[float, list[Array]]]
"""Arrays in; the loss and its gradient by each of them out."""


def minimise(start: Sequence[Array], loss: Loss, *, steps: int) -> list[Array]:
    from scipy.optimize import fmin_l_bfgs_b

    def flat_loss(flat: Array) -> tuple[float, Array]:
        value, gradients = loss(_split(flat, start))
        return value, np.concatenate([g.ravel() for g in gradients]).astype(np.float64)

    flat = np.concatenate([a.ravel() for a in start]).astype(np.float64)
    found, _, _ = fmin_l_bfgs_b(flat_loss, flat, maxiter=steps, factr=1e9)
    return _split(found, start)


def _split(flat: Array, like: Sequence[Array]) -> list[Array]:
    ends = np.cumsum([a.size for a in like])
    return [part.reshape(a.shape) for part, a in zip(np.split(flat, ends[:-1]), like, strict=True)]
