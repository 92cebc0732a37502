"""OpenAI's HTTP format, outbound: completions, chunks, errors and explanations as dictionaries."""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from experts.base import well_formed
from experts.errors import CollegiumError
from experts.types import Chunk, Completion, Usage
from orchestrator.run import Run

JsonObject = dict[str, Any]


def to_json(body: Any) -> bytes:
    """NaN becomes null, what JSON does not know (an aggregator's trace may hold anything) its text, and half a
    surrogate pair a replacement character."""
    try:
        return orjson.dumps(body, default=str, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        return orjson.dumps(_mended(body), default=_text, option=orjson.OPT_SERIALIZE_NUMPY)


def _mended(value: Any) -> Any:
    match value:
        case str():
            return well_formed(value)
        case dict():
            return {_mended(key): _mended(item) for key, item in value.items()}
        case list() | tuple():
            return [_mended(item) for item in value]
    return value


def _text(value: Any) -> str:
    return well_formed(str(value))


def error_body(exc: CollegiumError) -> JsonObject:
    """OpenAI's error object."""
    return {"error": {"message": exc.message, "type": exc.kind, "param": exc.param, "code": exc.code}}


def usage_body(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def answer_body(
    run: Run, completions: Sequence[Completion], form: "Format", *, created: int, explain: bool
) -> JsonObject:
    """A whole answer, one choice a completion."""
    body = {
        "id": run.request.request_id,
        "object": form.whole,
        "created": created,
        "model": completions[0].expert_id,
        "choices": [form.choice(c) for c in completions],
        "usage": usage_body(run.usage),
    }
    return {**body, "collegium": explanation(run)} if explain else body


def embeddings_body(vectors: Iterable[Any], model: str, tokens: int, encoding: str | None) -> JsonObject:
    return {
        "object": "list",
        "model": model,
        "data": [{"object": "embedding", "index": i, "embedding": _code(v, encoding)} for i, v in enumerate(vectors)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _code(vector: Any, encoding: str | None) -> Any:
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()


def explanation(run: Run) -> JsonObject:
    """The reply's ``collegium`` key, and what /v1/decisions gives back."""
    decision = run.decision
    return {
        "request_id": run.request.request_id,
        "policy": run.policy.name,
        "aggregator": run.policy.aggregator.name,
        "decision": decision
        and {
            "expert_ids": decision.expert_ids,
            "weights": decision.weights,
            "scores": dict(decision.scores),
            "reason": decision.reason,
            "router": decision.router,
            "route_ms": round(decision.route_ms, 3),
        },
        "calls": [
            {
                "expert_id": call.expert_id,
                "usage": usage_body(call.usage),
                "usd": call.usd,
                "ttft_ms": None if call.ttft_s is None else round(call.ttft_s * 1e3, 3),
                "latency_ms": round(call.latency_s * 1e3, 3),
                "error": call.error,
            }
            for call in run.calls
        ],
        "unanswered": [{"expert_id": e, "reason": reason} for e, reason in run.unanswered.items()],
        "usage": usage_body(run.usage),
        "answer_usage": usage_body(run.answer_usage),
        "usd": run.usd,
        "trace": run.trace,
        "error": run.error,
        "latency_ms": round(run.latency_s * 1e3, 3),
    }


class ChatFormat:
    """chat.completion and chat.completion.chunk objects of one run."""

    whole, piece = "chat.completion", "chat.completion.chunk"

    @staticmethod
    def choice(completion: Completion) -> JsonObject:
        message: JsonObject = {"role": "assistant", "content": completion.text or None, "refusal": None}
        if completion.tool_calls:
            message["tool_calls"] = completion.tool_calls
        elif completion.refused:
            message |= {"content": None, "refusal": completion.text}
        else:
            message["content"] = completion.text
        if completion.reasoning:
            message["reasoning_content"] = completion.reasoning
        return {
            "index": completion.index,
            "message": message,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }

    @staticmethod
    def delta(chunk: Chunk, *, first: bool) -> JsonObject:
        delta: JsonObject = {"role": "assistant"} if first else {}
        if chunk.refused:
            delta["refusal"] = chunk.text
        elif chunk.text or first:
            delta["content"] = chunk.text
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if chunk.tool_calls:
            delta["tool_calls"] = chunk.tool_calls
        return {
            "index": chunk.index,
            "delta": delta,
            "logprobs": chunk.logprobs,
            "finish_reason": chunk.finish_reason,
        }


class CompletionFormat:
    """text_completion objects of one run."""

    whole = piece = "text_completion"

    @staticmethod
    def choice(completion: Completion) -> JsonObject:
        return {
            "index": completion.index,
            "text": completion.text,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }

    @staticmethod
    def delta(chunk: Chunk, *, first: bool) -> JsonObject:
        return {
            "index": chunk.index,
            "text": chunk.text,
            "logprobs": chunk.logprobs,
            "finish_reason": chunk.finish_reason,
        }


Format = type[ChatFormat] | type[CompletionFormat]
