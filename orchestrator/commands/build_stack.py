"""collegium build stack: fit the stack on recorded answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orchestrator.aggregators.stacking.artefact import Fitted
    from orchestrator.aggregators.stacking.build import Wish


def stack(
    pool: Annotated[Path, typer.Option(help="Folder of a recorded pool.")],
    out: Annotated[Path, typer.Option(help="Folder for the fitted stack.")],
    experts: Annotated[str | None, typer.Option(help="Experts of the pool, comma-separated; all by default.")] = None,
    calls: Annotated[float, typer.Option(min=1, help="Mean number of calls that a question may cost.")] = 3.0,
    train: Annotated[str, typer.Option(help="The splits to learn from, comma-separated.")] = "train,val",
    prior: Annotated[
        bool, typer.Option(help="Learn what the options alone give away; holds for questions of the same make.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Folds and panels are drawn with it.")] = 0,
) -> None:
    """Fit the stack: what each expert's answer is worth, whom to ask first, and when to stop asking.

    Example: collegium build stack --pool pools/mmlu-pro --calls 3 --out artefacts/stack
    """
    from orchestrator.aggregators.stacking import artefact
    from orchestrator.aggregators.stacking.build import Wish
    from orchestrator.commands.screen import make_console

    chosen = None if experts is None else [e.strip() for e in experts.split(",") if e.strip()]
    wish = Wish(calls=calls, seed=seed, with_prior=prior)
    fitted, warnings = _fit(pool, chosen, [s.strip() for s in train.split(",") if s.strip()], wish)
    artefact.save(fitted, out)
    console = make_console(stderr=True)
    console.print(
        f"'stack' was fitted on {fitted.questions} questions of {fitted.pool}. It asks in this order:\n"
        f"  {', '.join(fitted.expert_ids[e] for e in fitted.stack.order)}\n"
        f"until {fitted.stack.stop}. In the config:\n"
        f"  aggregator: {{name: stack, artefact: {out}}}",
        markup=False,
    )
    for warning in warnings:
        console.print(f"Warning: {warning}", style="yellow", markup=False)


def _fit(pool: Path, experts: list[str] | None, splits: list[str], wish: "Wish") -> "tuple[Fitted, Sequence[str]]":
    from experts.models import cache_dir
    from orchestrator.aggregators.stacking.artefact import fit
    from orchestrator.aggregators.stacking.doubts import doubts
    from orchestrator.aggregators.stacking.recorded import read_recorded, rows_of
    from orchestrator.commands.screen import bars, make_console

    with bars(make_console(stderr=True)) as progress:
        progress.start("reading the answers", None, "bytes")
        recorded = read_recorded(pool, experts, cache=cache_dir() / "stacking")
        rows = rows_of(recorded, splits)
        fitted = fit(recorded, rows, wish, on_step=lambda step: progress.start(step, None, "bytes"))
    return fitted, doubts(fitted, recorded, rows)
