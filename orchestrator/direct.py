"""The busiest paths, past FastAPI's routing, which costs a tenth of a request: its routes are for the document here."""

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from experts.errors import CollegiumError
from orchestrator.exchange import error_reply

Handler = Callable[[HttpRequest], Awaitable[Response]]


class Direct:
    """An ASGI middleware. ``handlers`` answer POSTs, by path, and ``refused`` hears of what they refuse; everything
    else goes on to ``app``."""

    def __init__(self, app: ASGIApp, *, handlers: Mapping[str, Handler], refused: Callable[[str], None]) -> None:
        self._app = app
        self._handlers = handlers
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        handler = self._handlers.get(scope["path"]) if is_post else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            reply = await handler(HttpRequest(scope, receive, send))
        except CollegiumError as exc:
            self._refused(exc.code)
            reply = error_reply(exc)
        except ClientDisconnect:
            return
        await reply(scope, receive, send)
