"""A load generator that checks every answer. Raw asyncio on uvloop, so that it costs less than what it measures.

Requests are numbered and the stub's answer depends on the number: a lost, swapped, cut or merged answer is an error,
counted by kind. It speaks to our service, to the baselines and to the stub itself alike.
"""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import httptools
import orjson

from evals.gateway.stub import answer_pieces, answer_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who is asked."""

    name: str
    port: int
    model: str
    host: str = "127.0.0.1"
    path: str = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question and what must come back. ``how`` is a word of the stub's."""

    number: int
    stream: bool
    how: str = "burst"

    @property
    def question(self) -> str:
        return f"{self.how} {self.number}"

    def wire(self, target: Target) -> bytes:
        messages = [{"role": "user", "content": self.question}]
        data = orjson.dumps({"model": target.model, "messages": messages, "stream": self.stream})
        head = (
            f"POST {target.path} HTTP/1.1\r\nhost: {target.host}:{target.port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def fault(self, status: int, body: bytes) -> str | None:
        """What is wrong with an answer, in a word or two; None when nothing is."""
        if status != 200:
            return f"status {status}"
        try:
            return self._stream_fault(body) if self.stream else self._whole_fault(body)
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
            return "not OpenAI's format"

    def _whole_fault(self, body: bytes) -> str | None:
        text = orjson.loads(body)["choices"][0]["message"]["content"]
        return None if text == answer_text(self.question) else "wrong answer"

    def _stream_fault(self, body: bytes) -> str | None:
        events = [e.removeprefix(b"data: ") for e in body.split(b"\n\n") if e]
        if not events or events[-1] != b"[DONE]":
            return "no [DONE]"
        choices = [c for e in events[:-1] for c in orjson.loads(e)["choices"]]
        pieces = [text for c in choices if (text := c["delta"].get("content"))]
        if pieces == answer_pieces(self.question):
            return None
        return "chunks merged" if "".join(pieces) == answer_text(self.question) else "wrong answer"


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came back. Times in seconds; ``ttfb_s`` is to the first byte of the first piece of text."""

    right: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    latency_s: list[float] = field(default_factory=list)
    ttfb_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def answers(self) -> int:
        return self.right + self.faults.total()

    @property
    def per_second(self) -> float:
        return self.right / self.wall_s if self.wall_s else 0.0


class Connection(asyncio.Protocol):
    """One kept connection that asks one question at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answered.set_result(None)

    async def ask(self, ask: Ask, target: Target, tally: Tally, timeout_s: float) -> bool:
        """Ask and note the result in ``tally``. False when the connection is of no more use."""
        self._answered = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._mark = f"{ask.question}/0".encode()
        self._first_s: float | None = None
        started = time.perf_counter()
        self._transport.write(ask.wire(target))
        deadline = asyncio.get_running_loop().call_later(timeout_s, self._fail, "no answer in time")
        try:
            await self._answered
        except ConnectionError as exc:
            tally.faults[str(exc)] += 1
            return False
        finally:
            deadline.cancel()
        ended = time.perf_counter()
        fault = ask.fault(self._parser.get_status_code(), b"".join(self._body))
        if fault is not None:
            tally.faults[fault] += 1
            return True
        tally.right += 1
        tally.latency_s.append(ended - started)
        tally.ttfb_s.append((self._first_s or ended) - started)
        return True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"bad HTTP: {exc}")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        if self._first_s is None and self._mark in body:
            self._first_s = time.perf_counter()

    def on_message_complete(self) -> None:
        if not self._answered.done():
            self._answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("connection lost")

    def _fail(self, reason: str) -> None:
        if not self._answered.done():
            self._answered.set_exception(ConnectionError(reason))
            self._transport.abort()

    def close(self) -> None:
        self._answered.cancel()
        self._transport.close()


async def connect(target: Target) -> Connection:
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(Connection, target.host, target.port))[1]


async def run(
    target: Target,
    *,
    connections: int,
    requests: int | None = None,
    seconds: float | None = None,
    stream: bool = False,
    how: str = "burst",
    timeout_s: float = 30.0,
) -> Tally:
    """Ask over ``connections`` at once until ``requests`` are answered or ``seconds`` have passed."""
    tally = Tally()
    started = time.perf_counter()
    numbers = iter(range(10**6, 10**6 + requests if requests else 10**9))

    async def worker() -> None:
        connection = await connect(target)
        try:
            for number in numbers:
                ask = Ask(number=number, stream=stream, how=how)
                if not await connection.ask(ask, target, tally, timeout_s):
                    connection = await connect(target)
                if seconds is not None and time.perf_counter() - started >= seconds:
                    return
        finally:
            connection.close()

    await asyncio.gather(*(worker() for _ in range(connections)))
    tally.wall_s = time.perf_counter() - started
    return tally
