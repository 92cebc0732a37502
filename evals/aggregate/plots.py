"""Plots of the aggregation bench: accuracy against calls, what each source of evidence adds, calibration."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#33415c", "#e9a23b", "#2a9d8f", "#e76f51")
MARKERS = ("*", "o", "x", "s", "+", "^", "v", "D")
MOST_CALLS = 8


def draw(reports: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG a case, three panels each."""
    from matplotlib.figure import Figure

    paths = []
    for case, report in reports.items():
        figure = Figure(figsize=(15, 4), layout="constrained")
        calls, parts, sure = figure.subplots(1, 3)
        _calls(calls, report)
        _parts(parts, report)
        _sure(sure, report)
        figure.suptitle(f"{case}, test split", fontweight="bold")
        paths.append(folder / f"{case}.png")
        figure.savefig(paths[-1], dpi=130, metadata={"Software": None})
    return paths


def _calls(axes: "Axes", report: dict[str, Any]) -> None:
    for (variant, stack), colour in zip(report["stacks"].items(), COLOURS, strict=False):
        points = sorted(stack["curve"])
        axes.plot(*zip(*[(c, 100 * s) for c, s in points], strict=True), color=colour, label=f"stack: {variant}")
    few = [(name, result) for name, result in report["baselines"].items() if result["mean_calls"] <= MOST_CALLS]
    for (name, result), marker in zip(few, MARKERS, strict=False):
        place = (result["mean_calls"], 100 * result["score"])
        axes.scatter(*place, color="#555", s=22, marker=marker, zorder=3, label=name)
    axes.set_xlabel("mean calls a question")
    axes.set_ylabel("score in percent")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _parts(axes: "Axes", report: dict[str, Any]) -> None:
    found = {variant: stack["calls"]["3"] for variant, stack in report["stacks"].items()}
    values = [100 * result["over_single"] for result in found.values()]
    spans = [[100 * x for x in result["over_single_ci95"]] for result in found.values()]
    errors = [
        [v - s[0] for v, s in zip(values, spans, strict=True)],
        [s[1] - v for v, s in zip(values, spans, strict=True)],
    ]
    axes.barh(list(found), values, xerr=errors, color=COLOURS[: len(found)])
    axes.axvline(0, color="#333", linewidth=0.8)
    axes.set_xlabel("points over the best single expert, at most 3 calls, 95 %")


def _sure(axes: "Axes", report: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], ":", color="#888", linewidth=1)
    for (variant, stack), colour in zip(report["stacks"].items(), COLOURS, strict=False):
        bins = stack["calls"]["3"]["calibration"]
        axes.plot([b[0] for b in bins], [b[1] for b in bins], "o-", markersize=3, color=colour, label=variant)
    axes.set_xlabel("posterior of the answer given")
    axes.set_ylabel("share that was right")
