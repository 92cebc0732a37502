"""Sections of report.md that not every report has, and how its numbers are written."""

import math
from collections.abc import Mapping
from typing import Any


def wording(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    names = list(next(iter(found["routers"].values())))
    return [
        "## When only the wording changes",
        "",
        f"Flipped decisions in percent, and the score with its paired difference to the question as it was asked; "
        f"{found['n']} test questions, one call. Begging asks for {found['dearest']}; 'sent' is how often it is "
        "obeyed, against how often that expert is chosen anyway.",
        "",
        "| router | as asked | " + " | ".join(names[1:]) + " | sent |",
        "|---" * (len(names) + 2) + "|",
        *(_robust_row(router, trials) for router, trials in found["routers"].items()),
        "",
    ]


def _robust_row(router: str, trials: Mapping[str, Any]) -> str:
    plain, *others = trials.values()
    cells = [
        f"{as_percent(t['flipped'])} flipped, {as_percent(t['score'])}, {as_signed(t['difference'])}" for t in others
    ]
    sent = f"{as_percent(others[-1]['sent_to_dearest'])} for {as_percent(plain['sent_to_dearest'])}"
    return f"| {router} | {as_percent(plain['score'])} | " + " | ".join(cells) + f" | {sent} |"


def left_out(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    mean = found["mean"]
    return [
        f"## When an expert joins a fitted router ({found['router']})",
        "",
        f"Each expert left out in turn, then added by its card, or by {found['graded']} graded questions; scores in "
        f"percent, one call. The router fitted with all: {as_percent(found['refitted'])}. On average without the "
        f"expert {as_percent(mean['without'])}, by card {as_percent(mean['by_card'])}, by questions "
        f"{as_percent(mean['by_grades'])}; its mean score is missed by "
        f"{as_percent(mean['error_by_card'])} and {as_percent(mean['error_by_grades'])} points.",
        "",
        "| expert | alone | without | by card | chosen | by questions | chosen |",
        "|---|---|---|---|---|---|---|",
        *(_left_row(row) for row in found["experts"]),
        "",
    ]


def _left_row(row: Mapping[str, Any]) -> str:
    keys = ("true", "without", "by_card", "share_by_card", "by_grades", "share_by_grades")
    return f"| {row['expert']} | " + " | ".join(as_percent(row[key]) for key in keys) + " |"


def as_percent(share: float) -> str:
    return f"{share * 100:.1f}"


def as_range(ci95: list[float]) -> str:
    return f"{as_percent(ci95[0])} to {as_percent(ci95[1])}"


def as_signed(difference: Mapping[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['value'] * 100:+.1f} ({low * 100:+.1f} to {high * 100:+.1f})"


def as_number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
