"""Questions that a pool asks twice, in nearly the same words.

A pool has more of them within itself than questions to come have among it (MMLU-Pro: four times as many). Folds drawn
at random part them, and what remembers single questions then looks better than it is (docs/aggregators-measured.md).

Legend: Q questions.
"""

from collections.abc import Sequence

import numpy as np

from orchestrator.aggregators.stacking.grams import Grams, Weighed
from routers.records import Array

TWIN = 0.8
"""Cosine of the words and pairs of words, rare ones weighing more (tf-idf), from which on two questions are one."""
_LARGEST = 0.1
"""A family with more of a pool's questions than that is a form which they are all written in, and is none."""
_LINKS = 20
"""Of one question to others: enough to hold a family together, and no more than memory bears where all are alike."""
_AT_ONCE = 512
"""Questions whose likeness to all others is held in memory."""


def families(questions: Sequence[str]) -> Array:
    """A number for each question, which twins and their twins share: (Q,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # What every question says tells none apart.
    worded, count, pairs = Weighed(Grams.of_questions(questions), least=0.0), len(questions), []
    for start in range(0, count, _AT_ONCE):
        are_twins_QQ = (worded.matrix[start : start + _AT_ONCE] @ worded.turned).toarray() >= TWIN
        first_QQ = are_twins_QQ.cumsum(axis=1, dtype=np.int32) <= _LINKS
        pairs.append(np.argwhere(are_twins_QQ & first_QQ) + np.array([start, 0]))
    ones, others = np.concatenate(pairs).T
    twins = coo_array((np.ones(len(ones), np.bool_), (ones, others)), (count, count))
    _, family_Q = connected_components(twins, directed=False)
    is_form = np.bincount(family_Q)[family_Q] > max(_LARGEST * count, 1)
    return np.where(is_form, count + np.arange(count), family_Q)
