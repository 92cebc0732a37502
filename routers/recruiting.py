"""Whom to recruit by skill (Symbolic-MoE, arXiv 2503.05641): suitability = local score x global competence, then the
best or a draw.

Legend: Q questions, K keywords, E experts.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from routers.records import Array

COMPETENCES = ("power", "softmax", "none")
DRAWS = ("top", "without", "with")


def competence(global_E: Array, how: str, temperature: float) -> Array:
    """Shares of the experts' global scores, which sum to 1.

    ``power`` is what the authors' code does: scores are shifted above 0 where one is negative, then raised to
    1 / ``temperature``. ``softmax`` is what the paper says; with sums over many keywords it is all but the best expert
    alone. ``none``: equal shares. Where nothing tells the experts apart, shares are equal too.
    """
    if how == "none" or np.ptp(global_E) == 0:
        return np.full(len(global_E), 1 / len(global_E))
    scores = global_E.astype(np.float64)
    if how == "softmax":
        weights = np.exp((scores - scores.max()) / temperature)
    else:
        lifted = scores - scores.min() + 1 if scores.min() < 0 else scores
        # By the largest, or a large power of a large sum overflows.
        weights = (lifted / lifted.max()) ** (1 / temperature)
    shares: Array = weights / weights.sum()
    return shares


def relevance(local_QE: Array, share_E: Array) -> Array:
    """Each question's experts with a local score above 0, in proportion to score x share; rows sum to 1.

    Where no expert has one, or all that have it have no share, scores are lifted above 0 for all of them instead.
    """
    kept = np.where(local_QE > 0, local_QE, 0) * share_E
    lifted = (local_QE - local_QE.min(axis=1, keepdims=True) + 1) * share_E
    weights = np.where(kept.sum(axis=1, keepdims=True) > 0, kept, lifted)
    found: Array = weights / weights.sum(axis=1, keepdims=True)
    return found


def draw(shares_E: Array, count: int, rng: np.random.Generator, *, repeat: bool) -> list[int]:
    """``count`` experts by lot. With ``repeat`` one may be drawn again; without, experts of no share come last and all
    are named at most once."""
    if repeat:
        return [int(e) for e in rng.choice(len(shares_E), count, p=shares_E)]
    # A race of exponential clocks: the first k to ring are a sample of k, for every k.
    with np.errstate(divide="ignore"):
        rings = rng.exponential(size=len(shares_E)) / shares_E
    return [int(e) for e in np.argsort(rings, kind="stable")[:count]]


def trim(rows: Sequence[Sequence[int]], share: float, rng: np.random.Generator, *, repeat: bool) -> list[list[int]]:
    """The same recruits, less the experts that hold under ``share`` of all places: each of these places goes by lot to
    an expert that holds more, so that fewer models are loaded. A place that nobody else can take stays as it is."""
    counts = Counter(e for row in rows for e in row)
    large = sorted(e for e, n in counts.items() if n >= share * counts.total())
    result = []
    for row in rows:
        kept = [e if e in large else None for e in row]
        for place, expert in enumerate(row):
            if kept[place] is None:
                free = large if repeat else [e for e in large if e not in kept]
                kept[place] = _lot(free, counts, rng) if free else expert
        result.append([e for e in kept if e is not None])
    return result


def _lot(experts: Sequence[int], counts: Counter[int], rng: np.random.Generator) -> int:
    weights = np.array([counts[e] for e in experts], np.float64)
    return int(rng.choice(experts, p=weights / weights.sum()))
