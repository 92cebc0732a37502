"""The stack on a recorded pool: fitted on train and val, asked once on test, beside what it has to beat.

Legend: Q questions of the test split, E experts, K places in the order.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from evals.routing.statistics import Bootstrap, Estimate
from orchestrator.aggregators.stacking.build import Priors, Stack, Wish, fit_stack
from orchestrator.aggregators.stacking.model import Ballots, said_by_any
from orchestrator.aggregators.stacking.recorded import Recorded, rows_of
from orchestrator.aggregators.stacking.stopping import Walk, best_rule, decide, walk
from routers.records import Array

CALLS = (1.0, 2.0, 3.0, 5.0)
VARIANTS = {
    "answers": Wish(with_prior=False, with_words=False),
    "answers + words": Wish(with_prior=False),
    "answers + words + options": Wish(),
}
"""What the stack may look at: who said what; the words it was said in; what the options give away."""
_BINS = 10


def measure(
    recorded: Recorded, *, seed: int, priors: Priors, on_step: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """One pool and one set of experts, as JSON. ``priors`` were fitted on train and val. Raises ConfigError."""
    train, test = rows_of(recorded, ["train", "val"]), rows_of(recorded, ["test"])
    boot = Bootstrap(len(test), seed)
    means = recorded.records.scores_QE[train].mean(axis=0)
    single = recorded.records.scores_QE[test, means.argmax()]
    oracle = float(recorded.records.scores_QE[test].max(axis=1).mean())

    def result(right_Q: Array, calls: float, **more: Any) -> dict[str, Any]:
        gain = float(right_Q.mean() - single.mean()) / max(oracle - float(single.mean()), 1e-9)
        return {
            **_estimate("score", boot.mean(right_Q)),
            **_estimate("over_single", boot.difference(right_Q, single)),
            "gap_closed": gain,
            "mean_calls": calls,
            **more,
        }

    report: dict[str, Any] = {
        "pool": recorded.records.name,
        "experts": list(recorded.records.expert_ids),
        "n_train": len(train),
        "n_test": len(test),
        "seed": seed,
        "baselines": _baselines(recorded, means, test, result),
        "oracle": oracle,
        "stacks": {},
    }
    for variant, wish in VARIANTS.items():
        on_step(f"{recorded.records.name}: {variant}")
        own = priors if wish.with_prior else None
        stack = fit_stack(recorded, train, replace(wish, seed=seed), priors=own)
        report["stacks"][variant] = _measure_stack(stack, recorded, test, result)
    return report


def _estimate(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_ci95": estimate.ci95}


def _measure_stack(
    stack: Stack, recorded: Recorded, test: Array, result: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    ballots = stack.prepare(recorded.ballots.take(test), recorded.options.take(test))
    gold = recorded.gold_Q[test]
    walked = walk(stack.logit, ballots, gold, stack.order)
    sure, right = walked.sure_QK, walked.right_QK
    rows = np.arange(len(test))
    budgets = {}
    for calls in CALLS:
        stop, held_calls, held_score = best_rule(stack.curve_XF, calls)
        places = stop.places(sure, walked.gain_QK)
        budgets[f"{calls:g}"] = result(
            right[rows, places].astype(float),
            float((places + 1).mean()),
            threshold=stop.threshold,
            least_gain=stop.least_gain,
            held_out={"mean_calls": held_calls, "score": held_score},
            calibration=_calibration(sure[rows, places], right[rows, places]),
        )
    everyone, _ = decide(stack.logit, ballots)
    return {
        "order": [recorded.records.expert_ids[e] for e in stack.order],
        "calls": budgets,
        "first_of_order": [float(right[:, k].mean()) for k in range(len(stack.order))],
        "everyone": result((everyone == gold).astype(float), float(ballots.asked_QE.sum(axis=1).mean())),
        "curve": _curve(stack, walked),
    }


def _curve(stack: Stack, walked: Walk) -> list[list[float]]:
    """[mean calls, score] for one budget after another, on test: for the plot alone, nothing is chosen by it."""
    rows, points = np.arange(len(walked.sure_QK)), []
    for calls in np.arange(1.0, walked.sure_QK.shape[1] + 0.01, 0.1):
        stop, *_ = best_rule(stack.curve_XF, float(calls))
        places = stop.places(walked.sure_QK, walked.gain_QK)
        points.append([float((places + 1).mean()), float(walked.right_QK[rows, places].mean())])
    return points


def _calibration(sure_Q: Array, right_Q: Array) -> list[list[float]]:
    """[mean posterior, share that was right, questions] of equally large groups, the least sure first."""
    order = np.argsort(sure_Q, kind="stable")
    return [
        [float(sure_Q[part].mean()), float(right_Q[part].mean()), len(part)]
        for part in np.array_split(order, min(_BINS, len(order)))
    ]


def _baselines(
    recorded: Recorded, means_E: Array, test: Array, result: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    ballots, gold = recorded.ballots.take(test), recorded.gold_Q[test]
    order = np.argsort(-means_E, kind="stable")
    best = int(order[0])
    found = {
        "best single": result(recorded.records.scores_QE[test, best], 1.0, expert=recorded.records.expert_ids[best]),
        "majority of all": result(_vote(ballots, gold, order, np.ones(len(order))), float(len(order))),
    }
    odds = np.log(np.clip(means_E, 0.02, 0.98) * 9 / (1 - np.clip(means_E, 0.02, 0.98)))
    for calls in (3, 5):
        if calls <= len(order):
            found[f"majority of {calls}"] = result(_vote(ballots, gold, order[:calls], np.ones(len(order))), calls)
            found[f"weighted vote of {calls}"] = result(_vote(ballots, gold, order[:calls], odds), calls)
    return found


def _vote(ballots: Ballots, gold: Array, panel: Array, weights_E: Array) -> Array:
    """A tie goes to the better expert: each place in ``panel`` adds a little less than the one before."""
    total = np.zeros(ballots.open_QO.shape)
    rows = np.arange(len(gold))
    for place, expert in enumerate(panel):
        votes = ballots.votes_QE[:, expert]
        there = votes >= 0
        total[rows[there], votes[there]] += weights_E[expert] * (1 + 1e-6 * (len(panel) - place))
    votes_QK: Array = ballots.votes_QE[:, panel]
    said = said_by_any(votes_QK, ballots.open_QO.shape[1])
    chosen = np.where(said.any(axis=1), np.where(said, total, -np.inf).argmax(axis=1), -1)
    right: Array = (chosen == gold).astype(float)
    return right
