"""collegium models: the checkpoints that can be had offline."""

from typing import Annotated

import typer

from orchestrator.commands.options import Json
from orchestrator.commands.screen import bars, make_console

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def models() -> None:
    """The checkpoints that can be had offline, and making them ready.

    Example: collegium models list
    """


@app.command("list")
def list_(as_json: Json = False) -> None:
    """What there is, what is ready, and where.

    Example: collegium models list
    """
    from experts.models import list_models

    statuses = list_models()
    rows = [
        {
            "name": status.model.name,
            "prepared": status.prepared,
            "size_bytes": status.model.size_bytes,
            "licence": status.model.licence,
            "package": status.model.requirement,
            "path": str(status.path),
        }
        for status in statuses
    ]
    if as_json:
        import json

        typer.echo(json.dumps(rows, indent=2))
        return
    for status in statuses:
        state, megabytes = "ready" if status.prepared else "not prepared", status.model.size_bytes / 1e6
        typer.echo(f"{status.model.name:22} {state:12} {megabytes:4.0f} MB  {status.model.licence:10} {status.path}")


@app.command()
def prepare(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Which one; without it, all of them.")] = None,
) -> None:
    """Convert a model into the cache. Does nothing where that was done before.

    Example: collegium models prepare smollm2-135m-instruct
    """
    from experts import models

    console = make_console()
    for each in [name] if name else list(models.MODELS):
        with bars(console) as progress:
            path = models.prepare(each, progress)
        typer.echo(f"{each} is ready in {path}")
