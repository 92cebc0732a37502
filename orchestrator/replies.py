"""OpenAI's HTTP format, outbound: completions, chunks, errors and explanations as dictionaries."""

from typing import Any

import orjson

from experts.errors import CollegiumError
from experts.types import Chunk, Completion, Usage
from orchestrator.run import Run

JsonObject = dict[str, Any]


def to_json(body: Any) -> bytes:
    """NaN becomes null, and what JSON does not know (an aggregator's trace may hold anything) its text."""
    return orjson.dumps(body, default=str, option=orjson.OPT_SERIALIZE_NUMPY)


def error_body(exc: CollegiumError) -> JsonObject:
    """OpenAI's error object."""
    return {"error": {"message": exc.message, "type": exc.kind, "param": exc.param, "code": exc.code}}


def usage_body(usage: Usage) -> JsonObject:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


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
        else:
            message["content"] = completion.text
        return {
            "index": completion.index,
            "message": message,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }

    @staticmethod
    def delta(chunk: Chunk, *, first: bool) -> JsonObject:
        delta: JsonObject = {"role": "assistant"} if first else {}
        if chunk.text or first:
            delta["content"] = chunk.text
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
