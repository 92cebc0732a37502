"""collegium doctor: one line a check, and what to do."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.options import ConfigFile, Json
from orchestrator.commands.screen import make_console
from orchestrator.starter import find_config

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.doctor.case import Finding

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    config: ConfigFile = None,
    host: Annotated[str, typer.Option(help="Where the service is to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the service is to listen.")] = 8000,
    as_json: Json = False,
) -> None:
    """Check the installation, the config and each endpoint, and say what to do. Exit status 1 when a check fails.

    Example: collegium doctor -c collegium.yaml
    """
    from orchestrator.doctor import examine

    findings, console = [], make_console(stderr=False)
    for finding in examine(find_config(config), host=host, port=port):
        findings.append(finding)
        if not as_json:
            _show(console, finding)
    failed = any(f.status == "fail" for f in findings)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "findings": [asdict(f) for f in findings]}))
    if failed:
        raise typer.Exit(1)


def _show(console: "Console", finding: "Finding") -> None:
    from rich.markup import escape

    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}[finding.status]
    todo = f" [bold]-> {escape(finding.todo)}[/]" if finding.todo else ""
    console.print(f"[{colour}]{finding.status:4}[/]  {finding.check:9}  {escape(finding.message)}{todo}")
