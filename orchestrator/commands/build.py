"""collegium build: make a part of the service out of data or checkpoints. Each method is a function in a file."""

import typer

from orchestrator.commands.build_reward import reward
from orchestrator.commands.build_stack import stack

_HELP = """Make a part of the service out of data.

Example: collegium build stack --pool pools/mmlu-pro --out artefacts/stack
"""

app = typer.Typer(no_args_is_help=True, help=_HELP, add_completion=False)
app.command()(stack)
app.command()(reward)
