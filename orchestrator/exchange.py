"""One HTTP exchange: read a bounded body, watch the client, send the answer whole or as events."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from experts.errors import BadRequest, CollegiumError, TooLarge
from experts.types import Chunk
from orchestrator.pipeline import Orchestrator, deadline
from orchestrator.replies import Format, error_body, explanation, usage_body
from orchestrator.run import Run

DONE = b"data: [DONE]\n\n"


class JSONReply(Response):
    """orjson, which also turns the NaN of a stray score into null instead of a body that is no JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def error_reply(exc: CollegiumError, request_id: str | None = None) -> JSONReply:
    headers = {} if request_id is None else {"x-collegium-decision": request_id}
    if exc.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(exc.retry_after_s)))
    if exc.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONReply(error_body(exc), status_code=exc.status, headers=headers)


async def read_body(http: HttpRequest, *, max_bytes: int, within_s: float) -> bytes:
    """Raises TooLarge past ``max_bytes``, before the rest is read; BadRequest when the body does not come in time."""
    too_large = TooLarge(f"The body is larger than {max_bytes} bytes.")
    if int(http.headers.get("content-length") or 0) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            async for part in http.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as exc:
        raise BadRequest(f"The body did not arrive within {within_s:g} s.") from exc
    return bytes(body)


class ClientGone(Exception):
    """The client went away or reads nothing; there is nobody left to answer."""


class Client:
    """The other end. While attended, the block is ended with ClientGone as soon as the client leaves or stalls."""

    def __init__(self, receive: Receive, send: Send, *, stall_s: float) -> None:
        self._receive = receive
        self._send = send
        self._stall_s = stall_s
        self._sending_since: float | None = None
        self._gone = False

    async def send(self, message: Message) -> None:
        self._sending_since = time.monotonic()
        await self._send(message)
        self._sending_since = None

    @asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a coroutine always runs in one
        watch = asyncio.create_task(self._watch(task))
        try:
            yield
        except asyncio.CancelledError:
            # Ours only if nobody else, a timeout or a shutdown, has cancelled the task too.
            if self._gone and task.uncancel() == 0:
                raise ClientGone from None
            raise
        finally:
            watch.cancel()

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        while not self._stalled():
            try:
                async with asyncio.timeout(self._stall_s):
                    message = await self._receive()
            except TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                break
        self._gone = True
        task.cancel()

    def _stalled(self) -> bool:
        since = self._sending_since
        return since is not None and time.monotonic() - since >= self._stall_s


class WholeAnswer(Response):
    """The answer in one JSON object."""

    background = None  # FastAPI looks

    def __init__(self, orchestrator: Orchestrator, run: Run, form: Format, *, explain: bool, stall_s: float) -> None:
        self._orchestrator = orchestrator
        self._run = run
        self._form = form
        self._explain = explain
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(receive, send, stall_s=self._stall_s)
        try:
            async with client.attended():
                reply = await self._reply()
                await reply(scope, receive, client.send)
        except ClientGone:
            return

    async def _reply(self) -> JSONReply:
        run, request_id = self._run, self._run.request.request_id
        try:
            completions = await self._orchestrator.complete(run)
        except CollegiumError as exc:
            return error_reply(exc, request_id)
        body = {
            "id": request_id,
            "object": self._form.whole,
            "created": int(time.time()),
            "model": completions[0].expert_id,
            "choices": [self._form.choice(c) for c in completions],
            "usage": usage_body(run.usage),
        }
        if self._explain:
            body["collegium"] = explanation(run)
        return JSONReply(body, headers={"x-collegium-decision": request_id})


class AnswerStream(Response):
    """The answer as server-sent events, one a chunk.

    A failure before the first chunk is an ordinary error reply; after it, an error event and ``[DONE]``.
    """

    background = None

    def __init__(
        self,
        orchestrator: Orchestrator,
        run: Run,
        form: Format,
        *,
        include_usage: bool,
        explain: bool,
        stall_s: float,
    ) -> None:
        self._orchestrator = orchestrator
        self._run = run
        self._form = form
        self._include_usage = include_usage
        self._explain = explain
        self._stall_s = stall_s
        self._created = int(time.time())
        self._expert_id = ""
        self._begun: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(receive, send, stall_s=self._stall_s)
        try:
            async with client.attended():
                await self._answer(scope, receive, client)
        except ClientGone:
            return

    async def _answer(self, scope: Scope, receive: Receive, client: Client) -> None:
        try:
            async with deadline(self._run.request), aclosing(self._orchestrator.generate(self._run)) as chunks:
                async for chunk in chunks:
                    if not self._begun:
                        await client.send(self._start())
                    if chunk.usage is None or chunk.text or chunk.finish_reason:
                        await client.send(_more(self._event(chunk)))
        except CollegiumError as exc:
            if not self._begun:
                await error_reply(exc, self._run.request.request_id)(scope, receive, client.send)
                return
            await client.send(_more(_data(error_body(exc))))
        await client.send(_more(b"".join(self._closing())))
        await client.send({"type": "http.response.body", "body": b"", "more_body": False})

    def _start(self) -> Message:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-collegium-decision", self._run.request.request_id.encode()),
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    def _event(self, chunk: Chunk) -> bytes:
        first = chunk.index not in self._begun
        if first:
            self._begun.add(chunk.index)
            self._expert_id = chunk.expert_id
        return _data(self._object([self._form.delta(chunk, first=first)]))

    def _closing(self) -> Iterator[bytes]:
        run = self._run
        if run.error is None and self._include_usage:
            yield _data({**self._object([]), "usage": usage_body(run.usage)})
        if self._explain:
            yield _data({**self._object([]), "collegium": explanation(run)})
        yield DONE

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._run.request.request_id,
            "object": self._form.piece,
            "created": self._created,
            "model": self._expert_id,
            "choices": choices,
        }


def _data(body: Any) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _more(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}
