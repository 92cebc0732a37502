"""report.json, report.md and accuracy.png of an evaluation, and a line a question in answers.jsonl."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from evals.generation.measures import Row
from evals.generation.questions import Question
from evals.generation.run import Outcome
from evals.routing.statistics import Estimate

log = logging.getLogger(__name__)

HELPS, NOT = "helps", "does not help"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What was run; goes into the report as it is."""

    source: str
    policy: str
    router: str
    aggregator: str
    experts: Sequence[str]
    seed: int
    loads: int
    wall_s: float


def as_json(rows: Sequence[Row], questions: Sequence[Question], about: About) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for question in questions:
        kinds[question.kind] = kinds.get(question.kind, 0) + 1
    return {
        "source": about.source,
        "questions": len(questions),
        "scorers": kinds,
        "policy": about.policy,
        "router": about.router,
        "aggregator": about.aggregator,
        "experts": list(about.experts),
        "seed": about.seed,
        "loads": about.loads,
        "wall_s": round(about.wall_s, 1),
        "rows": [_row(row) for row in rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "note": row.note,
        "accuracy": row.accuracy.value,
        "ci95": row.accuracy.ci95,
        "difference": {"value": row.difference.value, "ci95": row.difference.ci95},
        "verdict": verdict(row),
        "mean_calls": row.calls,
        "mean_tokens": row.tokens,
        "mean_usd": row.usd,
        "mean_call_s": row.seconds,
        "failed": row.failed,
        "cut_off": row.cut_off,
    }


def verdict(row: Row) -> str:
    """Of the policy alone: it is what the others are there for."""
    return "" if row.name != "policy" else HELPS if row.helps else NOT


def write(
    found: Mapping[str, Any], rows: Sequence[Row], outcome: Outcome, questions: Sequence[Question], out: Path
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    (out / "report.md").write_text(as_markdown(found), encoding="utf-8")
    with (out / "answers.jsonl").open("wb") as file:
        for number, question in enumerate(questions):
            file.write(orjson.dumps(_answers(number, question, outcome)) + b"\n")
    if importlib.util.find_spec("matplotlib"):
        _draw(rows, found, out / "accuracy.png")
    else:
        log.warning("no accuracy.png: it needs matplotlib; pip install 'collegium[train]'")


def _answers(number: int, question: Question, outcome: Outcome) -> dict[str, Any]:
    policy = outcome.policy[number]
    return {
        "id": question.question_id,
        "right": question.answer if question.kind != "code" else None,
        "policy": {"answer": policy.answer, "score": policy.score, "error": policy.error, "calls": policy.calls},
        "experts": {
            e: {"answer": g[number].answer, "score": g[number].score, "error": g[number].error}
            for e, g in outcome.experts.items()
        },
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    return (
        f"# {found['source']}: {found['questions']} questions\n\n"
        f"Policy '{found['policy']}': router {found['router']}, aggregator {found['aggregator']}; "
        f"seed {found['seed']}, {found['loads']} engine loads, {found['wall_s']} s.\n"
        "Accuracy in percent; the difference is paired, to the best single expert. Seconds sum a question's calls as "
        "they took when they were made. Cut off are answers that ended at their token limit.\n\n"
        "| | accuracy | ci95 | difference | calls | tokens | USD | seconds | failed | cut off | |\n"
        f"|{'---|' * 11}\n" + "".join(_line(row) for row in found["rows"])
    )


def _line(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    note = ", ".join(part for part in (row["verdict"], row["note"]) if part)
    return (
        f"| {row['name']} | {row['accuracy'] * 100:.1f} | {low * 100:.1f} to {high * 100:.1f} "
        f"| {row['difference']['value'] * 100:+.1f} | {row['mean_calls']:.2f} | {row['mean_tokens']:.0f} "
        f"| {row['mean_usd']:.6f} | {row['mean_call_s']:.2f} | {row['failed']} | {row['cut_off']} "
        f"| {note} |\n"
    )


def _draw(rows: Sequence[Row], found: Mapping[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [row.name for row in rows]
    colours = ["#2a7f3f" if row.name == "policy" else "#9db4c8" for row in rows]
    axes.barh(names, [row.accuracy.value * 100 for row in rows], color=colours)
    axes.errorbar(
        [row.accuracy.value * 100 for row in rows],
        names,
        xerr=[[_below(row.accuracy) for row in rows], [_above(row.accuracy) for row in rows]],
        fmt="none",
        ecolor="#333333",
        elinewidth=1,
    )
    for place, row in enumerate(rows):
        axes.text(1, place, f"{row.calls:.1f} calls, {row.tokens:.0f} tokens", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in percent, with 95 % intervals")
    axes.set_title(f"{found['source']}, {found['questions']} questions", fontsize=10)
    figure.savefig(path, dpi=130)


def _below(estimate: Estimate) -> float:
    return max(0.0, (estimate.value - estimate.low) * 100)


def _above(estimate: Estimate) -> float:
    return max(0.0, (estimate.high - estimate.value) * 100)
