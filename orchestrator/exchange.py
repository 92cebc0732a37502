"""The answer's way out: whole or as events, and an error object or event for each way it can fail."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from experts.errors import CollegiumError, Unavailable
from experts.types import Chunk, Completion
from orchestrator.client import Client, ClientGone, SlowBody, Stopped
from orchestrator.pipeline import Orchestrator, deadline
from orchestrator.replies import Format, answer_body, error_body, explanation, to_json, usage_body
from orchestrator.run import Run

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_UNCACHED = (b"cache-control", b"no-cache")
BROKEN = "Something broke in collegium itself; its log says what."


class JSONReply(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_reply(exc: CollegiumError, request_id: str | None = None) -> JSONReply:
    headers = {} if request_id is None else {"x-collegium-decision": request_id}
    if exc.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(exc.retry_after_s)))
    if exc.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(exc, SlowBody):
        headers["connection"] = "close"
    return JSONReply(error_body(exc), status_code=exc.status, headers=headers)


@contextmanager
def bugs_told() -> Iterator[None]:
    """Turns what no layer foresaw into an internal error: the log gets the traceback, the caller an error object."""
    try:
        yield
    except (CollegiumError, ClientGone):
        raise
    except Exception as exc:
        log.exception("a bug, while answering")
        raise CollegiumError(BROKEN) from exc


class Teller(Protocol):
    """One way to tell an answer, or a failure at whatever point it comes."""

    async def tell(self, client: Client) -> None: ...

    async def fail(self, exc: CollegiumError, client: Client) -> None: ...


class Answer(Response):
    """What an endpoint returns for a run: told by its teller, and in an error's words whatever the failure."""

    background = None  # FastAPI looks

    def __init__(self, teller: Teller, *, stall_s: float) -> None:
        self._teller = teller
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(receive, send, stall_s=self._stall_s)
        try:
            with client.attended():
                await self._tell(client)
        except ClientGone:
            return
        except Stopped:
            await self._teller.fail(Unavailable("The service is shutting down; ask again."), client)

    async def _tell(self, client: Client) -> None:
        try:
            with bugs_told():
                await self._teller.tell(client)
        except CollegiumError as exc:
            await self._teller.fail(exc, client)


class Whole:
    """The answer in one JSON object."""

    def __init__(self, orchestrator: Orchestrator, run: Run, form: Format, *, explain: bool) -> None:
        self._orchestrator = orchestrator
        self._run = run
        self._form = form
        self._explain = explain
        self._created = int(time.time())
        self._told = False

    async def tell(self, client: Client) -> None:
        body = to_json(self._render(await self._orchestrator.complete(self._run)))
        self._told = True
        length = (b"content-length", str(len(body)).encode())
        await client.send(_start(self._run, b"application/json", length))
        await client.send(_last(body))

    async def fail(self, exc: CollegiumError, client: Client) -> None:
        if not self._told:
            await _send(error_reply(exc, self._run.request.request_id), client)

    def _render(self, completions: list[Completion]) -> dict[str, Any]:
        return answer_body(self._run, completions, self._form, created=self._created, explain=self._explain)


class Events:
    """The answer as server-sent events, one a chunk; those that came together leave in one write. A failure before the
    first is an ordinary error reply; after it, an error event and ``[DONE]``."""

    def __init__(
        self, orchestrator: Orchestrator, run: Run, form: Format, *, include_usage: bool, explain: bool
    ) -> None:
        self._orchestrator = orchestrator
        self._run = run
        self._form = form
        self._include_usage = include_usage
        self._explain = explain
        self._created = int(time.time())
        self._started = False
        self._expert_id = ""
        self._begun: set[int] = set()
        self._unsent: list[bytes] = []

    async def tell(self, client: Client) -> None:
        async with deadline(self._run.request), aclosing(self._orchestrator.generate(self._run)) as chunks:
            async for chunk in chunks:
                if not self._started:
                    self._started, self._expert_id = True, chunk.expert_id
                    await client.send(_start(self._run, b"text/event-stream; charset=utf-8", _UNCACHED))
                if chunk.usage is None or chunk.text or chunk.tool_calls or chunk.finish_reason:
                    self._unsent.append(self._event(chunk))
                if self._unsent and not chunk.more:
                    body = b"".join(self._unsent)
                    self._unsent.clear()
                    await client.send({"type": "http.response.body", "body": body, "more_body": True})
        await client.send(_last(*self._unsent, *self._closing()))

    async def fail(self, exc: CollegiumError, client: Client) -> None:
        if not self._started:
            await _send(error_reply(exc, self._run.request.request_id), client)
            return
        await client.send(_last(*self._unsent, _data(error_body(exc)), DONE))

    def _event(self, chunk: Chunk) -> bytes:
        first = chunk.index not in self._begun
        if first:
            self._begun.add(chunk.index)
        return _data(self._object([self._form.delta(chunk, first=first)]))

    def _closing(self) -> Iterator[bytes]:
        run = self._run
        if self._include_usage:
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


async def _send(reply: Response, client: Client) -> None:
    await client.send({"type": "http.response.start", "status": reply.status_code, "headers": reply.raw_headers})
    await client.send({"type": "http.response.body", "body": reply.body})


def _start(run: Run, kind: bytes, *headers: tuple[bytes, bytes]) -> Message:
    always = ((b"content-type", kind), (b"x-collegium-decision", run.request.request_id.encode()))
    return {"type": "http.response.start", "status": 200, "headers": [*always, *headers]}


def _data(body: Any) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"


def _last(*events: bytes) -> Message:
    return {"type": "http.response.body", "body": b"".join(events)}
