"""The scripted engine: text, delays, failures and load time by option. Ships in the package; the tests stand on it.

Options (all optional): ``text`` ("{expert_id}", "{question}" and "{adapter}" are filled in), ``chunks`` (pieces the
text is cut into), ``load_s``, ``unload_s``, ``ttft_s``, ``chunk_s``, ``context_length`` (in words), ``tool_calls``,
``usage`` (false: the engine does not tell it), and ``fail``: a list with one entry for each call in turn, the last one
repeated: "ok", "error" (before the first chunk), "cut" (after it), "drop" (the stream just ends after it), "hang",
"refuse" (not retryable). An entry "load" is no call: it makes every load() fail. ``fail_load`` is such a list for the
loads in turn: "ok", "error", "hang", "memory".

``prefill_tps`` and ``decode_tps`` make time a matter of tokens (words): read, and written for each call. ``kv_tokens``
is how many of them calls under way may have together; a call that does not fit waits for those before it.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from experts.errors import ConfigError, ContextLengthExceeded, ExpertFailed
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Request, Usage

OUTCOMES = ("ok", "error", "cut", "drop", "hang", "refuse", "load")
LOADS = ("ok", "error", "hang", "memory")
SPEEDS = ("load_s", "unload_s", "prefill_tps", "decode_tps", "kv_tokens")
OPTIONS = (
    *("text", "chunks", "ttft_s", "chunk_s", "context_length", "tool_calls", "usage", "fail", "fail_load"),
    *SPEEDS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """How fast a simulated engine is: seconds to load and unload, tokens a second read, and written for each call;
    ``kv_tokens`` is how many tokens its calls may have altogether."""

    load_s: float = 0.0
    unload_s: float = 0.0
    prefill_tps: float = math.inf
    decode_tps: float = math.inf
    kv_tokens: float = math.inf
    memory_gib: float = 0.0

    def run_s(self, prompt_tokens: int, answer_tokens: int) -> float:
        """How long a call takes once it has its KV cache."""
        return prompt_tokens / self.prefill_tps + answer_tokens / self.decode_tps


class FakeEngine:
    """``calls`` counts calls begun, ``running`` those under way, ``cancelled`` those that were closed or cancelled;
    ``tries`` counts loads begun."""

    def __init__(self, spec: EngineSpec) -> None:
        _check(f"Engine '{spec.engine_id}': unknown option", spec.options, OPTIONS)
        _check(f"Engine '{spec.engine_id}': unknown outcome", spec.options.get("fail", ()), OUTCOMES)
        _check(f"Engine '{spec.engine_id}': unknown outcome", spec.options.get("fail_load", ()), LOADS)
        self.spec = spec
        self.speeds = Speeds(**{name: spec.options[name] for name in SPEEDS if name in spec.options})
        self.calls = 0
        self.tries = 0
        self.running = 0
        self.cancelled = 0
        self.loaded = False
        self._gone = False
        self._cache = _Cache(self.speeds.kv_tokens)
        self._loads = list(spec.options.get("fail_load", ())) or ["ok"]
        self._script = [outcome for outcome in spec.options.get("fail", ()) if outcome != "load"] or ["ok"]

    async def load(self) -> None:
        outcome = self._loads[min(self.tries, len(self._loads) - 1)]
        self.tries += 1
        await asyncio.sleep(self.speeds.load_s)
        if outcome == "hang":
            await asyncio.Event().wait()
        if outcome == "memory":
            raise MemoryError("as scripted")
        if outcome == "error":
            self._gone = True
            raise ExpertFailed(f"Engine '{self.spec.engine_id}' failed to load this time, as scripted.")
        if "load" in self.spec.options.get("fail", ()):
            self._gone = True
            raise ExpertFailed(f"Engine '{self.spec.engine_id}' failed to load, as scripted.", retryable=False)
        self.loaded, self._gone = True, False

    async def unload(self) -> None:
        if self.loaded:
            await asyncio.sleep(self.speeds.unload_s)
        self.loaded, self._gone = False, True

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        """Answers without load() too, for tests that need no life cycle; not after unload() or a load that failed."""
        if self._gone:
            raise ExpertFailed(f"Engine '{self.spec.engine_id}' is not loaded.", retryable=False)
        outcome = self._script[min(self.calls, len(self._script) - 1)]
        self.calls += 1
        self.running += 1
        try:
            prompt_tokens = self._count(request, expert.expert_id)
            text = _fill(str(self.spec.options.get("text", "{expert_id} heard: {question}")), request, expert)
            room = self._cache.room(prompt_tokens + len(text.split()) * request.params.n)
            async with room, aclosing(self._play(request, expert, outcome, text, prompt_tokens)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _play(
        self, request: Request, expert: ExpertSpec, outcome: str, text: str, prompt_tokens: int
    ) -> ChunkStream:
        options, expert_id = self.spec.options, expert.expert_id
        await self._begin(outcome, expert_id)
        await _pass(self.speeds.run_s(prompt_tokens, 0))
        tool_calls = tuple(options.get("tool_calls", ()))
        for index in range(request.params.n):
            for piece in _pieces(text, options.get("chunks", 1)):
                yield Chunk(expert_id=expert_id, text=piece, index=index)
                if outcome == "cut":
                    raise ExpertFailed(f"Expert '{expert_id}' was cut off, as scripted.")
                if outcome == "drop":
                    return
                await _pass(options.get("chunk_s", 0.0) + self.speeds.run_s(0, len(piece.split())))
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


class _Cache:
    """Room for ``tokens``, first come first served. A call that alone is larger than all of it gets it for itself."""

    def __init__(self, tokens: float) -> None:
        self._tokens = tokens
        self._free = tokens
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def room(self, tokens: float) -> AsyncIterator[None]:
        if math.isinf(self._tokens):
            yield
            return
        tokens = min(tokens, self._tokens)
        async with self._turn:
            while self._free < tokens:
                self._freed.clear()
                await self._freed.wait()
            self._free -= tokens
        try:
            yield
        finally:
            self._free += tokens
            self._freed.set()


async def _pass(seconds: float) -> None:
    if seconds:
        await asyncio.sleep(seconds)


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
