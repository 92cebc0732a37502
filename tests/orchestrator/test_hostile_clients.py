"""Clients that leave, stall, dawdle or just sit there: their work ends, and nobody else notices."""

import json
import resource
import socket
import struct
import time
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest

from orchestrator.http1 import Http1
from tests.orchestrator.served import Served, fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "hi"}]
# Far more than the buffers between the two ends take.
FLOOD = {"text": "x" * 4_000_000, "chunks": 1000}


def chat(served: Served, model: str = "one", **keys: Any) -> bytes:
    return served.post(json.dumps({"model": model, "messages": ASK, **keys}).encode())


def leave(raw: socket.socket) -> None:
    """Gone without a goodbye, as by a crash."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def answers(served: Served) -> bool:
    with served.client() as client:
        return bool(client.chat.completions.create(model="two", messages=ASK).choices)


def serve(options: dict[str, Any], **sections: Any) -> AbstractContextManager[Served]:
    """Expert one is on an engine with ``options``, expert two on one that simply answers."""
    engines = {"a": {"backend": "fake", "options": options}, "quick": {"backend": "fake"}}
    experts = {"one": {"engine": "a"}, "two": {"engine": "quick"}}
    return serving(fake_config({"engines": engines, "experts": experts, **sections}))


@pytest.mark.parametrize("goodbye", [socket.socket.close, leave])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_first_chunk(goodbye: Any, stream: bool) -> None:
    with serve({"fail": ["hang"]}) as served:
        raw = served.connect(chat(served, stream=stream))
        wait_for(lambda: served.engine.running == 1)
        goodbye(raw)
        wait_for(lambda: served.engine.cancelled == 1)
        wait_for(lambda: served.idle)
        assert answers(served)


@pytest.mark.parametrize("goodbye", [socket.socket.close, leave])
def test_a_client_that_leaves_mid_stream(goodbye: Any) -> None:
    with serve({"text": "a b c d", "chunks": 7, "chunk_s": 0.1}) as served:
        raw = served.connect(chat(served, stream=True))
        while b"data:" not in raw.recv(4096):
            pass
        goodbye(raw)
        wait_for(lambda: served.engine.cancelled == 1)
        wait_for(lambda: served.idle)


def test_a_client_that_leaves_the_queue() -> None:
    limits = {"max_concurrency": 1, "queue": 2}
    with serve({"fail": ["hang"]}, limits=limits) as served:
        raws = [served.connect(chat(served))]
        wait_for(lambda: served.engine.running == 1)
        raws += [served.connect(chat(served)) for _ in range(2)]
        wait_for(lambda: served.service.admission.queued == 2)
        leave(raws[1])
        wait_for(lambda: served.service.admission.queued == 1)
        leave(raws[0])
        wait_for(lambda: served.engine.calls == 2)  # the place went to who still waits
        leave(raws[2])
        wait_for(lambda: served.idle)
        assert served.engine.cancelled == 2
        assert answers(served)


def test_a_client_that_leaves_while_it_sends(caplog: pytest.LogCaptureFixture) -> None:
    with serve({}) as served:
        for data in (b"POST", chat(served)[:-20], chat(served)[:40]):
            leave(served.connect(data))
        assert answers(served)
        wait_for(lambda: served.idle)
        assert served.engine.calls == 0
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_a_hundred_clients_that_leave_at_once() -> None:
    with serve({"fail": ["hang"]}) as served:
        raws = [served.connect(chat(served, stream=i % 2 == 0)) for i in range(100)]
        wait_for(lambda: served.engine.running == 100)
        for raw in raws:
            leave(raw)
        wait_for(lambda: served.idle)
        assert served.engine.cancelled == 100
        assert answers(served)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http1, "UNREAD_S", 0.3)
    monkeypatch.setattr(Http1, "HEADERS_S", 0.3)


@pytest.mark.usefixtures("impatient")
def test_a_client_that_stops_reading() -> None:
    with serve(FLOOD, limits={"client_stall_s": 0.2}) as served:
        raw = served.connect(chat(served, stream=True), receive_buffer=4096)
        wait_for(lambda: served.engine.running == 1)
        assert answers(served)  # while it is stuck
        wait_for(lambda: served.engine.cancelled == 1)
        wait_for(lambda: served.idle)
        wait_for(lambda: not connections(served))  # not even its connection is kept
        raw.close()


@pytest.mark.usefixtures("impatient")
def test_a_long_answer_that_nobody_reads() -> None:
    with serve({"text": FLOOD["text"]}) as served:
        raw = served.connect(chat(served), receive_buffer=4096)
        wait_for(lambda: served.engine.calls == 1 and served.idle)
        wait_for(lambda: not connections(served))
        raw.close()


@pytest.mark.usefixtures("impatient")
def test_a_slow_reader_gets_everything() -> None:
    """It takes longer than any of the limits, but never stops for as long."""
    with serve({"text": "x" * 2_000_000, "chunks": 400}, limits={"client_stall_s": 0.2}) as served:
        raw = served.connect(chat(served, stream=True), receive_buffer=65536)
        got = bytearray()
        with raw:
            while data := raw.recv(2**16):
                got += data
                time.sleep(0.01)
        assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert got.count(b"xxxxxxxxxx") >= 400
        assert served.engine.cancelled == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("start", [b"", b"P", b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"])
def test_a_request_that_is_never_finished(start: bytes) -> None:
    with serve({}) as served, served.connect(start) as raw:
        assert raw.recv(1) == b""
        assert not connections(served)


@pytest.mark.usefixtures("impatient")
def test_half_a_request_behind_a_whole_one() -> None:
    """The answer under way is not cut for it, and once that is out it is not waited for either."""
    with serve({"text": "a b", "chunks": 3, "chunk_s": 0.2}) as served:
        keep = chat(served, stream=True).replace(b"connection: close\r\n", b"")
        with served.connect(keep + b"POST /v1/chat") as raw:
            got = b""
            while b"[DONE]" not in got:
                data = raw.recv(4096)
                assert data, got
                got += data
            with suppress(ConnectionError):
                wait_for(lambda: not connections(served) or not raw.send(b"x"))  # it goes on for ever


@pytest.mark.usefixtures("impatient")
def test_a_thousand_idle_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    with serve({}) as served:
        raws = [served.connect() for _ in range(1000)]
        assert answers(served)
        wait_for(lambda: not connections(served))
        for raw in raws:
            raw.close()
        assert answers(served)


def test_requests_in_a_pipeline() -> None:
    with serve({}) as served:
        keep = chat(served).replace(b"connection: close\r\n", b"")
        reply = served.exchange(keep + keep + chat(served, model="two"))
        assert reply.count(b"HTTP/1.1 200 OK") == 3
        assert reply.index(b'"model":"one"') < reply.index(b'"model":"two"')


def connections(served: Served) -> int:
    """Those that the service has open."""
    return len(served.server.server_state.connections)
