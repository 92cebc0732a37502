"""collegium init: the starter config, or the JSON Schema of every config."""

import json
from pathlib import Path
from typing import Annotated

import typer

from experts.errors import ConfigError
from orchestrator.starter import FILENAME, starter_text

app = typer.Typer(add_completion=False)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write it.")] = Path(),
    schema: Annotated[bool, typer.Option("--schema", help="Print the config's JSON Schema; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a collegium.yaml that is there.")] = False,
) -> None:
    """Write a commented collegium.yaml that works as it stands.

    Example: collegium init my-service
    """
    if schema:
        from orchestrator.config import Config

        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
        return
    path = folder / FILENAME
    _write(path, starter_text(), force=force)
    typer.echo(f"Wrote {path}. Next: collegium doctor -c {path}, then collegium serve -c {path}")


def _write(path: Path, text: str, *, force: bool) -> None:
    """Raises ConfigError where ``path`` exists, unless ``force``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as exc:
        raise ConfigError(f"{path} exists; --force replaces it.") from exc
    except OSError as exc:
        raise ConfigError(f"Cannot write {path}: {exc.strerror}.") from exc
