"""Spans: what they say, whose they are, and what happens when nobody takes them."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from experts.errors import ConfigError
from orchestrator import app as app_module
from orchestrator.tracing import Tracing, make_tracing
from tests.orchestrator.served import Served, fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "Ann"}]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(app_module, "make_tracing", lambda _: Tracing(exporter))
    return exporter


def config(endpoint: str = "http://127.0.0.1:9", **options: Any) -> dict[str, Any]:
    panel = {"router": "always", "top_k": 2, "aggregator": "vote"}
    policies = {"default": {"router": "always"}, "panel": panel}
    return fake_config({"telemetry": {"otlp_endpoint": endpoint}, "policies": policies}, **options)


def chat(served: Served, model: str = "collegium", traceparent: str | None = None, **keys: Any) -> Any:
    headers = {} if traceparent is None else {"traceparent": traceparent}
    body = {"model": model, "messages": ASK, **keys}
    return served.http.post("/v1/chat/completions", json=body, headers=headers)


def spans(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def test_the_spans_of_a_request(kept: InMemorySpanExporter) -> None:
    with serving(config(ttft_s=0.03)) as served:
        reply = chat(served, "collegium/panel")
    found = spans(kept)
    assert {name: len(rows) for name, rows in found.items()} == {
        "request": 1,
        "route": 1,
        "dispatch": 1,
        "expert": 2,
        "combine": 1,
    }
    (request,) = found["request"]
    assert request.attributes == {
        "request_id": reply.headers["x-collegium-decision"],
        "policy": "panel",
        "outcome": "ok",
    }
    assert request.parent is None
    assert request.context is not None
    for name in ("route", "dispatch", "expert", "combine"):
        for span in found[name]:
            assert span.parent is not None
            assert span.parent.span_id == request.context.span_id
            assert ns(request)[0] <= ns(span)[0] <= ns(span)[1] <= ns(request)[1]
    experts = {dict(s.attributes or {})["expert_id"]: s for s in found["expert"]}
    assert sorted(map(str, experts)) == ["one", "two"]
    attributes = dict(experts["one"].attributes or {})
    assert (attributes["prompt_tokens"], attributes["completion_tokens"], attributes["outcome"]) == (1, 5, "ok")
    assert ns(experts["one"])[1] - ns(experts["one"])[0] >= 25_000_000
    assert dict(found["combine"][0].attributes or {}) == {"aggregator": "vote"}
    assert ns(found["route"][0])[1] <= ns(found["combine"][0])[0]
    assert abs(ns(request)[1] / 1e9 - time.time()) < 60  # on the wall's clock


def ns(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


def test_failures_have_spans(kept: InMemorySpanExporter) -> None:
    with serving(config(fail=["refuse"])) as served:
        chat(served)
    found = spans(kept)
    assert [dict(s.attributes or {})["outcome"] for s in found["expert"]] == ["expert_failed"] * 2
    assert dict(found["request"][0].attributes or {})["outcome"] == "expert_failed"


def test_the_callers_trace_goes_on(kept: InMemorySpanExporter) -> None:
    with serving(config()) as served:
        chat(served, traceparent=f"00-{TRACE}-{PARENT}-01")
    for span in kept.get_finished_spans():
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == TRACE
    (request,) = spans(kept)["request"]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT


def test_a_caller_who_does_not_sample(kept: InMemorySpanExporter) -> None:
    with serving(config()) as served:
        chat(served, traceparent=f"00-{TRACE}-{PARENT}-00")
    assert kept.get_finished_spans() == ()


@pytest.mark.parametrize("garbage", ["", "x", f"00-{TRACE}", f"00-{'0' * 32}-{PARENT}-01", "00-" + "z" * 5000])
def test_a_traceparent_that_is_none(kept: InMemorySpanExporter, garbage: str) -> None:
    with serving(config()) as served:
        assert chat(served, traceparent=garbage).status_code == 200
    (request,) = spans(kept)["request"]
    assert request.parent is None


class Collector:
    """What an OTLP/HTTP collector does, on loopback."""

    def __init__(self, status: int = 200) -> None:
        self.got: list[tuple[str, ExportTraceServiceRequest]] = []
        self.status = status
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.got.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Unsaid."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Callable[..., Collector]]:
    made: list[Collector] = []

    def make(status: int = 200) -> Collector:
        made.append(Collector(status))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("path", "arrives"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/custom", "/custom")])
def test_over_http(collector: Callable[..., Collector], path: str, arrives: str) -> None:
    taker = collector()
    with serving(config(taker.url + path)) as served:
        request_id = chat(served).headers["x-collegium-decision"]
    ((where, sent),) = taker.got
    assert where == arrives
    (resource,) = sent.resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "collegium"
    found = {s.name: s for s in resource.scope_spans[0].spans}
    assert sorted(found) == ["combine", "dispatch", "expert", "request", "route"]
    assert found["expert"].parent_span_id == found["request"].span_id
    assert request_id in {a.value.string_value for a in found["request"].attributes}


def test_an_endpoint_that_is_down(
    collector: Callable[..., Collector], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line when it goes and one when it is back, not a traceback a batch; and the service ends all the same."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    caplog.set_level(logging.INFO)
    taker = collector(404)
    with serving(config(taker.url)) as served:
        chat(served)
        wait_for(lambda: "takes no spans" in caplog.text)
        chat(served)
        wait_for(lambda: len(taker.got) >= 2)
        taker.status = 200
        chat(served)
        wait_for(lambda: "takes spans again" in caplog.text)
    said = [r for r in caplog.records if "opentelemetry" in r.name or r.name == "orchestrator.otlp"]
    assert [(r.levelname, "takes" in r.getMessage()) for r in said] == [("WARNING", True), ("INFO", True)]


def test_nobody_there_at_all(caplog: pytest.LogCaptureFixture) -> None:
    with serving(config("http://127.0.0.1:9")) as served:
        assert chat(served).status_code == 200
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.name for r in said] == ["orchestrator.otlp"]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "orchestrator.otlp", None)
    with pytest.raises(ConfigError, match=r"collegium\[otel\]"):
        make_tracing("http://127.0.0.1:4318")
