"""Whatever is sent, an error object comes back, nothing hangs, and the service goes on as if nothing had been."""

import gzip
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.openai import ChatBody
from tests.orchestrator.served import Served, fake_config, serving

LIMITS = {"max_body_bytes": 100_000, "max_messages": 100, "max_tokens": 50, "max_n": 4, "client_stall_s": 0.3}
HI = {"role": "user", "content": "hi"}
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route"]


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with serving(fake_config({"limits": LIMITS})) as served:
        yield served


@pytest.fixture
def served(running: Served) -> Iterator[Served]:
    calls = running.engine.calls
    yield running
    assert running.idle
    assert running.engine.calls == calls, "a bad request must reach no expert"
    assert read(running.exchange(running.post(chat())))[0] == 200


def chat(**keys: Any) -> bytes:
    return json.dumps({"model": "one", "messages": [HI], **keys}).encode()


def message(**keys: Any) -> bytes:
    return chat(messages=[{**HI, **keys}])


def tool(parameters: str) -> bytes:
    body = chat(tools=[{"type": "function", "function": {"name": "f", "parameters": "PARAMETERS"}}])
    return body.replace(b'"PARAMETERS"', parameters.encode())


def read(reply: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)


def check(reply: bytes, status: int = 400) -> dict[str, Any]:
    """The error object in ``reply``."""
    got, body = read(reply)
    assert got == status, body
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["message"]
    assert len(error["message"]) < 1000
    return error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON: EOF"),
        (b"{", "not JSON: EOF"),
        (b"hello", "not JSON"),
        (b"\x00" * 64, "not JSON"),
        (b"[]", "body: Input should be an object"),
        (b"null", "body: Input should be an object"),
        (b'"text"', "body: Input should be an object"),
        (b'{"model": "one"}', "messages: Field required"),
        (b'{"model": "one", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "not JSON: invalid unicode"),
        (b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        (b'{"model": "one", "messages": [{"role": "user", "content": "\\udfff"}]}', "not JSON"),
        (chat()[:-1] + b"} trailing", "not JSON: trailing"),
        (b"[" * 50_000, "not JSON: recursion limit"),
        (b'{"model": "one", "messages": ' + b'[{"a":' * 10_000, "not JSON: recursion limit"),
        (gzip.compress(chat()), "not JSON"),
        ("\ufeff".encode() + chat(), "not JSON"),
        (chat().decode().encode("utf-16"), "not JSON"),
    ],
)
def test_no_json(served: Served, body: bytes, says: str) -> None:
    for path in PATHS:
        check(served.exchange(served.post(body, path)))
    assert says in check(served.exchange(served.post(body)))["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(model=1), "model"),
        (chat(model=""), "model"),
        (chat(model=None), "model"),
        (chat(model="x" * 201), "model"),
        (chat(messages=[]), "messages"),
        (chat(messages={}), "messages"),
        (chat(messages="hi"), "messages"),
        (chat(messages=[1]), "messages.0"),
        (chat(messages=[HI] * 101), "messages"),
        (chat(messages=[HI] * 2000), "messages"),
        (message(content=""), "messages"),
        (message(content=" \n\t "), "messages"),
        (message(content=[]), "messages"),
        (message(content=None), "messages.0"),
        (message(content=3), "messages.0.content"),
        (message(content=[{"type": "text"}]), "messages.0.content.0.text"),
        (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content.0.type"),
        (message(role="boss"), "messages.0.role"),
        (message(role=["user"]), "messages.0.role"),
        (message(role="tool"), "messages.0"),
        (message(nmae="x"), "messages.0.nmae"),
        (message(content=[{"type": "text", "text": "x", "txt": 1}]), "messages.0.content.0.txt"),
        (chat(temprature=1), "temprature"),
        (chat(temperature="1"), "temperature"),
        (chat(temperature=-0.1), "temperature"),
        (chat(temperature=2.1), "temperature"),
        (chat(temperature=float("nan")), "temperature"),
        (chat(temperature=float("inf")), "temperature"),
        (chat(temperature=float("-inf")), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(top_p=1.01), "top_p"),
        (chat(top_p=float("nan")), "top_p"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=-1), "max_tokens"),
        (chat(max_tokens=51), "max_tokens"),
        (chat(max_tokens=2**70), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(max_completion_tokens=51), "max_tokens"),
        (chat(n=0), "n"),
        (chat(n=5), "n"),
        (chat(n=10**30), "n"),
        (chat(seed=2**63), "seed"),
        (chat(seed="1"), "seed"),
        (chat(stop=""), "stop"),
        (chat(stop=["a", ""]), "stop.1"),
        (chat(stop=["a"] * 17), "stop"),
        (chat(presence_penalty=2.5), "presence_penalty"),
        (chat(frequency_penalty=float("nan")), "frequency_penalty"),
        (chat(top_logprobs=21), "top_logprobs"),
        (chat(stream="yes"), "stream"),
        (chat(stream_options={"usage": True}), "stream_options.usage"),
        (chat(tools=[{"type": "function", "function": {"name": "no spaces"}}]), "tools.0.function.name"),
        (chat(tools=[{"type": "search"}]), "tools.0.type"),
        (chat(tool_choice="sometimes"), "tool_choice"),
        (chat(response_format={"type": "json_schema"}), "response_format"),
        (chat(response_format={"type": "xml"}), "response_format.type"),
        (chat(metadata={"a": 1}), "metadata"),
        (tool("{'a': NaN}".replace("'", '"')), "tools.0.function.parameters"),
        (tool('{"a": [1e999]}'), "tools.0.function.parameters"),
        (tool('{"a": ' + "9" * 300 + "}"), "tools.0.function.parameters"),
        (chat(collegium=[]), "collegium"),
        (chat(collegium={"max_usd": float("nan")}), "collegium.max_usd"),
        (chat(collegium={"explane": True}), "collegium.explane"),
    ],
)
def test_the_place_is_named(served: Served, body: bytes, param: str) -> None:
    assert check(served.exchange(served.post(body)))["param"] == param


def test_the_nearest_key_is_offered(served: Served) -> None:
    for body, near in (
        (chat(temprature=1), "temperature"),
        (message(nmae=1), "name"),
        (chat(collegium={"seeed": 1}), "seed"),
    ):
        assert f"did you mean '{near}'?" in check(served.exchange(served.post(body)))["message"]


@pytest.mark.parametrize(
    "model", ["nobody", "collegium/nobody", "../etc/passwd", "one\r\nx-evil: 1", "\x00", "é" * 200]
)
def test_no_such_model(served: Served, model: str) -> None:
    reply = served.exchange(served.post(chat(model=model)))
    assert check(reply, 404)["param"] == "model"
    assert b"x-evil: 1\r\n" not in reply


def test_only_so_many_mistakes_are_described(served: Served) -> None:
    """A body of a million mistakes took 22 s, in which nobody else was answered, when each was described."""
    parts = b'{"model": "one", "messages": [{"role": "user", "content": [' + b"{}," * 20_000 + b"{}]}]}"
    for body in (b'{"model": "one", "messages": [' + b"1," * 20_000 + b"1]}", parts):
        with pytest.raises(ValidationError) as caught:
            ChatBody.model_validate_json(body)
        assert caught.value.error_count() <= 3
    keys = chat()[:-1] + b"," + b",".join(b'"%d":1' % i for i in range(5000)) + b"}"
    assert "5000 mistakes" in check(served.exchange(served.post(keys)))["message"]
    assert check(served.exchange(served.post(chat()[:-1] + b',"' + b"k" * 90_000 + b'":1}')))["param"] == "k" * 200


def test_a_body_over_the_limit(served: Served) -> None:
    declared = served.post(b"", head="x: y\r\n").replace(b"content-length: 0", b"content-length: 100001")
    assert "100000 bytes" in check(served.exchange(declared), 413)["message"]  # before a byte of it is sent
    assert check(served.exchange(served.post(message(content="x" * 100_000))), 413)["code"] == "request_too_large"
    assert check(served.exchange(served.post(message(content="x" * 3_000_000))), 413)
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    chunked += b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = b"".join(b"4000\r\n" + b"x" * 0x4000 + b"\r\n" for _ in range(8))
    assert check(served.exchange(chunked + pieces + b"0\r\n\r\n"), 413)
    with served.connect(chunked + pieces) as raw:  # whose end never comes
        assert check(raw.recv(65536), 413)


def test_a_body_at_the_limit(running: Served) -> None:
    body = message(content="")
    body = message(content="x" * (100_000 - len(body)))
    assert len(body) == 100_000
    assert read(running.exchange(running.post(body)))[0] == 200


def test_a_chunked_body(running: Served) -> None:
    body = chat()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = b"".join(b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body)))
    assert read(running.exchange(head + pieces + b"0\r\n\r\n"))[0] == 200


def test_a_body_that_does_not_come(served: Served) -> None:
    half = served.post(chat()).replace(b"connection: close\r\n", b"")[:-10]
    error = check(served.exchange(half))  # closed by the service, though the client would have kept it
    assert "0.3 s" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_a_body_that_does_not_say_json(served: Served, kind: str) -> None:
    whole = served.post(chat()).replace(b"content-type: application/json", b"content-type: " + kind.encode())
    assert "content-type" in check(served.exchange(whole))["message"]


def test_content_types_that_say_json(running: Served) -> None:
    for kind in (b"application/json; charset=utf-8", b"Application/JSON"):
        whole = running.post(chat()).replace(b"application/json", kind)
        assert read(running.exchange(whole))[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # a TLS client
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 1e3\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models/\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nauthorization: Bearer a\x00b\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\nhost: x\r\n\r\n",
        b"BREW /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_no_http(served: Served, data: bytes) -> None:
    check(served.exchange(data))


def test_headers_without_end(served: Served) -> None:
    for start in (b"GET /v1/models HTTP/1.1\r\nx: ", b"GET /"):
        with served.connect(start) as raw:
            with suppress(ConnectionError):  # it may be over before all is sent
                for _ in range(64):
                    raw.sendall(b"x" * 65536)
            with suppress(ConnectionError):
                assert "headers" in check(b"".join(iter(lambda: raw.recv(65536), b"")))["message"]
        assert not [c for c in served.server.server_state.connections if c.cycle is None]
    many = b"".join(b"x-%d: %b\r\n" % (i, b"y" * 100) for i in range(500))  # 53 KB are still welcome
    whole = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + many + b"\r\n"
    with served.connect() as raw:
        for i in range(0, len(whole), 1000):
            raw.sendall(whole[i : i + 1000])
        assert raw.recv(12) == b"HTTP/1.1 200"


def test_injected_headers_go_nowhere(running: Served) -> None:
    for value in (b"a\r\nx-evil: 1", b"00-" + b"a" * 20_000, b"\xff\xfe", b"00-zz-zz-zz"):
        reply = running.exchange(running.post(chat()).replace(b"host: x", b"host: x\r\ntraceparent: " + value))
        status, body = read(reply)
        assert status == 200
        assert b"evil" not in reply
        assert body["choices"][0]["message"]["content"] == "one says hello to hi"


def test_the_last_of_two_equal_keys_holds(running: Served) -> None:
    body = chat()[:-1] + b', "model": "two"}'
    assert read(running.exchange(running.post(body)))[1]["model"] == "two"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("PUT", "/v1/models/one", 405),
        ("POST", "/v1/decisions/x", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/" + "x" * 5000, 404),
        ("GET", "/v1/models/%2e%2e%2f", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/v1/decisions/%ff", 404),
        ("GET", "/v1/decisions/' OR 1=1 --".replace(" ", "%20"), 404),
    ],
)
def test_no_such_path_or_method(served: Served, method: str, path: str, status: int) -> None:
    check(served.exchange(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()), status)


def test_head_has_no_body(served: Served) -> None:
    reply = served.exchange(b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 405")
    assert b"allow: GET" in reply
    assert reply.endswith(b"\r\n\r\n")


def test_ten_thousand_messages() -> None:
    body = chat(messages=[HI] * 10_000)
    with serving(fake_config()) as served:
        assert "10000 messages" in check(served.exchange(served.post(body)))["message"]
    with serving(fake_config({"limits": {"max_messages": 10_000}})) as served:
        assert read(served.exchange(served.post(body)))[0] == 200
