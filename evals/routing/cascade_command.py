"""The command line of the cascade's evaluation."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.routing.command import Experts, Hide, Model, Pool, Seed, Split


def cascade(
    pool: Pool,
    experts: Experts = None,
    train: Split = "train",
    test: Split = "test",
    most: Annotated[int, typer.Option(min=1, help="Experts asked a question at most.")] = 3,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for cascade.json and cascade.png.")] = Path("cascade-report"),
    encoder: Model = "all-minilm-l6-v2",
    hide_tasks: Hide = False,
) -> None:
    """Cheap experts first: what a cascade scores at every budget, on recorded answers.

    Example: collegium eval cascade --pool pools/mmlu-pro --out report
    """
    from orchestrator.commands.screen import make_console

    chosen = None if experts is None else [e.strip() for e in experts.split(",") if e.strip()]
    console = make_console(stderr=True)
    found = asyncio.run(_run(console, pool, chosen, (train, test), most, seed, out, encoder, hide_tasks))
    _show(found)
    console.print(f"[dim]cascade.json and cascade.png are in {out}[/]")


async def _run(
    console: Any,
    pool: Path,
    experts: list[str] | None,
    splits: tuple[str, str],
    most: int,
    seed: int,
    out: Path,
    encoder: str,
    hide_tasks: bool,
) -> dict[str, Any]:
    from evals.routing.cascades import evaluate_cascade, write
    from evals.routing.command import load
    from orchestrator.build import make_encoder
    from orchestrator.commands.screen import waiting

    setting = await load(console, pool, experts, make_encoder(encoder, 1), splits, seed, hide_tasks)
    with waiting(console, "following the cascade at every budget"):
        found = await evaluate_cascade(setting, most=most)
    write(found, out)
    return found


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    from orchestrator.commands.screen import make_console

    table = Table("stops by", "budget", "cost", "calls", "score", "to the last stage", box=None)
    for stage in found["stages"]:
        table.add_row(stage["expert"], "", f"{stage['cost']:.2f}", "1.00", f"{100 * stage['score']:.1f}", style="dim")
    for p in found["points"]:
        low, high = 100 * p["difference"]["low"], 100 * p["difference"]["high"]
        table.add_row(
            p["rule"],
            f"{p['spend']:.2f}",
            f"{p['cost']:.2f}",
            f"{p['calls']:.2f}",
            f"{100 * p['score']['value']:.1f}",
            f"{100 * p['difference']['value']:+.1f} ({low:+.1f} to {high:+.1f})",
        )
    make_console(stderr=False).print(table)
