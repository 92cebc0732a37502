"""Item response theory with a question model: log-odds = ability_e x difficulty(q) in ``rank`` dimensions + bias_e.

Difficulty is linear in the question's features (multidimensional IRT, amortised), so that experts share what is learned
of questions. It starts from the best low-rank part of ridge and is then fitted by likelihood.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of
from routers.learned.linear import ridge
from routers.learned.logistic import log_odds, sigmoid
from routers.learned.minimise import minimise
from routers.questions import Design, Questions
from routers.records import Array

RANKS = (2, 4, 8)
STRENGTH = 1000.0
_STEPS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    design: Design
    question_DR: Array
    ability_RE: Array
    bias_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, best_of(RANKS, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, rank: int) -> Self:
        design = Design.fit(training.questions)
        inputs, targets = design.features(training.questions), training.scores_QE
        start = [*_low_rank(inputs, targets, rank), log_odds(targets.mean(axis=0))]
        question, ability, bias = minimise(start, lambda w: _loss(w, inputs, targets), steps=_STEPS)
        return cls(
            design=design,
            question_DR=question.astype(np.float32),
            ability_RE=ability.astype(np.float32),
            bias_E=bias.astype(np.float32),
        )

    def predict(self, questions: Questions) -> Array:
        return sigmoid(self.design.features(questions) @ self.question_DR @ self.ability_RE + self.bias_E)


def _low_rank(inputs: Array, targets: Array, rank: int) -> tuple[Array, Array]:
    weights = ridge(inputs, targets - targets.mean(axis=0), STRENGTH)
    # Of what is predicted, not of the weights: directions that no question has do not count. Times 4: log-odds.
    _, _, directions = np.linalg.svd(inputs @ weights, full_matrices=False)
    top = directions[:rank]
    scale = np.sqrt(np.maximum(np.linalg.norm(weights @ top.T, axis=0), 1e-6) * 4)
    return 4 * (weights @ top.T) / scale, top * scale[:, None]


def _loss(weights: list[Array], inputs: Array, targets: Array) -> tuple[float, list[Array]]:
    question, ability, bias = weights
    traits = inputs @ question
    logits = traits @ ability + bias
    # The nuclear norm of question x ability, by way of its factors: half of each one's square.
    penalty = STRENGTH / 4 * (np.sum(question**2) + np.sum(ability**2)) / 8
    loss = np.sum(np.logaddexp(0, logits) - targets * logits) + penalty
    error = sigmoid(logits) - targets
    by_question = inputs.T @ (error @ ability.T) + STRENGTH / 16 * question
    return float(loss), [by_question, traits.T @ error + STRENGTH / 16 * ability, error.sum(axis=0)]
