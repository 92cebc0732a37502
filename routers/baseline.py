"""Routers that learn nothing: always, direct, random, hash, round_robin, rules. Others are measured against them."""

import itertools
import random
import re
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b

from experts.errors import BadRequest, ConfigError
from experts.types import ExpertSpec, Request
from routers.base import RouteDecision, RouterParts, decide


class Always:
    """One expert for everything (default: the pool's first); the others follow in the pool's order as spares."""

    name = "always"

    def __init__(self, parts: RouterParts, *, expert: str | None = None) -> None:
        self._expert = None if expert is None else _known(expert, parts.experts, "router 'always'")

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
        if all(s.expert_id != self._expert_id for s in pool):
            raise BadRequest(
                f"Expert '{self._expert_id}', asked for by name, costs more than the request may; raise "
                "collegium.max_usd or lower max_tokens.",
                param="collegium.max_usd",
            )
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
        # By way of str, whatever a caller sends is a seed.
        source = self._random if seed is None else random.Random(str(seed))  # noqa: S311
        scores = {s.expert_id: source.random() for s in pool}
        return decide(scores, reason="drawn at random", router=self.name)


class Hash:
    """By the question's own hash: evenly spread, and the same question always goes to the same expert (the fixed random
    routing of hash layers and THOR, arXiv 2110.04260), whatever the order of requests or of the pool. An expert that
    joins or leaves moves only the questions that it wins or held (rendezvous hashing)."""

    name = "hash"

    def __init__(self, parts: RouterParts, *, seed: int = 0) -> None:
        self._seed = seed

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        return [self._place(request.question, pool) for request in requests]

    def _place(self, question: str, pool: Sequence[ExpertSpec]) -> RouteDecision:
        scores = {s.expert_id: self._score(question, s.expert_id) for s in pool}
        return decide(scores, reason="by the question's hash", router=self.name)

    def _score(self, question: str, expert_id: str) -> float:
        raw = f"{self._seed}\0{expert_id}\0{question}".encode(errors="replace")
        return int.from_bytes(blake2b(raw, digest_size=6).digest(), "little") / 2**48


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

    A rule is {"expert": id} and one or more of "contains" (a text or a list of texts, any of them, whatever the case),
    "regex" (whatever the case), "tag" (the request's metadata), "min_chars" and "max_chars" (of the whole question),
    all of which must hold. ``default`` answers when no rule matches. Texts and expressions look at the question's
    first ``READ_CHARS`` characters, which bounds what a slow expression costs; one with nested repeats, as in
    ``(a+)+$``, can still take for ever and does not belong in a config.
    """

    name = "rules"
    READ_CHARS = 8_000
    KEYS = ("expert", "contains", "regex", "tag", "min_chars", "max_chars")

    def __init__(self, parts: RouterParts, *, rules: Sequence[Mapping[str, object]], default: str) -> None:
        self._rules = [_Rule(rule, number, parts.experts) for number, rule in enumerate(rules, 1)]
        self._default = _known(default, parts.experts, "router 'rules', default")

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        return [self._apply(request, pool) for request in requests]

    def _apply(self, request: Request, pool: Sequence[ExpertSpec]) -> RouteDecision:
        known = [s.expert_id for s in pool]
        hits = [rule for rule in self._rules if rule.expert in known and rule.holds(request)]
        reason = f"rule {hits[0].number}: {hits[0].says}" if hits else "no rule matched"
        # Later matches, then the default, stand by as spares in that order.
        order = dict.fromkeys([*(rule.expert for rule in hits), self._default, *known])
        scores = {e: 1.0 / (i + 1) for i, e in enumerate(e for e in order if e in known)}
        return decide(scores, reason=reason, router=self.name)


class _Rule:
    def __init__(self, rule: Mapping[str, object], number: int, experts: Collection[str]) -> None:
        place = f"router 'rules', rule {number}"
        if not isinstance(rule, Mapping) or "expert" not in rule or not set(rule) <= set(Rules.KEYS):
            raise ConfigError(f"{place}: a rule has 'expert' and some of {', '.join(Rules.KEYS[1:])}; got {rule!r}.")
        if len(rule) == 1:
            raise ConfigError(f"{place}: matches everything; name its expert as 'default' instead.")
        self.number = number
        self.expert = _known(rule["expert"], experts, place)
        self.says = ", ".join(f"{k} {v}" for k, v in rule.items() if k != "expert")
        self._texts = _texts(rule.get("contains"), place)
        self._regex = _compile(rule.get("regex"), place)
        self._tag = rule.get("tag")
        self._min, self._max = _count(rule, "min_chars", place), _count(rule, "max_chars", place)

    def holds(self, request: Request) -> bool:
        question = request.question
        text = question[: Rules.READ_CHARS]
        folded = text.casefold()
        return (
            (self._min is None or len(question) >= self._min)
            and (self._max is None or len(question) <= self._max)
            and (self._tag is None or request.metadata.get("tag") == self._tag)
            and (self._texts is None or any(t in folded for t in self._texts))
            and (self._regex is None or self._regex.search(text) is not None)
        )


def _known(expert: object, experts: Collection[str], place: str) -> str:
    if not isinstance(expert, str) or expert not in experts:
        raise ConfigError(f"{place}: no expert '{expert}'; known: {', '.join(experts)}.")
    return expert


def _texts(value: object, place: str) -> list[str] | None:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise ConfigError(f"{place}: 'contains' is a text or a list of texts, got {value!r}.")
    return [t.casefold() for t in texts]


def _count(rule: Mapping[str, object], key: str, place: str) -> int | None:
    value = rule.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(f"{place}: '{key}' is a number of characters, got {value!r}.")
    return value


def _compile(value: object, place: str) -> re.Pattern[str] | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{place}: 'regex' is a regular expression, got {value!r}.")
    try:
        return re.compile(value, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ConfigError(f"{place}: '{value[:100]}' is no regular expression: {exc}.") from exc
