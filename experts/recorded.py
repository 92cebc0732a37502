"""Replays a recorded pool: what an expert once answered to a question is what he answers again.

``model`` is the pool's folder; an expert's ``adapter`` (else its id) names the recorded expert. The question is found
by ``metadata["question_id"]``, else by its text, after which anything (its options, an instruction) may follow.
A question without an answer, and one that the pool does not have, is left to the next best expert; it is no fault of
the engine, so no breaker hears of it. Tokens are counted at 4 characters each.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from experts.errors import ConfigError, Unavailable
from experts.pools import RecordedAnswers, RecordedPool
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Request, Usage

PIECES = 4
"""Chunks that an answer is streamed in."""
CHARS_PER_TOKEN = 4


class RecordedEngine:
    """Reads the pool's index when it loads, an expert's answers when he is first asked; both in a thread."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.options:
            raise ConfigError(
                f"Engine '{spec.engine_id}': backend 'recorded' has no options, got {list(spec.options)}."
            )
        self.spec = spec
        self._folder = Path(spec.model).expanduser()
        self._pool: RecordedPool | None = None
        self._answers: dict[str, RecordedAnswers] = {}
        self._turn = asyncio.Lock()

    async def load(self) -> None:
        await self._open()

    async def unload(self) -> None:
        self._pool, self._answers = None, {}

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        recorded_id = expert.adapter or expert.expert_id
        pool = self._pool or await self._open()
        answers = self._answers.get(recorded_id) or await self._read(pool, recorded_id)
        question_id = request.metadata.get("question_id")
        question = pool.by_text(request.question) if question_id is None else pool.by_id(str(question_id))
        answer = None if question is None else answers.get(question)
        text = None if answer is None else answer.answer if answer.text is None else answer.text
        if answer is None or text is None:
            what = "no such question" if question is None else f"no answer of '{recorded_id}' to this question"
            raise Unavailable(
                f"Expert '{expert.expert_id}': {self.spec.model} has recorded {what}.", retry_after_s=None
            )
        whole, text = text, _stopped(text, request)
        chars = len(text) if answer.completion_chars is None or len(text) < len(whole) else answer.completion_chars
        for chunk in _play(text, expert.expert_id, request, int(chars)):
            yield chunk

    async def _open(self) -> RecordedPool:
        async with self._turn:
            if self._pool is None:
                self._pool = await asyncio.to_thread(RecordedPool, self._folder)
            return self._pool

    async def _read(self, pool: RecordedPool, recorded_id: str) -> RecordedAnswers:
        async with self._turn:
            if recorded_id not in self._answers:
                self._answers[recorded_id] = await asyncio.to_thread(pool.answers, recorded_id)
            return self._answers[recorded_id]


def _stopped(text: str, request: Request) -> str:
    """The answer up to the first of the request's stop sequences, as an engine would have ended it."""
    places = [place for stop in request.params.stop if stop and (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def _play(text: str, expert_id: str, request: Request, chars: int) -> Iterator[Chunk]:
    size = -(-len(text) // PIECES) or 1
    for index in range(request.params.n):
        for start in range(0, len(text), size):
            yield Chunk(expert_id=expert_id, text=text[start : start + size], index=index)
        yield Chunk(expert_id=expert_id, index=index, finish_reason="stop")
    asked = sum(len(m.content or "") for m in request.messages) + len(request.prompt or "")
    usage = Usage(prompt_tokens=_tokens(asked), completion_tokens=_tokens(chars) * request.params.n)
    yield Chunk(expert_id=expert_id, usage=usage)


def _tokens(chars: int) -> int:
    return -(-chars // CHARS_PER_TOKEN)
