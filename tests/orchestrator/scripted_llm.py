"""An engine for ray.serve.llm that needs no model: RAYLLM_VLLM_ENGINE_CLS names it, Ray's own way in for tests.

The question is a JSON object: ``wait_s`` before the first token, ``tokens`` (each says the replica's process id),
``token_s`` between them, ``gate`` (a file that has to exist before the second one), ``error`` (an HTTP status to refuse
with, and ``message``), ``crash`` (the method raises), ``note`` (a file that is written when the call is cancelled).
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any


class ScriptedEngine:
    def __init__(self, llm_config: Any) -> None:
        self.model = llm_config.model_id
        self.kwargs = llm_config.engine_kwargs

    async def start(self) -> None:
        """Nothing to start."""

    async def shutdown(self) -> None:
        """Nothing to end."""

    async def check_health(self) -> None:
        """Healthy while the process lives."""

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        yield _event({"choices": [{"index": 0, "text": f"{request.prompt}!", "finish_reason": "stop"}]})
        yield "data: [DONE]\n\n"

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        script = json.loads(request.messages[-1]["content"])
        if script.get("crash"):
            raise RuntimeError("scripted crash")
        if status := script.get("error"):
            yield _event({"error": {"message": script.get("message", "scripted"), "code": status}})
            return
        try:
            async for event in self._say(script):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            if note := script.get("note"):
                Path(note).write_text("cancelled")
            raise

    async def _say(self, script: dict[str, Any]) -> AsyncGenerator[str, None]:
        await asyncio.sleep(script.get("wait_s", 0))
        tokens = script.get("tokens", 1)
        for index in range(tokens):
            await asyncio.sleep(script.get("token_s", 0))
            while index and (gate := script.get("gate")) and not Path(gate).exists():
                await asyncio.sleep(0.02)
            finish = "stop" if index == tokens - 1 else None
            delta = {"content": f"{os.getpid()} "}
            yield _event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}})
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
