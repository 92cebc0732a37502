"""Several experts for one request: asked all at once or one after another, until what they said is enough."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from experts.base import Expert, collect
from experts.errors import CollegiumError
from experts.types import Completion
from orchestrator.run import Run

LATE, NOT_NEEDED, UNAVAILABLE = "late", "not_needed", "unavailable"
LAST_SHARE = 0.9
"""Of the deadline, how long experts are waited for once somebody has answered: the rest is for combining. An expert
that hangs, and hands over late to one that hangs too, must not cost the answers that are there."""


async def ask_panel(experts: Sequence[Expert], run: Run) -> list[Completion]:
    """The answers, in the experts' order, less those that failed or were not waited for; ``run.unanswered`` says why.

    ``run.policy`` says whether experts are asked one by one, and how many answers are enough when the others are late;
    where it says nothing, one is enough when most of the deadline has passed.
    After each answer its aggregator says whether the rest still matters. Calls that do not are cancelled, and have
    ended when this returns. Raises the first expert's failure when all fail.
    """
    panel = _Panel(experts, run)
    try:
        while panel.open and not await panel.has_enough():
            await panel.go_on()
    finally:
        await panel.close()
    run.unanswered = dict(panel.unanswered())
    return panel.answers()


class _Panel:
    def __init__(self, experts: Sequence[Expert], run: Run) -> None:
        self._run = run
        self._request = replace(run.request, stream=False)  # nobody sees an answer before the end
        self._experts = experts
        self._at_once = 1 if run.policy.one_by_one else len(experts)
        self._waiting = deque(range(len(experts)))
        self._calls: dict[asyncio.Task[Completion], int] = {}
        self._answers: dict[int, Completion] = {}
        self._failures: dict[int, CollegiumError] = {}
        self._late: tuple[int, ...] = ()
        if run.policy.late_s is None:
            self._quorum, self._late_s = 1, run.request.arrival_s + LAST_SHARE * run.request.deadline_s
        else:
            self._quorum, self._late_s = run.policy.quorum or 1, time.monotonic() + run.policy.late_s

    @property
    def open(self) -> bool:
        return bool(self._waiting or self._calls)

    async def has_enough(self) -> bool:
        if not self._answers:
            return False
        if self._has_quorum() and time.monotonic() >= self._late_s:
            self._late = tuple(self._calls.values())
            return True
        pending = [self._experts[i].spec.expert_id for i in sorted([*self._calls.values(), *self._waiting])]
        assert self._run.decision is not None  # noqa: S101  # there are experts because there is a decision
        return await self._run.policy.aggregator.settled(self._request, self._run.decision, self.answers(), pending)

    async def go_on(self) -> None:
        """Asks whose turn it is, and returns when an answer or a failure has come, or the quorum's time."""
        while self._waiting and len(self._calls) < self._at_once:
            index = self._waiting.popleft()
            answer = collect(self._experts[index].generate(self._request), self._request)
            self._calls[asyncio.create_task(answer)] = index
        within_s = max(0.0, self._late_s - time.monotonic()) if self._has_quorum() else None
        done, _ = await asyncio.wait(self._calls, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            self._note(call)

    async def close(self) -> None:
        """Ends the calls under way, down to the engine, and takes what came at the last moment."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        for call in [c for c in self._calls if not c.cancelled() and c.exception() is None]:
            self._note(call)

    def answers(self) -> list[Completion]:
        if not self._answers and self._failures:
            raise self._failures[min(self._failures)]
        return [self._answers[i] for i in sorted(self._answers)]

    def unanswered(self) -> Iterator[tuple[str, str]]:
        """Each chosen expert that did not answer, and why: an error's code, or one of this module's words."""
        for index, expert in enumerate(self._experts):
            expert_id, answer = expert.spec.expert_id, self._answers.get(index)
            if index in self._failures:
                yield expert_id, self._failures[index].code
            elif answer is None:
                yield expert_id, LATE if index in self._late else NOT_NEEDED
            elif answer.expert_id != expert_id:  # a spare or a hedge answered
                yield expert_id, self._how_it_failed(expert_id)

    def _how_it_failed(self, expert_id: str) -> str:
        errors = [c.error for c in self._run.calls if c.expert_id == expert_id and c.error]
        last = errors[-1] if errors else UNAVAILABLE
        return LATE if last == "cancelled" else last

    def _has_quorum(self) -> bool:
        return len(self._answers) >= self._quorum

    def _note(self, call: asyncio.Task[Completion]) -> None:
        """Raises what is no CollegiumError: a bug is not hidden by the others' answers."""
        index = self._calls.pop(call)
        try:
            self._answers[index] = call.result()
        except CollegiumError as exc:
            self._failures[index] = exc
