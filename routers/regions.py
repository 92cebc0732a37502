"""Regions of demonstrations for prompt experts (mixture of prompts, arXiv 2407.00256): how many, which demonstrations
each keeps, and where it lies.

Legend: N demonstrations, W width of the embedding, K regions.
"""

from dataclasses import dataclass

import numpy as np

from experts.errors import ConfigError
from routers.records import Array

K_MAX, PENALTY, GUARD = 10, 0.02, 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Numbers of demonstrations: ``members`` lie nearest to this centroid; ``kept`` are shown in its prompt, at most
    ``capacity`` of them, repeated to fill it; ``trimmed`` found no room."""

    members: tuple[int, ...]
    kept: tuple[int, ...]
    trimmed: tuple[int, ...]


def split_regions(vectors_NW: Array, seed: int, *, regions: int | None = None) -> tuple[Array, list[Region]]:
    """(centroids_KW, regions). Without a number of ``regions`` it is found. Raises ConfigError for too few
    demonstrations."""
    distinct = len(np.unique(vectors_NW, axis=0))
    count = choose_k(vectors_NW, seed) if regions is None else regions
    if not 1 <= count <= distinct:
        raise ConfigError(f"{count} regions need as many different demonstrations; there are {distinct}.")
    centroids, labels, _ = _cluster(vectors_NW, count, seed)
    rng, capacity = np.random.default_rng(seed), len(vectors_NW) // count
    return centroids, [_region(np.flatnonzero(labels == k), capacity, rng) for k in range(count)]


def choose_k(vectors_NW: Array, seed: int, *, most: int = K_MAX) -> int:
    """The k of least inertia(k) / inertia(1) + 0.02 k, as published, which is never 1.

    So there is a guard the paper does not have: k regions are believed only where they leave under ``GUARD`` of the
    inertia that they would leave in a single Gaussian cloud of the same covariance. Else there is one region.
    """
    most = min(most, len(np.unique(vectors_NW, axis=0)))
    whole = _cluster(vectors_NW, 1, seed)[2] if most > 1 else 0.0
    if whole <= 1e-12:
        return 1
    shares = {k: _cluster(vectors_NW, k, seed)[2] / whole for k in range(2, most + 1)}
    best = min(shares, key=lambda k: shares[k] + PENALTY * k)
    return best if shares[best] < GUARD * _share_of_a_cloud(vectors_NW, best, seed) else 1


def nearest_region(vectors_QW: Array, centroids_KW: Array) -> Array:
    """Q x K Euclidean distances."""
    squared = (vectors_QW**2).sum(axis=1)[:, None] - 2 * vectors_QW @ centroids_KW.T + (centroids_KW**2).sum(axis=1)
    distances: Array = np.sqrt(np.maximum(squared, 0))
    return distances


def _share_of_a_cloud(vectors_NW: Array, count: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    centred = (vectors_NW - vectors_NW.mean(axis=0)).astype(np.float64)
    # Mixing rows with Gaussian weights keeps the covariance and forgets the clusters.
    cloud = rng.normal(size=(len(centred), len(centred))) @ centred / len(centred) ** 0.5
    return _cluster(cloud, count, seed)[2] / _cluster(cloud, 1, seed)[2]


def _cluster(vectors_NW: Array, count: int, seed: int) -> tuple[Array, Array, float]:
    from sklearn.cluster import KMeans

    found = KMeans(count, n_init=4, random_state=seed).fit(vectors_NW)
    return found.cluster_centers_.astype(np.float32), found.labels_, float(found.inertia_)


def _region(members: Array, capacity: int, rng: np.random.Generator) -> Region:
    order = [int(m) for m in rng.permutation(members)]
    kept, trimmed = sorted(order[:capacity]), sorted(order[capacity:])
    fill = [kept[i % len(kept)] for i in range(capacity - len(kept))] if kept else []
    return Region(members=tuple(int(m) for m in members), kept=(*kept, *fill), trimmed=tuple(trimmed))
