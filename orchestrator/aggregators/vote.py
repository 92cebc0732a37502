"""The answer that most experts give: self-consistency (Wang et al., 2023, arXiv 2203.11171) over different experts.

Answers are read by one of extract's kinds; equal ones vote together. An expert that was chosen weighs what the decision
says; a spare that answered in a failed one's place weighs as much as the least of the chosen, for it ranked below all
of them. An answer that cannot be read does not vote, unless none can: then the heaviest expert's answer is taken.
A tie goes to the heavier side (``vote``), then to the one that the request's seed picks; nothing depends on the order
in which answers came.
"""

from collections.abc import Sequence
from dataclasses import replace

from experts.types import JSON, Completion, Request
from orchestrator.aggregators.base import AggregatorParts
from orchestrator.aggregators.election import Counting, by_head, by_weight, elect, is_safe, make_ballots
from orchestrator.aggregators.reading import make_reader
from routers.base import RouteDecision

THRESHOLD = 0.85
"""See docs/aggregators.md for what it tells apart."""


class Vote:
    """One expert, one vote. ``extract`` is a kind (auto, letter, number, boxed, json, text, or embedding: texts whose
    cosine reaches ``threshold`` vote together), ``field`` a JSON path."""

    name = "vote"
    takes_one = False
    _counting: Counting = staticmethod(by_head)

    def __init__(
        self,
        parts: AggregatorParts | None = None,
        *,
        extract: str = "auto",
        field: str | None = None,
        threshold: float = THRESHOLD,
    ) -> None:
        self._reader = make_reader(parts, extract, field, threshold)

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        ballots = make_ballots(decision, completions, await self._reader.read(request, completions))
        return elect(self._counting(ballots), request)

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        """Exact but for percentages: True when no answers of ``pending`` can make another answer win. Who words the
        winning answer may still change."""
        if not (pending and self._reader.is_stable(request, completions)):
            return not pending
        ballots = make_ballots(decision, completions, await self._reader.read(request, completions))
        return is_safe(ballots, decision, pending, self._counting, request)


class WeightedVote(Vote):
    """Each vote counts as much as its expert's weight; the weights of the votes sum to 1."""

    name = "weighted_vote"
    _counting = staticmethod(by_weight)


async def vote_instead(
    request: Request, decision: RouteDecision, completions: Sequence[Completion], because: str
) -> Completion:
    """A weighted vote in the place of an aggregator that could not do its own work; the trace says ``because``."""
    answer = await WeightedVote().aggregate(request, decision, completions)
    return replace(answer, trace=noted(answer.trace, f"{because}: a weighted vote instead"))


def noted(trace: JSON | None, note: str) -> JSON:
    """``trace`` with one note more."""
    trace = trace or {}
    return {**trace, "note": f"{note}; {trace['note']}" if "note" in trace else note}
