"""Three experts that vote better together than the three best would: the vote is fitted, not each expert.

Every candidate panel (a leader, two seconds; or a leader who outweighs both) is treated as one expert whose score is
whether its weighted vote was right. A vote of three has only three outcomes: the seconds agree against the leader, or
they do not, or the leader's answer cannot be read. So panels can be scored on recorded answers without voting again.
Which panel suits a question is a ridge on its features; with the strongest ridge it is one panel for all.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Self

import numpy as np

from routers.learned.base import Training, simplest_of
from routers.learned.linear import ridge
from routers.questions import Design, Questions
from routers.records import Array

STRENGTHS = (10_000.0, 30_000.0, 100_000.0, 1e9)
CANDIDATES = 12
"""Experts that panels are made of: the best on average. Panels grow with their cube."""
_PANELS = 200
_LEADER, _SECOND, _DECIDER = 0.36, 0.32, 0.7
"""Weights: the two seconds outvote a leader, and nobody outvotes a decider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    design: Design
    panels_PE: Array
    weights_DP: Array
    mean_P: Array
    mean_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, _strength(training))

    @classmethod
    def fit_with(cls, training: Training, strength: float) -> Self:
        members, votes = _best_panels(training)
        design = Design.fit(training.questions)
        mean = votes.mean(axis=0)
        weights = ridge(design.features(training.questions), votes - mean, strength)
        expert_mean = training.scores_QE.mean(axis=0)
        panels = np.stack([_scores(m, expert_mean) for m in members])
        return cls(design=design, panels_PE=panels, weights_DP=weights, mean_P=mean, mean_E=expert_mean)

    def predict(self, questions: Questions) -> Array:
        """The scores of the panel chosen; experts outside it follow far behind, by their means."""
        chosen: Array = self.panels_PE[self.panel_of(questions)]
        return chosen

    def panel_of(self, questions: Questions) -> Array:
        best: Array = (self.design.features(questions) @ self.weights_DP + self.mean_P).argmax(axis=1)
        return best


Members = tuple[int, ...]
"""Leader and two seconds, or a decider alone."""


def _strength(training: Training) -> float:
    """Cross-validated on the panel's own votes: panels stand in the place of experts."""
    members, votes = _best_panels(training)
    as_experts = Training(
        questions=training.questions,
        scores_QE=votes,
        answers_QE=np.full(votes.shape, -1, np.int32),
        costs_E=np.zeros(len(members)),
        seed=training.seed,
    )
    return simplest_of(STRENGTHS, _Ridge.fit_with, as_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ridge:
    design: Design
    weights_DE: Array
    mean_E: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, STRENGTHS[-1])

    @classmethod
    def fit_with(cls, training: Training, strength: float) -> Self:
        design, mean = Design.fit(training.questions), training.scores_QE.mean(axis=0)
        weights = ridge(design.features(training.questions), training.scores_QE - mean, strength)
        return cls(design=design, weights_DE=weights, mean_E=mean)

    def predict(self, questions: Questions) -> Array:
        found: Array = self.design.features(questions) @ self.weights_DE + self.mean_E
        return found


def _best_panels(training: Training) -> tuple[list[Members], Array]:
    mean = training.scores_QE.mean(axis=0)
    candidates = [int(e) for e in np.argsort(-mean, kind="stable")[:CANDIDATES]]
    panels: list[Members] = [(e,) for e in candidates]
    for leader in candidates:
        seconds = [e for e in candidates if e != leader]
        panels += [(leader, *pair) for pair in combinations(seconds, 2)]
    votes = np.stack([vote(p, training.scores_QE, training.answers_QE) for p in panels], axis=1)
    best = np.argsort(-votes.mean(axis=0), kind="stable")[:_PANELS]
    return [panels[b] for b in best], votes[:, best]


def vote(panel: Members, scores_QE: Array, answers_QE: Array) -> Array:
    """Each question's score under the panel's weighted vote; an answer that cannot be read does not vote."""
    if len(panel) == 1:
        alone: Array = scores_QE[:, panel[0]]
        return alone
    leader, second, third = panel
    agree = (answers_QE[:, second] == answers_QE[:, third]) & (answers_QE[:, second] >= 0)
    stand_in = np.where(answers_QE[:, second] >= 0, scores_QE[:, second], scores_QE[:, third])
    held = np.where(answers_QE[:, leader] >= 0, scores_QE[:, leader], stand_in)
    found: Array = np.where(agree, scores_QE[:, second], held).astype(np.float32)
    return found


def _scores(panel: Members, mean_E: Array) -> Array:
    scores = (mean_E * 1e-3).astype(np.float32)
    scores[list(panel)] = [_DECIDER] if len(panel) == 1 else [_LEADER, _SECOND + 1e-4, _SECOND]
    return scores
