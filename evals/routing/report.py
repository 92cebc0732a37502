"""report.json (contracts.md) and report.md of an evaluation. Times are the only part that a seed does not repeat."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from evals.routing.baselines import Baseline
from evals.routing.bench import Evaluation, Result
from evals.routing.curves import PairCurve, hull_area
from evals.routing.sections import as_number, as_percent, as_range, as_signed, left_out, wording
from evals.routing.setting import Setting
from evals.routing.statistics import Estimate
from routers.costs import COSTS
from routers.records import Array

HELPS, NOT = "helps", "does not help"


def as_json(evaluation: Evaluation, encode_ms: Array) -> dict[str, Any]:
    setting = evaluation.setting
    answered = setting.records.answered_QE[setting.test]
    return {
        "pool": setting.records.name,
        "pool_digest": setting.records.digest,
        "experts": list(setting.records.expert_ids),
        "n_train": len(setting.train),
        "n_test": len(setting.test),
        "unanswered_test": int((~answered).sum()),
        "seed": setting.seed,
        "tasks_told": not setting.hide_tasks,
        "cost_unit": setting.unit,
        "encode_ms_p50": _percentile(encode_ms, 50),
        "encode_ms_p99": _percentile(encode_ms, 99),
        "self_consistency": None,
        "singles_cost_area": _area(setting, singles(setting)),
        "baselines": {name: _baseline(name, b, evaluation) for name, b in evaluation.baselines.items()},
        "results": [_result(r, evaluation, encode_ms) for r in evaluation.results],
    }


def _baseline(name: str, baseline: Baseline, evaluation: Evaluation) -> dict[str, Any]:
    return {
        **({"expert": baseline.expert} if baseline.expert else {}),
        **_estimate(evaluation.estimates[name]),
        "difference": _difference(evaluation.differences[name]),
        "mean_calls": float(baseline.outcome.calls.mean()),
        "mean_cost": float(baseline.outcome.costs.mean()),
        "note": baseline.note,
    }


def _result(result: Result, evaluation: Evaluation, encode_ms: Array) -> dict[str, Any]:
    in_usd = evaluation.setting.unit == "usd"
    mean_cost = float(result.outcome.costs.mean())
    route_ms = result.fit.decide_ms + float(np.median(encode_ms)) if len(encode_ms) else result.fit.decide_ms
    return {
        "router": result.fit.router,
        "aggregator": result.aggregator,
        "top_k": result.top_k,
        **_estimate(result.score),
        "difference": _difference(result.difference),
        "verdict": HELPS if result.helps else NOT,
        "mean_calls": float(result.outcome.calls.mean()),
        "oracle_gap_closed": result.gap_closed,
        "mean_cost": mean_cost,
        "usd_per_1k": mean_cost * 1e3 if in_usd else None,
        "pair": None if result.fit.pair is None else _pair(result.fit.pair, evaluation.setting.records.expert_ids),
        "ece": None if result.fit.calibration is None else result.fit.calibration.ece,
        "cost_area": _area(evaluation.setting, result.fit.curve),
        "cost_curve": [list(point) for point in result.fit.curve],
        "fit_s": result.fit.fit_s,
        "decide_ms_p50": _percentile(result.fit.decide_ms, 50),
        "decide_ms_p99": _percentile(result.fit.decide_ms, 99),
        "route_ms_p50": _percentile(route_ms, 50),
        "route_ms_p99": _percentile(route_ms, 99),
    }


def _pair(pair: PairCurve, expert_ids: tuple[str, ...]) -> dict[str, Any]:
    return {
        "strong": expert_ids[pair.strong],
        "weak": expert_ids[pair.weak],
        "area": pair.area,
        "apgr": pair.apgr,
        "beyond_random": pair.beyond_random,
        "strong_calls_for_50": pair.calls_for(0.5),
        "strong_calls_for_80": pair.calls_for(0.8),
    }


def singles(setting: Setting) -> list[tuple[float, float]]:
    """(mean cost, mean score) of each expert on the test split."""
    costs = setting.cost_QE[setting.test].mean(axis=0)
    return [(float(c), float(s)) for c, s in zip(costs, setting.scores_QE.mean(axis=0, dtype=np.float64), strict=True)]


def _area(setting: Setting, points: Sequence[tuple[float, float]]) -> float | None:
    """Between the cheapest and the dearest expert; every curve may fall back on the cheapest one."""
    costs = [cost for cost, _ in singles(setting)]
    return hull_area([min(singles(setting)), *points], min(costs), max(costs))


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"score": estimate.value, "ci95": estimate.ci95}


def _difference(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "ci95": estimate.ci95}


def _percentile(times: Array, q: float) -> float | None:
    return float(np.percentile(times, q)) if len(times) else None


def as_markdown(report: Mapping[str, Any], extra: str = "") -> str:
    return "\n".join(
        [
            f"# Routing on {report['pool']}: {len(report['experts'])} experts",
            "",
            f"Fitted on {report['n_train']} questions, asked {report['n_test']} others"
            f"{'' if report['tasks_told'] else ', whose tasks routers are not told'}; seed {report['seed']}. Scores "
            f"in percent, with 95 % intervals by bootstrap over questions; the difference is paired, to the best "
            f"single expert on train. {report['unanswered_test']} answers are missing and score 0. "
            f"Cost: {COSTS[report['cost_unit']]}. One answer a question is recorded: no self-consistency.",
            "",
            "Calls are made one by one until the rest cannot change the result, as by a policy's 'one_by_one: true'. "
            "Each row is tested alone: of 40 that are no better than the best single expert, one helps by luck.",
            "",
            "| | score | ci95 | difference to best single | calls | cost | |",
            "|---|---|---|---|---|---|---|",
            *(_baseline_row(name, b) for name, b in report["baselines"].items()),
            *(_result_row(r) for r in report["results"]),
            "",
            "| router | gap to oracle closed | APGR | beyond the random mix | strong calls for 50 % / 80 % | cost area "
            "| ECE | fit s | decide ms p50 / p99 | route ms p50 / p99 |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_detail_row(r) for r in report["results"]),
            "",
            "Gap to oracle closed: 0 is the best single expert, 1 the best answer of all. APGR: 0.5 is the random mix "
            "of the strong and the weak expert. Cost area: the mean score over all budgets between the cheapest and "
            f"the dearest expert; of single experts and their mixes it is {as_number(report['singles_cost_area'])}. "
            "Decide: embedding given; route: with the encoder.",
            "",
            *wording(report.get("robustness")),
            *left_out(report.get("leave_one_out")),
            *(f"![{name}]({name}.png)" for name in report.get("plots", ())),
            extra,
            "",
        ]
    )


def _baseline_row(name: str, b: Mapping[str, Any]) -> str:
    who = f" ({b['expert']})" if b.get("expert") else ""
    return (
        f"| {name}{who} | {as_percent(b['score'])} | {as_range(b['ci95'])} | {as_signed(b['difference'])} "
        f"| {b['mean_calls']:.2f} | {b['mean_cost']:.4g} | {b['note']} |"
    )


def _result_row(r: Mapping[str, Any]) -> str:
    policy = f"{r['aggregator']}, top {r['top_k']}" if r["top_k"] > 1 else "one call"
    return (
        f"| **{r['router']}** ({policy}) | {as_percent(r['score'])} | {as_range(r['ci95'])} "
        f"| {as_signed(r['difference'])} | {r['mean_calls']:.2f} | {r['mean_cost']:.4g} | {r['verdict']} |"
    )


def _detail_row(r: Mapping[str, Any]) -> str:
    pair = r["pair"] or {}
    return (
        f"| {r['router']} | {as_number(r['oracle_gap_closed'])} | {as_number(pair.get('apgr'))} "
        f"| {as_number(pair.get('beyond_random'))} | {as_number(pair.get('strong_calls_for_50'))} / "
        f"{as_number(pair.get('strong_calls_for_80'))} | {as_number(r['cost_area'])} "
        f"| {as_number(r['ece'])} | {r['fit_s']:.1f} "
        f"| {as_number(r['decide_ms_p50'])} / {as_number(r['decide_ms_p99'])} "
        f"| {as_number(r['route_ms_p50'])} / {as_number(r['route_ms_p99'])} |"
    )


def write(report: Mapping[str, Any], folder: Path, extra: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
    (folder / "report.md").write_text(as_markdown(report, extra))
