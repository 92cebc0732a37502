"""collegium eval: measure on recorded answers. Each evaluation is a function here; its heavy imports are inside."""

import typer

from evals.routing.command import routing

app = typer.Typer(no_args_is_help=True, help="Measure: routers on recorded answers.")
app.command()(routing)


@app.callback()
def measure() -> None:
    """Keeps 'routing' a word of the command line while it is the only evaluation."""
