"""The answer that a reward likes best: best-of-n over different experts."""

import math
from collections.abc import Sequence
from dataclasses import replace

from experts.base import Score
from experts.errors import CollegiumError, ExpertFailed
from experts.types import JSON, Completion, Request
from orchestrator.aggregators.base import AggregatorParts, Closing
from orchestrator.aggregators.election import by_rank
from orchestrator.aggregators.extract import Asked, make_extract, read_request
from orchestrator.aggregators.reading import ByKind
from orchestrator.aggregators.rewards import make_reward
from orchestrator.aggregators.vote import vote_instead
from routers.base import RouteDecision


class BestOf:
    """``reward`` is a name of rewards.REWARDS; an artefact brings its own. Equal answers are scored once. Answers of
    one score: the better ranked expert's. A score that is no number counts for nothing; without any the answers vote.

    Answers in which what was asked for cannot be read go last (may_win()): a reward can be charmed, and a reply that
    says nothing would win by charm.
    """

    name = "best_of"
    takes_one = False

    def __init__(self, parts: AggregatorParts, *, reward: str | None = None) -> None:
        self._reward = make_reward(reward, parts)
        self._reader = ByKind(make_extract("auto"))

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
        read = await self._reader.read(request, [c for c, _ in known])
        may = may_win(read, read_request(request))
        able = [pair for pair, allowed in zip(known, may, strict=True) if allowed]
        best = max(score.value for _, score in able)
        winner = next(c for c, score in able if score.value == best)
        notes = []
        if len(known) < len(speaking):
            notes.append(f"{len(speaking) - len(known)} scores were no numbers and do not count")
        if len(able) < len(known):
            unread = sorted({c.expert_id for (c, _), allowed in zip(known, may, strict=True) if not allowed})
            notes.append(f"no answer could be read from {', '.join(unread)}: those that can be read go first")
        return replace(winner, trace=self._trace(ranked, speaking, scores, notes))

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
        self,
        ranked: Sequence[Completion],
        speaking: Sequence[Completion],
        scores: Sequence[Score],
        notes: Sequence[str],
    ) -> JSON:
        by_id = {id(c): score for c, score in zip(speaking, scores, strict=True)}
        answers = [{"expert_id": c.expert_id, **_told(by_id.get(id(c)))} for c in ranked]
        trace: dict[str, object] = {"reward": self._reward.name, "answers": answers}
        if notes:
            trace["note"] = "; ".join(notes)
        return trace


def may_win(answers: Sequence[str | None], asked: Asked) -> list[bool]:
    """Whether each of the ``answers``, as they were read, may be the best one: those that could be read, or all where
    none could. That a number was asked for is guessed from the question's words: most answers must give one.
    """
    read = [answer is not None for answer in answers]
    is_sure = bool(asked.options) or asked.json
    return read if sum(read) > (0 if is_sure else len(read) / 2) else [True] * len(read)


def _content(answer: Completion) -> tuple[str, str]:
    return answer.text or "", repr(answer.tool_calls)


def _told(score: Score | None) -> dict[str, object]:
    """JSON knows no NaN."""
    if score is None or not math.isfinite(score.value):
        return {"score": None}
    parts = {name: round(part, 6) for name, part in score.parts.items() if math.isfinite(part)}
    return {"score": round(score.value, 6), **({"parts": parts} if parts else {})}
