"""collegium serve: the app in this process, or as Ray Serve's ingress."""

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.commands.options import ConfigFile
from orchestrator.commands.screen import make_console
from orchestrator.starter import find_config, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.config import Config

app = typer.Typer(add_completion=False)


@app.command()
def serve(
    config: ConfigFile = None,
    runtime: Annotated[Literal["local", "ray"], typer.Option(help="One process, or Ray Serve.")] = "local",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    address: Annotated[str | None, typer.Option(help="Ray runtime: a running cluster to join.")] = None,
    grace_s: Annotated[int, typer.Option(min=0, help="What requests under way get to finish at the end.")] = 30,
) -> None:
    """Run the service until Ctrl-C or SIGTERM. SIGHUP reads the config file again.

    Example: collegium serve -c collegium.yaml --port 8000
    """
    if address is not None and runtime != "ray":
        raise typer.BadParameter("--address needs --runtime ray.")
    path = find_config(config)
    loaded = read_config(path)
    if runtime == "ray":
        from orchestrator.ray_runtime import run as run_on_ray

        run_on_ray(loaded, config_path=path, host=host, port=port, address=address)
        return
    from orchestrator.server import listen, run

    listener, console = listen(host, port), make_console()
    _greet(console, loaded, path, listener)
    run(loaded, config_path=path, listener=listener, grace_s=grace_s, console=console)


def _greet(console: "Console", config: "Config", path: Path | None, listener: socket.socket) -> None:
    """Where it listens, and what to try."""
    url = _url(listener)
    body = {"model": "collegium", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    key = '-H "Authorization: Bearer $COLLEGIUM_API_KEY" ' if config.security.api_keys else ""
    console.print(
        f"[bold]collegium[/] on [bold]{url}[/] with {len(config.experts)} experts on {len(config.engines)} engine(s), "
        f"by {path or 'the embedded default config'}. Ctrl-C stops it. Try:\n"
        f'  collegium ask "What is the capital of France?" --url {url}\n'
        f"  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
        f"  {url}/docs"
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
