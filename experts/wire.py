"""OpenAI's wire format, as spoken by endpoints, by vLLM's own server classes and by ray.serve.llm: one translation
for the three backends that meet it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from experts.errors import BadRequest, CollegiumError, ContextLengthExceeded, ExpertFailed
from experts.types import Chunk, ExpertSpec, FinishReason, Message, Request, Usage

_FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


def request_body(request: Request, model: str) -> dict[str, Any]:
    """The body of a streamed /chat/completions, or of /completions when ``request`` has a prompt, less what is unset."""
    params, chat = request.params, request.prompt is None
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop": list(params.stop) or None,
        "n": params.n if params.n > 1 else None,
        "logprobs": params.logprobs if not chat else None if params.logprobs is None else True,
    }
    if chat:
        body["messages"] = [_message(m) for m in request.messages]
        body["top_logprobs"] = params.logprobs
        body["tools"] = list(request.tools) or None
        body["tool_choice"] = request.tool_choice
        body["response_format"] = request.response_format
    else:
        body["prompt"] = request.prompt
    return {key: value for key, value in body.items() if value is not None}


def _message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        body["name"] = message.name
    if message.tool_calls:
        body["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    return body


def read_event(event: Mapping[str, Any], expert: ExpertSpec) -> Iterator[Chunk]:
    """The chunks in one streamed event: one a choice that says something, one for the usage.

    Raises the error that the event carries, if it carries one.
    """
    if "error" in event:
        error = event["error"]
        raise read_error(_status(error), event, expert)
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else delta.get("content")
        tool_calls = delta.get("tool_calls") if delta else None
        reason = choice.get("finish_reason")
        if text or tool_calls or reason:
            yield Chunk(
                expert_id=expert.expert_id,
                text=text or "",
                index=choice.get("index", 0),
                tool_calls=tuple(tool_calls) if tool_calls else (),
                logprobs=choice.get("logprobs"),
                finish_reason=_FINISH.get(reason, "stop") if reason else None,
            )
    if usage := event.get("usage"):
        yield Chunk(
            expert_id=expert.expert_id,
            usage=Usage(
                prompt_tokens=usage.get("prompt_tokens") or 0, completion_tokens=usage.get("completion_tokens") or 0
            ),
        )


def read_error(status: int, body: object, expert: ExpertSpec, retry_after_s: float | None = None) -> CollegiumError:
    """What an upstream's refusal means here.

    A prompt that is too long and a bad request are the caller's; all else is the expert's failure, retryable where it
    may pass (408, 409, 429 and 5xx). The upstream's words about our key are kept from the caller.
    """
    message = _error_message(body)
    if status in (401, 403):
        return ExpertFailed(
            f"Expert '{expert.expert_id}': its endpoint refused our key (HTTP {status}); check api_key_env.",
            retryable=False,
            upstream_status=status,
        )
    if status in (400, 413, 422):
        lengths = _context_lengths(message)
        if lengths is not None:
            return ContextLengthExceeded(
                prompt_tokens=lengths[1], context_length=lengths[0], expert_id=expert.expert_id
            )
        return BadRequest(f"Expert '{expert.expert_id}' refused the request: {message}")
    return ExpertFailed(
        f"Expert '{expert.expert_id}' failed (HTTP {status}): {message}",
        retryable=status in (408, 409, 429) or status >= 500,
        upstream_status=status,
        retry_after_s=retry_after_s or 1.0,
    )


def _status(error: object) -> int:
    code = error.get("code") if isinstance(error, Mapping) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _error_message(body: object) -> str:
    error = body.get("error", body) if isinstance(body, Mapping) else body
    message = error.get("message", error) if isinstance(error, Mapping) else error
    return str(message)[:500]


# vLLM: "maximum context length is 64 tokens ... your prompt contains at least 80 input tokens" and variants;
# OpenAI: "maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens".
_LIMIT = re.compile(r"maximum (?:context|model) length(?: is| of) (\d{1,9})", re.IGNORECASE)
_COUNT = re.compile(r"(?:contains|resulted in|requested|has|length of)(?: at least)? (\d{1,9})", re.IGNORECASE)


def _context_lengths(message: str) -> tuple[int, int] | None:
    """(context length, prompt tokens) when ``message`` says that the prompt is too long."""
    limit, count = _LIMIT.search(message), _COUNT.search(message)
    return (int(limit[1]), int(count[1])) if limit and count else None
