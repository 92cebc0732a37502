"""A cascade on recorded answers: experts are asked one after another, as the service would, until its aggregator is
content; what that costs, and what it scores, at every budget."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from evals.routing.setting import Setting
from evals.routing.statistics import Bootstrap, Estimate
from evals.routing.votes import Outcome, Recorded
from experts.types import Completion
from orchestrator.aggregators.base import Aggregator
from orchestrator.build import make_aggregator
from orchestrator.config import AggregatorConfig
from routers.base import decide
from routers.learned.cascade import Cascade
from routers.records import Array
from routers.static import WordLlama

SPENDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """``cost`` is a share of what the last stage alone costs; ``rule``: who stops the asking."""

    rule: str
    spend: float
    cost: float
    calls: float
    score: Estimate
    difference: Estimate


async def follow(predicted_QE: Array, setting: Setting, aggregator: Aggregator, most: int) -> Outcome:
    """At most ``most`` experts a question, in the order of their scores, until the aggregator is settled."""
    rows = [await _follow(int(q), predicted_QE[i], setting, aggregator, most) for i, q in enumerate(setting.test)]
    scores, calls, costs = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    return Outcome(scores=scores, calls=calls, costs=costs)


async def _follow(
    question: int, predicted_E: Array, setting: Setting, aggregator: Aggregator, most: int
) -> tuple[float, int, float]:
    records, ids = setting.records, setting.records.expert_ids
    scores = dict(zip(ids, map(float, predicted_E), strict=True))
    decision = decide(scores, reason="", router="cascade").top(most)
    recorded = Recorded(setting)
    request = recorded.request(question)
    answers: list[Completion] = []
    asked = [ids.index(e) for e in decision.expert_ids]
    for place, expert in enumerate(asked):
        answers.append(recorded.completion(question, expert))
        if await aggregator.settled(request, decision, answers, decision.expert_ids[place + 1 :]):
            break
    winner = await aggregator.aggregate(request, decision, answers)
    cost = float(setting.cost_QE[question, asked[: len(answers)]].sum())
    return float(records.scores_QE[question, ids.index(winner.expert_id)]), len(answers), cost


async def evaluate_cascade(setting: Setting, *, most: int = 3, spends: Sequence[float] = SPENDS) -> dict[str, Any]:
    """Fitted on train once. "router": the first stage's answer stands. "agreement": stages follow until two agree,
    where the pool has answers that can be compared. Differences are to the last stage alone."""
    model = Cascade.fit(setting.training)
    last = int(model.stages_S[-1])
    alone = setting.scores_QE[:, last].astype(np.float64)
    whole = float(setting.cost_QE[setting.test, last].mean())
    bootstrap = Bootstrap(len(setting.test), setting.seed)
    rules = {"router": 1, "agreement": most}
    if (setting.records.answers_QE[setting.test] < 0).all():
        del rules["agreement"]
    config = AggregatorConfig(name="cascade", options={"extract": "text"})
    aggregator = make_aggregator(config, {}, WordLlama)
    points = []
    for rule, calls in rules.items():
        for spend in spends:
            outcome = await follow(model.at(spend).predict(setting.asked), setting, aggregator, calls)
            points.append(
                Point(
                    rule=rule,
                    spend=spend,
                    cost=float(outcome.costs.mean()) / whole,
                    calls=float(outcome.calls.mean()),
                    score=bootstrap.mean(outcome.scores),
                    difference=bootstrap.difference(outcome.scores, alone),
                )
            )
    return {
        "pool": setting.records.name,
        "n_train": len(setting.train),
        "n_test": len(setting.test),
        "seed": setting.seed,
        "cost": setting.unit,
        "stages": [_stage(int(e), setting, whole) for e in model.stages_S],
        "points": [asdict(p) for p in points],
    }


def _stage(expert: int, setting: Setting, whole: float) -> dict[str, Any]:
    return {
        "expert": setting.records.expert_ids[expert],
        "cost": float(setting.cost_QE[setting.test, expert].mean()) / whole,
        "score": float(setting.scores_QE[:, expert].mean()),
    }


def write(found: dict[str, Any], out: Path) -> None:
    """cascade.json, and cascade.png: what is reached for what is spent."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    (out / "cascade.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for rule in dict.fromkeys(p["rule"] for p in found["points"]):
        own = [p for p in found["points"] if p["rule"] == rule]
        axes.plot([p["cost"] for p in own], [100 * p["score"]["value"] for p in own], "o-", label=rule)
    for stage in found["stages"]:
        axes.plot(stage["cost"], 100 * stage["score"], "k*", markersize=10)
        axes.annotate(stage["expert"], (stage["cost"], 100 * stage["score"]), fontsize=8)
    axes.set_xlabel("cost, as a share of the last stage alone")
    axes.set_ylabel("score, %")
    axes.set_title(f"Cascade on {found['pool']} (stars: one expert for everything)")
    axes.legend()
    figure.savefig(out / "cascade.png", dpi=120)
