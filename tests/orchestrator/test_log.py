"""Log lines: one JSON object each, with the request they belong to."""

import json
import logging
import sys
from typing import Any

import pytest

from orchestrator.log import JsonFormatter, configure, request_id
from tests.orchestrator.served import fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "a secret question"}]


def line(message: str, *args: Any, **extra: Any) -> Any:
    record = logging.LogRecord("a.logger", logging.WARNING, "", 0, message, args, None)
    record.__dict__.update(extra)
    written = JsonFormatter().format(record)
    assert "\n" not in written
    return json.loads(written)


def test_a_line() -> None:
    told = line("%d of %s", 3, "seven", fields={"policy": "default"})
    assert told.pop("time").endswith("+00:00")
    assert told == {"level": "warning", "logger": "a.logger", "message": "3 of seven", "policy": "default"}


@pytest.mark.parametrize("odd", ["two\nlines", "\ud800", "\x00\x1b[31m", 10**40, float("nan"), object()])
def test_nothing_breaks_a_line(odd: Any) -> None:
    assert "said" in line("said %s", odd, fields={"odd": odd})["message"]


def test_a_traceback_stands_in_its_line() -> None:
    try:
        int("this one")
    except ValueError:
        info = sys.exc_info()
    assert "ValueError: invalid literal" in line("it broke", exc_info=info)["exception"]


def test_the_request_is_named() -> None:
    token = request_id.set("req_1")
    try:
        assert line("deep inside")["request_id"] == "req_1"
    finally:
        request_id.reset(token)
    assert "request_id" not in line("elsewhere")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.rows.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> Any:
    handler, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler.rows
    root.removeHandler(handler)
    root.setLevel(level)


def test_each_request_has_a_line(lines: list[Any]) -> None:
    with serving(fake_config()) as served:
        reply = served.http.post("/v1/chat/completions", json={"model": "one", "messages": ASK})
    (row,) = [r for r in lines if r["logger"] == "collegium.request"]
    assert row["request_id"] == reply.headers["x-collegium-decision"]
    assert (row["policy"], row["experts"], row["outcome"]) == ("one", ["one"], "ok")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (3, 7)
    assert row["latency_ms"] > 0
    assert "secret" not in json.dumps(lines)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", ["collegium", "collegium/panel"])
def test_warnings_deep_inside_name_their_request(lines: list[Any], model: str, stream: bool) -> None:
    """Also from the tasks that ask several experts at once."""
    panel = {"router": "always", "top_k": 2, "aggregator": "vote"}
    with serving(fake_config({"policies": {"default": {}, "panel": panel}}, fail=["refuse", "ok"])) as served:
        body = {"model": model, "messages": ASK, "stream": stream}
        replies = [served.http.post("/v1/chat/completions", json=body) for _ in range(2)]
    (warning,) = [r for r in lines if r["level"] == "warning"]
    # Another expert answered: nobody but the log says why the first did not.
    assert "as scripted" in warning["message"]
    assert warning["error"] == "expert_failed"
    assert warning["request_id"] == replies[0].headers["x-collegium-decision"]


def test_a_bug_names_its_request(lines: list[Any]) -> None:
    def break_router(app: Any) -> None:
        async def route(*_: Any) -> Any:
            raise KeyError("a bug in a router")

        app.state.host.service.policies.resolve("collegium").router.route = route

    with serving(fake_config(), prepare=break_router) as served:
        reply = served.http.post("/v1/chat/completions", json={"model": "collegium", "messages": ASK})
        routed = served.http.post("/v1/route", json={"messages": ASK})
    assert (reply.status_code, routed.status_code) == (500, 500)
    assert routed.json()["error"]["code"] == "internal_error"
    bugs = [r for r in lines if "a bug in a router" in r.get("exception", "")]
    assert bugs[0]["request_id"] == reply.headers["x-collegium-decision"]
    assert len({b["request_id"] for b in bugs}) == 2


def test_requests_do_not_inherit_each_others_name(lines: list[Any]) -> None:
    with serving(fake_config(fail=["refuse"])) as served:
        ids = [
            served.http.post("/v1/chat/completions", json={"model": "one", "messages": ASK}).headers[
                "x-collegium-decision"
            ]
            for _ in range(3)
        ]
        served.connect(b"GARBAGE\r\n\r\n").close()
        wait_for(lambda: any("Invalid HTTP" in r["message"] for r in lines))
    assert [r["request_id"] for r in lines if r["level"] == "warning" and "Expert" in r["message"]] == ids
    (invalid,) = [r for r in lines if "Invalid HTTP" in r["message"]]
    assert "request_id" not in invalid


def test_configure_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure("warning")
        logging.getLogger("x").info("unsaid")
        logging.getLogger("x").warning("said")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["message"] == "said"
