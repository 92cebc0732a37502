"""Answers in this process: the service without its edges, and only the engines that are asked."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any

from experts.base import Engine
from experts.types import ChunkStream, EngineSpec, ExpertSpec
from orchestrator.build import Service, build_service, make_engine
from orchestrator.commands.question import Explanation, Question, View
from orchestrator.config import Config
from orchestrator.pipeline import deadline
from orchestrator.replies import explanation
from orchestrator.resilience import CallRecord
from orchestrator.run import Observer, Run
from routers.base import RouteDecision


class OnDemand:
    """An engine that loads when it is first asked, so that a pool of many costs the one that answers."""

    def __init__(self, inner: Engine) -> None:
        self.spec = inner.spec
        self._inner = inner
        self._loaded = False
        self._turn = asyncio.Lock()

    async def load(self) -> None:
        async with self._turn:
            if not self._loaded:
                await self._inner.load()
                self._loaded = True

    async def generate(self, request: Any, expert: ExpertSpec) -> ChunkStream:
        await self.load()
        async with aclosing(self._inner.generate(request, expert)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def unload(self) -> None:
        await self._inner.unload()


class _Routed:
    """The Observer that shows a decision as soon as it is made."""

    def __init__(self, view: View) -> None:
        self._view = view

    def routed(self, run: Run) -> None:
        self._view.routed(explanation(run)["decision"])

    def called(self, run: Run, call: CallRecord) -> None:
        """Told by the explanation."""

    def ended(self, run: Run) -> None:
        """Told by the explanation."""


async def ask(config: Config, question: Question, view: View) -> Explanation:
    """Stream the answer to ``view``. Raises a CollegiumError."""
    async with _service(config, [_Routed(view)]) as service:
        first = await _route(service, question, view)
        for engine_id in dict.fromkeys(service.experts[e].spec.engine_id for e in first.expert_ids):
            with view.waiting(f"Loading engine {engine_id}"):
                await service.engines[engine_id].load()
        policy = service.policies.resolve(question.model, question.overrides)
        run = Run(request=question.request(config), policy=policy)
        async with deadline(run.request), aclosing(service.orchestrator.generate(run)) as chunks:
            async for chunk in chunks:
                view.text(chunk.text)
        return explanation(run)


async def route(config: Config, question: Question, view: View) -> Mapping[str, Any]:
    """The decision alone; no engine is loaded unless the router itself asks one."""
    async with _service(config, []) as service:
        await _route(service, question, view)
        return asdict(await _route(service, question, view))


async def _route(service: Service, question: Question, view: View) -> RouteDecision:
    """The first pass loads what the router needs, so that the next one takes as long as in a running service."""
    policy = service.policies.resolve(question.model, question.overrides)
    with view.waiting("Choosing an expert"):
        return await service.orchestrator.route(question.request(service.config), policy)


@asynccontextmanager
async def _service(config: Config, observers: list[Observer]) -> AsyncIterator[Service]:
    service = build_service(config, observers=observers, make=_on_demand)
    try:
        yield service
    finally:
        for engine in service.engines.values():
            await engine.unload()


def _on_demand(spec: EngineSpec) -> Engine:
    return OnDemand(make_engine(spec))
