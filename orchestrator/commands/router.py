"""collegium router: fit a router on recorded answers, and look at one."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.keywords import keywords, keywords_for, read_keywords
from orchestrator.commands.prompts import prompts

if TYPE_CHECKING:
    from routers.learned.artefact import Fitted

_HELP = """Fit a router on recorded answers; look at a fitted one.

Example: collegium router fit linear --pool pools/mmlu-pro --out artefacts/linear
"""

app = typer.Typer(no_args_is_help=True, help=_HELP, add_completion=False)
app.command()(prompts)
app.command()(keywords)


@app.command()
def fit(
    name: Annotated[str, typer.Argument(help="A learned router, such as linear.")],
    pool: Annotated[Path, typer.Option(help="Folder of a recorded pool.")],
    out: Annotated[Path, typer.Option(help="Folder for the fitted router.")],
    experts: Annotated[str | None, typer.Option(help="Experts of the pool, comma-separated; all by default.")] = None,
    train: Annotated[str, typer.Option(help="The split to learn from.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Folds and starting points are drawn with it.")] = 0,
    encoder: Annotated[str, typer.Option(help="Encoder: its name or a folder; the service must use the same.")] = (
        "all-minilm-l6-v2"
    ),
    keywords_file: Annotated[
        Path | None, typer.Option("--keywords", help="For skills: keywords of the questions, by an expert.")
    ] = None,
) -> None:
    """Fit a router on a pool's train split.

    Example: collegium router fit linear --pool pools/mmlu-pro --out artefacts/linear
    """
    from orchestrator.commands.screen import make_console, waiting
    from routers.learned import artefact

    artefact.model_class(name)
    if keywords_file is not None and name != "skills":
        raise typer.BadParameter("only 'skills' reads keywords.", param_hint="--keywords")
    console = make_console(stderr=True)
    chosen = None if experts is None else [e.strip() for e in experts.split(",") if e.strip()]
    with waiting(console, f"fitting '{name}'"):
        fitted = asyncio.run(_fit(name, pool, chosen, train, seed, encoder, keywords_file))
    artefact.save(fitted, out)
    console.print(
        f"'{name}' was fitted on {fitted.questions} questions and {len(fitted.expert_ids)} experts. In the config:\n"
        f"  router: {{name: {name}, artefact: {out}}}",
        markup=False,
    )


async def _fit(
    name: str,
    pool: Path,
    experts: list[str] | None,
    train: str,
    seed: int,
    encoder_name: str,
    keywords_file: Path | None,
) -> "Fitted":
    from experts.models import cache_dir
    from orchestrator.build import make_encoder
    from routers.learned.fitting import fit_router
    from routers.records import read_records

    records = read_records(pool, experts)
    named = None
    if keywords_file is not None:
        asked = [records.question_ids[int(r)] for r in records.rows(train)]
        named = keywords_for(asked, read_keywords(keywords_file), keywords_file)
    encoder = make_encoder(encoder_name, 1)
    return await fit_router(name, records, encoder, cache_dir() / "embeddings", split=train, seed=seed, keywords=named)


@app.command()
def join(
    folder: Annotated[Path, typer.Argument(help="Folder of a fitted router.")],
    expert: Annotated[str, typer.Option(help="The new expert's id.")],
    out: Annotated[Path, typer.Option(help="Folder for the router with the expert.")],
    card: Annotated[str | None, typer.Option(help="What is known of it, in words.")] = None,
    pool: Annotated[Path | None, typer.Option(help="A recorded pool with its graded answers.")] = None,
    train: Annotated[str, typer.Option(help="The split that graded questions are taken from.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="At most 50 graded questions are drawn with it.")] = 0,
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
    from routers.learned.skills import Skills

    console, fitted = make_console(stderr=False), artefact.load(folder)
    console.print(describe(fitted), markup=False)
    if isinstance(fitted.model, Skills):
        console.print(fitted.model.profiles.table())
        fitted.model.profiles.heat_map(folder / "profiles.png")
        console.print(f"The heat map is in {folder / 'profiles.png'}.", markup=False)
