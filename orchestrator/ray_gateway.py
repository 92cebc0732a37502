"""What runs in the cluster: our app as Ray Serve's ingress, each vllm engine a ray.serve.llm deployment of its own.

client -> HAProxy -> Gateway replica (the same app as under uvicorn) -> ServeEngine -> JsonServer replica -> vLLM
"""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.base import Engine
from experts.serve_handle import ServeEngine
from experts.types import EngineSpec
from orchestrator import log as logs
from orchestrator.build import make_engine
from orchestrator.config import Config, parse_config

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)


class Gateway:
    """One ingress replica: the whole service, with its vllm engines in other processes."""

    def __init__(self, config: Mapping[str, Any], folder: str, engines: Mapping[str, "DeploymentHandle[Any]"]) -> None:
        # Relative paths in the config are meant from there, not from where Ray starts its processes.
        if Path(folder).is_dir():
            os.chdir(folder)
        self._config = parse_config(config)
        self._engines = engines
        self._app: FastAPI | None = None
        logs.configure(self._config.telemetry.log_level)
        for handler in logging.getLogger().handlers:
            # Serve replaces sys.stderr by a file of its own that it writes a thousand lines at a time.
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.__stderr__)

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Serve's hook: the app to serve. No config_path: POST /admin/reload would change this replica alone."""
        from orchestrator.app import create_app

        self._app = create_app(self._config, make=self._make)
        return self._app

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve's hook: called on every replica when it starts, and when the application is deployed again."""
        changed = parse_config(config)
        if self._app is not None and changed != self._config:
            await self._app.state.host.reload(changed)
            self._config = changed
            log.info("config reloaded")

    def _make(self, spec: EngineSpec) -> Engine:
        if spec.backend != "vllm":
            return make_engine(spec)
        return ServeEngine(spec, self._engines[spec.engine_id], json_bodies=True)


def make_application(config: Config, *, folder: Path, ingress_replicas: int = 1) -> "Application":
    """The gateways and the engines they reach, as one Serve application. Needs Ray to be running.

    Run again, it changes what differs: gateways take a new config without a restart, engines whose spec is the same
    stay as they are. ``folder`` is where the config's relative paths start.
    """
    from ray import serve

    from experts.serve_replica import make_deployment, pin

    drain_s = config.limits.deadline_s + 10
    specs = {e: c.spec(e) for e, c in config.engines.items() if c.backend == "vllm"}
    engines = {
        engine_id: make_deployment(spec, name=f"engine-{engine_id}", version=_version(spec), drain_s=drain_s)
        for engine_id, spec in specs.items()
    }
    settings = config.model_dump(mode="json", exclude_unset=True)
    gateway = serve.deployment(
        name="gateway",
        num_replicas=ingress_replicas,
        user_config=settings,
        # Admission is ours: it queues, and says 503 with Retry-After.
        max_ongoing_requests=1_000_000,
        # When they have to be replaced, new ones answer before old ones go.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=drain_s,
        # An engine's CPU must not be lost to what only passes messages.
        ray_actor_options={"num_cpus": 0},
        # Each request is in our own log.
        logging_config={"enable_access_log": False},
    )(serve.ingress()(Gateway))
    return pin(gateway.bind(settings, str(folder), engines), _version(sorted(specs), str(folder)))


def deploy_application(config: Config, *, name: str, folder: Path, ingress_replicas: int) -> None:
    """Blocks until every replica runs."""
    from ray import serve

    serve.run(make_application(config, folder=folder, ingress_replicas=ingress_replicas), name=name, route_prefix="/")


def _version(*parts: object) -> str:
    from importlib.metadata import version

    return hashlib.sha256(repr((version("collegium"), parts)).encode()).hexdigest()[:16]
