"""A router and the stack: the router says who is asked, the stack what their answers are worth together.

It is the service's stack on answers as they were parsed. Fitted on the train split alone, it hears the router's experts
one by one, stops where an option is likely enough, and gives no option that nobody chose: with one call exactly there
is nothing for it to do.

Legend: Q questions of the test split, E experts, K places in a router's order.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from evals.routing.setting import Setting
from evals.routing.votes import Outcome, check_answered
from experts.models import cache_dir
from orchestrator.aggregators.stacking.build import Stack, Wish, fit_stack
from orchestrator.aggregators.stacking.model import Ballots
from orchestrator.aggregators.stacking.recorded import read_recorded
from orchestrator.aggregators.stacking.stopping import best_rule, decide, expected_gain
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacking:
    """``ballots`` are all answers to the test split, prepared for ``stack``. ``calls`` is what its rule for stopping
    allows a question on average, as of 'collegium build stack'; None for as many as the router names. Few experts
    cannot use up what many may, so that the mean stays below it."""

    stack: Stack
    ballots: Ballots
    scores_QE: Array
    cost_QE: Array
    calls: float | None = None

    @classmethod
    def fit(cls, folder: Path, setting: Setting, calls: float | None = None) -> Self:
        """``folder`` is the pool's, for the options' wording. Raises ConfigError."""
        check_answered(setting)
        recorded = read_recorded(folder, setting.records.expert_ids, cache=cache_dir() / "stacking")
        stack = fit_stack(recorded, setting.train, Wish(seed=setting.seed))
        ballots = recorded.ballots.take(setting.test)
        if setting.hide_tasks:
            ballots = replace(ballots, tasks_Q=np.full(len(ballots), -1))
        return cls(
            stack=stack,
            calls=calls,
            ballots=stack.prepare(ballots, recorded.options.take(setting.test)),
            scores_QE=setting.scores_QE,
            cost_QE=setting.cost_QE[setting.test],
        )

    async def ask(self, predicted_QE: Array, top_k: int) -> Outcome:
        """At most ``top_k`` of the best-scored experts."""
        order_QK = np.argsort(-predicted_QE, axis=1, kind="stable")[:, :top_k]
        heard = [self._hear(order_QK, place) for place in range(1, order_QK.shape[1] + 1)]
        sure_QK, gain_QK, scores_QK = (np.stack(part, axis=1) for part in zip(*heard, strict=True))
        stop, *_ = best_rule(self.stack.curve_XF, self.calls or top_k)
        places = stop.places(sure_QK, gain_QK)
        rows = np.arange(len(places))
        costs_QK = np.take_along_axis(self.cost_QE, order_QK, axis=1).cumsum(axis=1)
        return Outcome(scores=scores_QK[rows, places], calls=places + 1.0, costs=costs_QK[rows, places])

    def _hear(self, order_QK: Array, calls: int) -> tuple[Array, Array, Array]:
        """How sure the stack is after that many answers, what the next call would be worth, and the score of the answer
        it takes; the first where none can be read."""
        heard_QE, logit = np.zeros(self.scores_QE.shape, np.bool_), self.stack.logit
        np.put_along_axis(heard_QE, order_QK[:, :calls], True, axis=1)
        ballots = self.ballots.hearing(heard_QE)
        chosen, sure = decide(logit, ballots)
        next_QN = np.take_along_axis(logit.usual(ballots.tasks_Q), order_QK[:, calls:], axis=1)
        said_QE = heard_QE & (self.ballots.votes_QE == chosen[:, None]) & (chosen[:, None] >= 0)
        winner = np.where(chosen >= 0, said_QE.argmax(axis=1), order_QK[:, 0])
        return sure, expected_gain(logit, ballots, next_QN), self.scores_QE[np.arange(len(winner)), winner]
