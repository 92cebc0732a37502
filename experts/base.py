"""What an engine is, what an expert is, and how a stream becomes a whole answer."""

import time
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Protocol

from experts.errors import ExpertFailed
from experts.types import (
    Chunk,
    ChunkStream,
    Completion,
    EngineSpec,
    ExpertSpec,
    Message,
    Request,
    SamplingParams,
    Usage,
)


class Engine(Protocol):
    """Loaded weights, or an endpoint that has them. One file in this folder implements it for each backend."""

    spec: EngineSpec

    async def load(self) -> None:
        """Make the engine ready. Raises ExpertFailed or ConfigError; safe to call again after a failure."""

    def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        """Stream the answer. Closing the iterator ends the generation in the engine."""

    async def unload(self) -> None:
        """Give back what load() took. Safe on an engine that never loaded."""


class Expert(Protocol):
    """Who answers. Retries, fallback, timing and the rest are Experts that wrap an Expert."""

    spec: ExpertSpec

    def generate(self, request: Request) -> ChunkStream:
        """Stream the answer; raises a CollegiumError. Closing the iterator ends the generation."""

    async def aclose(self) -> None:
        """Give back what this expert alone holds; its engine belongs to the pool."""


class EngineExpert:
    """An expert on an engine: puts its prompt, demonstrations and defaults around the request."""

    def __init__(self, spec: ExpertSpec, engine: Engine) -> None:
        self.spec = spec
        self.engine = engine
        pairs = [(Message(role="user", content=q), Message(role="assistant", content=a)) for q, a in spec.demos]
        self._demos = tuple(message for pair in pairs for message in pair)

    def generate(self, request: Request) -> ChunkStream:
        return self.engine.generate(self._prepare(request), self.spec)

    async def aclose(self) -> None:
        """Nothing of its own to give back."""

    def _prepare(self, request: Request) -> Request:
        params = merge_params(request.params, self.spec.defaults)
        if request.prompt is not None or not (self.spec.system_prompt or self._demos):
            return request if params is request.params else replace(request, params=params)
        return replace(request, messages=self._with_prompt(request.messages), params=params)

    def _with_prompt(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The expert's system prompt, then the caller's; demonstrations; the conversation."""
        start = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
        system = "\n\n".join(t for t in (self.spec.system_prompt, *(m.content for m in messages[:start])) if t)
        head = (Message(role="system", content=system),) if system else ()
        return head + self._demos + messages[start:]


def merge_params(asked: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """``asked`` with its unset fields taken from ``defaults``; ``asked`` itself when nothing changes."""
    if defaults == _NO_DEFAULTS:
        return asked
    unset = {f.name for f in fields(asked) if getattr(asked, f.name) in (None, ())}
    return replace(asked, **{name: getattr(defaults, name) for name in unset})


_NO_DEFAULTS = SamplingParams()


async def collect_choices(stream: ChunkStream, request: Request) -> list[Completion]:
    """Drain ``stream`` into one Completion per choice, in order of index.

    Raises ExpertFailed when the stream ends before a choice has its finish reason: half an answer is a failure.
    """
    started = time.monotonic()
    first = None
    parts: dict[int, list[Chunk]] = {}
    usage = Usage()
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            first = first or time.monotonic()
            parts.setdefault(chunk.index, []).append(chunk)
            usage = chunk.usage or usage
    ended = time.monotonic()
    if not parts:
        raise ExpertFailed("The expert's stream ended without an answer.")
    return [
        _join(parts[index], request.request_id, usage, (first or ended) - started, ended - started)
        for index in sorted(parts)
    ]


async def collect(stream: ChunkStream, request: Request) -> Completion:
    """Drain ``stream`` into its first choice; see collect_choices()."""
    return (await collect_choices(stream, request))[0]


def _join(chunks: list[Chunk], request_id: str, usage: Usage, ttft_s: float, latency_s: float) -> Completion:
    finish_reason = next((c.finish_reason for c in reversed(chunks) if c.finish_reason), None)
    if finish_reason is None:
        raise ExpertFailed(f"Expert '{chunks[0].expert_id}' hung up in the middle of its answer.")
    return Completion(
        request_id=request_id,
        expert_id=chunks[0].expert_id,
        text="".join(c.text for c in chunks),
        index=chunks[0].index,
        tool_calls=_join_tool_calls(chunks),
        logprobs=_join_logprobs(chunks),
        finish_reason=finish_reason,
        usage=usage,
        ttft_s=ttft_s,
        latency_s=latency_s,
    )


def _join_tool_calls(chunks: list[Chunk]) -> tuple[dict[str, object], ...]:
    """OpenAI streams a tool call as deltas that share an index; the arguments come in pieces."""
    calls: dict[int, dict[str, object]] = {}
    for delta in (d for c in chunks for d in c.tool_calls):
        call = calls.setdefault(delta.get("index", 0), {"id": None, "type": "function", "name": "", "arguments": ""})
        function = delta.get("function") or {}
        call["id"] = delta.get("id") or call["id"]
        call["name"] = function.get("name") or call["name"]
        call["arguments"] = f"{call['arguments']}{function.get('arguments') or ''}"
    return tuple(
        {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
        for _, c in sorted(calls.items())
    )


def _join_logprobs(chunks: list[Chunk]) -> dict[str, list[object]] | None:
    content = [entry for c in chunks if c.logprobs for entry in c.logprobs.get("content") or ()]
    return {"content": content} if content else None
