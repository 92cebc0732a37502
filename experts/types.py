"""The words that every layer shares: requests, chunks, completions and the specs of engines and experts.

All are frozen, slotted, keyword-only dataclasses. pydantic lives only at the edges (HTTP and YAML).
"""

import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from experts.errors import BadRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
Priority = Literal["online", "batch"]
Backend = Literal["vllm", "serve", "openai", "recorded", "fake"]

JSON = Mapping[str, Any]
"""A JSON object that travels as it is: tool definitions, response formats, log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation. ``content`` is text; ``tool_calls`` and ``tool_call_id`` as in OpenAI's API."""

    role: Role
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[JSON, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample; vLLM's names. ``None`` leaves the choice to the expert's defaults, then to its engine."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    more: JSON | None = None
    """What only some engines know (top_k, reasoning_effort): sent on as it is, by its name in the body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question on its way through the service.

    Exactly one of ``messages`` (a chat) and ``prompt`` (text to continue as it stands) is set; BadRequest otherwise.
    ``stream`` says that the caller sees each chunk as it comes. Where he does not, an answer that breaks off can still
    be asked for again. ``priority``: a batch's requests make way for the others. ``arrival_s`` is on the monotonic
    clock; ``deadline_s`` counts from it.
    """

    request_id: str = field(default_factory=lambda: f"req_{secrets.token_hex(16)}")
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    params: SamplingParams = SamplingParams()
    tools: tuple[JSON, ...] = ()
    tool_choice: str | JSON | None = None
    response_format: JSON | None = None
    tenant: str | None = None
    metadata: JSON = field(default_factory=dict)
    stream: bool = True
    priority: Priority = "online"
    deadline_s: float = 120.0
    arrival_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise BadRequest("A request has either messages or a prompt: one of them, not both.", param="messages")

    @property
    def question(self) -> str:
        """The text that routers read: the prompt, or the last thing the user said."""
        if self.prompt is not None:
            return self.prompt
        return next((m.content or "" for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def expires_s(self) -> float:
        """When the deadline passes, on the monotonic clock."""
        return self.arrival_s + self.deadline_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(slots=True, kw_only=True)
class Chunk:
    """A piece of one streamed choice. Not frozen: one is made per token, and freezing doubles its cost.

    ``reasoning`` is what a reasoning model says before its answer, where its engine tells the two apart; ``refused``
    that the text is the model's refusal, where its engine says so.

    ``finish_reason`` ends choice ``index``: a stream without one for each of its request's ``n`` choices was cut.
    ``usage`` comes once, on the stream's last chunk, if the engine tells it at all. ``more`` says that the next chunk
    is there already, so that a writer may send both at once.
    """

    expert_id: str
    text: str = ""
    reasoning: str = ""
    refused: bool = False
    index: int = 0
    tool_calls: tuple[JSON, ...] = ()
    logprobs: JSON | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    more: bool = False


ChunkStream = AsyncGenerator[Chunk, None]
"""What an expert gives back: an iterator of chunks that can be closed, which ends the generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole answer of one expert. ``ttft_s`` and ``latency_s`` count from the start of the call; ``trace`` is an
    aggregator's account of how it came to this answer."""

    request_id: str
    expert_id: str
    text: str
    reasoning: str = ""
    refused: bool = False
    index: int = 0
    tool_calls: tuple[JSON, ...] = ()
    logprobs: JSON | None = None
    finish_reason: FinishReason = "stop"
    usage: Usage = Usage()
    ttft_s: float = 0.0
    latency_s: float = 0.0
    trace: JSON | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Weights that can be loaded, and how. ``options`` go to the backend as they are."""

    engine_id: str
    backend: Backend
    model: str
    options: JSON = field(default_factory=dict)
    memory_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """An engine plus an adapter, a prompt with demonstrations, or neither.

    ``demos`` are (question, answer) pairs shown before the user's turn; ``examples`` are questions
    this expert is good at, read by routers only.
    """

    expert_id: str
    engine_id: str
    adapter: str | None = None
    system_prompt: str | None = None
    demos: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()
    defaults: SamplingParams = SamplingParams()
    context_length: int | None = None
    usd_per_mtok_in: float = 0.0
    usd_per_mtok_out: float = 0.0
    tags: tuple[str, ...] = ()
    description: str = ""

    def usd(self, usage: Usage) -> float:
        """What ``usage`` costs at this expert's prices."""
        return (usage.prompt_tokens * self.usd_per_mtok_in + usage.completion_tokens * self.usd_per_mtok_out) / 1e6
