"""collegium eval: measure on recorded answers or real ones. Each evaluation is a function here; its heavy imports are
inside."""

import typer

from evals.generation.command import run
from evals.routing.command import routing

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(routing)
app.command()(run)


@app.callback()
def measure() -> None:
    """Measure: routers on recorded answers, a policy on questions.

    Example: collegium eval routing --pool pools/mmlu-pro --router all --out report
    """
