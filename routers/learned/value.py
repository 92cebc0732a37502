"""What asking an expert is worth, given the question and the expert's own record (horizon 1 of fitted_q.py).

A candidate is known by what it got right before, group by group, not by its column: an expert with the same record is
worth the same. Every expert answered every recorded question, so that the fit has a closed form.

Legend: Q questions, E experts, D features, K components, X width of an expert's record.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.fitted_q import Value as Q
from routers.fitted_q import one_more
from routers.learned.base import Training, simplest_of
from routers.learned.cluster import Cluster
from routers.questions import Design, Questions
from routers.records import Array

STRENGTHS = (3.0, 10.0, 30.0, 100.0)
COMPONENTS, RECORD = 48, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    design: Design
    basis_DK: Array
    records_EX: Array
    q: Q

    @classmethod
    def fit(cls, training: Training) -> Self:
        return cls.fit_with(training, simplest_of(STRENGTHS, cls.fit_with, training))

    @classmethod
    def fit_with(cls, training: Training, strength: float) -> Self:
        design = Design.fit(training.questions)
        inputs = design.features(training.questions)
        _, _, directions = np.linalg.svd(inputs, full_matrices=False)
        basis, records = directions[:COMPONENTS].T, expert_records(training)
        q = Q(weights_WX=_solve(one_more(inputs @ basis), one_more(records), training.scores_QE, strength))
        return cls(design=design, basis_DK=basis.astype(np.float32), records_EX=records, q=q)

    def predict(self, questions: Questions) -> Array:
        context = one_more(self.design.features(questions) @ self.basis_DK)
        values: Array = context @ self.q.weights_WX @ one_more(self.records_EX).T
        return values


def expert_records(training: Training) -> Array:
    """E x X: how an expert's means by group of questions differ from the average expert's, in few numbers."""
    groups = Cluster.fit_with(training, (min(16, max(1, len(training.questions) // 8)), 20.0))
    means_EC = groups.means_CE.T - groups.means_CE.mean(axis=1)
    left, sizes, _ = np.linalg.svd(means_EC, full_matrices=False)
    kept = (left * sizes)[:, : min(RECORD, len(sizes))]
    records: Array = (kept / max(float(np.abs(kept).max()), 1e-9)).astype(np.float32)
    return records


def _solve(context_QK: Array, records_EX: Array, scores_QE: Array, strength: float) -> Array:
    """Ridge on all products of context and record: its matrix is a Kronecker product, so that both sides are turned to
    their own axes and divided."""
    left, from_left = np.linalg.eigh((context_QK.T @ context_QK).astype(np.float64))
    right, from_right = np.linalg.eigh((records_EX.T @ records_EX).astype(np.float64))
    turned = from_left.T @ (context_QK.T @ scores_QE @ records_EX) @ from_right
    weights: Array = from_left @ (turned / (left[:, None] * right + strength)) @ from_right.T
    return weights
