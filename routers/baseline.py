"""Routers that learn nothing: always, direct, random, round_robin, rules. The others are measured against them."""

import itertools
import random
import re
from collections.abc import Mapping, Sequence

from experts.errors import ConfigError
from experts.types import ExpertSpec, Request
from routers.base import RouteDecision, RouterParts, decide


class Always:
    """One expert for everything (default: the pool's first); the others follow in the pool's order as spares."""

    name = "always"

    def __init__(self, parts: RouterParts, *, expert: str | None = None) -> None:
        if expert is not None and expert not in parts.experts:
            raise ConfigError(f"router 'always': no expert '{expert}'; known: {', '.join(parts.experts)}.")
        self._expert = expert

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        ranks = {s.expert_id: 1.0 / (i + 2) for i, s in enumerate(pool)}
        best = self._expert if self._expert in ranks else pool[0].expert_id
        return [decide({**ranks, best: 1.0}, reason=f"always '{best}'", router=self.name) for _ in requests]


class Direct:
    """The expert the caller asked for by name. The only candidate, so nobody answers in its place."""

    name = "direct"

    def __init__(self, expert_id: str) -> None:
        self._expert_id = expert_id

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        scores = {self._expert_id: 1.0}
        return [decide(scores, reason="asked for by name", router=self.name) for _ in requests]


class Random:
    """Uniform, and reproducible: the same seed gives the same decisions in the same order. A request may bring its
    own seed as ``metadata["route_seed"]``."""

    name = "random"

    def __init__(self, parts: RouterParts, *, seed: int | None = None) -> None:
        self._random = random.Random(seed)  # noqa: S311  # choosing experts is no secret

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        return [self._draw(request, pool) for request in requests]

    def _draw(self, request: Request, pool: Sequence[ExpertSpec]) -> RouteDecision:
        seed = request.metadata.get("route_seed")
        source = self._random if seed is None else random.Random(seed)  # noqa: S311
        scores = {s.expert_id: source.random() for s in pool}
        return decide(scores, reason="drawn at random", router=self.name)


class RoundRobin:
    """Each expert in turn."""

    name = "round_robin"

    def __init__(self, parts: RouterParts) -> None:
        self._turn = itertools.count()

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        return [self._next(pool) for _ in requests]

    def _next(self, pool: Sequence[ExpertSpec]) -> RouteDecision:
        turn, size = next(self._turn), len(pool)
        scores = {s.expert_id: 1.0 - ((i - turn) % size) / size for i, s in enumerate(pool)}
        return decide(scores, reason=f"turn {turn % size + 1} of {size}", router=self.name)


class Rules:
    """The first rule that matches says who answers.

    A rule is {"expert": id} and one or more of "contains" (words, any of them), "regex", "tag" (request metadata),
    "min_chars", "max_chars", all of which must hold. ``default`` answers when no rule matches. The text is read up to
    ``READ_CHARS``, which bounds what an unlucky expression can cost.
    """

    name = "rules"
    READ_CHARS = 8_000
    KEYS = ("expert", "contains", "regex", "tag", "min_chars", "max_chars")

    def __init__(self, parts: RouterParts, *, rules: Sequence[Mapping[str, object]], default: str) -> None:
        self._rules = [_Rule(rule, number) for number, rule in enumerate(rules, 1)]
        self._default = default
        for expert in (default, *(rule.expert for rule in self._rules)):
            if expert not in parts.experts:
                raise ConfigError(f"router 'rules': no expert '{expert}'; known: {', '.join(parts.experts)}.")

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        return [self._apply(request, pool) for request in requests]

    def _apply(self, request: Request, pool: Sequence[ExpertSpec]) -> RouteDecision:
        text, known = request.question[: self.READ_CHARS], [s.expert_id for s in pool]
        hits = [rule for rule in self._rules if rule.expert in known and rule.holds(text, request)]
        reason = f"rule {hits[0].number}: {hits[0].says}" if hits else "no rule matched"
        # Later matches, then the default, stand by as spares in that order.
        order = dict.fromkeys([*(rule.expert for rule in hits), self._default, *known])
        scores = {e: 1.0 / (i + 1) for i, e in enumerate(e for e in order if e in known)}
        return decide(scores, reason=reason, router=self.name)


class _Rule:
    def __init__(self, rule: Mapping[str, object], number: int) -> None:
        unknown = set(rule) - set(Rules.KEYS)
        if unknown or "expert" not in rule:
            raise ConfigError(
                f"router 'rules', rule {number}: needs 'expert' and knows {Rules.KEYS}, got {list(rule)}."
            )
        self.number = number
        self.expert = str(rule["expert"])
        self.says = ", ".join(f"{k} {v}" for k, v in rule.items() if k != "expert") or "everything"
        self._words = [w.casefold() for w in _words(rule.get("contains"))]
        self._regex = _compile(rule.get("regex"), number)
        self._tag = rule.get("tag")
        self._min, self._max = int(str(rule.get("min_chars", 0))), rule.get("max_chars")

    def holds(self, text: str, request: Request) -> bool:
        folded = text.casefold()
        return (
            (not self._words or any(w in folded for w in self._words))
            and (self._regex is None or self._regex.search(text) is not None)
            and (self._tag is None or request.metadata.get("tag") == self._tag)
            and len(text) >= self._min
            and (self._max is None or len(text) <= int(str(self._max)))
        )


def _words(value: object) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(v) for v in value]  # type: ignore[attr-defined]


def _compile(value: object, number: int) -> re.Pattern[str] | None:
    try:
        return None if value is None else re.compile(str(value), re.IGNORECASE)
    except re.error as exc:
        raise ConfigError(f"router 'rules', rule {number}: '{value}' is no regular expression: {exc}.") from exc
