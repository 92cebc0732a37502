"""Leave each expert out in turn: what a router fitted without it makes of it when it joins later.

Four routers are compared on the test split, one call: without the expert; with it, known by its card alone; with it,
known by at most ``GRADED`` graded questions of the train split besides; and refitted with all of its answers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from evals.routing.setting import Setting
from routers.encoders import Encoder
from routers.learned.artefact import model_class
from routers.learned.newcomer import GRADED, Card, Row, from_card, from_grades
from routers.records import Array, RecordedExpert


async def leave_each_out(
    setting: Setting, router: str, encoder: Encoder, *, on_expert: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """For report.json. Fits ``router`` once without each expert, and once with all of them."""
    cards = await read_cards(setting.records.experts, encoder)
    maker = model_class(router)
    whole = maker.fit(setting.training).predict(setting.asked)
    graded = np.random.default_rng(setting.seed).permutation(len(setting.train))[:GRADED]
    rows = []
    for left, expert in enumerate(setting.records.experts):
        rows.append({"expert": expert.expert_id, **_without(setting, router, left, cards, graded)})
        on_expert()
    scores = {
        key: float(np.mean([r[key] for r in rows]))
        for key in ("without", "by_card", "by_grades", "error_by_card", "error_by_grades")
    }
    return {
        "router": router,
        "graded": len(graded),
        "experts": rows,
        "refitted": _score(whole, setting),
        "mean": scores,
    }


def _without(setting: Setting, router: str, left: int, cards: list[Card], graded: Array) -> dict[str, Any]:
    others = [e for e in range(len(cards)) if e != left]
    training = setting.training
    seen = replace(
        training,
        scores_QE=training.scores_QE[:, others],
        answers_QE=training.answers_QE[:, others],
        costs_E=training.costs_E[others],
    )
    model = model_class(router).fit(seen)
    mean = seen.scores_QE.mean(axis=0)
    card = from_card(cards[left], [cards[e] for e in others], mean)
    grades = from_grades(model.predict(training.questions.take(graded)), training.scores_QE[graded, left], card)
    known = model.predict(setting.asked)
    truth = float(setting.scores_QE[:, left].mean())
    joined = {name: _joined(known, row, left) for name, row in (("by_card", card), ("by_grades", grades))}
    # A column of -inf keeps the places of the others and is never chosen.
    absent = np.insert(known, left, -np.inf, axis=1)
    return {
        "true": truth,
        "without": _score(absent, setting),
        **{name: _score(predicted, setting) for name, predicted in joined.items()},
        **{f"share_{name}": float((predicted.argmax(axis=1) == left).mean()) for name, predicted in joined.items()},
        **{f"error_{name}": abs(float(p[:, left].mean()) - truth) for name, p in joined.items()},
    }


def _joined(known: Array, row: Row, left: int) -> Array:
    joined: Array = np.insert(known, left, row.predict(known), axis=1)
    return joined


def _score(predicted: Array, setting: Setting) -> float:
    return float(setting.scores_QE[np.arange(len(predicted)), predicted.argmax(axis=1)].mean())


async def read_cards(experts: tuple[RecordedExpert, ...], encoder: Encoder) -> list[Card]:
    """A recorded expert's card says its name and its size; nothing else is recorded of it."""
    vectors = await encoder.encode([e.expert_id.replace("-", " ") for e in experts])
    return [Card(vector_C=v, params_b=e.params_b) for v, e in zip(vectors, experts, strict=True)]
