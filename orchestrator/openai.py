"""OpenAI's HTTP format, inbound: pydantic models of the bodies, turned into a Request at once. See also replies.py."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from experts.errors import BadRequest
from experts.types import Request, SamplingParams
from orchestrator.config import Limits
from orchestrator.messages import ChatMessage, JsonObject, Rows, Tool, Wire
from orchestrator.policies import Overrides

Text = Annotated[str, Field(min_length=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Extension(Wire):
    """The body's ``collegium`` key: what this request wants otherwise than its policy says."""

    router: str | None = None
    top_k: Annotated[int, Field(ge=1, le=64)] | None = None
    aggregator: str | None = None
    max_calls: Annotated[int, Field(ge=1, le=64)] | None = None
    max_usd: Annotated[float, Field(gt=0)] | None = None
    seed: Seed | None = None
    explain: bool = False

    def overrides(self) -> Overrides:
        return Overrides(**self.model_dump(exclude={"seed", "explain"}))


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool | None = None


_NOT_READ = "Accepted for compatibility; not read."
_SENT_ON = "Sent on as it is; whether the expert's engine knows it is its own business."
_MORE = frozenset(
    (
        *("top_k", "min_p", "repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("reasoning_effort", "verbosity", "chat_template_kwargs"),
    )
)
"""Keys of a body that are sent on."""


class Body(Wire):
    """What /chat/completions and /completions share."""

    model: str = Field(min_length=1, max_length=200, description="'collegium', 'collegium/<policy>' or an expert.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: str | None = Field(None, description=_NOT_READ)
    service_tier: str | None = Field(None, description=_NOT_READ)
    safety_identifier: str | None = Field(None, description=_NOT_READ)
    prompt_cache_key: str | None = Field(None, description=_NOT_READ)
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description=_SENT_ON)
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description=_SENT_ON)
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description=_SENT_ON)
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = Field(None, description=_SENT_ON)
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description=_SENT_ON)
    ignore_eos: bool | None = Field(None, description=_SENT_ON)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = Field(None, description=_SENT_ON)
    collegium: Extension | None = None

    def params(self, limits: Limits, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise BadRequest(f"max_tokens is {max_tokens}, the limit {limits.max_tokens}.", param="max_tokens")
        if self.n is not None and self.n > limits.max_n:
            raise BadRequest(f"n is {self.n}, the limit {limits.max_n}.", param="n")
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            seed=self.seed,
            n=self.n or 1,
            logprobs=logprobs,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            more=self._more(),
        )

    def _more(self) -> JsonObject | None:
        given = self.model_fields_set & _MORE
        return {key: value for key in given if (value := getattr(self, key)) is not None} if given else None

    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class JsonSchemaFormat(Wire):
    name: str
    description: str | None = None
    json_schema: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must stand with type 'json_schema', and only there")
        return self


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Body):
    """POST /v1/chat/completions"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "collegium", "messages": [{"role": "user", "content": "What is 17 * 23?"}]},
                {
                    "model": "collegium",
                    "messages": [{"role": "user", "content": "What is 17 * 23?"}],
                    "stream": True,
                    "collegium": {"router": "random", "seed": 7, "explain": True},
                },
            ]
        }
    )

    messages: Rows[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Rows[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description=_NOT_READ)
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description=_SENT_ON
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description=_SENT_ON)
    chat_template_kwargs: JsonObject | None = Field(None, description=_SENT_ON)
    metadata: dict[str, str] | None = None
    store: bool | None = Field(None, description="Accepted for compatibility; nothing is stored.")

    def request(self, limits: Limits, tenant: str | None) -> Request:
        if len(self.messages) > limits.max_messages:
            raise BadRequest(f"{len(self.messages)} messages, the limit is {limits.max_messages}.", param="messages")
        messages = tuple(m.message() for m in self.messages)
        if not any((m.content or "").strip() or m.tool_calls for m in messages):
            raise BadRequest("The messages say nothing.", param="messages")
        logprobs = (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None
        return Request(
            messages=messages,
            params=self.params(limits, max_tokens=self.max_completion_tokens or self.max_tokens, logprobs=logprobs),
            tools=tuple(t.model_dump(exclude_none=True) for t in self.tools or ()),
            tool_choice=self.tool_choice.model_dump() if isinstance(self.tool_choice, NamedTool) else self.tool_choice,
            response_format=None
            if self.response_format is None
            else self.response_format.model_dump(exclude_none=True, by_alias=True),
            tenant=tenant,
            metadata=_metadata(self.collegium, self.metadata),
            stream=bool(self.stream),
            deadline_s=limits.deadline_s,
        )


class CompletionBody(Body):
    """POST /v1/completions"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "collegium", "prompt": "The capital of France is", "max_tokens": 8}]}
    )

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def request(self, limits: Limits, tenant: str | None) -> Request:
        return Request(
            prompt=self.prompt if isinstance(self.prompt, str) else self.prompt[0],
            params=self.params(limits, max_tokens=self.max_tokens, logprobs=self.logprobs),
            tenant=tenant,
            metadata=_metadata(self.collegium, None),
            stream=bool(self.stream),
            deadline_s=limits.deadline_s,
        )


class RouteBody(Wire):
    """POST /v1/route"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "collegium", "messages": [{"role": "user", "content": "Translate 'bread'."}]}]
        }
    )

    model: str = Field("collegium", min_length=1, max_length=200)
    messages: Rows[ChatMessage] = Field(min_length=1)
    metadata: dict[str, str] | None = Field(None, description="As of the question itself; 'task' is read by routers.")
    collegium: Extension | None = None

    def request(self, limits: Limits, tenant: str | None) -> Request:
        body = ChatBody(model=self.model, messages=self.messages, metadata=self.metadata, collegium=self.collegium)
        return body.request(limits, tenant)


class EmbeddingBody(Wire):
    """POST /v1/embeddings"""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "collegium", "input": ["one", "two"]}]})

    model: str = Field(min_length=1, max_length=200, description="'collegium' or the encoder's own name.")
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


def _metadata(extension: Extension | None, metadata: Mapping[str, str] | None) -> JsonObject:
    seed = extension.seed if extension else None
    return {**(metadata or {}), **({} if seed is None else {"route_seed": seed})}
