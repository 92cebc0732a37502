"""The FastAPI app: the same one under uvicorn and as Ray Serve's ingress."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Match, Route

from experts.base import Engine
from experts.errors import BadRequest, CollegiumError, Unavailable
from experts.types import EngineSpec
from orchestrator.batches.endpoints import BatchEndpoints
from orchestrator.batches.manager import Manager
from orchestrator.batches.register import Register
from orchestrator.build import Service, build_service, make_engine
from orchestrator.config import Config, load_config
from orchestrator.decisions import DecisionLog, MemoryShelf, SqliteShelf
from orchestrator.direct import Direct
from orchestrator.endpoints import Endpoints
from orchestrator.exchange import BROKEN, error_reply
from orchestrator.host import Host
from orchestrator.log import RequestLog
from orchestrator.metrics import Metrics
from orchestrator.run import Observer
from orchestrator.schema import mount
from orchestrator.tracing import Tracing, make_tracing

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)


def create_app(
    config: Config,
    *,
    config_path: Path | None = None,
    make: Callable[[EngineSpec], Engine] = make_engine,
) -> FastAPI:
    """The service under ``config``. ``config_path`` is what a reload reads; ``make`` makes the engines.

    Raises ConfigError. Engines load when the app starts, in the background: /readyz says when they are there.
    """
    decisions = DecisionLog(_shelf(config))
    tracing = make_tracing(config.telemetry.otlp_endpoint) if config.telemetry.otlp_endpoint else None
    metrics = Metrics(lambda: host.service)
    observers: list[Observer] = [decisions, metrics, RequestLog(), *([tracing] if tracing else [])]

    def build(config: Config, engines: Mapping[str, Engine]) -> Service:
        return build_service(config, engines, observers=observers, make=make)

    host = Host(config, build)
    register = Register(config.batches.path) if config.batches.path else None
    manager = Manager(host, register, config.batches) if register else None
    app = FastAPI(
        title="collegium",
        summary="One OpenAI-compatible service that answers every request with the right few models.",
        lifespan=lambda _: _lifespan(host, decisions, tracing, register, manager),
        redirect_slashes=False,
        docs_url=None,  # mount() brings one that works offline
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.host = host
    endpoints = Endpoints(host, decisions, metrics, reload=lambda: _reload(host, config_path))
    mount(app, endpoints, BatchEndpoints(host, register, manager, config.batches))
    busy = {
        "/v1/chat/completions": endpoints.chat,
        "/v1/completions": endpoints.completions,
        "/v1/route": endpoints.route,
        "/v1/embeddings": endpoints.embeddings,
    }
    app.add_middleware(Direct, handlers=busy, refused=metrics.refused)
    _explain_errors(app, metrics)
    return app


def build_serve_app(args: Mapping[str, Any]) -> "Application":
    """What deploy/serve.yaml names: the app as a Ray Serve application. ``args``: {"config": path}."""
    from orchestrator.ray_runtime import build_application

    return build_application(args)


@asynccontextmanager
async def _lifespan(
    host: Host, decisions: DecisionLog, tracing: Tracing | None, register: Register | None, manager: Manager | None
) -> AsyncIterator[None]:
    start = asyncio.create_task(_start(host, manager))
    try:
        yield
    finally:
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        if manager is not None:
            await manager.close()
        await host.close()
        await asyncio.to_thread(decisions.close)
        if register is not None:
            await asyncio.to_thread(register.close)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


async def _start(host: Host, manager: Manager | None) -> None:
    try:
        await host.start()
        if manager is not None:
            await manager.start()
    except Unavailable:
        raise  # the service ended first
    except Exception:
        # Nobody waits for this task: unsaid, the service would just never be ready.
        log.exception("the engines could not be started")
        raise


async def _reload(host: Host, config_path: Path | None) -> None:
    if config_path is None:
        raise BadRequest("The service runs on its built-in config; there is no file to read again.")
    old, new = host.service.config, load_config(config_path)
    await host.reload(new)
    log.info("config reloaded from %s", config_path)
    for section in ("batches", "decisions", "telemetry"):
        if getattr(old, section) != getattr(new, section):
            log.warning("'%s' changed in the config; that takes a restart", section)


def _shelf(config: Config) -> MemoryShelf | SqliteShelf:
    kept = config.decisions
    return MemoryShelf(kept.keep) if kept.path is None else SqliteShelf(kept.path, kept.keep, log.error)


def _explain_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every failure, Starlette's own included, leaves as OpenAI's error object."""

    @app.exception_handler(CollegiumError)
    async def ours(_: HttpRequest, exc: CollegiumError) -> Response:
        metrics.refused(exc.code)
        return error_reply(exc)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: HttpRequest, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    @app.exception_handler(HTTPException)
    async def starlettes(http: HttpRequest, exc: HTTPException) -> Response:
        phrase = HTTPStatus(exc.status_code).phrase
        error = BadRequest(f"{phrase}: {http.method} {http.url.path[:200]}. /docs lists what there is.")
        error.status, error.code = exc.status_code, phrase.lower().replace(" ", "_")
        metrics.refused(error.code)
        reply = error_reply(error)
        reply.headers.update(exc.headers or {})
        if exc.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            reply.headers["allow"] = _allowed(app, http)
        return reply

    @app.exception_handler(RequestValidationError)
    async def fastapis(_: HttpRequest, exc: RequestValidationError) -> Response:
        return error_reply(BadRequest(f"{exc.errors()[0]['loc']}: {exc.errors()[0]['msg']}."))

    @app.exception_handler(Exception)
    async def bugs(_: HttpRequest, __: Exception) -> Response:
        return error_reply(CollegiumError(BROKEN))  # the server logs it


def _allowed(app: FastAPI, http: HttpRequest) -> str:
    """The methods of a path; Starlette names those of the first route that it stands on."""
    routes = [r for r in app.router.routes if isinstance(r, Route) and r.matches(http.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))
