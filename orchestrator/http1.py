"""uvicorn's HTTP/1.1, less patient: nobody holds a connection by sending half a request or by reading no answer."""

import asyncio
import logging
from functools import partial

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from experts.errors import BadRequest
from orchestrator.replies import error_body, to_json

log = logging.getLogger(__name__)


class Http1(HttpToolsProtocol):
    """For uvicorn's ``http`` setting. What is no HTTP gets OpenAI's error object too."""

    HEADERS_S = 10.0
    """From the connection, or a request's first byte, to its last header."""
    HEAD_BYTES = 64 * 1024
    """The parser itself would take headers without end."""
    UNREAD_S = 60.0
    """How long what was sent may lie unread."""

    _headers_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._headers_timer)
        self._stop(self._unread_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if self._headers_timer is None:  # most headers come in one piece, and are read by now
            self._await_headers()
        self._head_bytes += len(data)  # all of it, for the headers are not complete
        if self._head_bytes > self.HEAD_BYTES:
            self.send_400_response(f"The request's headers take more than {self.HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._stop(self._headers_timer)
        self._headers_timer, self._in_head, self._head_bytes = None, False, 0
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self.UNREAD_S, partial(self._give_up, "reads nothing"))

    def resume_writing(self) -> None:
        self._stop(self._unread_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        body = to_json(error_body(BadRequest(msg)))
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _await_headers(self) -> None:
        self._stop(self._headers_timer)
        self._headers_timer = self.loop.call_later(self.HEADERS_S, self._headers_late)

    def _headers_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._give_up("sends no request")
        else:  # the answer before is still under way
            self._await_headers()

    def _give_up(self, why: str) -> None:
        log.info("a client %s; its connection was closed", why)
        self.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
