"""The other end of an HTTP exchange: reads its body, watches it, and ends what nobody waits for any more."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.types import Message, Receive, Send

from experts.errors import BadRequest, TooLarge

log = logging.getLogger(__name__)

LOOK_AFTER_S = 0.05
"""Most answers of a fast upstream are out before: only a longer one is worth the task that watches its client."""


DISCARD_BYTES = 64 * 2**20
DISCARD_S = 0.5


class SlowBody(BadRequest):
    """The connection is closed after it: half a body may still come."""


async def read_body(http: HttpRequest, *, max_bytes: int, within_s: float) -> bytes:
    """Raises TooLarge past ``max_bytes``, before the rest is read; SlowBody when the body does not come in time;
    BadRequest when it does not say that it is JSON, which keeps other sites' forms and scripts out of a browser."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest("The body must be JSON and say so: send the header 'content-type: application/json'.")
    parts, body = http.stream(), None
    if _declared(http) <= max_bytes:
        try:
            async with asyncio.timeout(within_s):
                body = await _take(parts, max_bytes)
        except TimeoutError as exc:
            raise SlowBody(f"The body did not arrive within {within_s:g} s.") from exc
    if body is None:
        await _discard(http, parts)
        raise TooLarge(f"The body is larger than {max_bytes} bytes.")
    return body


async def stream_body(http: HttpRequest, *, max_bytes: int, stall_s: float) -> AsyncGenerator[bytes, None]:
    """A body of any kind, piece by piece. Raises TooLarge past ``max_bytes``, SlowBody where nothing comes for so
    long."""
    parts, size = http.stream(), 0
    fits = _declared(http) <= max_bytes
    while fits:
        try:
            async with asyncio.timeout(stall_s):
                part = await anext(parts, None)
        except TimeoutError as exc:
            raise SlowBody(f"The body stopped for {stall_s:g} s.") from exc
        if part is None:
            return
        size += len(part)
        fits = size <= max_bytes
        if fits:
            yield part
    await _discard(http, parts)
    raise TooLarge(f"The body is larger than {max_bytes} bytes.")


async def _take(parts: AsyncIterator[bytes], max_bytes: int) -> bytes | None:
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > max_bytes:
            return None
    return bytes(body)


async def _discard(http: HttpRequest, parts: AsyncIterator[bytes]) -> None:
    """Where the connection is to be closed, take some of what is left: closed on unread bytes, it would be reset, and
    the client would lose our reply with it."""
    left = DISCARD_BYTES if http.headers.get("connection", "").lower() == "close" else 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while left > 0 and (part := await anext(parts, None)) is not None:
                left -= len(part)


def _declared(http: HttpRequest) -> float:
    length = http.headers.get("content-length", "0")
    if not length.isdecimal():
        return 0
    return int(length) if len(length) < 20 else float("inf")


class ClientGone(Exception):
    """The client went away or reads nothing; there is nobody left to answer."""


class Stopped(Exception):
    """The service ends; the client is still there to be told."""


class Client:
    """The other end. While attended, the block is ended with ClientGone when the client leaves or stalls, and with
    Stopped when the server cancels it."""

    def __init__(self, receive: Receive, send: Send, *, stall_s: float) -> None:
        self._receive = receive
        self._send = send
        self._stall_s = stall_s
        self._sending_since: float | None = None
        self._gone = False
        self._watch: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        self._sending_since = time.monotonic()
        try:
            await self._send(message)
        except OSError as exc:  # what ASGI asks of servers; uvicorn says nothing
            raise ClientGone from exc
        self._sending_since = None

    @contextmanager
    def attended(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a coroutine always runs in one
        look = asyncio.get_running_loop().call_later(LOOK_AFTER_S, self._look, task)
        try:
            yield
        except asyncio.CancelledError:
            task.uncancel()
            raise ClientGone if self._gone else Stopped from None
        finally:
            look.cancel()
            if self._watch is not None:
                self._watch.cancel()

    def _look(self, task: asyncio.Task[Any]) -> None:
        self._watch = asyncio.create_task(self._await_end(task))

    async def _await_end(self, task: asyncio.Task[Any]) -> None:
        while not self._stalled():
            try:
                async with asyncio.timeout(self._stall_s):
                    message = await self._receive()
            except TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                break
        else:
            log.info("a client reads nothing; its request was ended")
        self._gone = True
        task.cancel()

    def _stalled(self) -> bool:
        since = self._sending_since
        return since is not None and time.monotonic() - since >= self._stall_s
