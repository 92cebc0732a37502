"""Every line checked and routed before any engine is asked. What is found is filed stretch by stretch: a batch that is
killed here goes on after the last one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from experts.errors import CollegiumError, ConfigError, NotFound
from experts.types import Request
from orchestrator.batches.lines import Asked, BadLine, Reader, custom_id, too_large
from orchestrator.batches.rows import Rows
from orchestrator.batches.source import Place, Source
from orchestrator.batches.store import Plan, Result
from orchestrator.build import Service
from orchestrator.openai import EmbeddingBody
from orchestrator.policies import SERVICE_MODEL
from orchestrator.replies import embeddings_body, to_json
from orchestrator.run import Policy
from routers.base import RouteDecision

STRETCH_LINES, STRETCH_BYTES = 512, 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line under way through this stage."""

    place: Place
    custom_id: str | None
    asked: Asked | None = None
    request: Request | None = None
    policy: Policy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Consecutive lines, planned. ``n`` and ``offset``: where they end."""

    n: int
    offset: int
    plans: list[Plan]
    settled: list[Result]
    claims: list[tuple[bytes, int]]
    ids: dict[int, str]


def stretches(source: Source, *, n: int, offset: int) -> Iterator[list[tuple[Place, bytes]]]:
    """The lines after line ``n``, in pieces that fit into memory."""
    piece: list[tuple[Place, bytes]] = []
    size = 0
    for place, raw in source.lines(n=n, offset=offset):
        piece.append((place, raw))
        size += len(raw)
        if len(piece) >= STRETCH_LINES or size >= STRETCH_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


class Planner:
    def __init__(self, service: Service, reader: Reader, rows: Rows) -> None:
        self._service = service
        self._reader = reader
        self._rows = rows

    async def plan(self, piece: Sequence[tuple[Place, bytes]]) -> Stretch:
        """Raises ConfigError for what no line is to blame for; a line's own mistakes become rows."""
        settled: list[Result] = []
        lines = [self._read(place, raw, settled) for place, raw in piece]
        ids = {line.place.n: line.custom_id for line in lines if line.custom_id is not None}
        plans = await self._route([line for line in lines if line.policy is not None], settled)
        await self._embed([line for line in lines if line.asked and line.policy is None], settled)
        last = piece[-1][0]
        return Stretch(
            n=last.n,
            offset=last.offset + last.size_bytes,
            plans=plans,
            settled=settled,
            claims=[(_digest(name), n) for n, name in ids.items()],
            ids=ids,
        )

    def twice(self, ids: Mapping[int, str], n: int) -> Result:
        """The row of a line whose custom_id an earlier one has. ``ids`` are by line."""
        name = ids[n]
        message = f"An earlier line has the custom_id '{name[:100]}'; each line needs its own."
        return self._rows.failure(n, name, BadLine("duplicate_custom_id", message))

    def _read(self, place: Place, raw: bytes, settled: list[Result]) -> Line:
        n, asked = place.n, None
        try:
            if place.too_large:
                raise too_large(self._service.config.limits.max_body_bytes)
            asked = self._reader.read(raw)
            if isinstance(asked.body, EmbeddingBody):
                return Line(place=place, custom_id=asked.custom_id, asked=asked)
            policy = self._reader.policy(asked)
            request = self._reader.request(asked, self._rows.request_id(n))
        except ConfigError:
            raise
        except CollegiumError as exc:
            name = asked.custom_id if asked else custom_id(raw)
            settled.append(self._rows.failure(n, name, exc))
            return Line(place=place, custom_id=name)
        return Line(place=place, custom_id=asked.custom_id, asked=asked, request=request, policy=policy)

    async def _route(self, lines: Sequence[Line], settled: list[Result]) -> list[Plan]:
        groups: dict[Policy, list[Line]] = {}
        for line in lines:
            assert line.policy is not None  # noqa: S101
            groups.setdefault(line.policy, []).append(line)
        plans = [plan for policy, group in groups.items() for plan in await self._route_by(policy, group, settled)]
        return sorted(plans, key=lambda p: p.place.n)

    async def _route_by(self, policy: Policy, lines: Sequence[Line], settled: list[Result]) -> list[Plan]:
        """All at once; one by one where one of them spoils it for the others."""
        requests = [line.request for line in lines if line.request is not None]
        try:
            decisions = await self._service.orchestrator.route_all(requests, policy)
        except ConfigError:
            raise
        except CollegiumError as exc:
            if len(lines) > 1:
                return [plan for line in lines for plan in await self._route_by(policy, [line], settled)]
            settled.append(self._rows.failure(lines[0].place.n, lines[0].custom_id, exc))
            return []
        return [self._planned(line, decision) for line, decision in zip(lines, decisions, strict=True)]

    def _planned(self, line: Line, decision: RouteDecision) -> Plan:
        experts = self._service.experts
        choices = tuple((experts[e].spec.engine_id, e) for e in decision.expert_ids)
        return Plan(place=line.place, decision=to_json(decision), choices=choices)

    async def _embed(self, lines: Sequence[Line], settled: list[Result]) -> None:
        """Embeddings need no engine: they are answered on the way."""
        for line in lines:
            n, name, body = line.place.n, line.custom_id, line.asked and line.asked.body
            assert isinstance(body, EmbeddingBody)  # noqa: S101
            assert name is not None  # noqa: S101
            try:
                settled.append(self._rows.answer(n, name, await self._embedding(body)))
            except ConfigError:
                raise
            except CollegiumError as exc:
                settled.append(self._rows.failure(n, name, exc))

    async def _embedding(self, body: EmbeddingBody) -> dict[str, object]:
        encoder = self._service.encoder()
        if body.model not in (SERVICE_MODEL, encoder.name):
            raise NotFound(f"No embedding model '{body.model}'; the encoder is '{encoder.name}'.", param="model")
        vectors: list[np.ndarray] = list(await encoder.encode(body.texts()))
        return embeddings_body(vectors, encoder.name, await encoder.count_tokens(body.texts()), body.encoding_format)


def _digest(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()
