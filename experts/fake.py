"""The scripted engine: text, delays, failures and load time by option. Ships in the package; the tests stand on it.

Options (all optional): ``text`` ("{expert_id}", "{question}" and "{adapter}" are filled in), ``chunks`` (pieces the
text is cut into), ``load_s``, ``ttft_s``, ``chunk_s``, ``context_length`` (in words), ``tool_calls``, and ``fail``: a
list with one entry for each call in turn, the last one repeated: "ok", "error" (before the first chunk), "cut" (after
it), "hang", "refuse" (not retryable), "load" (loading fails).
"""

import asyncio
from collections.abc import Iterator

from experts.errors import ConfigError, ContextLengthExceeded, ExpertFailed
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Request, Usage

OUTCOMES = ("ok", "error", "cut", "hang", "refuse", "load")


class FakeEngine:
    def __init__(self, spec: EngineSpec) -> None:
        unknown = set(spec.options.get("fail", ())) - set(OUTCOMES)
        if unknown:
            raise ConfigError(f"Engine '{spec.engine_id}': unknown outcome {sorted(unknown)}; use {OUTCOMES}.")
        self.spec = spec
        self.calls = 0
        self.running = 0
        self.cancelled = 0
        self.loaded = False

    async def load(self) -> None:
        await asyncio.sleep(self.spec.options.get("load_s", 0.0))
        if "load" in self.spec.options.get("fail", ()):
            raise ExpertFailed(f"Engine '{self.spec.engine_id}' failed to load, as scripted.", retryable=False)
        self.loaded = True

    async def unload(self) -> None:
        self.loaded = False

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        outcome = self._next_outcome()
        self.running += 1
        try:
            async for chunk in self._play(request, expert, outcome):
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _next_outcome(self) -> str:
        script = self.spec.options.get("fail") or ("ok",)
        outcome: str = script[min(self.calls, len(script) - 1)]
        self.calls += 1
        return outcome

    async def _play(self, request: Request, expert: ExpertSpec, outcome: str) -> ChunkStream:
        options, expert_id = self.spec.options, expert.expert_id
        prompt_tokens = self._count(request, expert_id)
        if ttft_s := options.get("ttft_s", 0.0):
            await asyncio.sleep(ttft_s)
        if outcome == "hang":
            await asyncio.Event().wait()
        if outcome in ("error", "refuse"):
            raise ExpertFailed(f"Expert '{expert_id}' failed, as scripted.", retryable=outcome == "error")
        text = str(options.get("text", "{expert_id} heard: {question}"))
        for key, value in (("expert_id", expert_id), ("question", request.question), ("adapter", expert.adapter)):
            text = text.replace("{" + key + "}", str(value))
        for index in range(request.params.n):
            for piece in _pieces(text, options.get("chunks", 1)):
                yield Chunk(expert_id=expert_id, text=piece, index=index)
                if outcome == "cut":
                    raise ExpertFailed(f"Expert '{expert_id}' was cut off, as scripted.")
                if chunk_s := options.get("chunk_s", 0.0):
                    await asyncio.sleep(chunk_s)
            tool_calls = tuple(options.get("tool_calls", ()))
            if tool_calls:
                yield Chunk(expert_id=expert_id, index=index, tool_calls=tool_calls)
            yield Chunk(expert_id=expert_id, index=index, finish_reason="tool_calls" if tool_calls else "stop")
        written = len(text.split()) * request.params.n
        yield Chunk(expert_id=expert_id, usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=written))

    def _count(self, request: Request, expert_id: str) -> int:
        words = sum(len((m.content or "").split()) for m in request.messages) + len((request.prompt or "").split())
        limit = self.spec.options.get("context_length")
        if limit is not None and words > limit:
            raise ContextLengthExceeded(prompt_tokens=words, context_length=limit, expert_id=expert_id)
        return words


def _pieces(text: str, count: int) -> Iterator[str]:
    size = max(1, -(-len(text) // count))
    return (text[i : i + size] for i in range(0, len(text), size))
