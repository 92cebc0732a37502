"""The stub as an engine of ray.serve.llm (RAYLLM_VLLM_ENGINE_CLS names it), to measure the way from a gateway to an
engine's replica: its answers are the stub's, and come at once."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import orjson

from evals.gateway.stub import ANSWER_TOKENS, answer_pieces


class StubEngine:
    """What LLMServer needs of an engine."""

    def __init__(self, llm_config: Any) -> None:
        self.model = llm_config.model_id

    async def start(self) -> None: ...

    async def shutdown(self) -> None: ...

    async def check_health(self) -> None: ...

    def routing_stats(self) -> Mapping[str, Any]:
        return {}

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[str, None]:
        for piece in answer_pieces(request.messages[-1]["content"]):
            yield _event([{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
        yield _event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        yield _event([], {"prompt_tokens": 8, "completion_tokens": ANSWER_TOKENS})
        yield "data: [DONE]\n\n"


def _event(choices: list[dict[str, Any]], usage: Mapping[str, int] | None = None) -> str:
    return f"data: {orjson.dumps({'choices': choices, 'usage': usage}).decode()}\n\n"
