"""A fitted router with newcomers: the columns it was fitted for, and one more for each expert that joined later.

Legend: Q questions, E experts fitted, J experts joined.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from experts.errors import ConfigError
from routers.encoders import Encoder
from routers.learned.artefact import Fitted
from routers.learned.base import Model, Training
from routers.learned.newcomer import GRADED, Card, Row, from_card, from_grades
from routers.questions import Questions
from routers.records import Array, read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The fitted model stays as it is; ``mixture_JE`` and ``level_J`` are the newcomers' rows."""

    model: Model
    mixture_JE: Array
    level_J: Array

    @classmethod
    def fit(cls, training: Training) -> Self:
        raise ConfigError("A router with newcomers is not fitted: fit one, then let them join it.")

    def predict(self, questions: Questions) -> Array:
        known = self.model.predict(questions)
        rows = [Row(mixture_E=m, level=float(v)) for m, v in zip(self.mixture_JE, self.level_J, strict=True)]
        return np.column_stack([known, *(row.predict(known) for row in rows)])


async def join(
    fitted: Fitted,
    expert_id: str,
    encoder: Encoder,
    *,
    card: str | None = None,
    questions: Questions | None = None,
    scores_Q: Array | None = None,
) -> Fitted:
    """``fitted`` with one expert more, by its card, or by graded questions, or both. Raises ConfigError.

    The cards of the experts it has are their names: an artefact knows no more of them.
    """
    if expert_id in fitted.expert_ids:
        raise ConfigError(f"The router has an expert '{expert_id}' already.")
    base = fitted.model.model if isinstance(fitted.model, Joined) else fitted.model
    row = None if card is None else await _by_card(base, card, fitted, encoder)
    if questions is not None and scores_Q is not None:
        row = from_grades(base.predict(questions), scores_Q, row)
    if row is None:
        raise ConfigError(f"Expert '{expert_id}' joins by a card or by graded questions; there is neither.")
    return replace(fitted, model=_with(fitted.model, row), expert_ids=(*fitted.expert_ids, expert_id))


async def graded(pool: Path, expert_id: str, encoder: Encoder, *, split: str, seed: int) -> tuple[Questions, Array]:
    """At most ``GRADED`` questions of a recorded pool, drawn by seed, and what ``expert_id`` scored. ConfigError."""
    records = read_records(pool, [expert_id])
    rows = np.random.default_rng(seed).permutation(records.rows(split))[:GRADED]
    vectors = await encoder.encode([records.texts[int(r)] for r in rows])
    return Questions(vectors_QW=vectors, tasks=tuple(records.tasks[int(r)] for r in rows)), records.scores_QE[rows, 0]


async def _by_card(base: Model, card: str, fitted: Fitted, encoder: Encoder) -> Row:
    nothing = Questions(vectors_QW=np.zeros((1, fitted.width), np.float32), tasks=(None,))
    mean_E = base.predict(nothing)[0]
    names = [e.replace("-", " ") for e in fitted.expert_ids[: len(mean_E)]]
    own, *others = await encoder.encode([card, *names])
    return from_card(Card(vector_C=own), [Card(vector_C=v) for v in others], mean_E)


def _with(model: Model, row: Row) -> Joined:
    mixture, level = row.mixture_E[None].astype(np.float32), np.array([row.level], np.float32)
    if not isinstance(model, Joined):
        return Joined(model=model, mixture_JE=mixture, level_J=level)
    return replace(
        model,
        mixture_JE=np.concatenate([model.mixture_JE, mixture]),
        level_J=np.concatenate([model.level_J, level]),
    )
