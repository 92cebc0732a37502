"""What a router is: requests and a pool in, one decision a request out. A router never calls an expert.

Routers score every candidate; how many to ask is policy and is applied afterwards with RouteDecision.top().
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from experts.base import Expert
from experts.types import ExpertSpec, Request
from routers.encoders import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDecision:
    """Who is asked. ``expert_ids`` and ``weights`` (sum 1) are the model-level topk_ids and topk_weights;
    ``scores`` holds every candidate, higher is better, so that policy can change without the router.

    A router that recruits by lot names its ``draws`` in order: they go before the scores, and the first k of them are
    a sample of k, whatever k policy asks for. An expert drawn twice is asked once and weighs twice."""

    expert_ids: tuple[str, ...]
    weights: tuple[float, ...]
    scores: Mapping[str, float]
    reason: str
    router: str
    route_ms: float = 0.0
    draws: tuple[str, ...] = ()

    def ranked(self) -> list[str]:
        """Every candidate, best first; ties keep the pool's order."""
        by_score = sorted(self.scores, key=lambda e: -self.scores[e])
        return list(dict.fromkeys((*self.draws, *by_score))) if self.draws else by_score

    def top(self, k: int) -> "RouteDecision":
        """The same decision for ``k`` experts, fewer where draws repeat one."""
        if k == len(self.expert_ids) and not self.draws:
            return self
        if self.draws:
            counts = Counter(self.draws[:k])
            return replace(self, expert_ids=tuple(counts), weights=normalise(list(counts.values())))
        chosen = tuple(self.ranked()[:k])
        return replace(self, expert_ids=chosen, weights=normalise([self.scores[e] for e in chosen]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterParts:
    """What a router may be made from; every router's constructor takes it first, then its own options by keyword.
    ``encoder`` gives the service's encoder, the same one each time, made at the first call."""

    encoder: Callable[[], Encoder]
    experts: Mapping[str, Expert]
    artefact: Path | None = None


class Router(Protocol):
    name: str

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        """One decision a request, in order, for the experts in ``pool`` (never empty)."""


def decide(scores: Mapping[str, float], *, reason: str, router: str) -> RouteDecision:
    """A decision for the best-scored expert. Scores must be finite."""
    bad = [e for e, s in scores.items() if not math.isfinite(s)]
    if bad:
        raise ValueError(f"router '{router}' gave a score that is not finite to {bad}")
    best = (max(scores, key=scores.__getitem__),) if scores else ()
    return RouteDecision(expert_ids=best, weights=(1.0,) * len(best), scores=scores, reason=reason, router=router)


def normalise(scores: Sequence[float]) -> tuple[float, ...]:
    """Scores as weights that sum to 1: in proportion where none is negative, by softmax where one is."""
    if any(s < 0 for s in scores):
        top = max(scores)
        scores = [math.exp(s - top) for s in scores]
    total = sum(scores)
    return tuple(s / total for s in scores) if total > 0 else tuple(1 / len(scores) for _ in scores)
