"""The openai backend against a scripted endpoint on 127.0.0.1, which does what endpoints do at their worst."""

import asyncio
import gzip
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from email.utils import formatdate
from typing import Any

import orjson
import pytest

from experts.base import collect, collect_choices
from experts.errors import BadRequest, CollegiumError, ConfigError, ContextLengthExceeded, ExpertFailed
from experts.openai_http import OpenAIEngine
from experts.types import Chunk, EngineSpec, ExpertSpec, Message, Request, SamplingParams, Usage

EXPERT = ExpertSpec(expert_id="tutor", engine_id="gpt")
KEY = "sk-very-secret"

Writer = asyncio.StreamWriter
Step = bytes | Callable[[asyncio.StreamReader, Writer], Awaitable[None]]


class Upstream:
    """An endpoint that answers each request with the next of ``replies`` (the last one again and again)."""

    def __init__(self) -> None:
        self.replies: list[list[Step]] = []
        self.heads: list[str] = []
        self.bodies: list[Any] = []
        self.connections = 0
        self.left = asyncio.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.connections += 1
        try:
            while True:
                first = await reader.readexactly(1)
                if first != b"P":  # TLS, which a server of plain HTTP takes for a bad request
                    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    break
                head = (first + await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
                self.heads.append(head)
                self.bodies.append(orjson.loads(await reader.readexactly(length)))
                await self._reply(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()
        finally:
            writer.close()

    async def _reply(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        for step in self.replies[min(len(self.bodies), len(self.replies)) - 1]:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
                await asyncio.sleep(0.001)  # so that steps are separate segments
            else:
                await step(reader, writer)


async def hang(reader: asyncio.StreamReader, _: Writer) -> None:
    """Says nothing until the client leaves."""
    while await reader.read(1000):
        pass
    raise ConnectionResetError


async def reset(_: asyncio.StreamReader, writer: Writer) -> None:
    writer.transport.abort()
    raise ConnectionResetError


async def close(_: asyncio.StreamReader, writer: Writer) -> None:
    writer.close()
    raise ConnectionResetError


def response(body: bytes, status: str = "200 OK", kind: str = "application/json", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def part(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(body: object) -> bytes:
    return b"data: %b\n\n" % (body if isinstance(body, bytes) else orjson.dumps(body))


def delta(text: str | None = None, finish_reason: str | None = None, index: int = 0) -> dict[str, object]:
    said = {} if text is None else {"content": text}
    return {"choices": [{"index": index, "delta": said, "finish_reason": finish_reason}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
EVENTS = [delta("žluť "), delta("🐎 "), delta("kůň"), delta(None, "stop"), USAGE, b"[DONE]"]
STREAM = b"".join(event(e) for e in EVENTS)
TEXT = "žluť 🐎 kůň"
WHOLE = orjson.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    }
)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    yield upstream
    server.close()


Load = Callable[..., Awaitable[OpenAIEngine]]


@pytest.fixture
async def load(upstream: Upstream) -> AsyncIterator[Load]:
    engines: list[OpenAIEngine] = []

    async def make(**options: Any) -> OpenAIEngine:
        engine = OpenAIEngine(
            spec(base_url=upstream.url) if not options else spec(**{"base_url": upstream.url, **options})
        )
        engines.append(engine)
        await engine.load()
        return engine

    yield make
    for engine in engines:
        await engine.unload()


def spec(**options: Any) -> EngineSpec:
    return EngineSpec(engine_id="gpt", backend="openai", model="gpt-x", options=options)


def ask(text: str = "hi", *, stream: bool = True, **params: Any) -> Request:
    return Request(
        messages=(Message(role="user", content=text),), params=SamplingParams(**params), stream=stream, deadline_s=10
    )


async def read(engine: OpenAIEngine, request: Request | None = None) -> list[Chunk]:
    async with asyncio.timeout(5), aclosing(engine.generate(request or ask(), EXPERT)) as stream:
        return [chunk async for chunk in stream]


class TestAnswers:
    async def test_each_event_of_a_stream_is_its_own_chunk(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[STREAM_HEAD + part(STREAM) + LAST]]
        chunks = await read(await load())
        assert [c.text for c in chunks] == ["žluť ", "🐎 ", "kůň", "", ""]
        assert [c.finish_reason for c in chunks] == [None, None, None, "stop", None]
        assert chunks[-1].usage == Usage(prompt_tokens=5, completion_tokens=3)
        assert {c.expert_id for c in chunks} == {"tutor"}

    async def test_chunks_that_came_together_say_so(self, upstream: Upstream, load: Load) -> None:
        first, second, last = (part(b"".join(map(event, EVENTS[a:b]))) for a, b in ((0, 1), (1, 3), (3, 6)))
        upstream.replies = [[STREAM_HEAD + first, second, last + LAST]]
        assert [c.more for c in await read(await load())] == [False, True, False, True, False]

    async def test_a_chunk_is_given_before_the_next_is_there(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[STREAM_HEAD + part(event(delta("one"))), hang]]
        async with asyncio.timeout(5), aclosing((await load()).generate(ask(), EXPERT)) as stream:
            assert (await anext(stream)).text == "one"

    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    async def test_a_stream_cut_anywhere_is_the_same(self, upstream: Upstream, load: Load, size: int) -> None:
        wire = STREAM_HEAD + part(STREAM.replace(b"\n", b"\r\n")) + LAST
        upstream.replies = [[wire[i : i + size] for i in range(0, len(wire), size)]]
        assert (await collect((await load()).generate(ask(), EXPERT), ask())).text == TEXT

    async def test_who_reads_no_stream_gets_the_answer_in_one_call(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[response(WHOLE)]]
        answer = await collect((await load()).generate(ask(stream=False), EXPERT), ask())
        assert (answer.text, answer.finish_reason) == (TEXT, "stop")
        assert answer.usage == Usage(prompt_tokens=5, completion_tokens=3)
        assert upstream.bodies == [{"model": "gpt-x", "messages": [{"role": "user", "content": "hi"}]}]

    async def test_an_endpoint_that_cannot_stream(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[response(WHOLE)]]
        assert (await read(await load(stream=False)))[0].text == TEXT
        assert "stream" not in upstream.bodies[0]
        assert "stream_options" not in upstream.bodies[0]

    async def test_an_endpoint_that_does_not_care(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[response(WHOLE)], [STREAM_HEAD + part(STREAM) + LAST]]
        engine = await load()
        assert "".join(c.text for c in await read(engine, ask(stream=True))) == TEXT
        assert "".join(c.text for c in await read(engine, ask(stream=False))) == TEXT

    async def test_several_choices_keep_their_index(self, upstream: Upstream, load: Load) -> None:
        events = [delta("a", index=0), delta("b", index=1), delta(None, "stop", 0), delta("c", "length", 1)]
        upstream.replies = [[STREAM_HEAD + part(b"".join(map(event, events))) + LAST]]
        answers = await collect_choices((await load()).generate(ask(n=2), EXPERT), ask())
        assert [(a.text, a.finish_reason) for a in answers] == [("a", "stop"), ("bc", "length")]

    async def test_a_prompt_goes_to_completions(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [
            [response(orjson.dumps({"choices": [{"index": 0, "text": " time", "finish_reason": "length"}]}))]
        ]
        chunks = await read(await load(), Request(prompt="Once", stream=False))
        assert chunks[0].text == " time"
        assert upstream.heads[0].startswith("POST /v1/completions ")
        assert upstream.bodies[0]["prompt"] == "Once"

    @pytest.mark.parametrize(
        "stream",
        [
            b"".join(map(event, EVENTS[:-1])),
            b"".join(map(event, EVENTS[:4])),
            b": welcome\n\n" + STREAM.replace(b"data: ", b"event: piece\nid: 7\ndata:"),
        ],
        ids=["no done", "no usage", "more fields"],
    )
    async def test_what_endpoints_leave_out_or_put_in(self, upstream: Upstream, load: Load, stream: bytes) -> None:
        upstream.replies = [[STREAM_HEAD + part(stream) + LAST]]
        assert "".join(c.text for c in await read(await load())) == TEXT

    async def test_a_last_event_without_its_blank_line(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[STREAM_HEAD + part(event(delta("a")) + event(delta(None, "stop")).rstrip()) + LAST]]
        assert [c.text for c in await read(await load())] == ["a", ""]

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_compressed_answer(self, upstream: Upstream, load: Load, stream: bool) -> None:
        body, kind = (STREAM, "text/event-stream") if stream else (WHOLE, "application/json")
        upstream.replies = [[response(gzip.compress(body), "200 OK", kind, "content-encoding: gzip")]]
        assert "".join(c.text for c in await read(await load(), ask(stream=stream))) == TEXT
        assert "accept-encoding: identity" in upstream.heads[0].lower()


class TestConnections:
    async def test_one_connection_serves_call_after_call(self, upstream: Upstream, load: Load) -> None:
        engine = await load()
        upstream.replies = [
            [response(WHOLE)],
            [STREAM_HEAD + part(STREAM), LAST],  # the end of HTTP's message comes after [DONE], on its own
            [response(b'{"error": {"message": "busy"}}', "503 Service Unavailable")],
            [response(WHOLE)],
        ]
        await read(engine, ask(stream=False))
        await read(engine)
        with pytest.raises(ExpertFailed, match="busy"):
            await read(engine)
        await read(engine, ask(stream=False))
        assert upstream.connections == 1

    async def test_a_stream_that_lingers_after_done(
        self, upstream: Upstream, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("experts.openai_http._LINGER_S", 0.05)
        upstream.replies = [[STREAM_HEAD + part(STREAM), hang]]
        assert len(await read(await load())) == 5
        await asyncio.wait_for(upstream.left.wait(), 5)

    async def test_closing_the_stream_reaches_the_endpoint(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[STREAM_HEAD + part(event(delta("one"))), hang]]
        stream = (await load()).generate(ask(), EXPERT)
        await anext(stream)
        assert not upstream.left.is_set()
        await stream.aclose()
        await asyncio.wait_for(upstream.left.wait(), 5)

    @pytest.mark.parametrize("steps", [[hang], [STREAM_HEAD, hang], [STREAM_HEAD + part(event(delta("a"))), hang]])
    async def test_cancelling_the_reader_reaches_the_endpoint(
        self, upstream: Upstream, load: Load, steps: list[Step]
    ) -> None:
        upstream.replies = [steps]
        task = asyncio.create_task(read(await load()))
        while not upstream.bodies:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(upstream.left.wait(), 5)

    async def test_at_most_max_connections(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[response(WHOLE)]]
        engine = await load(max_connections=2)
        answers = await asyncio.gather(*(read(engine, ask(stream=False)) for _ in range(12)))
        assert len(answers) == 12
        assert upstream.connections <= 2

    async def test_a_body_of_megabytes(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[response(WHOLE)]]
        await read(await load(), ask("x" * 3_000_000, stream=False))
        assert len(upstream.bodies[0]["messages"][0]["content"]) == 3_000_000


def stream_of(*events: object) -> list[Step]:
    return [STREAM_HEAD + part(b"".join(map(event, events))) + LAST]


class TestFailures:
    @pytest.mark.parametrize(
        ("steps", "words", "retryable"),
        [
            pytest.param([close], "hung up", True, id="closed before a byte"),
            pytest.param([reset], "hung up", True, id="reset before a byte"),
            pytest.param([STREAM_HEAD + part(event(delta("a"))), reset], "hung up|broke off", True, id="reset later"),
            pytest.param([STREAM_HEAD + part(event(delta("a"))), close], "broke off", True, id="truncated chunks"),
            pytest.param([response(WHOLE)[:-5], close], "broke off", True, id="truncated body"),
            pytest.param([STREAM_HEAD + b"zz\r\n", close], "", None, id="chunk size is no number"),
            pytest.param([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], "does not speak HTTP", False, id="another protocol"),
            pytest.param(stream_of(delta("a")), "middle of its answer", True, id="no finish reason"),
            pytest.param(stream_of(delta("a"), b"[DONE]"), "middle of its answer", True, id="done too early"),
            pytest.param([STREAM_HEAD + LAST], "middle of its answer", True, id="empty stream"),
            pytest.param(stream_of(b"{not json}"), "cannot be read", True, id="garbage event"),
            pytest.param(stream_of(b"[1, 2]"), "not OpenAI's format", True, id="not an object"),
            pytest.param(stream_of({"choices": [{"delta": "x"}]}), "not OpenAI's format", True, id="odd delta"),
            pytest.param(
                [STREAM_HEAD + part(event(delta("a"))[:-4]) + LAST], "cannot be read", True, id="event cut by the end"
            ),
            pytest.param([response(b"{oops")], "cannot be read", True, id="garbage body"),
            pytest.param([response(b"\xff\xfe")], "cannot be read", True, id="not utf-8"),
            pytest.param([response(b"{}")], "no complete answer", True, id="empty object"),
            pytest.param([response(b"<html>", kind="text/html")], "'text/html'.*base_url", False, id="web page"),
            pytest.param([response(b"", "204 No Content")], "HTTP 204", False, id="no content"),
            pytest.param(
                [response(b"", "307 Temporary Redirect", "text/plain", "location: http://127.0.0.1:1/")],
                "redirects.*final address in base_url",
                False,
                id="redirect",
            ),
            pytest.param(
                [response(b"not gzip", "200 OK", "application/json", "content-encoding: gzip")],
                "",
                None,
                id="broken compression",
            ),
            pytest.param(
                stream_of(delta("a"), {"error": {"message": "GPU lost", "code": 500}}),
                "GPU lost",
                True,
                id="error event",
            ),
            pytest.param(
                [response(b"", "500 Internal Server Error")], "HTTP 500.*Internal Server Error", True, id="500"
            ),
            pytest.param(
                [response(b"<title>Bad gateway</title>", "502 Bad Gateway", "text/html")],
                "'Bad gateway'",
                True,
                id="502",
            ),
            pytest.param([response(b"slow down", "429 Too Many Requests", "text/plain")], "slow down", True, id="429"),
            pytest.param([response(b'{"detail":"Not Found"}', "404 Not Found")], "HTTP 404", False, id="404"),
        ],
    )
    async def test_each_failure_is_said_and_ends(
        self, upstream: Upstream, load: Load, steps: list[Step], words: str, retryable: bool | None
    ) -> None:
        upstream.replies = [steps]
        with pytest.raises(ExpertFailed, match=f"'tutor'.*{words}") as caught:
            await read(await load())
        assert retryable is None or caught.value.retryable is retryable

    @pytest.mark.parametrize(
        ("body", "error"),
        [
            (b'{"error": {"message": "no such role"}}', BadRequest),
            (
                b'{"error": {"message": "maximum context length is 10 tokens, your messages resulted in 20 tokens"}}',
                ContextLengthExceeded,
            ),
        ],
    )
    async def test_a_refused_request_is_the_callers(
        self, upstream: Upstream, load: Load, body: bytes, error: type[CollegiumError]
    ) -> None:
        upstream.replies = [[response(body, "400 Bad Request")]]
        with pytest.raises(error):
            await read(await load())

    @pytest.mark.parametrize(
        ("value", "low", "high"),
        [
            ("7", 7, 7),
            ("0.5", 0.5, 0.5),
            ("99999999", 3600, 3600),
            ("1e400", 1, 1),
            ("soon", 1, 1),
            ("-5", 1, 1),
            ("", 1, 1),
        ],
    )
    async def test_retry_after(self, upstream: Upstream, load: Load, value: str, low: float, high: float) -> None:
        upstream.replies = [[response(b"", "503 Service Unavailable", "text/plain", f"retry-after: {value}")]]
        with pytest.raises(ExpertFailed) as caught:
            await read(await load())
        assert caught.value.retry_after_s is not None
        assert low <= caught.value.retry_after_s <= high

    async def test_retry_after_a_date(self, upstream: Upstream, load: Load) -> None:
        date = formatdate(time.time() + 1000, usegmt=True)
        upstream.replies = [[response(b"", "503 Service Unavailable", "text/plain", f"retry-after: {date}")]]
        with pytest.raises(ExpertFailed) as caught:
            await read(await load())
        assert 900 < (caught.value.retry_after_s or 0) <= 1000

    async def test_silence(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[STREAM_HEAD + part(event(delta("a"))), hang]]
        with pytest.raises(ExpertFailed, match="silent"):
            await read(await load(read_s=0.05))

    async def test_nobody_listens(self, load: Load) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            engine = await load(base_url=f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
            with pytest.raises(ExpertFailed, match="cannot be reached") as caught:
                await read(engine)
        assert caught.value.retryable

    async def test_plain_http_where_tls_is_asked_for(self, upstream: Upstream, load: Load) -> None:
        with pytest.raises(ExpertFailed, match="TLS"):
            await read(await load(base_url=upstream.url.replace("http:", "https:")))

    async def test_a_name_that_does_not_resolve(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        async def nowhere(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", nowhere)
        with pytest.raises(ExpertFailed, match="does not resolve"):
            await read(await load(base_url="http://models.invalid/v1"))

    async def test_a_resolver_that_hangs(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        async def never(*_: object, **__: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
        with pytest.raises(ExpertFailed, match="connect_s"):
            await read(await load(base_url="http://models.invalid/v1", connect_s=0.05))

    @pytest.mark.parametrize(
        "steps",
        [[STREAM_HEAD, *([part(b"data: " + b"x" * 1000)] * 40)], [response(b" " * 40_000)]],
        ids=["event", "body"],
    )
    async def test_an_answer_too_large_to_keep(self, upstream: Upstream, load: Load, steps: list[Step]) -> None:
        upstream.replies = [steps]
        with pytest.raises(ExpertFailed, match="more than 20000 bytes"):
            await read(await load(max_event_bytes=20_000, max_answer_bytes=20_000))

    async def test_text_that_is_no_text(self, load: Load) -> None:
        with pytest.raises(BadRequest, match="JSON"):
            await read(await load(), ask("\ud800"))


class TestKey:
    async def test_it_is_read_when_the_engine_loads(
        self, upstream: Upstream, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upstream.replies = [[response(WHOLE)]]
        monkeypatch.setenv("MY_KEY", f" {KEY}\n")
        engine = await load(api_key_env="MY_KEY")
        monkeypatch.delenv("MY_KEY")
        await read(engine, ask(stream=False))
        assert f"Authorization: Bearer {KEY}\r\n" in upstream.heads[0]

    @pytest.mark.parametrize("value", [None, "", "  "])
    async def test_a_missing_one_is_named(self, load: Load, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
        monkeypatch.delenv("MY_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(ConfigError, match="MY_KEY"):
            await load(api_key_env="MY_KEY")

    async def test_a_key_in_the_place_of_its_variable_is_not_shown(self, load: Load) -> None:
        with pytest.raises(ConfigError, match="api_key_env names an environment variable") as caught:
            await load(api_key_env="gsk_Abc123")
        assert "gsk_" not in repr(caught.value)

    async def test_one_that_is_no_header_is_not_shown(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MY_KEY", f"{KEY}\r\nx-evil: 1")
        with pytest.raises(ConfigError, match="Authorization") as caught:
            await load(api_key_env="MY_KEY")
        assert KEY not in repr(caught.value)

    @pytest.mark.parametrize(
        "steps",
        [
            [b"SSH-2.0-OpenSSH\r\n\r\n"],
            [b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n"],
            [close],
            [response(WHOLE)[:-5], close],
            [response(f'{{"error": "wrong key {KEY}"}}'.encode(), "401 Unauthorized")],
            [response(f'{{"error": "wrong key {KEY}"}}'.encode(), "400 Bad Request")],
            [STREAM_HEAD + part(event({"error": f"wrong key {KEY}"})) + LAST],
        ],
    )
    async def test_no_failure_shows_it(
        self,
        upstream: Upstream,
        load: Load,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        steps: list[Step],
    ) -> None:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("MY_KEY", KEY)
        upstream.replies = [steps]
        engine = await load(api_key_env="MY_KEY")
        with pytest.raises(CollegiumError) as caught:
            await read(engine)
        seen: BaseException | None = caught.value
        while seen is not None:
            assert KEY not in f"{seen} {seen!r} {seen.args} {vars(seen)}"
            seen = seen.__cause__ or seen.__context__
        assert KEY not in caplog.text
        assert KEY not in f"{engine!r} {vars(engine)} {engine.spec}"

    @pytest.mark.parametrize("value", [KEY, f"Bearer {KEY}"])
    async def test_a_key_in_a_header_of_its_own(self, upstream: Upstream, load: Load, value: str) -> None:
        upstream.replies = [[response(f'{{"error": "wrong key {KEY} for blue"}}'.encode(), "400 Bad Request")]]
        with pytest.raises(BadRequest, match=r"wrong key \(the key\) for blue"):
            await read(await load(headers={"api-key": value, "x-team": "blue"}))

    @pytest.mark.parametrize("shown", range(8, len(KEY)))
    async def test_a_key_that_a_long_message_was_cut_in(self, upstream: Upstream, load: Load, shown: int) -> None:
        told = "x" * (500 - shown - 1) + " " + KEY
        upstream.replies = [[response(f'{{"error": "{told}"}}'.encode(), "400 Bad Request")]]
        with pytest.raises(BadRequest, match=r"x \(the key\)$"):
            await read(await load(headers={"api-key": KEY}))

    async def test_a_header_that_is_not_authorization(
        self, upstream: Upstream, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_KEY", KEY)
        upstream.replies = [[response(f'{{"error": "wrong key {KEY}"}}'.encode(), "400 Bad Request")]]
        with pytest.raises(BadRequest, match=r"wrong key \(the key\)"):
            await read(await load(api_key_env="MY_KEY", key_header="api-key"))
        assert f"\r\napi-key: {KEY}\r\n" in upstream.heads[0]
        assert "Authorization" not in upstream.heads[0]


class TestOptions:
    async def test_what_the_body_may_be_given(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[STREAM_HEAD + part(STREAM) + LAST]]
        engine = await load(
            rename={"max_tokens": "max_completion_tokens"},
            extra_body={"top_k": 5, "stream_options": None},
            headers={"X-Team": "blue"},
        )
        await read(engine, ask(max_tokens=9))
        assert upstream.bodies[0] == {
            "model": "gpt-x",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "max_completion_tokens": 9,
            "top_k": 5,
        }
        assert "X-Team: blue\r\n" in upstream.heads[0]

    @pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/openai/deployments/x?api-version=2024"])
    async def test_any_base_url(self, upstream: Upstream, load: Load, path: str) -> None:
        upstream.replies = [[response(WHOLE)]]
        await read(await load(base_url=f"http://127.0.0.1:{upstream.port}{path}"), ask(stream=False))
        before, mark, query = path.partition("?")
        assert upstream.heads[0].startswith(f"POST {before.rstrip('/')}/chat/completions{mark}{query} HTTP/1.1\r\n")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"read_ms": 5}, "unknown option 'read_ms'; did you mean 'read_s'"),
            ({"timeout": 5}, "unknown option 'timeout'; known: connect_s, read_s, "),
            ({"connect_s": "soon"}, "connect_s"),
            ({"connect_s": 0}, "connect_s"),
            ({"headers": {"X": 1}}, "headers.X"),
            ({"base_url": "ftp://host/v1"}, "base_url"),
            ({"base_url": "https:///v1"}, "base_url"),
            ({"base_url": "http://host:99999/v1"}, "base_url is no address: Port out of range"),
            ({"base_url": "http://[::1/v1"}, "base_url is no address"),
            ({"base_url": f"https://user:{KEY}@host/v1"}, "api_key_env"),
        ],
    )
    def test_a_mistake_is_named(self, options: Mapping[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=f"'gpt'.*{words}") as caught:
            OpenAIEngine(spec(**{"base_url": "http://127.0.0.1/v1", **options}))
        assert KEY not in caught.value.message

    def test_a_base_url_is_needed(self) -> None:
        with pytest.raises(ConfigError, match="base_url"):
            OpenAIEngine(spec())

    @pytest.mark.parametrize("headers", [{"X": "a\r\nb: c"}, {"X\r\nY": "a"}, {"X": "ž"}])
    async def test_a_header_cannot_carry_another(self, load: Load, headers: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="header"):
            await load(headers=headers)

    async def test_nothing_comes_from_the_environment(
        self, upstream: Upstream, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password pass\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        upstream.replies = [[response(WHOLE, "200 OK", "application/json", "set-cookie: a=b; Path=/")]]
        engine = await load()
        await read(engine, ask(stream=False))
        await read(engine, ask(stream=False))
        assert "cookie" not in upstream.heads[1].lower()
        assert "authorization" not in upstream.heads[1].lower()


class TestLife:
    async def test_load_and_unload_in_any_order(self, upstream: Upstream) -> None:
        upstream.replies = [[response(WHOLE)]]
        engine = OpenAIEngine(spec(base_url=upstream.url))
        await engine.unload()
        with pytest.raises(ExpertFailed, match="not loaded"):
            await read(engine)
        await engine.load()
        await engine.load()
        assert len(await read(engine, ask(stream=False))) == 2
        await engine.unload()
        await engine.unload()
        with pytest.raises(ExpertFailed, match="not loaded"):
            await read(engine)

    async def test_unloading_ends_what_runs(self, upstream: Upstream, load: Load) -> None:
        upstream.replies = [[STREAM_HEAD + part(event(delta("a"))), hang]]
        engine = await load()
        async with aclosing(engine.generate(ask(), EXPERT)) as stream:
            await anext(stream)
            await engine.unload()
            with pytest.raises(ExpertFailed):
                await anext(stream)
        await asyncio.wait_for(upstream.left.wait(), 5)
