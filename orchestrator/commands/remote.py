"""Answers from a service that runs already, over HTTP. COLLEGIUM_API_KEY holds the key where one is asked for."""

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from experts.errors import BadRequest, CollegiumError, Unavailable
from orchestrator.commands.question import Explanation, Question, View


async def ask(url: str, question: Question, view: View) -> Explanation:
    """Stream the answer to ``view``; its decision comes last. Raises a CollegiumError."""
    body = question.body()
    body |= {"stream": True, "collegium": {**body["collegium"], "explain": True}}
    async with _post(url, "/v1/chat/completions", body) as reply:
        async for event in _events(reply):
            if "error" in event:
                raise _error(event, 503)
            for choice in event.get("choices") or ():
                view.text(choice["delta"].get("content") or "")
            if explanation := event.get("collegium"):
                view.routed(explanation["decision"])
                return dict(explanation)
    raise Unavailable(f"{url} ended its stream in the middle.")


async def route(url: str, question: Question) -> Mapping[str, Any]:
    async with _post(url, "/v1/route", question.body()) as reply:
        return dict((await reply.json())["decision"])


@asynccontextmanager
async def _post(url: str, path: str, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
    if not url.startswith(("http://", "https://")):
        raise BadRequest(f"--url takes an address with http:// or https:// before it, not '{url}'.")
    base, key = url.rstrip("/").removesuffix("/v1"), os.environ.get("COLLEGIUM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        async with (
            aiohttp.ClientSession(headers=headers, read_bufsize=2**20) as session,
            session.post(base + path, json=body) as reply,
        ):
            if reply.status != 200:
                raise _error(await _json(reply), reply.status)
            yield reply
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise Unavailable(f"Cannot reach {url}: {exc}. Is 'collegium serve' running there?") from exc


async def _events(reply: aiohttp.ClientResponse) -> AsyncIterator[Mapping[str, Any]]:
    async for line in reply.content:
        data = line.removeprefix(b"data: ").strip()
        if data and data != b"[DONE]" and line.startswith(b"data: "):
            yield json.loads(data)


async def _json(reply: aiohttp.ClientResponse) -> Any:
    try:
        return await reply.json(content_type=None)
    except ValueError:
        return {}


def _error(body: Any, status: int) -> CollegiumError:
    error = body.get("error") if isinstance(body, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else None
    if status == 401:
        message = f"{message or 'The service asks for a key.'} Put it into COLLEGIUM_API_KEY."
    return CollegiumError(message or f"HTTP {status} from something that is not collegium.")
