"""What a learned model is, and how one is tuned: on the training split alone, by cross-validation.

Legend: Q questions, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np

from experts.errors import ConfigError
from routers.questions import Questions
from routers.records import Array

FOLDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """``scores_QE`` from 0 to 1; ``answers_QE`` as in Records; ``costs_E`` what a call costs on average;
    ``expert_ids`` may be empty where only columns matter."""

    questions: Questions
    scores_QE: Array
    answers_QE: Array
    costs_E: Array
    seed: int = 0
    expert_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.questions):
            raise ConfigError("There is no question to learn from.")
        if not np.isfinite(self.scores_QE).all():
            row, column = np.argwhere(~np.isfinite(self.scores_QE))[0]
            raise ConfigError(f"The score of question {row + 1} for expert {column + 1} is not a number.")
        if self.scores_QE.min() == self.scores_QE.max():
            raise ConfigError(f"Every score is {self.scores_QE.min():g}: there is nothing to learn from.")

    def take(self, rows: Array) -> Self:
        return type(self)(
            questions=self.questions.take(rows),
            scores_QE=self.scores_QE[rows],
            answers_QE=self.answers_QE[rows],
            costs_E=self.costs_E,
            seed=self.seed,
            expert_ids=self.expert_ids,
        )


class Model(Protocol):
    """``predict``: Q x E, higher is better. Where scores are 0 or 1, the probability that the expert answers well."""

    @classmethod
    def fit(cls, training: Training) -> Self: ...

    def predict(self, questions: Questions) -> Array: ...


M = TypeVar("M", bound=Model)
Option = TypeVar("Option")


def split_folds(count: int, seed: int, folds: int = FOLDS, families: Array | None = None) -> list[tuple[Array, Array]]:
    """(the rest, the part held out) for each fold. Rows of one family, by its number, are not parted."""
    order = np.random.default_rng(seed).permutation(count)
    parts = np.array_split(order, min(folds, count))
    if families is not None:
        fold_of = np.empty(count, np.int64)
        for number, part in enumerate(parts):
            fold_of[part] = number
        _, first, own = np.unique(families, return_index=True, return_inverse=True)
        parts = [p for n in range(len(parts)) if len(p := np.flatnonzero(fold_of[first[own]] == n))]
    return [(np.concatenate([q for q in parts if q is not p]), p) for p in parts if len(p) < count]


def best_of(options: Sequence[Option], fit: Callable[[Training, Option], M], training: Training) -> Option:
    """The option whose choices score best on questions held out; the first of equals."""
    return options[int(np.argmax(held_out_scores(options, fit, training).mean(axis=1)))]


def simplest_of(options: Sequence[Option], fit: Callable[[Training, Option], M], training: Training) -> Option:
    """The last option that is not clearly worse than the best: by less than a standard error, question by question.

    Options are in the order of ever simpler models. Where choosing among many is mostly choosing noise, this keeps what
    a questionable gain would cost.
    """
    scores_OQ = held_out_scores(options, fit, training)
    deficits_OQ = scores_OQ[np.argmax(scores_OQ.mean(axis=1))] - scores_OQ
    errors_O = deficits_OQ.std(axis=1) / deficits_OQ.shape[1] ** 0.5
    return options[int(np.flatnonzero(deficits_OQ.mean(axis=1) <= errors_O)[-1])]


def held_out_scores(options: Sequence[Option], fit: Callable[[Training, Option], M], training: Training) -> Array:
    """Score of the expert chosen first, by option and question; the question was held out of the fit."""
    scores_OQ = np.zeros((len(options), len(training.questions)))
    for kept, held in split_folds(len(training.questions), training.seed):
        inner, asked = training.take(kept), training.questions.take(held)
        for number, option in enumerate(options):
            chosen = fit(inner, option).predict(asked).argmax(axis=1)
            scores_OQ[number, held] = training.scores_QE[held, chosen]
    return scores_OQ


def shrunk(sums: Array, counts: Array, prior: Array, strength: float) -> Array:
    """Means of few observations, pulled towards ``prior`` as if it had been seen ``strength`` times."""
    return (sums + strength * prior) / (counts + strength)
