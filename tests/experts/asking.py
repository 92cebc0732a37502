"""How the tests on the real engine ask it, and look into it."""

import asyncio
from typing import Any

import psutil

from experts.base import collect
from experts.types import ChunkStream, Completion, ExpertSpec, Message, Request, SamplingParams
from experts.vllm import VllmEngine

PLAIN = ExpertSpec(expert_id="plain", engine_id="smol")
FRANCE = "What is the capital of France?"
STORY = "Write a long story about a lighthouse keeper and the sea."


def chat(text: str, *, temperature: float = 0.0, max_tokens: int = 24, **params: Any) -> Request:
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, **params)
    return Request(messages=(Message(role="user", content=text),), params=sampling)


async def ask(engine: VllmEngine, request: Request, expert: ExpertSpec = PLAIN) -> Completion:
    return await collect(engine.generate(request, expert), request)


async def drain(stream: ChunkStream) -> None:
    async for _ in stream:
        pass


async def has_work(engine: VllmEngine) -> bool:
    """Whether the scheduler, in the process below, still has a request."""
    server = await engine._running()
    return bool(await server.llm.engine_core.call_utility_async("has_work"))


async def drained(engine: VllmEngine) -> bool:
    for _ in range(40):
        if not await has_work(engine):
            return True
        await asyncio.sleep(0.05)
    return False


def engine_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
