"""collegium build reward: fit a reward on graded answers and preferences."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orchestrator.aggregators.reward_moe.artefact import Fitted

ADVISED = 400
"""Pairs, by docs/rewards.md of one category."""


def reward(
    out: Annotated[Path, typer.Option(help="Folder for the fitted reward.")],
    pool: Annotated[
        list[Path] | None, typer.Option(help="Folder of a recorded pool with texts; may be given twice.")
    ] = None,
    preferences: Annotated[
        list[Path] | None, typer.Option(help="Folder of *.jsonl.gz with compared answers, or one such file.")
    ] = None,
    kind: Annotated[str, typer.Option(help="armorm, dmoerm, single or uniform.")] = "armorm",
    encoder: Annotated[str, typer.Option(help="wordllama, or the service's encoder.")] = "wordllama",
    train: Annotated[str, typer.Option(help="The split to learn from.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Panels, attacks and starting points are drawn with it.")] = 0,
) -> None:
    """Fit a reward on graded answers, preferences, or both. On the CPU, in minutes.

    Example: collegium build reward --pool pools/mmlu-pro --preferences preferences --out artefacts/reward
    """
    from orchestrator.aggregators.reward_moe import artefact
    from orchestrator.commands.screen import make_console

    if not pool and not preferences:
        raise typer.BadParameter("give --pool, --preferences or both", param_hint="--pool")
    console = make_console(stderr=True)
    fitted = asyncio.run(_fit(pool or [], preferences or [], kind, encoder, train, seed))
    artefact.save(fitted, out)
    console.print(
        f"'{kind}' was fitted on {fitted.pairs} pairs of {', '.join(s.name for s in fitted.sources)}. In the config:\n"
        f"  aggregator: {{name: best_of, artefact: {out}}}",
        markup=False,
    )
    if fitted.pairs < ADVISED:
        console.print(
            f"Warning: {fitted.pairs} pairs are few for a reward; find {ADVISED} or more, or take best_of without an "
            "artefact, by agreement.",
            style="yellow",
            markup=False,
        )


async def _fit(
    pools: list[Path], preferences: list[Path], kind: str, encoder_name: str, train: str, seed: int
) -> "Fitted":
    from experts.models import cache_dir
    from orchestrator.aggregators.reward_moe.build import Watch, build_reward, read_material
    from orchestrator.build import make_encoder
    from orchestrator.commands.screen import bars, make_console

    with bars(make_console(stderr=True)) as progress:
        watch = Watch(step=lambda label, total: progress.start(label, total, "bytes"), advance=progress.advance)
        material = read_material(pools, preferences, seed=seed, split=train, watch=watch)
        encoder = make_encoder(encoder_name, 1)
        return await build_reward(kind, material, encoder, cache_dir() / "embeddings", seed=seed, watch=watch)
