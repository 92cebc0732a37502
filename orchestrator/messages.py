"""What stands in a body's messages and tools, in OpenAI's format; see openai.py."""

import json
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from experts.types import Message

T = TypeVar("T")


def _portable(value: dict[str, Any]) -> dict[str, Any]:
    """pydantic takes NaN and integers of any size in free JSON; what comes after cannot send them on."""
    try:
        orjson.dumps(value)
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise ValueError(f"not JSON as it can be sent on ({exc})") from exc
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_portable)]
# Bounded, and checked up to the first mistake only: a body of a million wrong items must not cost seconds.
Rows = Annotated[list[T], Field(max_length=16_384, fail_fast=True)]


class Wire(BaseModel):
    # Strict: "0.5" is no number. The example values of /docs come from json_schema_extra.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Wire):
    type: Literal["text"]
    text: str


class FunctionCall(Wire):
    name: str = Field(min_length=1)
    arguments: str


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolFunction(Wire):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: ToolFunction


_SENT_BACK = "Accepted, so that an assistant's reply can be sent back as the client dumps it; not read."


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Rows[TextPart] | None = None
    name: str | None = None
    tool_calls: Rows[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = Field(None, description="Read where there is no content.")
    annotations: list[Any] | None = Field(None, max_length=16_384, description=_SENT_BACK)
    audio: None = Field(None, description=_SENT_BACK)
    function_call: None = Field(None, description=_SENT_BACK)
    reasoning: str | None = Field(None, description=_SENT_BACK)
    reasoning_content: str | None = Field(None, description=_SENT_BACK)

    @model_validator(mode="after")
    def _complete(self) -> "ChatMessage":
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' needs tool_call_id")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message of role '{self.role}' needs content")
        return self

    def message(self) -> Message:
        content = "".join(p.text for p in self.content) if isinstance(self.content, list) else self.content
        return Message(
            role=self.role,
            content=self.refusal if content is None else content,
            name=self.name,
            tool_calls=tuple(c.model_dump() for c in self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
        )
