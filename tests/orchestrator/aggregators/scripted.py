"""Experts that answer what a function says, and the parts and answers that aggregators are tried with."""

import asyncio
from collections.abc import Callable, Sequence

from experts.errors import ExpertFailed
from experts.types import Chunk, ChunkStream, Completion, ExpertSpec, Message, Request
from orchestrator.aggregators.base import AggregatorParts
from routers.base import RouteDecision
from routers.static import WordLlama

QUESTION = "How far is the moon?"


class Scripted:
    """An Expert that says ``reply(prompt)`` and keeps what it was asked. None hangs; an exception is raised."""

    def __init__(self, expert_id: str, reply: Callable[[str], str | Exception | None]) -> None:
        self.spec = ExpertSpec(expert_id=expert_id, engine_id="e")
        self.requests: list[Request] = []
        self.running = 0
        self.most = 0
        self._reply = reply

    @property
    def prompts(self) -> list[str]:
        return [r.question for r in self.requests]

    async def generate(self, request: Request) -> ChunkStream:
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            reply = self._reply(request.question)
            if isinstance(reply, Exception):
                raise reply
            if reply is None:
                await asyncio.Event().wait()
            yield Chunk(expert_id=self.spec.expert_id, text=reply or "", finish_reason="stop")
        finally:
            self.running -= 1

    async def aclose(self) -> None:
        pass


def always(expert_id: str, text: str) -> Scripted:
    return Scripted(expert_id, lambda _: text)


def broken(expert_id: str) -> Scripted:
    return Scripted(expert_id, lambda _: ExpertFailed("as scripted"))


def parts(*experts: Scripted) -> AggregatorParts:
    return AggregatorParts(encoder=WordLlama, experts={e.spec.expert_id: e for e in experts})


def ask(question: str = QUESTION, **fields: object) -> Request:
    return Request(request_id="r", messages=(Message(role="user", content=question),), **fields)  # type: ignore[arg-type]


def decided(top_k: int | None = None, **scores: float) -> RouteDecision:
    decision = RouteDecision(expert_ids=(), weights=(), scores=scores, reason="", router="scripted")
    return decision.top(top_k or len(scores))


def said(**texts: str) -> list[Completion]:
    return [Completion(request_id="r", expert_id=e, text=t) for e, t in texts.items()]


def experts_of(answers: Sequence[dict[str, object]]) -> list[object]:
    return [answer["expert_id"] for answer in answers]
