"""What runs in the cluster: our app as Ray Serve's ingress, each vllm engine a ray.serve.llm deployment of its own.

client -> HAProxy -> Gateway replica (the same app as under uvicorn) -> ServeEngine -> JsonServer replica -> vLLM
"""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.base import Engine
from experts.errors import CollegiumError, ConfigError
from experts.serve_handle import ServeEngine
from experts.types import EngineSpec
from orchestrator import log as logs
from orchestrator.build import build_service, make_engine
from orchestrator.config import Config, Residency, parse_config

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

DRAIN_MARGIN_S = 10
"""Past the deadline, a request has been answered for sure."""


class Gateway:
    """One ingress replica: the whole service, with its vllm engines in other processes."""

    def __init__(self, config: Mapping[str, Any], folder: str, engines: Mapping[str, "DeploymentHandle[Any]"]) -> None:
        # Relative paths in the config are meant from there, not from where Ray starts its processes.
        if Path(folder).is_dir():
            os.chdir(folder)
        self._config = _without_residency(parse_config(config))
        self._engines = engines
        self._app: FastAPI | None = None
        _configure_log(self._config.telemetry.log_level)

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Serve's hook: the app to serve. No config_path: POST /admin/reload would change this replica alone."""
        from orchestrator.app import create_app

        self._app = create_app(self._config, make=self._make)
        return self._app

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve's hook: called on every replica when it starts, and when the application is deployed again."""
        changed = _without_residency(parse_config(config))
        if changed != self._config and await self._took_over(changed):
            self._config = changed

    async def _took_over(self, config: Config) -> bool:
        if self._app is None:
            return True
        try:
            await self._app.state.host.reload(config)
        except CollegiumError as exc:
            # Raised further, it would have Serve end this replica, and each that comes after it.
            log.error("config not reloaded, the old one stays: %s", exc.message)
            return False
        log.info("config reloaded")
        return True

    def _make(self, spec: EngineSpec) -> Engine:
        return _make(spec, self._engines.get(spec.engine_id))


def _without_residency(config: Config) -> Config:
    """Each engine has replicas of its own, and Ray decides how many."""
    return config.model_copy(update={"residency": Residency()})


def _configure_log(level: str) -> None:
    """Serve replaces sys.stderr by a file of its own, which it writes a thousand lines at a time."""
    logs.configure(level)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.__stderr__)


def make_application(config: Config, *, folder: Path, ingress_replicas: int = 1) -> "Application":
    """The gateways and the engines they reach, as one Serve application. Needs Ray to be running.

    Run again, it changes what differs: gateways take a new config without a restart, engines whose spec is the same
    stay as they are. ``folder`` is where the config's relative paths start. Raises ConfigError.
    """
    from ray import serve

    drain_s = config.limits.deadline_s + DRAIN_MARGIN_S
    specs = {e: c.spec(e) for e, c in config.engines.items() if c.backend == "vllm"}
    engines = {engine_id: _engine(spec, drain_s) for engine_id, spec in specs.items()}
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
    return _pin(gateway.bind(settings, str(folder), engines), sorted(specs), str(folder))


def check(config: Config, *, folder: Path) -> None:
    """Raises ConfigError for what no gateway could run on, before any has to try. Loads nothing."""
    if config.batches.path is not None:
        raise ConfigError(
            "batches.path: files and batches are not served under the ray runtime, where each gateway replica would "
            "work on them by its own. Take the section out, or run 'collegium serve --runtime local' for them."
        )
    with chdir(folder):
        build_service(config, make=_make)


class Deployer:
    """Deploys in a process that is not the caller's: to describe an engine to Ray takes all of vLLM, 700 MB."""

    def deploy(self, config: Config, *, name: str, folder: Path, ingress_replicas: int) -> None:
        """Blocks until every replica runs. Raises ConfigError, and then nothing was changed."""
        from ray import serve

        check(config, folder=folder)
        app = make_application(config, folder=folder, ingress_replicas=ingress_replicas)
        serve.run(app, name=name, route_prefix="/")


def _make(spec: EngineSpec, handle: "DeploymentHandle[Any] | None" = None) -> Engine:
    return ServeEngine(spec, handle, json_bodies=True) if spec.backend == "vllm" else make_engine(spec)


def _engine(spec: EngineSpec, drain_s: float) -> "Application":
    # Only where there is one: this imports vLLM.
    from experts.serve_replica import make_deployment

    # How many replicas there are is no property of a replica.
    same = replace(spec, options={name: value for name, value in spec.options.items() if name != "autoscaling"})
    return _pin(make_deployment(spec, name=f"engine-{spec.engine_id}", drain_s=drain_s), same)


def _pin(app: "Application", *identity: object) -> "Application":
    """The deployment, with a version that says what its replicas are made of. Serve's own is random, which replaces
    them all each time; it has no public way to say that nothing changed."""
    from importlib.metadata import version

    from ray.serve import Application

    digest = hashlib.sha256(repr((version("collegium"), identity)).encode()).hexdigest()
    return Application(app._bound_deployment.options(version=digest[:16], _internal=True))
