"""Plots of an evaluation: who scores what, what it costs, and whether probabilities hold."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evals.routing.bench import Evaluation
from routers.records import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 6
"""Lines in colour in a plot: the best ones. The others stay, in grey, without a name."""
FEW = 20
"""Answers below which a point of the reliability plot is chance, and is not drawn."""
INK, GOOD, PALE, LINE = "#33415c", "#2a9d8f", "#b8c4d6", "#e76f51"


def draw(evaluation: Evaluation, folder: Path) -> list[Path]:
    """PNG files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"scores": _scores(evaluation), "reliability": _reliability(evaluation)}
    if np.ptp(evaluation.setting.costs_E) > 0:
        figures["cost"] = _cost(evaluation)
    if any(fit.pair is not None for fit in evaluation.fits):
        figures["pair"] = _pair(evaluation)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight", metadata={"Software": None})
    return paths


def _figure(width: float, height: float, title: str) -> "tuple[Figure, Axes]":
    # Not pyplot: it keeps every figure, and chooses a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _scores(evaluation: Evaluation) -> "Figure":
    bars = [(name, evaluation.estimates[name], PALE) for name in evaluation.baselines if name != "oracle"]
    bars += [(r.label, r.score, GOOD if r.helps else INK) for r in evaluation.results]
    bars.sort(key=lambda bar: bar[1].value)
    records = evaluation.setting.records
    figure, axes = _figure(7.5, 1.2 + 0.3 * len(bars), f"{records.name}, {len(records.experts)} experts: score, 95 %")
    values = np.array([e.value for _, e, _ in bars]) * 100
    errors = np.abs(np.array([[e.low, e.high] for _, e, _ in bars]).T * 100 - values)
    axes.barh(
        [n for n, _, _ in bars],
        values,
        xerr=errors,
        color=[c for _, _, c in bars],
        error_kw={"ecolor": "#777", "lw": 1},
    )
    best = evaluation.estimates["best_single"].value * 100
    axes.axvline(best, color=LINE, linewidth=1.2)
    axes.set_xlim(left=max(0.0, values.min() - 12))
    axes.margins(y=0.01)
    axes.set_xlabel(f"score in percent; line: best single; green: helps; oracle {_oracle(evaluation):.1f}")
    return figure


def _oracle(evaluation: Evaluation) -> float:
    return evaluation.estimates["oracle"].value * 100


def _cost(evaluation: Evaluation) -> "Figure":
    figure, axes = _figure(7, 4.5, "Cost and quality, one call")
    setting = evaluation.setting
    mean_costs, means = setting.cost_QE[setting.test].mean(axis=0), setting.scores_QE.mean(axis=0) * 100
    axes.scatter(mean_costs, means, color=PALE, edgecolor=INK, zorder=3, label="experts")
    routed = [(fit.router, np.array(sorted(fit.curve)) * [1, 100]) for fit in evaluation.fits]
    _lines(axes, [(name, points, float(points[:, 1].mean())) for name, points in routed])
    if mean_costs.min() > 0:
        axes.set_xscale("log")
    axes.set_xlabel(f"mean cost of a question ({setting.unit})")
    axes.set_ylabel("score in percent")
    axes.legend(fontsize=7, ncols=2, frameon=False)
    return figure


def _pair(evaluation: Evaluation) -> "Figure":
    figure, axes = _figure(6, 4.5, "Strong and weak expert")
    pairs = [(f"{f.router} {f.pair.apgr or 0:.2f}", f.pair) for f in evaluation.fits if f.pair is not None]
    shares = [np.linspace(0, 100, len(pair.scores)) for _, pair in pairs]
    points = [np.stack([x, pair.scores * 100], axis=1) for x, (_, pair) in zip(shares, pairs, strict=True)]
    _lines(axes, [(name, line, pair.area) for line, (name, pair) in zip(points, pairs, strict=True)])
    pair = next((f.pair for f in evaluation.fits if f.pair is not None), None)
    if pair is not None:
        ids = evaluation.setting.records.expert_ids
        axes.plot([0, 100], pair.scores[[0, -1]] * 100, "--", color="#777", linewidth=1, label="random mix 0.50")
        axes.plot(np.linspace(0, 100, len(pair.oracle)), pair.oracle * 100, ":", color=INK, linewidth=1, label="oracle")
        axes.set_xlabel(f"percent of questions for {ids[pair.strong]}, others to {ids[pair.weak]}")
    axes.set_ylabel("score in percent")
    axes.legend(fontsize=7, ncols=2, frameon=False, title="APGR", title_fontsize=7)
    return figure


def _lines(axes: "Axes", lines: list[tuple[str, Array, float]]) -> None:
    """(label, points, how good it is): the best in colour, best first in the legend."""
    ranked = sorted(lines, key=lambda line: -line[2])
    for label, points, _ in ranked[:SHOWN]:
        axes.plot(*points.T, linewidth=1.4, label=label, zorder=2)
    for _, points, _ in ranked[SHOWN:]:
        axes.plot(*points.T, linewidth=0.8, color=PALE, alpha=0.7, zorder=1)


def _reliability(evaluation: Evaluation) -> "Figure":
    figure, axes = _figure(5, 4.5, "Do probabilities hold?")
    axes.plot([0, 1], [0, 1], "--", color="#777", linewidth=1)
    for fit in evaluation.fits:
        if fit.calibration is not None:
            bins = [b for b in fit.calibration.bins if b[2] >= FEW]
            axes.plot(
                [b[0] for b in bins],
                [b[1] for b in bins],
                marker="o",
                markersize=3,
                linewidth=1,
                label=_ece(fit.router, fit.calibration.ece),
            )
    axes.set_xlabel("predicted")
    axes.set_ylabel("observed")
    axes.legend(fontsize=7, frameon=False, title="expected calibration error", title_fontsize=7)
    return figure


def _ece(router: str, ece: float) -> str:
    return f"{router} {ece:.3f}"
