"""The command line. Each command is a file in orchestrator/commands/. Adding one: a file, a line here, a test."""

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from experts.errors import CollegiumError

COMMANDS = {
    "init": "orchestrator.commands.init:app",
    "doctor": "orchestrator.commands.doctor:app",
    "models": "orchestrator.commands.models:app",
    "serve": "orchestrator.commands.serve:app",
    "ask": "orchestrator.commands.ask:app",
    "route": "orchestrator.commands.route:app",
    "batch": "orchestrator.commands.batch:app",
    "router": "orchestrator.commands.router:app",
    "build": "orchestrator.commands.build:app",
    "eval": "evals.commands:app",
}
EXTRAS = {"matplotlib": "train", "scipy": "train", "sklearn": "train", "torch": "train", "wordllama": "train"}
"""Which extra brings a package that a command may find missing."""


class Commands(TyperGroup):
    """Imports a command when it is named, and says a CollegiumError in a line where Python would show a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CollegiumError as exc:
            if ctx.params["debug"]:
                raise
            typer.secho(f"collegium: {exc.message}", err=True, fg="red")
            raise typer.Exit(1) from exc
        except ModuleNotFoundError as exc:
            extra = EXTRAS.get((exc.name or "").partition(".")[0])
            if extra is None or ctx.params["debug"]:
                raise
            typer.secho(
                f"collegium: this needs the package {exc.name}: pip install 'collegium[{extra}]'", err=True, fg="red"
            )
            raise typer.Exit(1) from exc


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def collegium(
    version: Annotated[
        bool, typer.Option("--version", callback=lambda v: _version(v), is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a failure's traceback.")] = False,
) -> None:
    """One OpenAI-compatible service that answers every request with the right few models.

    Example: collegium ask "What is the capital of France?"
    """


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"collegium {version('collegium')}")
        raise typer.Exit


if __name__ == "__main__":
    app()
