"""Experts chosen for what they answer together: the vote is fitted, not each expert.

Every candidate is treated as one expert whose score is whether its weighted vote was right. A relay is a leader who
outweighs the rest, who count only where the leader's answer cannot be read. A trio is a leader and two seconds, who
outvote the leader where they agree. So candidates can be scored on recorded answers without voting again, and a vote
that asks one by one stops early: a relay makes one call and seldom a second, a trio two where the first two agree.

Which one suits a question is a ridge on its features, reduced to a few directions (reduced-rank regression, Izenman
1975): hundreds of candidates that share their members differ in few ways, and the rest is noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Self

import numpy as np

from routers.learned.base import Training, best_of
from routers.learned.linear import ridge
from routers.questions import Design, Questions
from routers.records import Array

OPTIONS = ((4, 3000.0), (2, 3000.0), (2, 10_000.0), (1, 30_000.0))
"""Rank, and strength of the ridge."""
EXPERTS = 8
"""Experts that candidates are made of: the best on average. Trios grow with their cube."""
_CANDIDATES = 120
_LEADER, _SECOND, _THIRD = 0.36, 0.3201, 0.32
_RELAY = (0.7, 0.2, 0.05)

Members = tuple[int, ...]
"""A leader and two seconds; of a relay, its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """For at most three calls; with one, a leader answers alone who was not chosen for that."""

    design: Design
    panels_PE: Array
    weights_DR: Array
    panels_RP: Array
    mean_P: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        shares, votes = _best_candidates(training)
        option = best_of(OPTIONS, _Ridge.fit_with, _as_experts(training, votes))
        return cls._of(_Ridge.fit_with(_as_experts(training, votes), option), shares)

    @classmethod
    def _of(cls, ridge: "_Ridge", shares: Array) -> Self:
        return cls(
            design=ridge.design,
            panels_PE=shares,
            weights_DR=ridge.weights_DR,
            panels_RP=ridge.panels_RP,
            mean_P=ridge.mean_P,
        )

    def predict(self, questions: Questions) -> Array:
        """The weights of the panel chosen; experts outside it follow far behind, by their means."""
        traits = self.design.features(questions) @ self.weights_DR
        chosen: Array = self.panels_PE[(traits @ self.panels_RP + self.mean_P).argmax(axis=1)]
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ridge:
    design: Design
    weights_DR: Array
    panels_RP: Array
    mean_P: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, OPTIONS[-1])

    @classmethod
    def fit_with(cls, training: Training, option: tuple[int, float]) -> Self:
        rank, strength = option
        design, mean = Design.fit(training.questions), training.scores_QE.mean(axis=0)
        inputs = design.features(training.questions)
        weights = ridge(inputs, training.scores_QE - mean, strength)
        # What all candidates share moves no choice.
        weights = weights - weights.mean(axis=1, keepdims=True)
        _, _, directions = np.linalg.svd(inputs @ weights, full_matrices=False)
        top = directions[:rank]
        return cls(
            design=design,
            weights_DR=(weights @ top.T).astype(np.float32),
            panels_RP=top.astype(np.float32),
            mean_P=mean.astype(np.float32),
        )

    def predict(self, questions: Questions) -> Array:
        found: Array = self.design.features(questions) @ self.weights_DR @ self.panels_RP + self.mean_P
        return found


def _as_experts(training: Training, votes: Array) -> Training:
    """Candidates in the place of experts, so that they are tuned by their own votes."""
    return Training(
        questions=training.questions,
        scores_QE=votes,
        answers_QE=np.full(votes.shape, -1, np.int32),
        costs_E=np.zeros(votes.shape[1]),
        seed=training.seed,
    )


def _best_candidates(training: Training) -> tuple[Array, Array]:
    """(weights by candidate and expert, scores by question and candidate) of the best on average."""
    mean = training.scores_QE.mean(axis=0)
    best = [int(e) for e in np.argsort(-mean, kind="stable")[:EXPERTS]]
    found = [(kind, members) for kind in VOTES for members in _members(kind, best)]
    votes = np.stack([VOTES[k](m, training.scores_QE, training.answers_QE) for k, m in found], axis=1)
    kept = np.argsort(-votes.mean(axis=0), kind="stable")[:_CANDIDATES]
    return np.stack([_shares(kind, members, mean) for kind, members in (found[k] for k in kept)]), votes[:, kept]


def _members(kind: str, best: list[int]) -> list[Members]:
    if kind == "relay" or len(best) < 3:
        relays = list(permutations(best, min(2, len(best))))
        return [(*r, *[e for e in best if e not in r][:1]) for r in relays]
    return [(leader, *pair) for leader in best for pair in combinations([e for e in best if e != leader], 2)]


def relay(members: Members, scores_QE: Array, answers_QE: Array) -> Array:
    """Each question's score: of the first member whose answer can be read, else of the leader."""
    found: Array = scores_QE[:, members[0]]
    for member in reversed(members):
        found = np.where(answers_QE[:, member] >= 0, scores_QE[:, member], found)
    return found.astype(np.float32)


def trio(members: Members, scores_QE: Array, answers_QE: Array) -> Array:
    """Each question's score under the trio's weighted vote; an answer that cannot be read does not vote."""
    if len(members) < 3:
        return relay(members, scores_QE, answers_QE)
    _, second, third = members
    agree = (answers_QE[:, second] == answers_QE[:, third]) & (answers_QE[:, second] >= 0)
    found: Array = np.where(agree, scores_QE[:, second], relay(members, scores_QE, answers_QE))
    return found.astype(np.float32)


VOTES: dict[str, Callable[[Members, Array, Array], Array]] = {"relay": relay, "trio": trio}


def _shares(kind: str, members: Members, mean_E: Array) -> Array:
    scores = (mean_E * 1e-3).astype(np.float32)
    weights = _RELAY if kind == "relay" else (_LEADER, _SECOND, _THIRD)
    scores[list(members)] = weights[: len(members)]
    return scores
