"""The scripted engine: text, delays, failures and load time by option. Ships in the package; the tests stand on it.

Options (all optional): ``text`` ("{expert_id}", "{question}" and "{adapter}" are filled in), ``chunks`` (pieces the
text is cut into), ``load_s``, ``ttft_s``, ``chunk_s``, ``context_length`` (in words), ``tool_calls``, ``usage`` (false:
the engine does not tell it), and ``fail``: a list with one entry for each call in turn, the last one repeated: "ok",
"error" (before the first chunk), "cut" (after it), "drop" (the stream just ends after it), "hang", "refuse" (not
retryable). An entry "load" is no call: it makes every load() fail.
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import aclosing

from experts.errors import ConfigError, ContextLengthExceeded, ExpertFailed
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Request, Usage

OUTCOMES = ("ok", "error", "cut", "drop", "hang", "refuse", "load")
OPTIONS = ("text", "chunks", "load_s", "ttft_s", "chunk_s", "context_length", "tool_calls", "usage", "fail")


class FakeEngine:
    """``calls`` counts calls begun, ``running`` those under way, ``cancelled`` those that were closed or cancelled."""

    def __init__(self, spec: EngineSpec) -> None:
        _check(f"Engine '{spec.engine_id}': unknown option", spec.options, OPTIONS)
        _check(f"Engine '{spec.engine_id}': unknown outcome", spec.options.get("fail", ()), OUTCOMES)
        self.spec = spec
        self.calls = 0
        self.running = 0
        self.cancelled = 0
        self.loaded = False
        self._gone = False
        self._script = [outcome for outcome in spec.options.get("fail", ()) if outcome != "load"] or ["ok"]

    async def load(self) -> None:
        await asyncio.sleep(self.spec.options.get("load_s", 0.0))
        if "load" in self.spec.options.get("fail", ()):
            self._gone = True
            raise ExpertFailed(f"Engine '{self.spec.engine_id}' failed to load, as scripted.", retryable=False)
        self.loaded, self._gone = True, False

    async def unload(self) -> None:
        self.loaded, self._gone = False, True

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        """Answers without load() too, for tests that need no life cycle; not after unload() or a load that failed."""
        if self._gone:
            raise ExpertFailed(f"Engine '{self.spec.engine_id}' is not loaded.", retryable=False)
        outcome = self._script[min(self.calls, len(self._script) - 1)]
        self.calls += 1
        self.running += 1
        try:
            async with aclosing(self._play(request, expert, outcome)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _play(self, request: Request, expert: ExpertSpec, outcome: str) -> ChunkStream:
        options, expert_id = self.spec.options, expert.expert_id
        prompt_tokens = self._count(request, expert_id)
        await self._begin(outcome, expert_id)
        text = _fill(str(options.get("text", "{expert_id} heard: {question}")), request, expert)
        tool_calls = tuple(options.get("tool_calls", ()))
        for index in range(request.params.n):
            for piece in _pieces(text, options.get("chunks", 1)):
                yield Chunk(expert_id=expert_id, text=piece, index=index)
                if outcome == "cut":
                    raise ExpertFailed(f"Expert '{expert_id}' was cut off, as scripted.")
                if outcome == "drop":
                    return
                if chunk_s := options.get("chunk_s", 0.0):
                    await asyncio.sleep(chunk_s)
            if tool_calls:
                yield Chunk(expert_id=expert_id, index=index, tool_calls=tool_calls)
            yield Chunk(expert_id=expert_id, index=index, finish_reason="tool_calls" if tool_calls else "stop")
        if options.get("usage", True):
            written = len(text.split()) * request.params.n
            yield Chunk(expert_id=expert_id, usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=written))

    async def _begin(self, outcome: str, expert_id: str) -> None:
        if ttft_s := self.spec.options.get("ttft_s", 0.0):
            await asyncio.sleep(ttft_s)
        if outcome == "hang":
            await asyncio.Event().wait()
        if outcome in ("error", "refuse"):
            raise ExpertFailed(f"Expert '{expert_id}' failed, as scripted.", retryable=outcome == "error")

    def _count(self, request: Request, expert_id: str) -> int:
        words = sum(len((m.content or "").split()) for m in request.messages) + len((request.prompt or "").split())
        limit = self.spec.options.get("context_length")
        if limit is not None and words > limit:
            raise ContextLengthExceeded(prompt_tokens=words, context_length=limit, expert_id=expert_id)
        return words


def _check(what: str, words: object, known: tuple[str, ...]) -> None:
    unknown = sorted(set(words) - set(known)) if isinstance(words, list | tuple | dict) else [words]
    if unknown:
        raise ConfigError(f"{what} {unknown}; use {', '.join(known)}.")


def _fill(template: str, request: Request, expert: ExpertSpec) -> str:
    """Not str.format: a question may hold braces of its own."""
    values = {"expert_id": expert.expert_id, "question": request.question, "adapter": str(expert.adapter)}
    return re.sub(r"\{(expert_id|question|adapter)\}", lambda m: values[m[1]], template)


def _pieces(text: str, count: int) -> Iterator[str]:
    size = max(1, -(-len(text) // count))
    return (text[i : i + size] for i in range(0, len(text), size))
