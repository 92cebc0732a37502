"""READ FIRST. One request's life: route, dispatch, run the experts, combine.

Everything here is made in build.py and handed in; nothing here knows HTTP, YAML or a backend.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from experts.base import Expert, collect_choices
from experts.errors import BadRequest, ConfigError, DeadlineExceeded
from experts.types import Chunk, ChunkStream, Completion, Request
from orchestrator.admission import Admission
from orchestrator.aggregators.base import consulted
from orchestrator.chains import affordable, calls_within, chains, combined_usd
from orchestrator.panel import ask_panel
from orchestrator.run import Ledger, Policy, Run
from routers.base import RouteDecision


class Orchestrator:
    """The service without its edges. ``experts`` are wrapped already (see resilience) and report to ``ledger``."""

    def __init__(
        self,
        *,
        experts: Mapping[str, Expert],
        admission: Admission,
        ledger: Ledger,
        hedge_after_s: float | None = None,
    ) -> None:
        self._experts = experts
        self._pool = [expert.spec for expert in experts.values()]
        self._admission = admission
        self._ledger = ledger
        self._hedge_after_s = hedge_after_s

    async def generate(self, run: Run) -> ChunkStream:
        """Answer ``run.request`` as ``run.policy`` says: chunks of the one answer that the caller is to see.

        Raises a CollegiumError. The caller keeps the deadline (see deadline()) and closes the iterator.
        """
        with self._ledger.watch(run):
            async with self._admission.place():
                run.decision = await self.route(run.request, run.policy)
                self._ledger.note_route(run)
                max_calls = self.max_calls(run.decision, run.request, run.policy)
                experts = chains(run.decision, self._experts, max_calls=max_calls, hedge_after_s=self._hedge_after_s)
                if len(experts) == 1:
                    async with aclosing(experts[0].generate(run.request)) as stream:
                        async for chunk in stream:
                            run.answer_usage = chunk.usage or run.answer_usage
                            yield chunk
                    return
                answers = await ask_panel(experts, run)
                answer = await run.policy.aggregator.aggregate(run.request, run.decision, answers)
                run.answer_usage, run.trace = answer.usage, answer.trace
                yield _as_chunk(answer)

    async def complete(self, run: Run) -> list[Completion]:
        """The whole answer, one Completion a choice, inside the deadline."""
        if run.request.stream:
            run.request = replace(run.request, stream=False)
        async with deadline(run.request):
            return await collect_choices(self.generate(run), run.request)

    async def route(self, request: Request, policy: Policy) -> RouteDecision:
        """Who is to be asked, by ``policy``'s router, its top_k and its budgets. Calls no expert."""
        (decision,) = await self.route_all([request], policy)
        return decision

    async def route_all(self, requests: Sequence[Request], policy: Policy) -> list[RouteDecision]:
        """Many requests at once, for routers that are faster so. Raises what is wrong with any of them."""
        started = time.perf_counter()
        pools: dict[tuple[str, ...], list[int]] = {}
        for i, request in enumerate(requests):
            within = affordable(self._pool, request, policy.max_usd)
            pools.setdefault(tuple(spec.expert_id for spec in within), []).append(i)
        decisions: dict[int, RouteDecision] = {}
        for expert_ids, places in pools.items():
            pool = [self._experts[e].spec for e in expert_ids]
            decisions |= zip(places, await policy.router.route([requests[i] for i in places], pool), strict=True)
        chosen = [self._choose(decisions[i], request, policy) for i, request in enumerate(requests)]
        route_ms = (time.perf_counter() - started) * 1e3 / max(1, len(requests))
        return [replace(decision, route_ms=route_ms) for decision in chosen]

    def max_calls(self, decision: RouteDecision, request: Request, policy: Policy) -> int:
        """How many experts may be asked altogether, spares included, besides those whom the aggregator consults."""
        consults = consulted(policy.aggregator, decision.expert_ids)
        return self._calls_within(decision, request, policy) - len(consults)

    def _choose(self, decision: RouteDecision, request: Request, policy: Policy) -> RouteDecision:
        if not decision.scores or decision.scores.keys() - self._experts.keys():
            raise ConfigError(f"Router '{decision.router}' chose among {sorted(decision.scores)}; fit it again.")
        top_k = 1 if policy.aggregator.takes_one else policy.top_k
        top_k = min(top_k, self._calls_within(decision, request, policy))
        top_k = self._combinable(decision, top_k, request, policy)
        if request.params.n > 1 and min(top_k, len(decision.scores)) > 1:
            raise BadRequest("n > 1 needs a policy that asks one expert; set collegium.top_k to 1.", param="n")
        return decision.top(top_k)

    def _calls_within(self, decision: RouteDecision, request: Request, policy: Policy) -> int:
        if policy.max_usd is None:
            return policy.max_calls
        ranked = (self._experts[e].spec for e in decision.ranked())
        return calls_within(ranked, request, max_calls=policy.max_calls, max_usd=policy.max_usd)

    def _combinable(self, decision: RouteDecision, top_k: int, request: Request, policy: Policy) -> int:
        """``top_k``, or less, so that what the aggregator asks itself is within the budgets too."""
        for k in range(top_k, 1, -1):
            asked = decision.top(k).expert_ids
            consults = consulted(policy.aggregator, asked)
            first, then = ([self._experts[e].spec for e in ids] for ids in (asked, consults))
            is_paid = policy.max_usd is None or combined_usd(first, then, request) <= policy.max_usd
            if is_paid and len(asked) + len(consults) <= policy.max_calls:
                return k
        return 1


class deadline:  # noqa: N801  # used as asyncio.timeout is
    """Ends the block when the request's deadline passes, with DeadlineExceeded.

    Belongs around the loop that consumes a stream, never inside a generator: a timeout must not span a yield.
    """

    __slots__ = ("_limit", "_request")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._limit = asyncio.timeout(request.expires_s - time.monotonic())

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    async def __aexit__(self, *failure: Any) -> None:
        try:
            await self._limit.__aexit__(*failure)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"The request took longer than its {self._request.deadline_s:g} s.") from exc


def _as_chunk(answer: Completion) -> Chunk:
    return Chunk(
        expert_id=answer.expert_id,
        text=answer.text,
        reasoning=answer.reasoning,
        refused=answer.refused,
        tool_calls=tuple({"index": i, **call} for i, call in enumerate(answer.tool_calls)),
        logprobs=answer.logprobs,
        finish_reason=answer.finish_reason,
        usage=answer.usage,
    )
