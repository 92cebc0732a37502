"""'collegium serve' as its own process: signals, reload, ports; and 'ask' and 'route' against it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app

CONFIG = """
engines:
  quick: {backend: fake, options: {text: "{expert_id} heard {question}", chunks: 3}}
  slow: {backend: fake, options: {text: "slowly slowly slowly done", chunks: 4, chunk_s: 0.3}}
  hanging: {backend: fake, options: {fail: [hang]}}
experts:
  one: {engine: quick}
  two: {engine: slow}
  three: {engine: hanging}
policies:
  default: {router: always}
"""


class Service:
    """A 'collegium serve' process on a free port."""

    def __init__(self, config: Path, *options: str) -> None:
        command = [sys.executable, "-m", "orchestrator.cli", "serve", "-c", str(config), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.lines: list[str] = []
        self._heard = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = ""

    def ready(self) -> "Service":
        self.url = self.wait_for(r"on (http://\S+:\d+) with").group(1)
        self.wait_for("Ready after")
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                with self._heard:
                    self.lines.append(line)
                    self._heard.notify_all()
        with self._heard:
            self._ended = True
            self._heard.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line of its log, past or to come, that matches."""
        with self._heard:
            self._heard.wait_for(lambda: self._ended or self._find(pattern) is not None, timeout=20)
            match = self._find(pattern)
        assert match is not None, f"no '{pattern}' in:\n{''.join(self.lines)}"
        return match

    def _find(self, pattern: str) -> re.Match[str] | None:
        return next((m for line in self.lines if (m := re.search(pattern, line))), None)

    def get(self, path: str) -> dict[str, object]:
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            body: dict[str, object] = json.load(reply)
            return body

    def post(self, expert: str) -> str:
        """A streamed chat, whole, as text."""
        body = {"model": expert, "stream": True, "messages": [{"role": "user", "content": "Why?"}]}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=20) as reply:
            return str(reply.read().decode())

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(timeout=20)
        self._reader.join()
        return status

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "fake.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def start(config: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def make(*options: str) -> Service:
        services.append(Service(config, *options))
        return services[-1].ready()

    yield make
    for service in services:
        service.close()


@pytest.fixture
def run() -> CliRunner:
    return CliRunner()


def in_background(call: Callable[[], str]) -> tuple[threading.Thread, list[str]]:
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def wait_until_busy(service: Service, expert: str) -> None:
    """Returns when a call of ``expert`` is under way: the request is counted before its answer begins."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{service.url}/metrics", timeout=10) as reply:
            if re.search(rf'routes?_total{{.*"{expert}".*}} [1-9]', reply.read().decode()):
                return
        time.sleep(0.02)
    raise AssertionError(f"no request reached {expert}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_was_begun_and_exits_0(start: Callable[..., Service], number: int) -> None:
    service = start()
    thread, answers = in_background(lambda: service.post("two"))
    wait_until_busy(service, "two")
    assert service.end(number) == 0
    thread.join()
    assert _text(answers[0]) == "slowly slowly slowly done"
    assert answers[0].endswith("data: [DONE]\n\n")
    with pytest.raises(urllib.error.URLError):
        service.get("/healthz")


def test_what_is_not_finished_in_time_is_cut_off(start: Callable[..., Service]) -> None:
    service = start("--grace-s", "0")

    def ask() -> str:
        try:
            return service.post("three")
        except (OSError, urllib.error.URLError) as exc:
            return f"cut off: {exc}"

    thread, answers = in_background(ask)
    wait_until_busy(service, "three")
    assert service.end() == 0
    thread.join()
    assert "cut off" in answers[0] or "error" in answers[0]


def test_a_hang_up_reads_the_config_again(start: Callable[..., Service], config: Path) -> None:
    service = start()
    config.write_text(CONFIG.replace("policies:", "  four: {engine: quick}\npolicies:"))
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("config reloaded")
    assert '"id":"four"' in json.dumps(service.get("/v1/models"), separators=(",", ":"))
    assert "four heard Why?" in _text(service.post("four"))


def test_a_config_with_a_mistake_leaves_the_old_one(start: Callable[..., Service], config: Path) -> None:
    service = start()
    config.write_text(CONFIG.replace("router: always", "rooter: always"))
    service.process.send_signal(signal.SIGHUP)
    assert "did you mean 'router'?" in service.wait_for("config not reloaded.*").group()
    assert "one heard Why?" in _text(service.post("one"))


def test_a_port_in_use_is_said_before_anything_loads(config: Path) -> None:
    config.write_text(CONFIG.replace("fail: [hang]", "load_s: 600"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = [sys.executable, "-m", "orchestrator.cli", "serve", "-c", str(config), "--port", port]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
    assert "--port 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_host_that_is_not_ours(run: CliRunner, config: Path) -> None:
    result = run.invoke(app, ["serve", "-c", str(config), "--host", "no.such.host.invalid"])
    assert (result.exit_code, "Cannot listen on 'no.such.host.invalid'" in result.stderr) == (1, True)


def test_an_engine_that_does_not_load_is_named(config: Path, start: Callable[..., Service]) -> None:
    config.write_text(CONFIG.replace("fail: [hang]", "fail: [load]"))
    service = start()
    service.wait_for("Engine hanging did not load: .*as scripted")
    service.wait_for("2 of 3 engines")
    assert "one heard Why?" in _text(service.post("one"))


def test_ask_and_route_a_running_service(run: CliRunner, start: Callable[..., Service]) -> None:
    url = start().url
    asked = run.invoke(app, ["ask", "Why?", "--url", url, "--explain"])
    assert asked.exit_code == 0
    assert asked.stdout == "one heard Why?\n"
    assert "one by always in" in asked.stderr
    assert "1 + 3 tokens" in asked.stderr
    by_name = json.loads(run.invoke(app, ["ask", "Why?", "--url", url, "--expert", "two", "--json"]).stdout)
    assert by_name["answer"] == "slowly slowly slowly done"
    assert by_name["decision"]["expert_ids"] == ["two"]
    routed = json.loads(run.invoke(app, ["route", "Why?", "--url", f"{url}/v1", "--router", "random", "--json"]).stdout)
    assert set(routed) == {"expert_ids", "weights", "scores", "reason", "router", "route_ms"}
    assert routed["router"] == "random"


def test_a_running_service_that_refuses(run: CliRunner, start: Callable[..., Service]) -> None:
    refused = run.invoke(app, ["ask", "Why?", "--url", start().url, "--expert", "nobody"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "No model 'nobody'" in refused.stderr


def test_a_running_service_that_asks_for_a_key(
    run: CliRunner, start: Callable[..., Service], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(CONFIG + "security: {api_keys: {alice: {env: ALICE_KEY}}}")
    monkeypatch.setenv("ALICE_KEY", "secret")
    url = start().url
    monkeypatch.delenv("COLLEGIUM_API_KEY", raising=False)
    assert "COLLEGIUM_API_KEY" in run.invoke(app, ["ask", "Why?", "--url", url]).stderr
    monkeypatch.setenv("COLLEGIUM_API_KEY", "secret")
    assert run.invoke(app, ["ask", "Why?", "--url", url]).stdout == "one heard Why?\n"


def test_no_running_service(run: CliRunner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    result = run.invoke(app, ["ask", "Why?", "--url", url])
    assert result.exit_code == 1
    assert "Is 'collegium serve' running there?" in result.stderr
    bare = run.invoke(app, ["ask", "Why?", "--url", url.removeprefix("http://")])
    assert "takes an address with http://" in bare.stderr


def _text(events: str) -> str:
    """The text of a stream of events."""
    rows = [json.loads(e[6:]) for e in events.split("\n\n") if e.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for row in rows for c in row.get("choices", ()))
