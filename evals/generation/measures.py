"""The table: the policy beside the best single expert, self-consistency, majority and the oracle, all on the same
questions, each with its uncertainty and its cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evals.generation.questions import Question
from evals.generation.run import Given, Outcome
from evals.routing.statistics import Bootstrap, Estimate
from experts.types import Completion, Request
from orchestrator.aggregators.base import Aggregator
from routers.base import RouteDecision
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``difference`` is paired, to the best single expert. Costs are means of a question. ``cut_off`` counts answers
    that ended at their token limit, perhaps before they said what they were to say."""

    name: str
    note: str
    accuracy: Estimate
    difference: Estimate
    calls: float
    tokens: float
    usd: float
    seconds: float
    failed: int
    cut_off: int

    @property
    def helps(self) -> bool:
        return self.difference.low > 0


RequestOf = Callable[[Question], Request]


async def table(
    outcome: Outcome, questions: Sequence[Question], seed: int, vote: Aggregator, request_of: RequestOf
) -> list[Row]:
    """``vote`` makes the majorities."""
    bootstrap = Bootstrap(len(questions), seed)
    best, who = _best_single(outcome.experts, seed)
    reference = _scores(best)
    calls = max(1, round(float(np.mean([g.calls for g in outcome.policy]))))
    voters = _Voters(questions, vote, request_of)

    def row(name: str, note: str, given: Sequence[Given]) -> Row:
        return _row(name, note, given, reference, bootstrap)

    rows = [row("policy", "", outcome.policy), row("best single", who, best)]
    means = {e: float(_scores(given).mean()) for e, given in outcome.experts.items()}
    top = sorted(means, key=lambda e: -means[e])
    rows.append(row("best in hindsight", f"{top[0]}, chosen on these answers", outcome.experts[top[0]]))
    if outcome.sampled is not None:
        note = f"{outcome.sampled_expert}, {calls} samples"
        rows.append(row("self-consistency", note, await voters.vote(outcome.sampled)))
    if calls > 1:
        panel = [outcome.experts[e] for e in top[:calls]]
        rows.append(row("majority, same calls", ", ".join(top[:calls]), await voters.vote(_columns(panel))))
    everyone = await voters.vote(_columns([outcome.experts[e] for e in top]))
    rows.append(row("majority of all", f"{len(top)} experts", everyone))
    rows.append(row("oracle", "knows which answer is right", _oracle(outcome.experts)))
    return rows + [row(e, "expert", outcome.experts[e]) for e in top]


def _row(name: str, note: str, given: Sequence[Given], reference: Array, bootstrap: Bootstrap) -> Row:
    scores = _scores(given)
    return Row(
        name=name,
        note=note,
        accuracy=bootstrap.mean(scores),
        difference=bootstrap.difference(scores, reference),
        calls=float(np.mean([g.calls for g in given])),
        tokens=float(np.mean([g.tokens for g in given])),
        usd=float(np.mean([g.usd for g in given])),
        seconds=float(np.mean([g.seconds for g in given])),
        failed=sum(g.error is not None for g in given),
        cut_off=sum(g.completion is not None and g.completion.finish_reason == "length" for g in given),
    )


def _scores(given: Sequence[Given]) -> Array:
    return np.array([g.score for g in given])


def _best_single(experts: Mapping[str, Sequence[Given]], seed: int) -> tuple[list[Given], str]:
    """Chosen on one half of the questions and asked the other, both ways: nobody is chosen on what he is judged by."""
    names = list(experts)
    scores_EQ = np.array([_scores(experts[e]) for e in names])
    count = scores_EQ.shape[1]
    first = np.zeros(count, bool)
    first[np.random.default_rng(seed).permutation(count)[: count // 2]] = True
    picks = [int(scores_EQ[:, ~half].mean(axis=1).argmax()) if (~half).any() else 0 for half in (first, ~first)]
    given = [experts[names[picks[0] if first[q] else picks[1]]][q] for q in range(count)]
    return given, " and ".join(dict.fromkeys(names[p] for p in picks)) + ", each chosen on the other half"


def _oracle(experts: Mapping[str, Sequence[Given]]) -> list[Given]:
    return [max(column, key=lambda g: (g.score, -g.usd, -g.tokens)) for column in _columns(list(experts.values()))]


def _columns(rows: Sequence[Sequence[Given]]) -> list[list[Given]]:
    return [list(column) for column in zip(*rows, strict=True)]


@dataclass(frozen=True, slots=True)
class _Voters:
    """Answers vote as the scorer read them."""

    questions: Sequence[Question]
    aggregator: Aggregator
    request_of: RequestOf

    async def vote(self, columns: Sequence[Sequence[Given]]) -> list[Given]:
        return [await self._one(q, column) for q, column in zip(self.questions, columns, strict=True)]

    async def _one(self, question: Question, column: Sequence[Given]) -> Given:
        said = [
            replace(g.completion, text=g.answer or "", index=i)
            for i, g in enumerate(column)
            if g.completion is not None
        ]
        costs = Given(
            calls=len(column),
            tokens=sum(g.tokens for g in column),
            usd=sum(g.usd for g in column),
            seconds=sum(g.seconds for g in column),
        )
        if not said:
            return replace(costs, error="no_answer")
        winner = await self.aggregator.aggregate(self.request_of(question), _equal(said), said)
        return replace(costs, answer=column[winner.index].answer, score=column[winner.index].score)


def _equal(completions: Sequence[Completion]) -> RouteDecision:
    """One vote each; a tie goes to the side of the best, who come first: by lot a majority would be easier to beat."""
    ids = tuple(dict.fromkeys(c.expert_id for c in completions))
    scores = {expert_id: 0.5**place for place, expert_id in enumerate(ids)}
    decision = RouteDecision(expert_ids=(), weights=(), scores=scores, reason="one expert, one vote", router="none")
    return decision.top(len(ids))
