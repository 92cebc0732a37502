"""Two models, a strong and a weak one, and the probability that the strong one is needed (after RouteLLM, 2406.18665).

Strong is the best expert on average, weak the cheapest; the other experts keep a score below both. The score of the
strong one is that probability, of the weak one its complement, so that the threshold is policy.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from experts.errors import ConfigError
from routers.learned.base import Training
from routers.learned.logistic import Logistic
from routers.questions import Questions
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    needed: Logistic
    strong: int
    weak: int
    mean_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        mean = training.scores_QE.mean(axis=0)
        strong = int(mean.argmax())
        weak = cheapest_but(strong, training.costs_E, mean)
        gain = training.scores_QE[:, [strong]] - training.scores_QE[:, [weak]]
        # A tie is half a win, as for a rating: which of two right answers is taken does not matter.
        needed = Logistic.fit(
            Training(
                questions=training.questions,
                scores_QE=np.concatenate([(1 + gain) / 2, (1 - gain) / 2], axis=1),
                answers_QE=training.answers_QE[:, [strong, weak]],
                costs_E=training.costs_E[[strong, weak]],
                seed=training.seed,
            )
        )
        return cls(needed=needed, strong=strong, weak=weak, mean_E=mean)

    def predict(self, questions: Questions) -> Array:
        wins = self.needed.predict(questions)[:, 0]
        scores = np.repeat(self.mean_E[None] * 1e-3, len(questions), axis=0)
        scores[:, self.strong], scores[:, self.weak] = wins, 1 - wins
        return scores


def cheapest_but(strong: int, costs_E: Array, mean_E: Array) -> int:
    """The cheapest other expert; of equally cheap ones the best."""
    order = np.lexsort((-mean_E, costs_E))
    others = [int(e) for e in order if e != strong]
    if not others:
        raise ConfigError("Router 'threshold' chooses between two experts; there is one.")
    return others[0]
