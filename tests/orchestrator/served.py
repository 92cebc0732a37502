"""The real app under uvicorn on a free loopback port, in a thread of its own, as `collegium serve` runs it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from experts.base import Engine
from experts.fake import FakeEngine
from experts.types import EngineSpec
from orchestrator.app import create_app
from orchestrator.build import Service, make_engine
from orchestrator.config import parse_config
from orchestrator.http1 import Http1

HELLO = "{expert_id} says hello to {question}"


def fake_config(sections: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Two experts on one fake engine with ``options``; ``sections`` are put over it."""
    return {
        "engines": {"a": {"backend": "fake", "options": {"text": HELLO, "chunks": 4, **options}}},
        "experts": {"one": {"engine": "a", "usd_per_mtok_out": 2}, "two": {"engine": "a"}},
        "policies": {"default": {"router": "always"}, "turns": {"router": "round_robin"}},
        "resilience": {"retries": 0},
        **(sections or {}),
    }


class Served:
    """A service that runs, and a client of it. ``service`` and ``engine`` may be looked at from the test's thread."""

    def __init__(self, app: FastAPI, server: uvicorn.Server, port: int, http: httpx.Client) -> None:
        self.app = app
        self.server = server
        self.port = port
        self.http = http
        self.url = f"http://127.0.0.1:{port}"

    @property
    def service(self) -> Service:
        service: Service = self.app.state.host.service
        return service

    @property
    def engine(self) -> FakeEngine:
        engine = self.service.engines["a"]
        assert isinstance(engine, FakeEngine)
        return engine

    @property
    def idle(self) -> bool:
        return self.engine.running == 0 and len(self.service.ledger) == 0 and self.service.admission.queued == 0

    def client(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 10.0, **settings})

    def connect(self, data: bytes = b"", *, receive_buffer: int | None = None) -> socket.socket:
        """A raw connection that has sent ``data``."""
        raw = socket.socket()
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", self.port))
        raw.sendall(data)
        return raw

    def exchange(self, data: bytes) -> bytes:
        """All that comes back for ``data`` until the service closes the connection."""
        with self.connect(data) as raw:
            return b"".join(iter(lambda: raw.recv(65536), b""))

    def post(self, body: bytes, path: str = "/v1/chat/completions", head: str = "") -> bytes:
        """A whole request that asks for the connection to be closed."""
        return (
            f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n{head}"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode() + body


@contextmanager
def serving(
    config: Mapping[str, Any],
    *,
    config_path: Path | None = None,
    make: Callable[[EngineSpec], Engine] = make_engine,
    grace_s: int = 2,
    ready: bool = True,
    prepare: Callable[[FastAPI], None] = lambda _: None,
) -> Iterator[Served]:
    """Serves until the block ends. ``ready`` waits for the engines; ``prepare`` may change the app before it starts."""
    app = create_app(parse_config(config), config_path=config_path, make=make)
    prepare(app)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    # Small, so that it takes little to fill what lies between the two ends; connections inherit it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    settings = uvicorn.Config(
        app, http=Http1, loop="uvloop", ws="none", access_log=False, log_config=None, timeout_graceful_shutdown=grace_s
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_for(lambda: app.state.host.ready if ready else server.started)
        port = listener.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as http:
            yield Served(app, server, port, http)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def wait_for(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Returns as soon as ``condition`` holds."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.005)
