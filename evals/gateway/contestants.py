"""Who takes part: our service as a user starts it, the bare forwarders, LiteLLM's proxy."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evals.gateway.load import Target
from evals.gateway.process import NotStarted, Process, free_port

LITELLM_VENV = Path(".venv-litellm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    target: Target
    process: Process


@contextmanager
def stub(core: int, folder: Path) -> Iterator[int]:
    """The upstream of all; gives its port."""
    port = free_port()
    command = [sys.executable, "-m", "evals.gateway.stub", "--port", str(port)]
    process = Process(command, port=port, core=core, log=folder / "stub.log")
    try:
        process.wait(30)
        yield port
    finally:
        process.stop()


def collegium(upstream: int, core: int, folder: Path) -> Contestant:
    """``collegium serve`` with one endpoint, and everything else left as it comes."""
    config = folder / "collegium.yaml"
    config.write_text(
        json.dumps(
            {
                "engines": {
                    "stub": {"backend": "openai", "model": "stub", "base_url": f"http://127.0.0.1:{upstream}/v1"}
                },
                "experts": {"one": {"engine": "stub"}, "two": {"engine": "stub"}},
                "policies": {"default": {"router": "always"}},
            }
        )
    )
    command = [sys.executable, "-m", "orchestrator.cli", "serve", "--config", str(config)]
    return _start("collegium", "collegium", [*command, "--port"], core, folder)


def forwarder(client: str) -> Callable[[int, int, Path], Contestant]:
    def start(upstream: int, core: int, folder: Path) -> Contestant:
        package = client.replace("-", "_")
        if importlib.util.find_spec(package) is None:
            raise NotStarted(f"the package {package} is not installed")
        command = [sys.executable, "-m", "evals.gateway.baselines", "--client", client, "--upstream", str(upstream)]
        return _start(f"FastAPI + {client}", "stub", [*command, "--port"], core, folder)

    return start


def litellm(upstream: int, core: int, folder: Path) -> Contestant:
    """LiteLLM's proxy with one worker, from a virtual environment of its own that is made at the first run."""
    binary = (LITELLM_VENV / "bin" / "litellm").absolute()
    if not binary.exists():
        _install_litellm()
    config = folder / "litellm.yaml"
    params = {"model": "openai/stub", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    models = [{"model_name": "stub", "litellm_params": params}]
    # It wants a key by default; checking none is in its favour.
    settings = {"dangerously_permit_weak_or_unset_master_key": True}
    config.write_text(json.dumps({"model_list": models, "general_settings": settings}))
    options = ("--host", "127.0.0.1", "--num_workers", "1", "--telemetry", "False")
    command = [str(binary), "--config", str(config), *options, "--port"]
    # Its price list would otherwise be fetched from the network.
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return _start("LiteLLM proxy", "stub", command, core, folder, env=env)


def _install_litellm() -> None:
    print("installing LiteLLM's proxy into", LITELLM_VENV, "(minutes, once)", flush=True)
    pip = str(LITELLM_VENV / "bin" / "pip")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(LITELLM_VENV)], check=True, capture_output=True)
        subprocess.run([pip, "install", "--quiet", "litellm[proxy]"], check=True, capture_output=True, timeout=900)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        said = (exc.stderr or b"").decode(errors="replace").strip()[-300:]
        raise NotStarted(f"it could not be installed: {said or exc}") from exc


def _start(
    name: str,
    model: str,
    command: list[str],
    core: int,
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
) -> Contestant:
    port = free_port()
    log = Path(tempfile.mkstemp(prefix=name.replace(" ", "-"), suffix=".log", dir=folder)[1])
    process = Process([*command, str(port)], port=port, core=core, log=log, env=env)
    try:
        process.wait(120)
    except NotStarted:
        process.stop()
        raise
    return Contestant(target=Target(name=name, port=port, model=model), process=process)


CONTESTANTS: dict[str, Callable[[int, int, Path], Contestant]] = {
    "collegium": collegium,
    "aiohttp": forwarder("aiohttp"),
    "litellm": litellm,
    "httpx": forwarder("httpx"),
    "httpx-aiohttp": forwarder("httpx-aiohttp"),
}
