"""A vLLM engine in this process: its scheduler and its model run in a process below, on CPUs or GPUs.

Requests go through vLLM's own OpenAI server classes, so that chat templates, tools, JSON schemas, log-probabilities
and the wording of refusals are vLLM's. vllm_options.py says which options there are, vllm_start.py starts vLLM,
vllm_server.py talks to it.
"""

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from experts.errors import ExpertFailed
from experts.types import ChunkStream, EngineSpec, ExpertSpec, Request
from experts.vllm_start import start
from experts.wire import read_event

if TYPE_CHECKING:
    from experts.vllm_server import Server


class VllmEngine:
    """load() takes 10 to 20 s on two cores. Where the engine's process died, the next call starts it again."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._server: asyncio.Task[Server] | None = None
        self._ran = False

    async def load(self) -> None:
        await self._running()

    async def unload(self) -> None:
        server, self._server, self._ran = self._server, None, False
        if server is None:
            return
        await asyncio.wait([server])
        if not _failed(server):
            await server.result().aclose()

    async def sleep(self, level: int) -> bool:
        """Give the GPU's memory back without ending (vLLM's sleep mode). Level 1 keeps the weights in the machine's
        memory, level 2 reads them again from the disk. False: it cannot, and has to be unloaded.

        No calls may be under way.
        """
        server = self._server
        if server is None or not server.done() or _failed(server) or server.result().dead:
            return False
        return await server.result().sleep(level)

    async def wake(self) -> None:
        """Ready again. Raises ExpertFailed; the engine has ended then, and load() starts it anew."""
        server = await self._running()
        try:
            await server.wake()
        except BaseException as exc:
            await self.unload()  # it must not be taken for ready
            if isinstance(exc, Exception):
                raise ExpertFailed(f"Engine '{self.spec.engine_id}' did not wake up: {exc}") from exc
            raise

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        if self._server is None or (_failed(self._server) and not self._ran):
            raise ExpertFailed(
                f"Expert '{expert.expert_id}': its engine '{self.spec.engine_id}' is not loaded.", retryable=False
            )
        server = await self._running()
        try:
            async with aclosing(server.events(request, expert)) as events:
                async for event in events:
                    for chunk in read_event(event, expert):
                        yield chunk
        except ExpertFailed as exc:
            if server.dead:
                raise ExpertFailed(
                    f"Expert '{expert.expert_id}': the process of its engine '{self.spec.engine_id}' has ended. Asked "
                    "again, it starts anew."
                ) from exc
            raise

    async def _running(self) -> "Server":
        """The server; a new one where there is none, where it did not start, or where its process died.

        Shielded: many callers may wait for one start, and one that goes away must not end it for the others.
        """
        last = self._server
        if last is None or (last.done() and (_failed(last) or last.result().dead)):
            self._server = asyncio.create_task(self._start(last))
        assert self._server is not None  # noqa: S101
        return await asyncio.shield(self._server)

    async def _start(self, last: "asyncio.Task[Server] | None") -> "Server":
        if last is not None and not _failed(last):
            await last.result().aclose()
        server = await start(self.spec)
        self._ran = True
        return server


def _failed(server: "asyncio.Task[Server]") -> bool:
    return server.done() and (server.cancelled() or server.exception() is not None)
