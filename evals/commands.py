"""collegium eval: measure on recorded answers. Each evaluation is a function here; its heavy imports are inside."""

import typer

from evals.routing.cascade_command import cascade
from evals.routing.command import routing

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(routing)
app.command()(cascade)


# Without a callback typer would drop the word 'routing' while it is the only evaluation.
@app.callback()
def measure() -> None:
    """Measure: routers on recorded answers.

    Example: collegium eval routing --pool pools/mmlu-pro --router all --out report
    """
