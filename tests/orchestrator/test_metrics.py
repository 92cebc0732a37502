"""What Prometheus is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.orchestrator.served import Served, fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "Ann"}]


def chat(served: Served, model: str = "collegium", **keys: Any) -> int:
    body = {"model": model, "messages": ASK, **keys}
    return served.http.post("/v1/chat/completions", json=body).status_code


class Page:
    """A scrape. ``page("name", label=value)`` sums what fits."""

    def __init__(self, served: Served) -> None:
        reply = served.http.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        self.text = reply.text
        self.samples = [s for family in text_string_to_metric_families(reply.text) for s in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        found = [s for s in self.samples if s.name == f"collegium_{name}" and labels.items() <= s.labels.items()]
        assert found, f"no {name} {labels}"
        return sum(s.value for s in found)


def test_what_went_well() -> None:
    with serving(fake_config()) as served:
        for model in ("collegium", "collegium", "two", "collegium/turns"):
            assert chat(served, model) == 200
        assert chat(served, stream=True) == 200
        page = Page(served)
    assert page("requests_total", policy="default", outcome="ok") == 3
    assert page("requests_total", policy="two", outcome="ok") == 1
    assert page("routes_total", expert="one", router="always") == 3
    assert page("routes_total", expert="two", router="direct") == 1
    assert page("calls_total", outcome="ok") == 5
    assert page("tokens_total", kind="prompt") == 5
    assert page("tokens_total", kind="completion") == 25
    assert page("usd_total", expert="one") == pytest.approx(4 * 5 * 2 / 1e6)
    assert page("ttft_seconds_count", expert="one") == 4
    assert page("call_latency_seconds_count", expert="one") == 4
    assert page("latency_seconds_count", policy="default") == 3
    assert 0 < page("latency_seconds_sum", policy="default") < 1
    assert page("route_seconds_count", router="always") == 3
    assert page("queue_depth") == 0
    assert page("running") == 0
    assert page("breaker_state", engine="a") == 0
    assert "process_resident_memory_bytes" in page.text
    assert "_created" not in page.text


def test_failures_by_kind() -> None:
    config = fake_config({"resilience": {"retries": 1, "backoff_s": 0.001}}, fail=["error", "ok", "refuse"])
    with serving(config) as served:
        assert chat(served, "one") == 200  # at the second attempt
        assert chat(served, "one") == 503
        page = Page(served)
    assert page("calls_total", outcome="expert_failed") == 2
    assert page("failures_total", of="call", kind="expert_failed") == 2
    assert page("failures_total", of="request", kind="expert_failed") == 1
    assert page("requests_total", outcome="ok") == 1
    assert page("requests_total", outcome="expert_failed") == 1


def test_those_who_left() -> None:
    with serving(fake_config(fail=["hang"])) as served:
        raw = served.connect(served.post(b'{"model": "one", "messages": [{"role": "user", "content": "x"}]}'))
        wait_for(lambda: Page(served)("running") == 1)
        raw.close()
        wait_for(lambda: served.idle)
        page = Page(served)
    assert page("requests_total", outcome="cancelled") == 1
    assert page("calls_total", outcome="cancelled") == 1


def test_the_queue() -> None:
    with serving(fake_config({"limits": {"max_concurrency": 1, "queue": 1}}, fail=["hang"])) as served:
        body = b'{"model": "one", "messages": [{"role": "user", "content": "x"}]}'
        raws = [served.connect(served.post(body)) for _ in range(2)]
        wait_for(lambda: Page(served)("queue_depth") == 1)
        assert chat(served) == 503
        page = Page(served)
        for raw in raws:
            raw.close()
        wait_for(lambda: served.idle)
    assert page("running") == 2
    assert page("failures_total", of="request", kind="queue_full") == 1


def test_breakers() -> None:
    resilience = {"retries": 0, "breaker_failures": 2, "breaker_open_s": 60}
    with serving(fake_config({"resilience": resilience}, fail=["error"])) as served:
        assert [chat(served, "one") for _ in range(3)] == [503] * 3
        page = Page(served)
        assert served.engine.calls == 2
    assert page("breaker_state", engine="a") == 2
    assert page("requests_total", outcome="breaker_open") == 1


def test_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANN_KEY", "sk-ann")
    key = {"env": "ANN_KEY", "requests_per_minute": 2, "models": ["one"]}
    with serving(fake_config({"security": {"api_keys": {"ann": key}}})) as served:
        assert chat(served) == 401
        served.http.headers["authorization"] = "Bearer sk-ann"
        assert chat(served, "two") == 403
        assert chat(served, "one", temperature=9) == 400
        assert chat(served, "one") == 429
        assert served.http.get("/nothing").status_code == 404
        page = Page(served)
    for kind in ("invalid_api_key", "not_allowed", "bad_request", "rate_limit_exceeded", "not_found"):
        assert page("refusals_total", kind=kind) == 1
    assert "requests_total{" not in page.text


def test_labels_are_few_whatever_is_asked() -> None:
    """No caller's word ever becomes a label."""
    with serving(fake_config()) as served:
        chat(served)
        chat(served, "one", temperature=9)
        chat(served, "nobody")
        served.http.get("/nothing")
        served.http.put("/v1/models")
        before = len(Page(served).samples)
        for i in range(50):
            chat(served, f"nobody-{i}")
            chat(served, collegium={"router": f"nobody-{i}"})
            chat(served, "one", metadata={"tag": f"tag-{i}"}, user=f"user-{i}")
            served.http.get(f"/nothing-{i}")
        chat(served, "one")
        page = Page(served)
    assert "-7" not in "".join(v for s in page.samples for v in s.labels.values())
    assert len(page.samples) < before + 100


def test_a_reload_keeps_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_KEY", "sk-admin")
    path = tmp_path / "c.json"
    config = fake_config({"security": {"admin_key_env": "ADMIN_KEY"}})
    path.write_text(json.dumps(config))
    with serving(config, config_path=path) as served:
        chat(served)
        served.http.post("/admin/reload", headers={"authorization": "Bearer sk-admin"}).raise_for_status()
        chat(served)
        assert Page(served)("requests_total") == 2
