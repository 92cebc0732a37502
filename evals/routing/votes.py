"""Answers as the service would give them: decisions, the recorded completions, and the service's own aggregator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evals.routing.setting import Setting
from experts.errors import ConfigError
from experts.types import Completion, Request
from orchestrator.aggregators.base import Aggregator
from orchestrator.build import make_aggregator
from orchestrator.config import AggregatorConfig
from routers.base import RouteDecision
from routers.records import Array
from routers.static import WordLlama

VOTES = ("vote", "weighted_vote")
COMPARING = (*VOTES, "cascade")
"""Which ask whether answers are the same."""
ASKERS = ("fuse", "general_expert", "pick_aggregator", "debate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """By question of the test split: the score of the answer given, the calls made and what they cost."""

    scores: Array
    calls: Array
    costs: Array


def aggregator_for(name: str, setting: Setting) -> Aggregator:
    """Answers are recorded as they were parsed, so they are compared as they are. Raises ConfigError."""
    if name in ASKERS:
        raise ConfigError(
            f"Aggregator '{name}' asks an expert itself, and nobody is asked here. Use 'collegium eval run --pool DIR "
            "-c FILE' with a policy that has it."
        )
    if name in COMPARING:
        check_answered(setting)
    options = {"extract": "text"} if name in COMPARING else {}
    return make_aggregator(AggregatorConfig(name=name, options=options), {}, WordLlama)


def check_answered(setting: Setting) -> None:
    """Raises ConfigError where nobody's answer to the test split can be read."""
    if (setting.records.answers_QE[setting.test] < 0).all():
        experts = ", ".join(setting.records.expert_ids)
        raise ConfigError(
            f"Pool '{setting.records.name}' has scores only: in responses/ of {experts} no row of the split has an "
            "'answer', so that nothing can be voted on. Use --top-k 1."
        )


def take_first(predicted_QE: Array, setting: Setting) -> Outcome:
    """One call: the expert with the best score."""
    rows, chosen = np.arange(len(setting.test)), predicted_QE.argmax(axis=1)
    return Outcome(
        scores=setting.scores_QE[rows, chosen],
        calls=np.ones(len(rows)),
        costs=setting.cost_QE[setting.test][rows, chosen],
    )


class Source(Protocol):
    """What is asked and answered; questions and experts by number."""

    def request(self, question: int) -> Request: ...

    def completion(self, question: int, expert: int) -> Completion: ...


class Combiner(Protocol):
    """What stands in for an aggregator that takes more than answers as they were parsed."""

    async def ask(self, predicted_QE: Array, top_k: int) -> Outcome: ...


async def ask(
    predicted_QE: Array, setting: Setting, aggregator: Aggregator, top_k: int, source: Source | None = None
) -> Outcome:
    """The ``top_k`` best-scored experts of each question, through the aggregator; ``source``: as parsed by default."""
    source = source or Recorded(setting)
    top_k = min(top_k, predicted_QE.shape[1])
    if aggregator.takes_one or top_k == 1:
        return take_first(predicted_QE, setting)
    ranked = np.argsort(-predicted_QE, axis=1, kind="stable")[:, :top_k]
    found = [
        await _answer(int(q), row, predicted_QE[i], setting, aggregator, source)
        for i, (q, row) in enumerate(zip(setting.test, ranked, strict=True))
    ]
    scores, calls = (np.array(column) for column in zip(*found, strict=True))
    made = np.arange(top_k) < calls[:, None]
    costs = (np.take_along_axis(setting.cost_QE[setting.test], ranked, axis=1) * made).sum(axis=1)
    return Outcome(scores=scores, calls=calls.astype(np.float64), costs=costs)


async def _answer(
    question: int, ranked: Array, predicted: Array, setting: Setting, aggregator: Aggregator, source: Source
) -> tuple[float, int]:
    """The score of the answer, and how many calls it took: best-ranked first, until the rest cannot change it."""
    records = setting.records
    ids = records.expert_ids
    candidates = RouteDecision(
        expert_ids=(), weights=(), scores=dict(zip(ids, map(float, predicted), strict=True)), reason="", router=""
    )
    decision = candidates.top(len(ranked))
    request = source.request(question)
    completions: list[Completion] = []
    for place, expert in enumerate(ranked, 1):
        completions.append(source.completion(question, int(expert)))
        if await aggregator.settled(request, decision, completions, [ids[int(e)] for e in ranked[place:]]):
            break
    winner = await aggregator.aggregate(request, decision, completions)
    return float(records.scores_QE[question, ids.index(winner.expert_id)]), len(completions)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Questions without their options, and answers as they were parsed."""

    setting: Setting

    def request(self, question: int) -> Request:
        records, seed = self.setting.records, self.setting.seed
        return Request(
            request_id=records.question_ids[question], prompt=records.texts[question], metadata={"route_seed": seed}
        )

    def completion(self, question: int, expert: int) -> Completion:
        records = self.setting.records
        code = int(records.answers_QE[question, expert])
        return Completion(
            request_id=records.question_ids[question],
            expert_id=records.expert_ids[expert],
            text=records.answer_texts[code] if code >= 0 else "",
        )


def fixed(order: Sequence[int], setting: Setting) -> Array:
    """Equal scores but for the order, the same for every question: an unweighted panel."""
    row = np.zeros(len(setting.records.expert_ids))
    for place, expert in enumerate(order):
        row[expert] = 1 - 1e-6 * place
    return np.repeat(row[None], len(setting.test), axis=0)
