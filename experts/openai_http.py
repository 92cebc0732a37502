"""Any OpenAI-compatible endpoint. Plain aiohttp, because it costs least (measured: docs/performance.md).

An answer is streamed where its caller reads a stream, and comes whole where he does not, which costs less than half.
"""

import io
import math
import time
from asyncio import timeout
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

import aiohttp
import orjson
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from experts.endpoint import Options, key_headers, open_session, read_options
from experts.errors import BadRequest, CollegiumError, ExpertFailed
from experts.sse import END, EventReader
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Request
from experts.wire import read_error, read_event, request_body

_ERROR_BYTES = 64 * 1024
_KEY_CHARS = 12
_LARGE_BYTES = 2**20
_LINGER_S = 1.0
"""How long an endpoint may take to end a stream it has said [DONE] in, before its connection is given up."""
_MAX_RETRY_AFTER_S = 3600.0


class OpenAIEngine:
    """Talks to the endpoint over kept connections. Each event of its stream becomes its own Chunk."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._options = read_options(spec)
        base = URL(self._options.base_url)
        self._chat_url = (base / "chat/completions").with_query(base.query)
        self._completions_url = (base / "completions").with_query(base.query)
        self._session: aiohttp.ClientSession | None = None

    async def load(self) -> None:
        """Reads the key and makes the session; asks the endpoint nothing. Raises ConfigError for a missing key."""
        if self._session is None:
            self._session = open_session(self._options, key_headers(self.spec, self._options))

    async def unload(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        session, body = self._session, self._body(request)
        if session is None:
            raise ExpertFailed(f"Engine '{self.spec.engine_id}' is not loaded.", retryable=False)
        try:
            response = await self._post(session, request, body)
            try:
                answer = await self._answer(response, request, expert)
                while not answer.done and (data := await response.content.readany()):
                    for chunk in answer.feed(data):
                        yield chunk
                for chunk in answer.end():
                    yield chunk
                await _drain(response)
            finally:
                # Of no effect after the last byte. Before it, this is how the endpoint learns that nobody listens.
                response.close()
        except (aiohttp.ClientError, OSError) as exc:
            raise _failure(exc, expert) from exc
        except RuntimeError as exc:
            if self._session is session:
                raise
            # What aiohttp says to a call whose session is closed under it.
            raise ExpertFailed(f"Expert '{expert.expert_id}': its engine was unloaded.") from exc
        except CollegiumError as exc:
            _hide_keys(exc, session, self._options)
            raise

    def _body(self, request: Request) -> bytes:
        options, body = self._options, request_body(request, self.spec.model)
        if not (request.stream and options.stream):
            del body["stream"], body["stream_options"]
        for old, new in options.rename.items():
            if old in body:
                body[new] = body.pop(old)
        if options.extra_body:
            body = {k: v for k, v in {**body, **options.extra_body}.items() if v is not None}
        try:
            return orjson.dumps(body)
        except orjson.JSONEncodeError as exc:
            raise BadRequest(f"The request cannot be sent on as JSON: {exc}.") from exc

    async def _post(self, session: aiohttp.ClientSession, request: Request, body: bytes) -> aiohttp.ClientResponse:
        url = self._chat_url if request.prompt is None else self._completions_url
        # aiohttp writes a large file piece by piece; of large bytes it warns that the loop stands still meanwhile.
        data = body if len(body) < _LARGE_BYTES else io.BytesIO(body)
        return await session.post(url, data=data, allow_redirects=False)

    async def _answer(
        self, response: aiohttp.ClientResponse, request: Request, expert: ExpertSpec
    ) -> "_StreamedAnswer | _WholeAnswer":
        """How to read ``response``. Raises what it means when it is no answer."""
        if response.status != 200:
            raise await _refusal(response, expert)
        match response.content_type:
            case "text/event-stream":
                return _StreamedAnswer(expert, request.params.n, self._options.max_event_bytes)
            case "application/json":
                return _WholeAnswer(expert, self._options.max_answer_bytes)
            case other:
                raise ExpertFailed(
                    f"Expert '{expert.expert_id}': its endpoint answered with {other[:100]!r} where an event stream or "
                    "JSON belongs; check base_url (most end in /v1).",
                    retryable=False,
                )


class _StreamedAnswer:
    """Server-sent events. ``done`` is set by [DONE]."""

    def __init__(self, expert: ExpertSpec, n: int, max_event_bytes: int) -> None:
        self.done = False
        self._expert = expert
        self._n = n
        self._finished = 0
        self._events = EventReader(max_bytes=max_event_bytes)

    def feed(self, data: bytes) -> list[Chunk]:
        chunks: list[Chunk] = []
        try:
            for event in self._events.feed(data):
                if event == b"[DONE]":
                    self.done = True
                    break
                chunks += read_event(orjson.loads(event), self._expert)
        except ValueError as exc:
            raise _garbled(exc, self._expert) from exc
        for chunk in chunks:
            chunk.more = chunk is not chunks[-1]
            if chunk.finish_reason is not None:
                self._finished += 1
        return chunks

    def end(self) -> list[Chunk]:
        """What was left without a last blank line. Raises ExpertFailed when the answer is not complete."""
        chunks = [] if self.done else self.feed(END)
        # Some endpoints leave [DONE] out; none leaves out the finish reason of an answer that is whole.
        if self._finished < (1 if self.done else self._n):
            raise ExpertFailed(f"Expert '{self._expert.expert_id}' hung up in the middle of its answer.")
        return chunks


class _WholeAnswer:
    """One JSON object."""

    done = False

    def __init__(self, expert: ExpertSpec, max_bytes: int) -> None:
        self._expert = expert
        self._max_bytes = max_bytes
        self._body = bytearray()

    def feed(self, data: bytes) -> list[Chunk]:
        self._body += data
        if len(self._body) > self._max_bytes:
            raise _garbled(ValueError(f"an answer of more than {self._max_bytes} bytes"), self._expert)
        return []

    def end(self) -> list[Chunk]:
        try:
            chunks = read_event(orjson.loads(self._body), self._expert)
        except orjson.JSONDecodeError as exc:
            raise _garbled(exc, self._expert) from exc
        if not any(chunk.finish_reason for chunk in chunks):
            raise ExpertFailed(f"Expert '{self._expert.expert_id}' gave no complete answer.")
        return chunks


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read what follows [DONE], so that the connection can be kept. The answer is complete: no failure here counts."""
    if response.content.at_eof():
        return
    with suppress(aiohttp.ClientError, OSError):
        async with timeout(_LINGER_S):
            while await response.content.readany():
                pass


async def _refusal(response: aiohttp.ClientResponse, expert: ExpertSpec) -> CollegiumError:
    """What an answer without an answer means."""
    if 300 <= response.status < 400:
        return ExpertFailed(
            f"Expert '{expert.expert_id}': its endpoint redirects (HTTP {response.status}), which is not followed; "
            "put the final address in base_url.",
            retryable=False,
            upstream_status=response.status,
        )
    raw = bytearray()
    while len(raw) < _ERROR_BYTES and (data := await response.content.readany()):
        raw += data
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = raw.decode(errors="replace")
    return read_error(response.status, body or response.reason, expert, _retry_after_s(response.headers))


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds or as a date, at most an hour; None when it is missing or makes no sense."""
    value = headers.get("Retry-After", "")
    try:
        wait_s = float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(wait_s, 0.0), _MAX_RETRY_AFTER_S) if math.isfinite(wait_s) else None


def _hide_keys(exc: CollegiumError, session: aiohttp.ClientSession, options: Options) -> None:
    """Endpoints like to repeat the key that they refuse. Some take it in a header of their own, perhaps behind a word
    like Bearer: whatever is as long as a key there is taken for one."""
    own = [word for value in options.headers.values() for word in value.split() if len(word) >= _KEY_CHARS]
    for key in (session.headers.get(options.key_header, "").removeprefix("Bearer "), *own):
        if not key:
            continue
        exc.message = exc.message.replace(key, "(the key)")
        # A long message was cut, perhaps within the key.
        cut = next((n for n in range(len(key) - 1, _KEY_CHARS // 2, -1) if exc.message.endswith(key[:n])), 0)
        exc.message = f"{exc.message[:-cut]}(the key)" if cut else exc.message
        exc.args = (exc.message,)


def _garbled(exc: Exception, expert: ExpertSpec) -> ExpertFailed:
    return ExpertFailed(f"Expert '{expert.expert_id}' sent what cannot be read: {exc}.")


_REASONS: tuple[tuple[type[Exception], bool, str], ...] = (
    (aiohttp.ClientConnectorDNSError, True, "has a name that does not resolve; check base_url"),
    (
        aiohttp.ClientConnectorCertificateError,
        False,
        "has a TLS certificate that is not trusted; check base_url, or name your authority's file in SSL_CERT_FILE",
    ),
    (aiohttp.ClientSSLError, False, "does not speak TLS; check base_url"),
    (aiohttp.ClientConnectorError, True, "cannot be reached; see that it runs and that base_url is right"),
    (aiohttp.ConnectionTimeoutError, True, "did not take a connection in time (connect_s)"),
    (aiohttp.SocketTimeoutError, True, "fell silent (read_s)"),
    (aiohttp.ClientPayloadError, True, "broke off in the middle of its answer"),
    (aiohttp.ClientResponseError, False, "does not speak HTTP; check base_url"),
    (Exception, True, "hung up"),
)
"""What aiohttp's exceptions mean: the first that fits; whether it may pass; in words."""


def _failure(exc: Exception, expert: ExpertSpec) -> ExpertFailed:
    if isinstance(exc, aiohttp.ClientResponseError):
        # It carries our request's headers, and with them the key, into its repr.
        exc.request_info = exc.request_info._replace(headers=CIMultiDictProxy(CIMultiDict()))
        exc.args = ()
    retryable, reason = next((retryable, words) for kind, retryable, words in _REASONS if isinstance(exc, kind))
    return ExpertFailed(f"Expert '{expert.expert_id}': its endpoint {reason}.", retryable=retryable)
