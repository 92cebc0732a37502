"""The bench's own instruments: the stub answers, the load generator notices every kind of wrong answer, the weights
weigh, and the verdicts follow the figures. Nothing here is timed."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import orjson
import pytest

from evals.gateway.contestants import forwarder
from evals.gateway.load import Ask, Tally, Target, run
from evals.gateway.measure import best, quantile
from evals.gateway.process import NotStarted, Process, free_port
from evals.gateway.report import Row, rows
from evals.gateway.stub import CHUNKS, Stub, streamed_reply, whole_reply


async def serve(factory: Callable[[], asyncio.Protocol]) -> tuple[asyncio.Server, Target]:
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
    return server, Target(name="stub", port=server.sockets[0].getsockname()[1], model="m")


@pytest.fixture
async def stub() -> AsyncIterator[Target]:
    server, target = await serve(Stub)
    yield target
    server.close()


@pytest.mark.parametrize(("stream", "how"), [(False, "burst"), (True, "burst"), (True, "steps")])
async def test_every_answer_of_the_stub_is_right(stub: Target, stream: bool, how: str) -> None:
    tally = await run(stub, connections=3, requests=20, stream=stream, how=how)
    assert tally.right == 20
    assert not tally.faults
    assert len(tally.latency_s) == len(tally.ttfb_s) == 20
    assert all(0 < first <= whole for first, whole in zip(tally.ttfb_s, tally.latency_s, strict=True))
    assert tally.per_second > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_answer_is_noticed(stub: Target, stream: bool) -> None:
    tally = await run(stub, connections=2, requests=6, stream=stream, how="wrong")
    assert tally.right == 0
    assert tally.faults == {"wrong answer": 6}


class Answering(asyncio.Protocol):
    """Answers everything with ``reply``, or hangs up."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._reply:
            self._transport.write(self._reply)  # type: ignore[attr-defined]
        else:
            self._transport.close()


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (b"", "connection lost"),
        (b"SSH-2.0\r\n\r\n", "bad HTTP"),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", "status 503"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "not OpenAI's format"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}", "no answer in time"),
    ],
)
async def test_every_kind_of_failure_is_counted(reply: bytes, fault: str) -> None:
    server, target = await serve(lambda: Answering(reply))
    tally = await run(target, connections=1, requests=2, timeout_s=0.1)
    assert tally.right == 0
    assert tally.answers == 2
    assert all(kind.startswith(fault) for kind in tally.faults)
    server.close()


def body_of(wire: bytes) -> bytes:
    """The events in a chunked reply of the stub."""
    parts = wire.split(b"\r\n\r\n", 1)[1].split(b"\r\n")
    return b"".join(parts[1::2])


class TestStreams:
    ask = Ask(number=7, stream=True)
    body = body_of(b"".join(streamed_reply("burst 7")))

    def test_the_stubs_is_right(self) -> None:
        assert self.ask.fault(200, self.body) is None
        assert self.body.count(b'"content":"burst 7/') == CHUNKS

    def test_two_chunks_in_one_event(self) -> None:
        events = self.body.split(b"\n\n")
        one, two = (orjson.loads(e.removeprefix(b"data: ")) for e in events[1:3])
        one["choices"][0]["delta"]["content"] += two["choices"][0]["delta"]["content"]
        merged = b"\n\n".join([events[0], b"data: " + orjson.dumps(one), *events[3:]])
        assert self.ask.fault(200, merged) == "chunks merged"

    def test_a_lost_chunk(self) -> None:
        events = self.body.split(b"\n\n")
        assert self.ask.fault(200, b"\n\n".join(events[:4] + events[5:])) == "wrong answer"

    def test_a_stream_without_its_end(self) -> None:
        assert self.ask.fault(200, self.body.replace(b"data: [DONE]\n\n", b"")) == "no [DONE]"

    def test_somebody_elses_answer(self) -> None:
        assert self.ask.fault(200, body_of(b"".join(streamed_reply("burst 8")))) == "wrong answer"
        whole = whole_reply("burst 8").split(b"\r\n\r\n", 1)[1]
        assert Ask(number=7, stream=False).fault(200, whole) == "wrong answer"
        assert Ask(number=8, stream=False).fault(200, whole) is None


class TestProcess:
    LISTEN = (
        "import socket, sys\ns = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "block = bytearray(64 * 2**20)\nsum(range(10**6))\nwhile True: s.accept()"
    )

    def test_it_is_weighed_and_ended(self, tmp_path: Path) -> None:
        port = free_port()
        command = [sys.executable, "-c", self.LISTEN, str(port)]
        process = Process(command, port=port, core=min(os.sched_getaffinity(0)), log=tmp_path / "log")
        try:
            process.wait(20)
            with process.awake():
                process.wait(20)
            assert process.cpu_s() > 0
            assert process.rss_mib() > 1
        finally:
            process.stop()
        assert process.rss_mib() == 0

    def test_one_that_does_not_start_says_why(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", "raise SystemExit('no such model')"]
        process = Process(command, port=free_port(), core=None, log=tmp_path / "log")
        with pytest.raises(NotStarted, match="no such model"):
            process.wait(20)
        process.stop()

    def test_a_contestant_that_is_not_installed_is_left_out(self, tmp_path: Path) -> None:
        with pytest.raises(NotStarted, match="no_such_client is not installed"):
            forwarder("no-such-client")(1, 0, tmp_path)


FIGURES = {
    "stub": {"p50_ms": 0.1, "ttfb_ms": 0.1},
    "collegium": {
        "requests_per_s": 3000.0,
        "cpu_ms": 0.4,
        "p50_ms": 0.5,
        "p99_ms": 9.0,
        "ttfb_ms": 0.6,
        "streams_per_s": 999.0,
        "merged": 0,
        "faults": 1,
    },
    "aiohttp": {"requests_per_s": 6000.0},
}


class TestReport:
    def test_verdicts(self) -> None:
        soak = {"warm_mib": 100.0, "ended_mib": 104.0, "faults": 0.0}
        verdicts = {row.name: (row.figure, row.verdict) for row in rows(FIGURES, soak, None)}
        assert verdicts["requests/s at 16 connections"] == (3000.0, "met")
        assert verdicts["added latency, p50"] == (0.4, "met")
        assert verdicts["added latency, p99"] == (8.9, "MISSED")
        assert verdicts["streams/s of 32 chunks"] == (999.0, "MISSED")
        assert verdicts["wrong or lost answers"] == (1, "MISSED")
        assert verdicts["share of FastAPI + aiohttp's requests/s"] == (0.5, "met")
        assert verdicts["times LiteLLM's requests/s"] == (None, "not measured")
        assert verdicts["memory after 100,000 requests"] == (104.0, "met")
        assert verdicts["growth over them"] == (pytest.approx(4.0), "met")
        assert verdicts["collegium --help"] == (None, "not measured")

    def test_nothing_measured_is_no_success(self) -> None:
        assert {row.verdict for row in rows({}, {}, None)} == {"not measured"}

    def test_not_a_number_is_missed(self) -> None:
        assert Row(name="x", target=1, figure=quantile([], 0.5)).verdict == "MISSED"

    def test_the_best_round_is_kept_and_no_fault_is_forgotten(self) -> None:
        rounds = [
            {"requests_per_s": 1.0, "cpu_ms": 2.0, "faults": 1.0},
            {"requests_per_s": 3.0, "cpu_ms": 4.0, "faults": 2.0},
        ]
        assert best(rounds) == {"requests_per_s": 3.0, "cpu_ms": 2.0, "faults": 3.0}

    def test_a_tally_that_never_ran(self) -> None:
        assert Tally().per_second == 0
