"""Serves a fitted value and, if told to, tries others now and then, so that what they are worth can be learned."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from experts.errors import ConfigError
from experts.types import ExpertSpec, Request
from routers.base import RouteDecision, RouterParts
from routers.learned.router import Learned


class Value:
    """With probability ``epsilon`` any expert of the pool goes first; the reason says with which probability the first
    one was picked, which is what learning from these logs needs."""

    name = "value"

    def __init__(
        self, parts: RouterParts, *, names: Mapping[str, str] | None = None, epsilon: float = 0.0, seed: int = 0
    ) -> None:
        if not 0 <= epsilon <= 1:
            raise ConfigError(f"router 'value': 'epsilon' is a probability, not {epsilon}.")
        self._learned = Learned(parts, self.name, names)
        self._epsilon = epsilon
        self._random = random.Random(seed)  # noqa: S311  # choosing experts is no secret

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        decisions = await self._learned.route(requests, pool)
        return [self._explore(d) for d in decisions] if self._epsilon else decisions

    def _explore(self, decision: RouteDecision) -> RouteDecision:
        ranked = decision.ranked()
        tries = self._random.random() < self._epsilon
        first = self._random.choice(ranked) if tries else ranked[0]
        chance = self._epsilon / len(ranked) + (1 - self._epsilon) * (first == ranked[0])
        reason = f"{decision.reason}; '{first}' goes first with probability {chance:.3f}"
        if first == ranked[0]:
            return replace(decision, reason=reason)
        order = (first, *(e for e in ranked if e != first))
        return replace(decision, reason=reason, draws=order).top(1)
