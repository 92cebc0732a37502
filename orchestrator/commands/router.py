"""collegium router: fit a router on recorded answers, and look at one."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from routers.learned.artefact import Fitted

_HELP = """Fit a router on recorded answers; look at a fitted one.

Example: collegium router fit linear --pool pools/mmlu-pro --out artefacts/linear
"""

app = typer.Typer(no_args_is_help=True, help=_HELP, add_completion=False)


@app.command()
def fit(
    name: Annotated[str, typer.Argument(help="A learned router, such as linear.")],
    pool: Annotated[Path, typer.Option(help="Folder of a recorded pool.")],
    out: Annotated[Path, typer.Option(help="Folder for the fitted router.")],
    experts: Annotated[str | None, typer.Option(help="Experts of the pool, comma-separated; all by default.")] = None,
    train: Annotated[str, typer.Option(help="The split to learn from.")] = "train",
    seed: Annotated[int, typer.Option(help="Folds and starting points are drawn with it.")] = 0,
    encoder: Annotated[str, typer.Option(help="Encoder: its name or a folder; the service must use the same.")] = (
        "all-minilm-l6-v2"
    ),
) -> None:
    """Fit a router on a pool's train split.

    Example: collegium router fit linear --pool pools/mmlu-pro --out artefacts/linear
    """
    from orchestrator.commands.screen import make_console, waiting
    from routers.learned import artefact

    artefact.model_class(name)
    console = make_console(stderr=True)
    chosen = None if experts is None else [e.strip() for e in experts.split(",") if e.strip()]
    with waiting(console, f"fitting '{name}'"):
        fitted = asyncio.run(_fit(name, pool, chosen, train, seed, encoder))
    artefact.save(fitted, out)
    console.print(
        f"'{name}' was fitted on {fitted.questions} questions and {len(fitted.expert_ids)} experts. In the config:\n"
        f"  router: {{name: {name}, artefact: {out}}}",
        markup=False,
    )


async def _fit(name: str, pool: Path, experts: list[str] | None, train: str, seed: int, encoder_name: str) -> "Fitted":
    from experts.models import cache_dir
    from orchestrator.build import make_encoder
    from routers.learned.fitting import fit_router
    from routers.records import read_records

    records = read_records(pool, experts)
    encoder = make_encoder(encoder_name, 1)
    return await fit_router(name, records, encoder, cache_dir() / "embeddings", split=train, seed=seed)


@app.command()
def join(
    folder: Annotated[Path, typer.Argument(help="Folder of a fitted router.")],
    expert: Annotated[str, typer.Option(help="The new expert's id.")],
    out: Annotated[Path, typer.Option(help="Folder for the router with the expert.")],
    card: Annotated[str | None, typer.Option(help="What is known of it, in words.")] = None,
    pool: Annotated[Path | None, typer.Option(help="A recorded pool with its graded answers.")] = None,
    train: Annotated[str, typer.Option(help="The split that graded questions are taken from.")] = "train",
    seed: Annotated[int, typer.Option(help="At most 50 graded questions are drawn with it.")] = 0,
) -> None:
    """Let an expert join a fitted router without refitting it, by its card or by at most 50 graded questions.

    Example: collegium router join artefacts/linear --expert new --pool pools/mmlu-pro --out artefacts/more
    """
    from orchestrator.commands.screen import make_console, waiting
    from routers.learned import artefact

    console = make_console(stderr=True)
    with waiting(console, f"'{expert}' joins"):
        fitted = asyncio.run(_join(folder, expert, card, pool, train, seed))
    artefact.save(fitted, out)
    console.print(f"'{expert}' is the last of {len(fitted.expert_ids)} experts of the router in {out}.", markup=False)


async def _join(folder: Path, expert: str, card: str | None, pool: Path | None, split: str, seed: int) -> "Fitted":
    from orchestrator.build import make_encoder
    from routers.learned import artefact
    from routers.learned.joined import graded, join

    fitted = artefact.load(folder)
    encoder = make_encoder(fitted.encoder, 1)
    questions, scores = (None, None) if pool is None else await graded(pool, expert, encoder, split=split, seed=seed)
    return await join(fitted, expert, encoder, card=card, questions=questions, scores_Q=scores)


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="Folder of a fitted router.")]) -> None:
    """Print what a fitted router is, what it learned from, and how it ranks the experts.

    Example: collegium router show artefacts/linear
    """
    from orchestrator.commands.screen import make_console
    from routers.learned import artefact
    from routers.learned.fitting import describe

    make_console(stderr=False).print(describe(artefact.load(folder)), markup=False)
