"""Answers in this process: the service without its edges, and only the engines that are asked."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from experts.base import Engine
from experts.types import ChunkStream, EngineSpec, ExpertSpec, Request
from orchestrator.aggregators.base import consulted
from orchestrator.build import Service, build_service, make_engine
from orchestrator.commands.question import Explanation, Question, View
from orchestrator.config import Config
from orchestrator.pipeline import deadline
from orchestrator.replies import explanation
from orchestrator.run import Policy, Run
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

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        await self.load()
        async with aclosing(self._inner.generate(request, expert)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def unload(self) -> None:
        await self._inner.unload()


class _Decided:
    """The Router that gives a decision made before."""

    def __init__(self, decision: RouteDecision) -> None:
        self.name = decision.router
        self._decision = decision

    async def route(self, requests: Sequence[Request], pool: Sequence[ExpertSpec]) -> list[RouteDecision]:
        return [self._decision for _ in requests]


async def ask(config: Config, question: Question, view: View) -> Explanation:
    """Stream the answer to ``view``. Raises a CollegiumError."""
    async with _service(config) as service:
        policy = service.policies.resolve(question.model, question.overrides)
        decision = await _decide(service, question, policy, view)
        shown = _shown(decision)
        view.routed(shown)
        await _load(service, [*decision.expert_ids, *consulted(policy.aggregator, decision.expert_ids)], view)
        run = Run(request=question.request(config), policy=replace(policy, router=_Decided(decision)))
        async with deadline(run.request), aclosing(service.orchestrator.generate(run)) as chunks:
            async for chunk in chunks:
                view.text(chunk.text)
        return {**explanation(run), "decision": shown}


async def route(config: Config, question: Question, view: View) -> Mapping[str, Any]:
    """The decision alone; no engine is loaded unless the router itself asks one."""
    async with _service(config) as service:
        policy = service.policies.resolve(question.model, question.overrides)
        return _shown(await _decide(service, question, policy, view))


async def _decide(service: Service, question: Question, policy: Policy, view: View) -> RouteDecision:
    """Another question goes first: it loads what the router needs, so that this one takes as long as in a running
    service, and none of it from a cache."""
    with view.waiting("Loading the router"):
        await service.orchestrator.route(replace(question, text="Hello?").request(service.config), policy)
    return await service.orchestrator.route(question.request(service.config), policy)


async def _load(service: Service, expert_ids: Sequence[str], view: View) -> None:
    """Before the deadline runs."""
    for engine_id in dict.fromkeys(service.experts[e].spec.engine_id for e in expert_ids):
        with view.waiting(f"Loading engine {engine_id}"):
            await service.engines[engine_id].load()


def _shown(decision: RouteDecision) -> Mapping[str, Any]:
    shown = {**asdict(decision), "route_ms": round(decision.route_ms, 3)}
    return shown if decision.draws else {key: value for key, value in shown.items() if key != "draws"}


@asynccontextmanager
async def _service(config: Config) -> AsyncIterator[Service]:
    service = build_service(config, make=_on_demand)
    try:
        yield service
    finally:
        await service.aclose()
        for engine in service.engines.values():
            await engine.unload()


def _on_demand(spec: EngineSpec) -> Engine:
    return OnDemand(make_engine(spec))
