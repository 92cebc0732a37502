"""The app under uvicorn in this process: signals, reload, and an end that finishes what was begun."""

import asyncio
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from rich.markup import escape

from experts.errors import CollegiumError, ConfigError
from orchestrator import log as logs
from orchestrator.app import create_app
from orchestrator.commands.screen import waiting
from orchestrator.config import Config, load_config
from orchestrator.host import Host
from orchestrator.http1 import Http1

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

BACKLOG = 2048
# An answer's objects die by reference count; at Python's 700 the cycle collector takes a quarter of the CPU looking.
COLLECT_AFTER = (10_000, 20, 20)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Taken before any engine loads, so that a port in use costs nothing. Raises ConfigError."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as exc:
        raise ConfigError(f"Cannot listen on '{host}': {exc.strerror}.") from exc
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {exc.strerror}. Stop what runs there, or take a free port with --port 0."
        ) from exc
    return listener


def run(config: Config, *, config_path: Path | None, listener: socket.socket, grace_s: int, console: "Console") -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP reads ``config_path`` again. Requests under way get ``grace_s`` to finish.

    Raises ConfigError before anything is served.
    """
    logs.configure(config.telemetry.log_level)
    _raise_file_limit()
    gc.set_threshold(*COLLECT_AFTER)
    app = create_app(config, config_path=config_path)
    settings = uvicorn.Config(
        app,
        access_log=False,
        backlog=BACKLOG,
        http=Http1,
        lifespan="on",
        log_config=None,
        log_level="warning",
        proxy_headers=False,  # nobody here asks who the client is
        timeout_graceful_shutdown=grace_s,
        ws="none",
    )
    server = Server(settings, Reload(app.state.host, config_path))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(server, listener, app.state.host, console))


async def _serve(server: "Server", listener: socket.socket, host: Host, console: "Console") -> None:
    async with _announced(host, console):
        await server.serve([listener])


class Reload:
    """SIGHUP. A config with a mistake is logged, and the old one stays."""

    def __init__(self, host: Host, config_path: Path | None) -> None:
        self._host = host
        self._path = config_path
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self) -> None:
        task = asyncio.create_task(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self) -> None:
        if self._path is None:
            log.warning("nothing to reload: the service runs on its embedded config")
            return
        try:
            await self._host.reload(load_config(self._path))
        except CollegiumError as exc:
            log.error("config not reloaded, the old one stays: %s", exc.message)
        else:
            log.info("config reloaded from %s", self._path)


class Server(uvicorn.Server):
    """uvicorn's, except that a stop by signal is an ordinary end (exit status 0) and SIGHUP reloads."""

    def __init__(self, config: uvicorn.Config, reload: Reload) -> None:
        super().__init__(config)
        self._reload = reload

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        yield


@asynccontextmanager
async def _announced(host: Host, console: "Console") -> AsyncIterator[None]:
    """Says when the engines are loaded, beside the block."""
    task = asyncio.create_task(_announce(host, console))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _announce(host: Host, console: "Console") -> None:
    started = time.monotonic()
    with waiting(console, f"Loading {', '.join(host.service.engines)}"):
        while not host.ready:  # noqa: ASYNC110  # Host keeps a flag, not an event
            await asyncio.sleep(0.1)
    for engine_id, reason in host.failed.items():
        console.print(f"[red]Engine {engine_id} did not load:[/] {escape(reason)}")
    answering = len(host.service.engines) - len(host.failed)
    console.print(
        f"Ready after {time.monotonic() - started:.1f} s: {answering} of {len(host.service.engines)} engines."
    )


def _raise_file_limit() -> None:
    """A connection is an open file, and many systems start a process with room for 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
