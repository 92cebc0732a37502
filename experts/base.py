"""What an engine is, what an expert is, and how a stream becomes a whole answer."""

import operator
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from experts.errors import ExpertFailed
from experts.types import (
    JSON,
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
        """Give back what load() took. Safe on an engine that never loaded, and twice."""


class Expert(Protocol):
    """Who answers. Retries, fallback, timing and the rest are Experts that wrap an Expert."""

    spec: ExpertSpec

    def generate(self, request: Request) -> ChunkStream:
        """Stream the answer; raises a CollegiumError. Closing the iterator ends the generation."""

    async def aclose(self) -> None:
        """Give back what this expert alone holds; its engine belongs to the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a reward thinks of one answer; higher is better. Comparable among answers to one request only.
    ``parts`` says what it is made of: objectives, say, with what each counted for."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Reward(Protocol):
    """An expert that scores (request, answer) instead of answering."""

    name: str

    async def score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        """One score an answer, in their order, none of them NaN or infinite. Raises a CollegiumError."""


class EngineExpert:
    """An expert on an engine: puts its prompt, demonstrations and defaults around the request."""

    def __init__(self, spec: ExpertSpec, engine: Engine) -> None:
        self.spec = spec
        self.engine = engine
        pairs = [(Message(role="user", content=q), Message(role="assistant", content=a)) for q, a in spec.demos]
        self._demos = tuple(message for pair in pairs for message in pair)
        self._has_defaults = spec.defaults != SamplingParams()

    def generate(self, request: Request) -> ChunkStream:
        return self.engine.generate(self._prepare(request), self.spec)

    async def aclose(self) -> None:
        """Nothing of its own to give back."""

    def _prepare(self, request: Request) -> Request:
        params = merge_params(request.params, self.spec.defaults) if self._has_defaults else request.params
        if request.prompt is not None or not (self.spec.system_prompt or self._demos):
            return request if params is request.params else replace(request, params=params)
        return replace(request, messages=self._with_prompt(request.messages), params=params)

    def _with_prompt(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The expert's system prompt, then the caller's; demonstrations; the conversation."""
        start = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
        system = "\n\n".join(t for t in (self.spec.system_prompt, *(m.content for m in messages[:start])) if t)
        head = (Message(role="system", content=system),) if system else ()
        return head + self._demos + messages[start:]


_PARAMS = tuple(f.name for f in fields(SamplingParams) if f.name != "n")  # n is the caller's alone
_UNSET = (None, ())


def merge_params(asked: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """``asked`` with its unset fields taken from ``defaults``; ``asked`` itself when nothing changes. Zero is set."""
    taken = {
        name: value
        for name in _PARAMS
        if getattr(asked, name) in _UNSET and (value := getattr(defaults, name)) not in _UNSET
    }
    return replace(asked, **taken) if taken else asked


async def collect_choices(stream: ChunkStream, request: Request) -> list[Completion]:
    """Drain ``stream`` into one Completion per choice, in order of index.

    Raises ExpertFailed when the stream ends before a choice has its finish reason: half an answer is a failure.
    """
    started = time.monotonic()
    first: float | None = None
    parts: dict[int, list[Chunk]] = {}
    usage = Usage()
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            if first is None:
                first = time.monotonic()
            parts.setdefault(chunk.index, []).append(chunk)
            usage = chunk.usage or usage
    ended = time.monotonic()
    if first is None:
        raise ExpertFailed("The expert's stream ended without an answer.")
    return [_join(parts[index], request.request_id, usage, first - started, ended - started) for index in sorted(parts)]


async def collect(stream: ChunkStream, request: Request) -> Completion:
    """Drain ``stream`` into its first choice; see collect_choices()."""
    return (await collect_choices(stream, request))[0]


def _join(chunks: list[Chunk], request_id: str, usage: Usage, ttft_s: float, latency_s: float) -> Completion:
    expert_id = chunks[0].expert_id
    finish_reason = next((c.finish_reason for c in reversed(chunks) if c.finish_reason), None)
    if finish_reason is None:
        raise ExpertFailed(f"Expert '{expert_id}' hung up in the middle of its answer.")
    try:
        return Completion(
            request_id=request_id,
            expert_id=expert_id,
            text=well_formed("".join([c.text for c in chunks])),
            reasoning=well_formed("".join([c.reasoning for c in chunks])),
            refused=any(c.refused for c in chunks),
            index=chunks[0].index,
            tool_calls=_join_tool_calls(chunks),
            logprobs=_join_logprobs(chunks),
            finish_reason=finish_reason,
            usage=usage,
            ttft_s=ttft_s,
            latency_s=latency_s,
        )
    except (AttributeError, TypeError) as exc:
        raise ExpertFailed(f"Expert '{expert_id}' sent a malformed answer: {exc}.") from exc


def well_formed(text: str) -> str:
    """``text`` with a replacement character for each half of a surrogate pair that stands alone, as engines that cut
    between UTF-16 units leave them: no JSON and no tokenizer takes those. Two halves side by side become one character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(slots=True)
class _Call:
    """A tool call whose pieces are still coming."""

    call_id: str | None = None
    name: str = ""
    arguments: str = ""

    def add(self, delta: JSON) -> None:
        function: Mapping[str, Any] = delta.get("function") or {}
        self.call_id = self.call_id or delta.get("id")
        self.name += "" if self.name else function.get("name") or ""  # some servers repeat it in every piece
        self.arguments += function.get("arguments") or ""

    def whole(self) -> JSON:
        if not self.name:
            raise TypeError("a tool call without a function name")
        # Callers answer a call by its id, so one that came without gets one.
        call_id = self.call_id or f"call_{uuid.uuid4().hex[:24]}"
        return {"id": call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _join_tool_calls(chunks: list[Chunk]) -> tuple[JSON, ...]:
    """OpenAI streams a tool call as deltas that share an index; the arguments come in pieces."""
    calls: dict[int, _Call] = {}
    last = -1
    for delta in [delta for c in chunks if c.tool_calls for delta in c.tool_calls]:
        last = _index(delta, calls, last)
        calls.setdefault(last, _Call()).add(delta)
    return tuple(calls[index].whole() for index in sorted(calls))


def _index(delta: JSON, calls: Mapping[int, _Call], last: int) -> int:
    """Which call ``delta`` goes on with. Some servers send no index: there the id tells, and a delta without one goes
    on with the call before it."""
    index, call_id = delta.get("index"), delta.get("id")
    if index is not None:
        return operator.index(index)
    known = {call.call_id: i for i, call in calls.items()}
    if call_id is None and known:
        return last
    return known.get(call_id, max(calls, default=-1) + 1)


def _join_logprobs(chunks: list[Chunk]) -> JSON | None:
    """Lists are joined key by key: "content" and "refusal" of chats, "tokens", "token_logprobs" and so on of
    completions."""
    joined: dict[str, list[object]] = {}
    for logprobs in [c.logprobs for c in chunks if c.logprobs]:
        for key, entries in logprobs.items():
            if isinstance(entries, list | tuple):
                joined.setdefault(key, []).extend(entries)
    return joined or None
