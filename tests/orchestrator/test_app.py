"""The service as a whole: its start and end, its config read again, its paths as contracts.md names them."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from experts.errors import ConfigError
from orchestrator.app import create_app
from orchestrator.config import parse_config
from tests.orchestrator.served import Served, fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "Ann"}]
ADMIN = {"authorization": "Bearer sk-admin"}


def chat(served: Served, model: str = "one", **keys: Any) -> Any:
    return served.http.post("/v1/chat/completions", json={"model": model, "messages": ASK, **keys})


@pytest.mark.filterwarnings("ignore:open_binary is deprecated")  # by the package that has Swagger's files
def test_the_paths_of_the_contract() -> None:
    with serving(fake_config()) as served:
        paths = served.http.get("/openapi.json").json()["paths"]
        assert set(paths) >= {
            "/admin/reload",
            "/healthz",
            "/metrics",
            "/readyz",
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/decisions/{request_id}",
            "/v1/embeddings",
            "/v1/models",
            "/v1/models/{model}",
            "/v1/route",
        }
        assert served.http.get("/healthz").json() == {"status": "ok"}
        page = served.http.get("/docs").text
        assert "swagger" in page.lower()
        assert "https://" not in page  # works offline
        assert "http://" not in page  # and behind a proxy that speaks TLS, or adds a prefix
        for file in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
            assert f'"swagger/{file}"' in page
            assert served.http.get(f"/swagger/{file}").status_code == 200
        assert served.http.get("/", follow_redirects=False).headers["location"] == "docs"


def test_while_the_engines_load() -> None:
    with serving(fake_config(load_s=0.5), ready=False) as served:
        assert served.http.get("/healthz").status_code == 200
        ready = served.http.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "engines": {"a": "loading"}})
        assert ready.headers["retry-after"] == "5"
        reply = chat(served)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
        assert reply.headers["retry-after"] == "5"
        assert served.http.get("/v1/models").status_code == 200
        wait_for(lambda: served.http.get("/readyz").status_code == 200)
        assert chat(served).status_code == 200


def test_engines_that_do_not_load() -> None:
    good = {"backend": "fake"}
    bad = {"backend": "fake", "options": {"fail": ["load"]}}
    with serving(fake_config({"engines": {"a": good, "b": bad}})) as served:
        state = served.http.get("/readyz")
        assert state.status_code == 200
        assert state.json()["engines"]["a"] == "ready"
        assert state.json()["engines"]["b"].startswith("failed: ")
        assert chat(served).status_code == 200
    with serving(fake_config({"engines": {"a": bad}})) as served:
        state = served.http.get("/readyz")
        assert (state.status_code, state.json()["ready"]) == (503, False)
        assert chat(served).status_code == 503


def test_a_start_that_breaks_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(fake_config(), ready=False, prepare=break_start):
        wait_for(lambda: "no start today" in caplog.text)


def break_start(app: Any) -> None:
    async def start() -> None:
        raise RuntimeError("no start today")

    app.state.host.start = start


def test_a_wrong_config_makes_no_app() -> None:
    with pytest.raises(ConfigError, match="nobody"):
        create_app(parse_config(fake_config({"policies": {"default": {"router": "nobody"}}})))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADMIN_KEY", "sk-admin")
    path = tmp_path / "collegium.yaml"
    write(path)
    return path


def write(path: Path, **sections: Any) -> None:
    config = fake_config({"security": {"admin_key_env": "ADMIN_KEY"}, **sections}, chunk_s=0.05)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.fixture
def served(file: Path) -> Iterator[Served]:
    with serving(yaml.safe_load(file.read_text(encoding="utf-8")), config_path=file) as running:
        yield running


def test_reload(file: Path, served: Served) -> None:
    write(
        file,
        experts={"three": {"engine": "a"}},
        limits={"max_tokens": 5},
        security={"admin_key_env": "ADMIN_KEY", "api_keys": {"ann": {"env": "ADMIN_KEY_2"}}},
    )
    os.environ["ADMIN_KEY_2"] = "sk-ann"
    try:
        reply = served.http.post("/admin/reload", headers=ADMIN)
    finally:
        del os.environ["ADMIN_KEY_2"]  # read when the config was, not later
    models = ["collegium", "collegium/default", "collegium/turns", "three"]
    assert reply.json() == {"status": "reloaded", "models": models}
    assert chat(served, "three").status_code == 401
    served.http.headers["authorization"] = "Bearer sk-ann"
    assert [m["id"] for m in served.http.get("/v1/models").json()["data"]] == models
    assert chat(served, "one").status_code == 404
    assert chat(served, "three").status_code == 200
    assert chat(served, "three", max_tokens=6).status_code == 400


def test_requests_under_way_end_on_the_old_config(file: Path, served: Served) -> None:
    replies: list[Any] = []
    old, engine = served.service, served.engine
    threads = [
        threading.Thread(target=lambda stream=stream: replies.append(chat(served, stream=stream)))
        for stream in (True, False)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: engine.running == 2)
    write(file, experts={"three": {"engine": "b"}}, engines={"b": {"backend": "fake"}})
    assert served.http.post("/admin/reload", headers=ADMIN).status_code == 200
    assert served.service is not old
    assert engine.running == 2
    for thread in threads:
        thread.join()
    assert [r.status_code for r in replies] == [200, 200]
    assert sum(r.text.endswith("data: [DONE]\n\n") for r in replies) == 1
    wait_for(lambda: not engine.loaded)  # and then the old engine goes
    assert chat(served, "three").status_code == 200


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"limits": {"max_token": 5}}, "max_tokens"),
        ({"policies": {"default": {"router": "nobody"}}}, "nobody"),
        ({"security": {"admin_key_env": "NO_SUCH_VARIABLE"}}, "NO_SUCH_VARIABLE"),
        ({"experts": {"x": {"engine": "nobody"}}}, "nobody"),
        ({"engines": {"a": {"backend": "fake", "options": {"fail": ["load"]}}}}, "did not load"),
    ],
)
def test_a_wrong_config_changes_nothing(file: Path, served: Served, sections: Any, says: str) -> None:
    write(file, **sections)
    old = served.service
    reply = served.http.post("/admin/reload", headers=ADMIN)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "config_error")
    assert says in reply.json()["error"]["message"]
    assert served.service is old
    assert chat(served).status_code == 200


def test_a_file_that_is_no_config(file: Path, served: Served) -> None:
    for content in (b"engines: [", b"\xff\xfe\x00", b"just text", b""):
        file.write_bytes(content)
        assert served.http.post("/admin/reload", headers=ADMIN).status_code == 500
    file.unlink()
    reply = served.http.post("/admin/reload", headers=ADMIN)
    assert "Cannot read" in reply.json()["error"]["message"]
    assert chat(served).status_code == 200


def test_what_a_reload_does_not_change_is_said(file: Path, served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    write(file, decisions={"keep": 5})
    assert served.http.post("/admin/reload", headers=ADMIN).status_code == 200
    assert "decisions" in caplog.text
    assert "restart" in caplog.text


def test_no_file_no_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_KEY", "sk-admin")
    with serving(fake_config({"security": {"admin_key_env": "ADMIN_KEY"}})) as served:
        assert served.http.post("/admin/reload", headers=ADMIN).status_code == 400


def test_a_hundred_requests_through_ten_reloads(file: Path, served: Served) -> None:
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(chat(served).status_code)) for _ in range(100)]
    for i, thread in enumerate(threads):
        thread.start()
        if i % 10 == 0:
            served.http.post("/admin/reload", headers=ADMIN).raise_for_status()
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert statuses == [200] * 100
    wait_for(lambda: served.idle)
