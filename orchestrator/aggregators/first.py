"""The best-ranked expert's answer. The others stand by as its fallback and cost nothing."""

from collections.abc import Sequence

from experts.types import Completion, Request
from routers.base import RouteDecision


class First:
    name = "first"
    takes_one = True

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        ranks = {expert_id: rank for rank, expert_id in enumerate(decision.ranked())}
        return min(completions, key=lambda c: (ranks.get(c.expert_id, len(ranks)), c.expert_id, c.index))

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        ranks = {expert_id: rank for rank, expert_id in enumerate(decision.ranked())}
        best = min((ranks.get(c.expert_id, len(ranks)) for c in completions), default=len(ranks))
        return bool(completions) and all(ranks.get(e, len(ranks)) > best for e in pending)
