"""Near vectors without reading all of them: an inverted file (Sivic & Zisserman, Video Google, ICCV 2003).

Vectors are sorted into cells around the centres of a k-means, and a question reads the nearest cells only, until it has
seen ``read`` vectors. What it costs then hardly grows with the pool; what it may miss are neighbours in cells that lie
further away.

Legend: N vectors, W their width, C cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from routers.records import Array

EXACT = 20_000
"""Up to so many vectors all are read: that is as fast, and misses none."""
READ = 10_000
_BLOCK = 4_096
_SAMPLE = 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """``ends_C``: where each cell ends in the sorted vectors. Both arrays are empty where all vectors are read."""

    centres_CW: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    ends_C: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    read: int = READ

    @classmethod
    def fit(cls, vectors_NW: Array, seed: int, exact: int = EXACT) -> tuple[Self, Array]:
        """The cells, and the order of ``vectors_NW`` that they are for. Vectors are of one length."""
        count = len(vectors_NW)
        if count <= exact:
            return cls(), np.arange(count)
        centres = _centres(vectors_NW, int(2 * count**0.5), seed)
        own = [(vectors_NW[i : i + _BLOCK] @ centres.T).argmax(axis=1) for i in range(0, count, _BLOCK)]
        cells = np.concatenate(own)
        ends = np.cumsum(np.bincount(cells, minlength=len(centres)))
        return cls(centres_CW=centres, ends_C=ends), np.argsort(cells, kind="stable")

    def near(self, vector_W: Array, at_least: int) -> Iterator[slice]:
        """Where the vectors of the nearest cells lie, nearest cell first: ``read`` vectors or more."""
        seen, enough = 0, max(self.read, at_least)
        for cell in np.argsort(-(self.centres_CW @ vector_W), kind="stable"):
            start, end = int(self.ends_C[cell - 1]) if cell else 0, int(self.ends_C[cell])
            yield slice(start, end)
            seen += end - start
            if seen >= enough:
                return


def _centres(vectors_NW: Array, count: int, seed: int) -> Array:
    from sklearn.cluster import MiniBatchKMeans

    rows = np.random.default_rng(seed).permutation(len(vectors_NW))[:_SAMPLE]
    means = MiniBatchKMeans(
        count, init="random", n_init=1, max_iter=10, batch_size=_BLOCK, max_no_improvement=None, random_state=seed
    )
    centres: Array = means.fit(vectors_NW[np.sort(rows)]).cluster_centers_.astype(np.float32)
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-9)
    return centres
