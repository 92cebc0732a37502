"""How an answer ends when something goes wrong: an error reply before the first chunk, an error event after it."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from experts.base import Engine
from experts.types import Chunk, ChunkStream, EngineSpec, ExpertSpec, Request, Usage
from tests.orchestrator.served import Served, fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "Ann"}]


def post(served: Served, **keys: Any) -> httpx.Response:
    body = {"model": "collegium", "messages": ASK, **keys}
    return served.http.post("/v1/chat/completions", json=body)


def stream(served: Served, **keys: Any) -> httpx.Response:
    return post(served, stream=True, **keys)


def events(reply: httpx.Response) -> list[Any]:
    """The events of a whole stream, less its [DONE], which must be there."""
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["x-collegium-decision"].startswith("req_")
    *rows, done, nothing = reply.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(row.removeprefix("data: ")) for row in rows]


def text(rows: list[Any]) -> str:
    return "".join(c["delta"].get("content", "") for row in rows for c in row.get("choices", ()))


def error(reply: httpx.Response, status: int) -> Any:
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-collegium-decision"].startswith("req_")
    return reply.json()["error"]


def test_every_chunk_is_an_event_of_its_own() -> None:
    with serving(fake_config(text="abcdefgh", chunks=8)) as served:
        rows = events(stream(served, stream_options={"include_usage": True}, collegium={"explain": True}))
    contents = [c["delta"].get("content") for row in rows for c in row["choices"]]
    assert contents == [*"abcdefgh", None]
    assert [bool(row["choices"]) for row in rows] == [True] * 9 + [False] * 2
    assert rows[-2]["usage"]["total_tokens"] == 2
    assert rows[-1]["collegium"]["calls"][0]["expert_id"] == "one"


def test_chunks_are_sent_as_they_come() -> None:
    with serving(fake_config(text="ab", chunks=2, chunk_s=5)) as served:
        raw = served.connect(
            served.post(json.dumps({"model": "one", "messages": ASK, "stream": True}).encode()),
        )
        got = b""
        while b'"content":"a"' not in got:
            got += raw.recv(4096)
        assert served.engine.running == 1
        assert b'"content":"b"' not in got
        raw.close()


@pytest.mark.parametrize("outcome", ["error", "refuse"])
def test_before_the_first_chunk_the_next_expert_answers(outcome: str) -> None:
    with serving(fake_config(fail=[outcome, "ok"])) as served:
        assert text(events(stream(served))) == "two says hello to Ann"


@pytest.mark.parametrize("ask", [post, stream])
def test_nobody_can_answer(ask: Callable[..., httpx.Response]) -> None:
    with serving(fake_config(fail=["error"])) as served:
        reply = ask(served)
        assert error(reply, 503)["code"] == "expert_failed"
        assert reply.headers["retry-after"] == "1"
        assert served.idle


@pytest.mark.parametrize("outcome", ["cut", "drop"])
def test_after_the_first_chunk_an_error_event(outcome: str) -> None:
    with serving(fake_config(fail=[outcome, "ok"])) as served:
        *rows, last = events(stream(served, collegium={"explain": True}))
        assert text(rows) == "one sa"
        assert last["error"]["code"] == "expert_failed"
        assert served.idle


def test_the_client_raises_the_error_event() -> None:
    with (
        serving(fake_config(fail=["cut"])) as served,
        served.client() as client,
        pytest.raises(openai.APIError) as caught,
    ):
        list(client.chat.completions.create(model="one", messages=ASK, stream=True))
    assert "cut off" in caught.value.message
    assert caught.value.code == "expert_failed"


@pytest.mark.parametrize("outcome", ["cut", "drop"])
def test_half_an_answer_is_none(outcome: str) -> None:
    """Unstreamed, nobody has seen the half: the next expert answers."""
    with serving(fake_config(fail=[outcome, "ok"])) as served:
        assert post(served).json()["choices"][0]["message"]["content"] == "two says hello to Ann"


def test_one_choice_of_three_is_cut() -> None:
    with serving(fake_config(fail=["drop"])) as served:
        *_, last = events(stream(served, n=3))
        assert last["error"]["code"] == "expert_failed"


@pytest.mark.parametrize("ask", [post, stream])
def test_the_deadline_before_the_first_chunk(ask: Callable[..., httpx.Response]) -> None:
    with serving(fake_config({"limits": {"deadline_s": 0.1}}, fail=["hang"])) as served:
        found = error(ask(served), 504)
        assert (found["code"], "0.1 s" in found["message"]) == ("deadline_exceeded", True)
        assert served.idle
        assert served.engine.cancelled >= 1  # a whole answer leaves time for the next expert


def test_the_deadline_mid_stream() -> None:
    with serving(fake_config({"limits": {"deadline_s": 0.2}}, chunk_s=0.09)) as served:
        *rows, last = events(stream(served))
        assert text(rows).startswith("one sa")
        assert last["error"]["code"] == "deadline_exceeded"
        assert served.idle
        assert served.engine.cancelled == 1


def test_no_place_left() -> None:
    limits = {"max_concurrency": 1, "queue": 0}
    with serving(fake_config({"limits": limits}, fail=["hang"])) as served:
        raw = served.connect(served.post(json.dumps({"model": "one", "messages": ASK}).encode()))
        wait_for(lambda: served.engine.running == 1)
        for reply in (post(served), stream(served), served.http.post("/v1/route", json={"messages": ASK})):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "queue_full"
            assert reply.headers["retry-after"] == "1"
        raw.close()


class Buggy:
    """Sends ``chunks``, then raises ``exc``."""

    def __init__(self, spec: EngineSpec, chunks: list[Chunk], exc: BaseException | None) -> None:
        self.spec = spec
        self._chunks = chunks
        self._exc = exc

    async def load(self) -> None:
        """Nothing to load."""

    async def unload(self) -> None:
        """Nothing to give back."""

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        for chunk in self._chunks:
            yield chunk
        if self._exc is not None:
            raise self._exc


def buggy(chunks: list[Chunk], exc: BaseException | None) -> Callable[[EngineSpec], Engine]:
    return lambda spec: Buggy(spec, chunks, exc)


BUG = ValueError("no layer foresaw this")
HALF = [Chunk(expert_id="one", text="half")]


@pytest.mark.parametrize("ask", [post, stream])
def test_a_bug_before_the_first_chunk(ask: Callable[..., httpx.Response], caplog: pytest.LogCaptureFixture) -> None:
    with serving(fake_config(), make=buggy([], BUG)) as served:
        found = error(ask(served), 500)
    assert (found["code"], found["type"]) == ("internal_error", "server_error")
    assert "foresaw" not in found["message"]  # the log's business
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is BUG


def test_a_bug_mid_stream(caplog: pytest.LogCaptureFixture) -> None:
    with serving(fake_config(), make=buggy(HALF, BUG)) as served:
        *rows, last = events(stream(served))
        assert text(rows) == "half"
        assert last["error"]["code"] == "internal_error"
        assert error(post(served), 500)["code"] == "internal_error"
    assert "foresaw" in caplog.text


def test_chunks_that_came_together_leave_together() -> None:
    chunks = [Chunk(expert_id="one", text=t, more=t == "b") for t in "abc"]
    end = Chunk(expert_id="one", finish_reason="stop")
    with serving(fake_config(), make=buggy([*chunks, end], None)) as served:
        body = {"model": "collegium", "messages": ASK, "stream": True}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as reply:
            parts = list(reply.iter_raw())
    assert [part.count(b"data: ") for part in parts] == [1, 2, 1, 1]


def test_what_was_held_is_not_lost_in_a_failure() -> None:
    with serving(fake_config(), make=buggy([Chunk(expert_id="one", text="half", more=True)], BUG)) as served:
        *rows, last = events(stream(served))
        assert text(rows) == "half"
        assert last["error"]["code"] == "internal_error"


@pytest.mark.parametrize("ask", [post, stream])
def test_an_engine_that_cancels_itself(ask: Callable[..., httpx.Response]) -> None:
    with serving(fake_config(), make=buggy([], asyncio.CancelledError())) as served:
        assert error(ask(served), 503)["code"] == "expert_failed"


def test_usage_comes_first() -> None:
    chunks = [
        Chunk(expert_id="one", usage=Usage(prompt_tokens=3)),
        Chunk(expert_id="one", text="hi", finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=1)),
    ]
    with serving(fake_config(), make=buggy(chunks, None)) as served:
        rows = events(stream(served, stream_options={"include_usage": True}))
    assert text(rows) == "hi"
    assert rows[-1]["usage"]["total_tokens"] == 4


def test_what_json_does_not_know_is_no_failure() -> None:
    odd = {"content": [{"token": "a", "logprob": float("nan"), "kind": ValueError("x")}]}
    chunks = [Chunk(expert_id="one", text="a", logprobs=odd, finish_reason="stop")]
    with serving(fake_config(), make=buggy(chunks, None)) as served:
        (entry,) = post(served, logprobs=True).json()["choices"][0]["logprobs"]["content"]
        assert entry == {"token": "a", "logprob": None, "kind": "x"}
        assert events(stream(served))[0]["choices"][0]["logprobs"]["content"] == [entry]


def test_the_end_of_the_service_is_told() -> None:
    """When the grace is over, those still under way hear of it, in their own format."""
    replies: dict[str, httpx.Response] = {}

    def ask(how: str, **keys: Any) -> None:
        body = {"model": "one", "messages": ASK, **keys}
        replies[how] = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=10)

    with serving(fake_config({"experts": {"one": {"engine": "a"}}}, chunk_s=30), grace_s=0) as served:
        asks = [
            threading.Thread(target=ask, args=("whole",)),
            threading.Thread(target=ask, args=("stream",), kwargs={"stream": True}),
        ]
        for thread in asks:
            thread.start()
        wait_for(lambda: served.engine.running == 2)
    for thread in asks:
        thread.join()
    assert error(replies["whole"], 503)["code"] == "unavailable"
    *rows, last = events(replies["stream"])
    assert text(rows) == "one sa"
    assert "shutting down" in last["error"]["message"]
