"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Config file; without it ./collegium.yaml, else the embedded default."),
]
Text = Annotated[str, typer.Argument(metavar="TEXT", help="The question.")]
RouterName = Annotated[str | None, typer.Option("--router", help="Router instead of the policy's.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="How many experts to ask.")]
Policy = Annotated[str | None, typer.Option("--policy", help="A policy of the config instead of 'default'.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Aggregator = Annotated[str | None, typer.Option("--aggregator", help="What makes one answer of several.")]
Expert = Annotated[str | None, typer.Option("--expert", help="Ask this expert; nothing is routed.")]
Url = Annotated[str | None, typer.Option("--url", help="A running service, such as http://127.0.0.1:8000.")]
