"""make bench-aggregate: what combining recorded answers gives over the best single expert.

Cases are the subsets of subsets.json beside the folder of pools, and pools that have texts and no subsets.
"""

from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from evals.aggregate.plots import draw
from evals.aggregate.stacks import measure
from experts.errors import ConfigError
from orchestrator.aggregators.stacking.build import Wish, fit_priors
from orchestrator.aggregators.stacking.recorded import Recorded, read_recorded, rows_of

POOLS = ("mmlu-pro", "gsm8k-gpt3")


def bench(
    pools: Annotated[Path, typer.Option(envvar="COLLEGIUM_POOLS", help="Folder of recorded pools.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md and plots.")] = Path("aggregate-report"),
    only: Annotated[str | None, typer.Option(help="Cases, comma-separated; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Folds, panels and resamples are drawn with it.")] = 0,
) -> None:
    """Fit on train and val, ask on test, and print the table.

    Example: python -m evals.aggregate.bench --pools pools --only mmlu-pro-small
    """
    from experts.models import cache_dir

    wanted = None if only is None else {name.strip() for name in only.split(",")}
    reports: dict[str, Any] = {}
    for name in POOLS:
        if not (pools / name / "pool.json").is_file():
            continue
        cases = _cases(pools, name)
        chosen = {case: experts for case, experts in cases.items() if wanted is None or case in wanted}
        if not chosen:
            continue
        typer.echo(f"reading {name} ...", err=True)
        recorded = read_recorded(pools / name, cache=cache_dir() / "stacking")
        reports |= _measure(recorded, chosen, seed)
    if not reports:
        raise ConfigError(f"No case to measure in {pools}; COLLEGIUM_POOLS names the folder that holds the pools.")
    _write(reports, out)


def _measure(recorded: Recorded, cases: dict[str, list[str] | None], seed: int) -> dict[str, Any]:
    typer.echo("fitting the options' prior ...", err=True)
    priors = fit_priors(recorded, rows_of(recorded, ["train", "val"]), Wish(seed=seed))
    return {
        case: measure(
            recorded if experts is None else recorded.only(experts),
            seed=seed,
            priors=priors,
            on_step=lambda step: typer.echo(f"{step} ...", err=True),
        )
        for case, experts in cases.items()
    }


def _cases(pools: Path, name: str) -> dict[str, list[str] | None]:
    listed = pools.parent / "subsets.json"
    subsets = orjson.loads(listed.read_bytes()).get(name, {}) if listed.is_file() else {}
    return {f"{name}-{subset}": experts for subset, experts in subsets.items()} or {name: None}


def _write(reports: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_bytes(orjson.dumps(reports, option=orjson.OPT_INDENT_2))
    text = render(reports)
    (out / "report.md").write_text(text)
    draw(reports, out)
    typer.echo(text)


def render(reports: dict[str, Any]) -> str:
    return "\n".join(_table(case, report) for case, report in reports.items())


def _table(case: str, report: dict[str, Any]) -> str:
    lines = [
        f"## {case}: {len(report['experts'])} experts, {report['n_train']} questions learned, {report['n_test']} asked",
        "",
        "| | mean calls | score | ci95 | over best single | ci95 | gap closed |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, result) for name, result in report["baselines"].items()]
    lines.append(f"| oracle | | {report['oracle'] * 100:.1f} | | | | 1 |")
    for variant, stack in report["stacks"].items():
        for calls, result in stack["calls"].items():
            lines.append(_row(f"stack, {variant}, at most {calls} on average", result))
        lines.append(_row(f"stack, {variant}, everyone heard", stack["everyone"]))
    return "\n".join([*lines, ""])


def _row(name: str, result: dict[str, Any]) -> str:
    low, high = (100 * x for x in result["score_ci95"])
    less, more = (100 * x for x in result["over_single_ci95"])
    return (
        f"| {name} | {result['mean_calls']:.2f} | {100 * result['score']:.1f} | {low:.1f} to {high:.1f} "
        f"| {100 * result['over_single']:+.1f} | {less:+.1f} to {more:+.1f} | {result['gap_closed']:.2f} |"
    )


if __name__ == "__main__":
    typer.run(bench)
