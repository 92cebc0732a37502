"""The answer that a reward likes best: best-of-n over different experts."""

import math
from collections.abc import Sequence
from dataclasses import replace

from experts.base import Score
from experts.errors import CollegiumError, ExpertFailed
from experts.types import JSON, Completion, Request
from orchestrator.aggregators.base import AggregatorParts, Closing
from orchestrator.aggregators.election import by_rank
from orchestrator.aggregators.rewards import make_reward
from orchestrator.aggregators.vote import vote_instead
from routers.base import RouteDecision


class BestOf:
    """``reward`` is a name of rewards.REWARDS; an artefact brings its own. Equal answers are scored once. Answers of
    one score: the better ranked expert's. A score that is no number counts for nothing; without any the answers vote.
    """

    name = "best_of"
    takes_one = False

    def __init__(self, parts: AggregatorParts, *, reward: str | None = None) -> None:
        self._reward = make_reward(reward, parts)

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        ranked = by_rank(decision, completions)
        speaking = [c for c in ranked if (c.text or "").strip() or c.tool_calls] or ranked
        try:
            scores = await self._score(request, speaking)
        except CollegiumError as exc:
            return await vote_instead(request, decision, completions, f"the reward failed ({exc.code})")
        known = [(c, s) for c, s in zip(speaking, scores, strict=True) if math.isfinite(s.value)]
        if not known:
            return await vote_instead(request, decision, completions, "the reward gave no number")
        best = max(score.value for _, score in known)
        winner = next(c for c, score in known if score.value == best)
        return replace(winner, trace=self._trace(ranked, speaking, scores, len(known)))

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        return not pending

    async def aclose(self) -> None:
        if isinstance(self._reward, Closing):
            await self._reward.aclose()

    async def _score(self, request: Request, answers: Sequence[Completion]) -> list[Score]:
        """Raises ExpertFailed for a reward that gives too few or too many."""
        different = list({_content(a): a for a in reversed(answers)}.values())[::-1]
        scores = await self._reward.score(request, different)
        if len(scores) != len(different):
            raise ExpertFailed(f"Reward '{self._reward.name}' gave {len(scores)} scores to {len(different)} answers.")
        by_content = dict(zip(map(_content, different), scores, strict=True))
        return [by_content[_content(a)] for a in answers]

    def _trace(
        self, ranked: Sequence[Completion], speaking: Sequence[Completion], scores: Sequence[Score], known: int
    ) -> JSON:
        by_id = {id(c): score for c, score in zip(speaking, scores, strict=True)}
        answers = [{"expert_id": c.expert_id, **_told(by_id.get(id(c)))} for c in ranked]
        trace: dict[str, object] = {"reward": self._reward.name, "answers": answers}
        if known < len(speaking):
            trace["note"] = f"{len(speaking) - known} scores were no numbers and do not count"
        return trace


def _content(answer: Completion) -> tuple[str, str]:
    return answer.text or "", repr(answer.tool_calls)


def _told(score: Score | None) -> dict[str, object]:
    """JSON knows no NaN."""
    if score is None or not math.isfinite(score.value):
        return {"score": None}
    parts = {name: round(part, 6) for name, part in score.parts.items() if math.isfinite(part)}
    return {"score": round(score.value, 6), **({"parts": parts} if parts else {})}
