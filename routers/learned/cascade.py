"""Cheap first: a chain of ever dearer and better experts, and for each question the stage to begin with.

Experts that are dearer than a better one are no stages. The stage is chosen by expected score less price x cost; which
price spends which share of what the last stage alone would cost is found on questions held out, so that a budget needs
no new fit. Later stages follow in order: the aggregator 'cascade' decides after each answer whether to go on.

Legend: Q questions, E experts, S stages, B points of the price table.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from routers.calibrate import price_for, price_table
from routers.learned.base import Training, split_folds
from routers.learned.linear import Linear
from routers.questions import Questions
from routers.records import Array

STAGES = 4
SPEND = 0.5
_STRENGTH = 3000.0
BEHIND, _OUTSIDE = 0.4, 0.2
"""Scores of skipped stages, and of experts that are no stage, lie below these: they are spares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade:
    base: Linear
    costs_E: Array
    stages_S: Array
    prices_B: Array
    spends_B: Array
    spend: float

    @classmethod
    def fit(cls, training: Training) -> Self:
        mean = training.scores_QE.mean(axis=0)
        stages = np.array(front(mean, training.costs_E), np.int64)
        held = np.zeros((len(training.questions), len(stages)))
        for kept, out in split_folds(len(training.questions), training.seed):
            model = Linear.fit_with(training.take(kept), _STRENGTH)
            held[out] = model.predict(training.questions.take(out))[:, stages]
        prices, spends = price_table(held, training.costs_E[stages])
        return cls(
            base=Linear.fit_with(training, _STRENGTH),
            costs_E=training.costs_E.astype(np.float64),
            stages_S=stages,
            prices_B=prices,
            spends_B=spends,
            spend=SPEND,
        )

    def at(self, spend: float) -> Self:
        """The same cascade with another budget: a share of what the last stage alone would cost."""
        return replace(self, spend=spend)

    def predict(self, questions: Questions) -> Array:
        """Q x E in the order of asking: the first stage chosen, the later ones, then spares."""
        expected = self.base.predict(questions)
        price = price_for(self.spend, self.prices_B, self.spends_B)
        first = (expected[:, self.stages_S] - price * self.costs_E[self.stages_S]).argmax(axis=1)
        steps = np.arange(len(self.stages_S)) - first[:, None]
        order = np.where(steps >= 0, 1 - steps / (2 * len(self.stages_S)), BEHIND + 0.1 * steps / len(self.stages_S))
        scores = np.clip(expected, 0, 1) * _OUTSIDE
        scores[:, self.stages_S] = order
        return scores


def front(mean_E: Array, costs_E: Array, most: int = STAGES) -> list[int]:
    """Experts that no cheaper one beats, cheapest first; of many, the ends and those spread evenly by cost between."""
    best, chain = -np.inf, []
    for e in np.lexsort((-mean_E, costs_E)):
        if mean_E[e] > best:
            best = mean_E[e]
            chain.append(int(e))
    places = np.unique(np.linspace(0, len(chain) - 1, min(most, len(chain))).round().astype(int))
    return [chain[p] for p in places]
