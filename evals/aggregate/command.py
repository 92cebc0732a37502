"""The command line of the aggregators' ranking."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evals.aggregate.pick import Synthetic
    from orchestrator.aggregators.pick import Standing


def aggregators(
    pool: Annotated[Path, typer.Option(help="Folder of a recorded pool with texts and gold answers.")],
    out: Annotated[Path, typer.Option(help="Folder for the ranking, an artefact of 'pick_aggregator'.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="Config with the experts.")] = Path("collegium.yaml"),
    experts: Annotated[str | None, typer.Option(help="Experts, comma-separated; all by default.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many questions are drawn.")] = 100,
    split: Annotated[str, typer.Option(help="The split they are drawn from.")] = "val",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each fused answer.")] = 512,
    response_chars: Annotated[int, typer.Option(min=100, help="Of each response in the prompt.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Questions and responses are drawn with it.")] = 0,
) -> None:
    """Rank experts by how well they fuse one right and two wrong answers.

    Example: collegium eval aggregators --pool pools/mmlu-pro --questions 100 --out artefacts/aggregators
    """
    import random

    from evals.aggregate.pick import make_tasks
    from experts.errors import ExpertFailed
    from orchestrator.aggregators.pick import AggregatorRanking
    from orchestrator.commands.screen import make_console
    from routers.records import read_records

    console = make_console(stderr=True)
    records = read_records(pool)
    rows = records.rows(split).tolist()
    drawn = sorted(random.Random(seed).sample(rows, min(questions, len(rows))))  # noqa: S311  # no secret
    tasks = make_tasks(pool, ids=[records.question_ids[r] for r in drawn], seed=seed)
    names = [e.strip() for e in experts.split(",") if e.strip()] if experts else []
    standings = asyncio.run(_rank(config, names, tasks, max_tokens, response_chars))
    if all(s.failed == s.asked for s in standings):
        raise ExpertFailed("Every call failed, so that nobody can be ranked; collegium doctor looks for the reason.")
    AggregatorRanking(
        pool=records.name, pool_digest=records.digest, split=split, seed=seed, standings=tuple(standings)
    ).save(out)
    for s in standings:
        console.print(
            f"{s.expert_id}: {s.right} of {s.asked} right ({s.accuracy:.1%}); of the winnable {s.winnable_right} of "
            f"{s.winnable}; {s.failed} failed",
            markup=False,
        )
    console.print(f"In the config: aggregator: {{name: pick_aggregator, artefact: {out}}}", markup=False)


async def _rank(
    path: Path, names: list[str], tasks: "list[Synthetic]", max_tokens: int, response_chars: int
) -> "list[Standing]":
    from rich.progress import Progress

    from evals.aggregate.pick import rank_aggregators
    from experts.errors import ConfigError
    from orchestrator.build import build_service
    from orchestrator.commands.screen import make_console
    from orchestrator.config import load_config

    service = build_service(load_config(path))
    if unknown := set(names) - set(service.experts):
        raise ConfigError(f"No expert {sorted(unknown)}; known: {', '.join(service.experts)}.")
    experts = {e: service.experts[e] for e in names or service.experts}
    engines = {x.spec.engine_id: service.engines[x.spec.engine_id] for x in experts.values()}
    try:
        for engine in engines.values():
            await engine.load()
        with Progress(console=make_console(stderr=True)) as progress:
            bar = progress.add_task("fusing", total=len(tasks) * len(experts))
            return await rank_aggregators(
                experts,
                tasks,
                max_tokens=max_tokens,
                response_chars=response_chars,
                on_answer=lambda _: progress.advance(bar),
            )
    finally:
        for engine in engines.values():
            await engine.unload()
