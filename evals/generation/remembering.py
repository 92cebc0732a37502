"""An engine that asks nothing twice: answers on disk are played back, and it loads only for one that is not there."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from evals.generation.answers import Answer, Answers, key_of
from experts.base import Engine, collect
from experts.errors import BadRequest
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, FinishReason, Request


class Remembering:
    """``on_call`` hears of each answer given: the request's id, and how many seconds the call took when it was made."""

    def __init__(self, inner: Engine, answers: Answers, on_call: Callable[[str, float], None]) -> None:
        self.spec: EngineSpec = inner.spec
        self.loads = 0
        self._inner = inner
        self._answers = answers
        self._on_call = on_call
        self._loaded = False
        self._turn = asyncio.Lock()

    async def load(self) -> None:
        """Nothing yet: perhaps every answer is there."""

    async def unload(self) -> None:
        async with self._turn:
            if self._loaded:
                self._loaded = False
                await self._inner.unload()

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        if request.params.n > 1 or request.params.logprobs is not None:
            raise BadRequest("An evaluation keeps one answer a call, without log-probabilities.")
        key = key_of(self.spec, expert, request)
        answer = self._answers.get(key) or await self._ask(key, request, expert)
        self._on_call(request.request_id, answer.seconds)
        yield Chunk(expert_id=expert.expert_id, text=answer.text)
        finish: FinishReason = "length" if answer.finish_reason == "length" else "stop"
        yield Chunk(expert_id=expert.expert_id, finish_reason=finish, usage=answer.usage)

    async def _ask(self, key: bytes, request: Request, expert: ExpertSpec) -> Answer:
        await self._ready()
        async with aclosing(self._inner.generate(request, expert)) as stream:
            answer = await collect(stream, request)
        self._answers.put(key, expert.expert_id, answer)
        return Answer(
            text=answer.text, finish_reason=answer.finish_reason, usage=answer.usage, seconds=answer.latency_s
        )

    async def _ready(self) -> None:
        async with self._turn:
            if not self._loaded:
                await self._inner.load()
                self._loaded, self.loads = True, self.loads + 1
