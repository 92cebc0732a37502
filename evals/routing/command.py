"""The command line of the routing benchmark."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from evals.routing.bench import Evaluation
    from evals.routing.judged import Judging
    from evals.routing.setting import Setting
    from evals.routing.stacked import Stacking
    from evals.routing.votes import Combiner
    from routers.encoders import Encoder

Pool = Annotated[Path, typer.Option("--pool", help="Folder of a recorded pool.")]
Names = Annotated[str, typer.Option("--router", help="Routers, comma-separated, or 'all'.")]
Experts = Annotated[str | None, typer.Option(help="Experts of the pool, comma-separated; all by default.")]
Split = Annotated[str, typer.Option(help="A split of the pool.")]
TopK = Annotated[str, typer.Option("--top-k", help="Experts asked a question; several, as in 1,3, cost no new fit.")]
MaxCalls = Annotated[int | None, typer.Option(min=1, help="Never more calls than these.")]
AggregatorName = Annotated[str, typer.Option("--aggregator", help="What combines answers where top-k is above 1.")]
StackCalls = Annotated[
    float | None, typer.Option(min=1, help="Mean calls that '--aggregator stack' may make; top-k by default.")
]
Artefact = Annotated[
    Path | None, typer.Option(help="The reward of '--aggregator best_of'; without one, the answers' agreement.")
]
Seed = Annotated[int, typer.Option(min=0, help="Results repeat by seed, bit for bit, but for the times.")]
Out = Annotated[Path, typer.Option(help="Folder for report.json, report.md and the plots.")]
Hide = Annotated[bool, typer.Option("--hide-tasks", help="Routers must guess the tasks of the test questions.")]
Away = Annotated[bool, typer.Option("--leave-one-out", help="How well each expert joins a router fitted without it.")]
Model = Annotated[str, typer.Option("--encoder", help="Encoder: its name or a folder.")]


def routing(
    pool: Pool,
    router: Names = "all",
    experts: Experts = None,
    train: Split = "train",
    test: Split = "test",
    top_k: TopK = "1",
    max_calls: MaxCalls = None,
    aggregator: AggregatorName = "weighted_vote",
    stack_calls: StackCalls = None,
    artefact: Artefact = None,
    seed: Seed = 0,
    out: Out = Path("routing-report"),
    encoder: Model = "all-minilm-l6-v2",
    hide_tasks: Hide = False,
    leave_one_out: Away = False,
) -> None:
    """Fit routers on a pool's train split, and say whether they beat its best single expert on test.

    Example: collegium eval routing --pool pools/mmlu-pro --router linear,panel --top-k 3 --out report
    """
    from orchestrator.commands.screen import make_console

    calls = _calls(top_k, max_calls)
    _check_heeded(aggregator, max(calls), stack_calls, artefact)
    console = make_console(stderr=True)
    chosen = None if experts is None else [e.strip() for e in experts.split(",") if e.strip()]
    asyncio.run(
        _run(
            console,
            pool,
            chosen,
            router,
            (train, test),
            calls,
            aggregator,
            stack_calls,
            artefact,
            seed,
            out,
            encoder,
            hide_tasks,
            leave_one_out,
            is_robust=router == "all",
        )
    )


def _check_heeded(aggregator: str, most: int, stack_calls: float | None, artefact: Path | None) -> None:
    """An option that changes nothing is a mistake."""
    for option, value, heeds in (("stack-calls", stack_calls, "stack"), ("artefact", artefact, "best_of")):
        if value is not None and aggregator != heeds:
            raise typer.BadParameter(f"only '--aggregator {heeds}' heeds it.", param_hint=f"--{option}")
    if most == 1 and aggregator not in ("first", "weighted_vote"):
        raise typer.BadParameter(
            f"'{aggregator}' combines answers, and one call gives one: ask more with --top-k.",
            param_hint="--aggregator",
        )


def _calls(top_k: str, max_calls: int | None) -> list[int]:
    try:
        wanted = [int(k) for k in top_k.split(",")]
    except ValueError as exc:
        raise typer.BadParameter(
            f"'{top_k}' is no number, nor several with commas between.", param_hint="--top-k"
        ) from exc
    if min(wanted) < 1:
        raise typer.BadParameter("a question needs one call at least.", param_hint="--top-k")
    return sorted({min(k, max_calls or k) for k in wanted})


async def _run(
    console: "Console",
    pool: Path,
    experts: list[str] | None,
    router: str,
    splits: tuple[str, str],
    top_ks: list[int],
    aggregator: str,
    stack_calls: float | None,
    artefact: Path | None,
    seed: int,
    out: Path,
    encoder_name: str,
    hide_tasks: bool,
    leave_one_out: bool,
    *,
    is_robust: bool,
) -> None:
    from evals.routing import report
    from evals.routing.bench import encode_times_ms, evaluate
    from orchestrator.build import make_encoder
    from orchestrator.commands.screen import bars

    names = _names(router)
    encoder = make_encoder(encoder_name, 1)
    setting = await load(console, pool, experts, encoder, splits, seed, hide_tasks)
    top_ks = sorted({min(k, len(setting.records.experts)) for k in top_ks})
    combiner: Combiner | None = None
    if max(top_ks) > 1 and aggregator == "stack":
        combiner = _fit_stack(console, pool, setting, stack_calls)
    elif max(top_ks) > 1 and aggregator == "best_of":
        combiner = _read_texts(console, pool, setting, artefact, encoder)
    with bars(console) as progress:
        progress.start("fitting routers", len(names), "bytes")

        def tell(name: str) -> None:
            _make(out)  # all else was found right; not after the last fit
            progress.advance(1)
            console.print(f"[dim]{name}[/]")

        evaluation = await evaluate(
            setting, names, top_ks=top_ks, aggregator=aggregator, combiner=combiner, on_router=tell
        )
    found = report.as_json(evaluation, await encode_times_ms(encoder, setting))
    if is_robust:
        found["robustness"] = await _rewritten(console, evaluation, encoder)
    if leave_one_out:
        found["leave_one_out"] = await _without_each(console, setting, names[0], encoder)
    _tell(console, evaluation, found, out)


def _tell(console: "Console", evaluation: "Evaluation", found: dict[str, Any], out: Path) -> None:
    from evals.routing import plots, report

    found["plots"] = [path.stem for path in plots.draw(evaluation, out)]
    report.write(found, out)
    _show(evaluation, found)
    console.print(f"[dim]report.json, report.md and the plots are in {out}[/]")


def _make(folder: Path) -> None:
    """Raises ConfigError."""
    from experts.errors import ConfigError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"Cannot write a report to {folder}: {exc.strerror or exc}. Choose another --out.") from exc


async def _rewritten(console: "Console", evaluation: "Evaluation", encoder: "Encoder") -> Any:
    from evals.routing.robustness import rewrite, robustness
    from orchestrator.commands.screen import bars

    with bars(console) as progress:
        progress.start("rewriting questions", None, "bytes")
        asked = await rewrite(evaluation.setting, encoder)
        return robustness(evaluation.fits, asked, evaluation.setting)


async def _without_each(console: "Console", setting: "Setting", router: str, encoder: "Encoder") -> Any:
    from evals.routing.joining import leave_each_out
    from orchestrator.commands.screen import bars

    with bars(console) as progress:
        progress.start("leaving experts out", len(setting.records.experts), "bytes")
        return await leave_each_out(setting, router, encoder, on_expert=lambda: progress.advance(1))


def _names(router: str) -> list[str]:
    """Each once. Raises ConfigError for a router that does not exist, and where none is named."""
    from evals.routing.bench import all_routers
    from experts.errors import ConfigError
    from routers.learned.artefact import model_class

    given = all_routers() if router == "all" else [r.strip() for r in router.split(",") if r.strip()]
    names = list(dict.fromkeys(given))
    if not names:
        raise ConfigError(f"--router names no router; known: {', '.join(all_routers())}, or 'all'.")
    for name in names:
        model_class(name)
    return names


def _fit_stack(console: "Console", pool: Path, setting: "Setting", calls: float | None) -> "Stacking":
    from evals.routing.stacked import Stacking
    from orchestrator.commands.screen import bars

    with bars(console) as progress:
        progress.start("fitting the stack", None, "bytes")
        return Stacking.fit(pool, setting, calls)


def _read_texts(
    console: "Console", pool: Path, setting: "Setting", artefact: Path | None, encoder: "Encoder"
) -> "Judging":
    from evals.routing.judged import Judging, Texts
    from orchestrator.commands.screen import bars

    with bars(console) as progress:
        progress.start("reading texts", len(setting.records.expert_ids), "bytes")
        texts = Texts.read(pool, setting, on_expert=lambda: progress.advance(1))
    return Judging.make(artefact, encoder, texts)


async def load(
    console: "Console",
    pool: Path,
    experts: list[str] | None,
    encoder: "Encoder",
    splits: tuple[str, str],
    seed: int,
    hide_tasks: bool,
) -> "Setting":
    """The pool and the embeddings of its questions, with a bar for each."""
    from evals.routing.setting import make_setting
    from experts.models import cache_dir
    from orchestrator.commands.screen import bars
    from routers.records import read_records

    with bars(console) as progress:
        progress.start(f"reading {pool.name}", None, "bytes")
        records = read_records(pool, experts)
        progress.start("embedding the questions (once)", len(records.texts), "bytes")
        return await make_setting(
            records,
            encoder,
            cache_dir() / "embeddings",
            train=splits[0],
            test=splits[1],
            seed=seed,
            hide_tasks=hide_tasks,
            on_batch=progress.advance,
        )


def _show(evaluation: "Evaluation", found: dict[str, Any]) -> None:
    from rich.table import Table

    from orchestrator.commands.screen import make_console

    table = Table("", "score", "ci95", "difference", "calls", "", box=None)
    for name, b in found["baselines"].items():
        table.add_row(name, *_cells(b), b.get("expert", ""), style="dim")
    for r in found["results"]:
        who = r["router"] if r["top_k"] == 1 else f"{r['router']}, {r['top_k']} calls"
        table.add_row(who, *_cells(r), r["verdict"], style="green" if r["verdict"] == "helps" else "")
    make_console(stderr=False).print(table)


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    low, high = row["ci95"]
    return (
        f"{row['score'] * 100:.1f}",
        f"{low * 100:.1f} to {high * 100:.1f}",
        f"{row['difference']['value'] * 100:+.1f}",
        f"{row['mean_calls']:.2f}",
    )
