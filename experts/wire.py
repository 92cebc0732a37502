"""OpenAI's wire format, as spoken by endpoints, by vLLM's own server classes and by ray.serve.llm: one translation
for the three backends that meet it."""

import re
from collections.abc import Mapping
from typing import Any

from experts.errors import BadRequest, CollegiumError, ContextLengthExceeded, ExpertFailed
from experts.types import Chunk, ExpertSpec, FinishReason, Message, Request, Usage

_FINISH: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}
_BROKEN = ("error", "abort")
"""What vLLM, and endpoints that resell others', say of an answer that was cut."""


def request_body(request: Request, model: str) -> dict[str, Any]:
    """The body of a streamed /chat/completions, or of /completions where there is a prompt, less what is unset."""
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
    body = {key: value for key, value in body.items() if value is not None}
    return {**params.more, **body} if params.more else body


def _message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        body["name"] = message.name
    if message.tool_calls:
        body["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    return body


def read_event(event: Mapping[str, Any], expert: ExpertSpec) -> list[Chunk]:
    """The chunks in one streamed event, or in an answer that came whole: one a choice that says something, one for
    the usage.

    Raises the error that the event carries, if it carries one, and ExpertFailed for what is not OpenAI's format.
    """
    try:
        if event.get("error") or event.get("object") == "error":
            raise read_error(_status(event.get("error") or event), event, expert)
        choices = event.get("choices") or ()
        chunks = [chunk for choice in choices if (chunk := _read_choice(choice, expert.expert_id)) is not None]
        if usage := event.get("usage"):
            chunks.append(Chunk(expert_id=expert.expert_id, usage=_read_usage(usage)))
    except (AttributeError, LookupError, TypeError, ValueError) as exc:
        raise ExpertFailed(
            f"Expert '{expert.expert_id}' sent what is not OpenAI's format ({exc}); see its engine's base_url."
        ) from exc
    return chunks


def _read_choice(choice: Mapping[str, Any], expert_id: str) -> Chunk | None:
    said = choice.get("delta") or choice.get("message") or choice
    told = said.get("content") or said.get("text")
    text = told or said.get("refusal")
    tool_calls = said.get("tool_calls")
    reasoning = said.get("reasoning_content") or said.get("reasoning")
    reason = choice.get("finish_reason")
    if not (text or tool_calls or reason or reasoning):
        return None
    if text and not isinstance(text, str):
        raise TypeError(f"content of type {type(text).__name__}")
    if reason in _BROKEN:
        raise ExpertFailed(f"Expert '{expert_id}' broke off its answer (finish_reason '{reason}').")
    return Chunk(
        expert_id=expert_id,
        text=text or "",
        reasoning=reasoning if isinstance(reasoning, str) else "",
        refused=bool(text) and not told,
        index=choice.get("index") or 0,
        tool_calls=_tool_calls(tool_calls, whole="message" in choice) if tool_calls else (),
        logprobs=choice.get("logprobs"),
        finish_reason=_FINISH.get(reason, "stop") if reason else None,
    )


def _tool_calls(tool_calls: list[Any], *, whole: bool) -> tuple[Any, ...]:
    """As deltas. The calls of a whole message have no index: they stand in order."""
    return tuple({"index": i, **call} for i, call in enumerate(tool_calls)) if whole else tuple(tool_calls)


def _read_usage(usage: Mapping[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=int(usage.get("prompt_tokens") or 0), completion_tokens=int(usage.get("completion_tokens") or 0)
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
        retry_after_s=retry_after_s,
    )


def _status(error: object) -> int:
    code = error.get("code") if isinstance(error, Mapping) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _error_message(body: object) -> str:
    error = body.get("error", body) if isinstance(body, Mapping) else body
    message = error.get("message", error) if isinstance(error, Mapping) else error
    text = " ".join(str(message or "").split())
    if text.startswith("<"):
        title = _TITLE.search(text)
        text = f"a web page, '{title[1].strip()}'" if title else "a web page"
    return text[:500] or "no reason given"


_TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)

# vLLM: "maximum context length is 64 tokens ... your prompt contains at least 80 input tokens" and variants;
# OpenAI: "maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens".
_LIMIT = re.compile(r"maximum (?:context|model) length(?: is| of) (\d{1,9})", re.IGNORECASE)
_COUNT = re.compile(r"(?:contains|resulted in|has|length of)(?: at least)? (\d{1,9})", re.IGNORECASE)
# "you requested 5000 tokens (4000 in your messages, 1000 in the completion)": the fallback, as the total of both.
_TOTAL = re.compile(r"requested (\d{1,9}) tokens", re.IGNORECASE)


def _context_lengths(message: str) -> tuple[int, int] | None:
    """(context length, prompt tokens) when ``message`` says that the prompt is too long."""
    limit, count = _LIMIT.search(message), _COUNT.search(message) or _TOTAL.search(message)
    return (int(limit[1]), int(count[1])) if limit and count else None
