"""What a router has to beat."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.routing.setting import Setting
from evals.routing.votes import VOTES, Outcome, aggregator_for, ask, fixed
from routers.learned.task import Task
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """``note`` says what it knows or whom it asks."""

    outcome: Outcome
    note: str
    expert: str | None = None


async def baselines(setting: Setting, top_k: int) -> dict[str, Baseline]:
    """By the names of contracts.md. The first is what differences are taken to."""
    train, test = setting.records.scores_QE[setting.train], setting.scores_QE
    return {
        "best_single": _single(int(train.mean(axis=0).argmax()), setting, "chosen on train"),
        "best_single_hindsight": _single(int(test.mean(axis=0).argmax()), setting, "chosen on test"),
        "task_best": _task_best(setting),
        "random": _random(setting),
        "cheapest": _single(int(setting.costs_E.argmin()), setting, f"by {setting.unit}"),
        **await _majorities(setting, top_k),
        "oracle": _oracle(setting),
    }


def _single(expert: int, setting: Setting, note: str) -> Baseline:
    return Baseline(
        outcome=_chosen(np.full(len(setting.test), expert), setting),
        note=note,
        expert=setting.records.expert_ids[expert],
    )


def _task_best(setting: Setting) -> Baseline:
    means = Task.fit_with(setting.training, 0.0).predict(setting.told)
    return Baseline(outcome=_chosen(means.argmax(axis=1), setting), note="the best on train in the question's task")


def _random(setting: Setting) -> Baseline:
    scores, costs = setting.scores_QE.mean(axis=1), setting.cost_QE[setting.test].mean(axis=1)
    return Baseline(
        outcome=Outcome(scores=scores, calls=np.ones(len(scores)), costs=costs), note="expected value of one at random"
    )


def _oracle(setting: Setting) -> Baseline:
    """The cheapest of the best: costs differ, and an oracle would know."""
    cheap = setting.cost_QE[setting.test] / max(float(setting.cost_QE.max()), 1e-12)
    chosen = (setting.scores_QE - 1e-6 * cheap).argmax(axis=1)
    return Baseline(outcome=_chosen(chosen, setting), note="the best answer of all, known afterwards")


async def _majorities(setting: Setting, top_k: int) -> dict[str, Baseline]:
    if (setting.records.answers_QE[setting.test] < 0).all():
        return {}
    order = np.argsort(-setting.records.scores_QE[setting.train].mean(axis=0), kind="stable")
    sizes: Mapping[str, int] = {"majority_vote": len(order)}
    if 1 < top_k < len(order):
        sizes = {"majority_same_calls": top_k, **sizes}
    vote = aggregator_for(VOTES[0], setting)
    return {
        name: Baseline(
            outcome=await ask(fixed([int(e) for e in order[:size]], setting), setting, vote, size),
            note=f"plain vote of the {size} best on train",
        )
        for name, size in sizes.items()
    }


def _chosen(experts_Q: Array, setting: Setting) -> Outcome:
    rows = np.arange(len(setting.test))
    return Outcome(
        scores=setting.scores_QE[rows, experts_Q],
        calls=np.ones(len(rows)),
        costs=setting.cost_QE[setting.test][rows, experts_Q],
    )
