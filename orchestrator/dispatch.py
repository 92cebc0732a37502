"""From a decision to running experts: a place in the service, a chain of spares for each choice, all at once."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from experts.base import Expert, collect
from experts.errors import BadRequest, CollegiumError, QueueFull
from experts.types import Completion, ExpertSpec, Request
from orchestrator.resilience import Fallback, Hedged
from routers.base import RouteDecision


class Admission:
    """At most ``max_concurrency`` requests run, at most ``queue`` wait, first come first served; the rest get 503."""

    def __init__(self, *, max_concurrency: int, queue: int) -> None:
        self._free = max_concurrency
        self._queue = queue
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        await self._enter()
        try:
            yield
        finally:
            self._leave()

    async def _enter(self) -> None:
        if self._free > 0:
            self._free -= 1
            return
        if len(self._waiting) >= self._queue:
            raise QueueFull(f"All places are taken and {self._queue} requests wait; try again in a moment.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # the place was handed over in the moment of leaving
            else:
                self._waiting.remove(turn)
            raise

    def _leave(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def chains(
    decision: RouteDecision, experts: Mapping[str, Expert], *, max_calls: int, hedge_after_s: float | None
) -> list[Expert]:
    """One Expert for each choice of ``decision``, backed by the next best candidates: at most ``max_calls`` are asked
    altogether. A hedged choice takes the first spare."""
    ranked = decision.ranked()
    chosen = list(decision.expert_ids)
    spares = iter([experts[e] for e in ranked if e not in chosen][: max(0, max_calls - len(chosen))])
    rows: list[Expert] = []
    for expert_id in chosen:
        first = experts[expert_id]
        if hedge_after_s is not None and (second := next(spares, None)) is not None:
            first = Hedged(first, second, after_s=hedge_after_s)
        rows.append(Fallback(first, spares))
    return rows


async def ask_all(experts: Sequence[Expert], request: Request) -> list[Completion]:
    """Every expert at once; the answers in the experts' order, less those that failed.

    Raises the first expert's failure when all fail.
    """
    tasks = [asyncio.create_task(collect(expert.generate(request), request)) for expert in experts]
    try:
        results = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, CollegiumError):
            raise result
    answers = [r for r in results if isinstance(r, Completion)]
    if not answers:
        raise next(r for r in results if isinstance(r, CollegiumError))
    return answers


def affordable(pool: Sequence[ExpertSpec], request: Request, max_usd: float | None) -> list[ExpertSpec]:
    """The experts whose dearest possible answer to ``request`` stays within ``max_usd``.

    The prompt is counted at 4 characters a token, the answer at max_tokens (256 where the request sets none).
    """
    if max_usd is None:
        return list(pool)
    characters = sum(len(m.content or "") for m in request.messages) + len(request.prompt or "")
    prompt_tokens, completion_tokens = characters / 4, request.params.max_tokens or 256
    usd = {
        s.expert_id: (prompt_tokens * s.usd_per_mtok_in + completion_tokens * s.usd_per_mtok_out) / 1e6 for s in pool
    }
    within = [s for s in pool if usd[s.expert_id] <= max_usd]
    if not within:
        raise BadRequest(
            f"No expert can answer for {max_usd:g} USD; the cheapest may need {min(usd.values()):.2g}. "
            "Raise collegium.max_usd or lower max_tokens.",
            param="collegium.max_usd",
        )
    return within
