"""An upstream that answers at once, so that what is measured is what stands before it. Raw asyncio on uvloop.

The answer is made from the question, so that the load generator can tell a wrong, lost or swapped answer. The first
word of the question says how to answer: ``burst`` sends a stream in one write, ``steps`` each event in its own write,
``wrong`` gives a wrong answer (for the tests of the load generator).
"""

import argparse
import asyncio
from collections.abc import Iterator
from typing import cast

import httptools
import orjson
import uvloop

CHUNKS = 32
ANSWER_TOKENS = CHUNKS


def answer_text(question: str) -> str:
    return "".join(answer_pieces(question))


def answer_pieces(question: str) -> list[str]:
    """The content of each streamed event."""
    return [f"{question}/{i} " for i in range(CHUNKS)]


class Stub(asyncio.Protocol):
    """One connection. Requests are answered in the order they come; a client may keep the connection."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        asked = orjson.loads(self._body)
        question = asked["messages"][-1]["content"]
        heard = "something else" if question.startswith("wrong") else question
        if not asked.get("stream"):
            self._transport.write(whole_reply(heard))
        elif question.startswith("steps"):
            self._step(streamed_reply(heard))
        else:
            self._transport.write(b"".join(streamed_reply(heard)))

    def _step(self, events: Iterator[bytes]) -> None:
        event = next(events, None)
        if event is None or self._transport.is_closing():
            return
        self._transport.write(event)
        asyncio.get_running_loop().call_soon(self._step, events)


def whole_reply(question: str) -> bytes:
    message = {"role": "assistant", "content": answer_text(question)}
    body = orjson.dumps(
        {
            "id": "chatcmpl-stub",
            "object": "chat.completion",
            "created": 1700000000,
            "model": "stub",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": _USAGE,
        }
    )
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def streamed_reply(question: str) -> Iterator[bytes]:
    """What OpenAI sends: the role, the pieces, the finish reason, the usage, [DONE]; each event a chunk of HTTP's."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    yield head + _event([_choice({"role": "assistant", "content": ""})])
    for piece in answer_pieces(question):
        yield _event([_choice({"content": piece})])
    yield _event([_choice({}, "stop")])
    yield _event([], _USAGE)
    yield b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


_USAGE = {"prompt_tokens": 8, "completion_tokens": ANSWER_TOKENS, "total_tokens": 8 + ANSWER_TOKENS}


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, object]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> bytes:
    event = {
        "id": "chatcmpl-stub",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "stub",
        "choices": choices,
        "usage": usage,
    }
    data = b"data: %b\n\n" % orjson.dumps(event)
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
