"""The stages: every expert answers every question, engine by engine; then the policy, whose experts' answers are there
already; then the best expert again and again, for self-consistency at as many calls as the policy made."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from evals.generation.questions import Question
from evals.generation.remembering import Remembering
from evals.generation.scorers import score
from experts.base import collect
from experts.errors import CollegiumError, ConfigError
from experts.types import Completion, Message, Request, SamplingParams
from orchestrator.build import Service
from orchestrator.resilience import failure_kind
from orchestrator.run import Policy, Run

T = TypeVar("T")
DEADLINE_S = 1800.0
"""Of each call; an engine may have to load in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What was given to one question. ``seconds`` sums its calls, as they took when they were made; ``error`` is a
    code, and the score then 0. ``completion`` is what was said."""

    answer: str | None = None
    score: float = 0.0
    calls: int = 1
    tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0
    error: str | None = None
    completion: Completion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``tell_tasks`` gives routers each question's task; a real request has none. ``temperature`` is that of
    self-consistency's samples; None: none are drawn."""

    questions: Sequence[Question]
    policy: Policy
    seed: int
    concurrency: int
    tell_tasks: bool = False
    temperature: float | None = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``experts``: by id, in the questions' order. ``sampled``: each question's samples of ``sampled_expert``."""

    experts: Mapping[str, Sequence[Given]]
    policy: Sequence[Given]
    sampled_expert: str
    sampled: Sequence[Sequence[Given]] | None


@dataclass(slots=True)
class Clock:
    """Seconds of calls by request, as the engines tell them."""

    seconds: dict[str, float] = field(default_factory=dict)

    def note(self, request_id: str, seconds: float) -> None:
        self.seconds[request_id] = self.seconds.get(request_id, 0.0) + seconds


Tell = Callable[[str, int], None]
"""What begins, and of how many answers; with 0, that one more is there."""


class Evaluator:
    def __init__(self, service: Service, clock: Clock, plan: Plan, tell: Tell) -> None:
        self._service = service
        self._clock = clock
        self.plan = plan
        self._tell = tell
        self._places = asyncio.Semaphore(plan.concurrency)

    async def run(self) -> Outcome:
        by_expert = await self._ask_experts()
        policy = await self._each("the policy", [self._ask_policy(q) for q in self.plan.questions])
        best = max(by_expert, key=lambda e: sum(g.score for g in by_expert[e]))
        calls = round(sum(g.calls for g in policy) / len(policy))
        sampled = await self._sample(best, calls) if self.plan.temperature is not None and calls > 1 else None
        return Outcome(experts=by_expert, policy=policy, sampled_expert=best, sampled=sampled)

    async def _ask_experts(self) -> dict[str, Sequence[Given]]:
        """Grouped by engine: each is loaded once, and ended before the next one loads."""
        found: dict[str, Sequence[Given]] = {}
        for engine_id, engine in self._service.engines.items():
            for expert_id, expert in self._service.experts.items():
                if expert.spec.engine_id == engine_id:
                    asked = [self._ask_expert(expert_id, q, SamplingParams()) for q in self.plan.questions]
                    found[expert_id] = await self._each(expert_id, asked)
            if len(self._service.engines) > 1:
                await engine.unload()
        if all(g.error for given in found.values() for g in given):
            reasons = ", ".join(sorted({g.error for given in found.values() for g in given if g.error}))
            raise ConfigError(
                f"No expert answered any of {len(self.plan.questions)} questions ({reasons}). 'collegium doctor' looks "
                "at engines; a recorded pool needs a 'text' or an 'answer' in its responses."
            )
        return {e: found[e] for e in self._service.experts}

    async def _sample(self, expert_id: str, calls: int) -> list[list[Given]]:
        params = [SamplingParams(temperature=self.plan.temperature, seed=self.plan.seed + i) for i in range(calls)]
        asked = [self._ask_expert(expert_id, q, p) for q in self.plan.questions for p in params]
        drawn = await self._each(f"{expert_id}, {calls} samples", asked)
        return [list(drawn[i : i + calls]) for i in range(0, len(drawn), calls)]

    async def _ask_expert(self, expert_id: str, question: Question, params: SamplingParams) -> Given:
        expert, request = self._service.experts[expert_id], replace(self.request(question), params=params)
        try:
            completion = await collect(expert.generate(request), request)
        except CollegiumError as exc:
            return Given(error=failure_kind(exc))
        answer, points = await score(completion.text, question)
        return Given(
            answer=answer,
            score=points,
            tokens=completion.usage.total_tokens,
            usd=expert.spec.usd(completion.usage),
            seconds=self._clock.seconds.pop(request.request_id, 0.0),
            completion=completion,
        )

    async def _ask_policy(self, question: Question) -> Given:
        run = Run(request=self.request(question), policy=self.plan.policy)
        try:
            (completion,) = await self._service.orchestrator.complete(run)
        except CollegiumError as exc:
            return replace(self._costs(run), error=failure_kind(exc))
        answer, points = await score(completion.text, question)
        return replace(self._costs(run), answer=answer, score=points, completion=completion)

    def _costs(self, run: Run) -> Given:
        return Given(
            calls=sum(call.error is None for call in run.calls),
            tokens=run.usage.total_tokens,
            usd=run.usd,
            seconds=self._clock.seconds.pop(run.request.request_id, 0.0),
        )

    def request(self, question: Question) -> Request:
        told = {"task": question.task} if self.plan.tell_tasks else {}
        return Request(
            messages=(Message(role="user", content=question.prompt),),
            metadata={"question_id": question.question_id, "route_seed": self.plan.seed, **told},
            stream=False,
            priority="batch",
            deadline_s=DEADLINE_S,
        )

    async def _each(self, what: str, asked: Sequence[Awaitable[T]]) -> list[T]:
        """All of ``asked``, a few at a time, in their order."""
        self._tell(what, len(asked))

        async def one(awaitable: Awaitable[T]) -> T:
            async with self._places:
                found = await awaitable
            self._tell(what, 0)
            return found

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(awaitable)) for awaitable in asked]
        return [task.result() for task in tasks]


def loads(service: Service) -> int:
    return sum(engine.loads for engine in service.engines.values() if isinstance(engine, Remembering))
