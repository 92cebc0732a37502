"""Recruits by skill (Symbolic-MoE, arXiv 2503.05641): the experts whose record on the question's keywords is best.

Keywords come from the artefact's own vocabulary by embedding, or from an expert that is asked for them; whatever it
says is replaced by the nearest keyword of the vocabulary. Nothing is trained: see routers/learned/skills.py for how the
profiles are made.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from experts.base import Expert
from experts.errors import CollegiumError, ConfigError
from experts.types import ExpertSpec, Request
from routers.artefacts import columns_of
from routers.base import RouteDecision, RouterParts, decide
from routers.keywords import LlmKeywords, nearest_known
from routers.learned import artefact
from routers.learned.router import check_encoder, told_task
from routers.learned.skills import Skills as Fitted
from routers.profiles import SCORES
from routers.questions import Questions
from routers.records import Array
from routers.recruiting import COMPETENCES, DRAWS, draw, trim

log = logging.getLogger(__name__)

_LONGEST_DRAW = 16
"""Draws that a decision carries: policy may ask for as many experts."""


class Skills:
    """``keywords`` names the expert that is asked for them; without one they come by embedding.

    ``draw``: "top" takes the most suitable experts; "without" and "with" draw by suitability, without and with
    repeats (as published). An expert drawn twice is asked once and weighs twice, so a sampled second answer is saved
    with its call. A draw depends on ``seed`` (or the request's route_seed) and the question alone. ``trim``: of a
    batch, experts with less than this share of the first ``recruits`` places are replaced, which saves loading them.
    ``empty``: a question without keywords goes by "global" competence, or is drawn "uniform" as published.
    ``score``, ``competence``, ``temperature``, ``most`` and ``floor`` override the artefact's: no refit is needed.
    """

    name = "skills"

    def __init__(
        self,
        parts: RouterParts,
        *,
        names: Mapping[str, str] | None = None,
        keywords: str | None = None,
        draw: str = "top",
        recruits: int = 3,
        trim: float = 0.0,
        empty: str = "global",
        seed: int = 0,
        score: str | None = None,
        competence: str | None = None,
        temperature: float | None = None,
        most: int | None = None,
        floor: float | None = None,
    ) -> None:
        _one_of("draw", draw, DRAWS)
        _one_of("empty", empty, ("global", "uniform"))
        _one_of("score", score, SCORES)
        _one_of("competence", competence, COMPETENCES)
        if not 0 <= trim < 1 or not 1 <= recruits <= _LONGEST_DRAW:
            raise ConfigError(f"router 'skills': 'trim' is a share below 1, 'recruits' from 1 to {_LONGEST_DRAW}.")
        if (temperature is not None and not temperature > 0) or (most is not None and most < 1):
            raise ConfigError("router 'skills': 'temperature' is above 0 and 'most' at least 1.")
        self._fitted, model = _load(parts)
        rule = model.rule
        rule = replace(
            rule,
            score=rule.score if score is None else score,
            competence=rule.competence if competence is None else competence,
            temperature=rule.temperature if temperature is None else temperature,
            most=rule.most if most is None else most,
            floor=rule.floor if floor is None else floor,
        )
        self._model = replace(model, rule=rule)
        self._encoder = parts.encoder()
        check_encoder(self._fitted, self._encoder.name, self._encoder.width)
        self._columns = columns_of(self._fitted.expert_ids, list(parts.experts), names or {})
        self._asked = None if keywords is None else LlmKeywords(_expert(keywords, parts))
        self._known_KW: Array | None = None
        self._draw, self._recruits, self._trim, self._empty, self._seed = draw, recruits, trim, empty, seed

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        tags = await self._tags(requests)
        rated = self._model.rate(tags)
        shares = [self._among(row, own, pool) for row, own in zip(rated, tags, strict=True)]
        draws = self._draws(requests, shares)
        return [self._decide(own, share, drawn) for own, share, drawn in zip(tags, shares, draws, strict=True)]

    async def _tags(self, requests: Sequence[Request]) -> Array:
        """Q x K counts of the vocabulary's keywords."""
        if self._asked is not None:
            return np.stack(await asyncio.gather(*(self._asked_tags(r, self._asked) for r in requests)))
        vectors = await self._encoder.encode([r.question for r in requests])
        questions = Questions(vectors_QW=vectors, tasks=tuple(told_task(r) for r in requests))
        rule = self._model.rule
        return self._model.tagger.tag(questions, most=rule.most, floor=rule.floor)

    async def _asked_tags(self, request: Request, source: LlmKeywords) -> Array:
        names = self._model.tagger.names
        tags = np.zeros(len(names), np.float32)
        try:
            found = await source.of(request.question)
        except CollegiumError as exc:
            log.warning("no keywords for %s: %s", request.request_id, exc.message)
            found = []
        if found:
            if self._known_KW is None:
                self._known_KW = await self._encoder.encode(names)
            vectors = await self._encoder.encode(found)
            for place in nearest_known(vectors, self._known_KW, self._model.rule.floor):
                if place is not None:
                    tags[place] += 1
        return tags

    def _among(self, row: Array, tags: Array, pool: Sequence[ExpertSpec]) -> dict[str, float]:
        """Shares of the pool's experts, which sum to 1; one that was never profiled has none. By name, so that the
        order of the pool does not change a draw."""
        ids = sorted(s.expert_id for s in pool)
        if self._empty == "uniform" and not tags.any():
            return dict.fromkeys(ids, 1 / len(ids))
        own = {e: float(row[self._columns[e]]) if e in self._columns else 0.0 for e in ids}
        total = sum(own.values())
        return {e: s / total for e, s in own.items()} if total > 0 else dict.fromkeys(ids, 1 / len(ids))

    def _draws(self, requests: Sequence[Request], shares: Sequence[Mapping[str, float]]) -> list[tuple[str, ...]]:
        if self._draw == "top" and not self._trim:
            return [()] * len(requests)
        ids, repeat = list(shares[0]), self._draw == "with"
        rows = [self._places(r, np.array(list(s.values()))) for r, s in zip(requests, shares, strict=True)]
        if self._trim:
            # Beyond the recruits nobody is loaded, unless policy asks for more than it said.
            rng = np.random.default_rng(self._seed)
            rows = trim([row[: self._recruits] for row in rows], self._trim, rng, repeat=repeat)
        return [tuple(ids[e] for e in row) for row in rows]

    def _places(self, request: Request, share_E: Array) -> list[int]:
        if self._draw == "top":
            return [int(e) for e in np.argsort(-share_E, kind="stable")]
        seed = f"{request.metadata.get('route_seed', self._seed)}\0{request.question}".encode(errors="replace")
        rng = np.random.default_rng(int.from_bytes(blake2b(seed, digest_size=8).digest(), "little"))
        repeat = self._draw == "with"
        return draw(share_E, _LONGEST_DRAW if repeat else len(share_E), rng, repeat=repeat)

    def _decide(self, tags: Array, shares: Mapping[str, float], drawn: tuple[str, ...]) -> RouteDecision:
        names = self._model.tagger.names
        words = ", ".join(names[k] for k in tags.nonzero()[0]) or "no keyword"
        decision = decide(dict(shares), reason=f"keywords: {words}", router=self.name)
        return replace(decision, draws=drawn).top(1) if drawn else decision


def _load(parts: RouterParts) -> tuple[artefact.Fitted, Fitted]:
    if parts.artefact is None:
        raise ConfigError(
            "router 'skills' must be fitted first: collegium router fit skills --pool DIR --out DIR, then write "
            "'artefact: DIR' beside its name."
        )
    fitted = artefact.load(parts.artefact)
    if not isinstance(fitted.model, Fitted):
        raise ConfigError(f"{parts.artefact} holds a router '{fitted.name}', not 'skills'.")
    return fitted, fitted.model


def _expert(expert_id: str, parts: RouterParts) -> Expert:
    if expert_id not in parts.experts:
        raise ConfigError(f"router 'skills', keywords: no expert '{expert_id}'; known: {', '.join(parts.experts)}.")
    return parts.experts[expert_id]


def _one_of(what: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"router 'skills': '{what}' is one of {', '.join(known)}, not '{value}'.")
