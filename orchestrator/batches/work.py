"""One call, and a line's calls made into its row. Both know experts and aggregators; neither knows a file."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from experts.base import Expert, collect_choices
from experts.errors import BreakerOpen, CollegiumError, ExpertFailed, QueueFull
from experts.types import Completion, Request, Usage
from orchestrator.batches.lines import Asked, Reader, custom_id
from orchestrator.batches.rows import Rows
from orchestrator.batches.store import Call, Result, Said
from orchestrator.build import FREE_AGGREGATORS, Service
from orchestrator.exchange import bugs_told
from orchestrator.replies import answer_body, to_json
from orchestrator.resilience import CallRecord
from orchestrator.run import Run
from routers.base import RouteDecision

PATIENCE_S = 120.0
"""How long an engine may be silent before a batch stops waiting for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Who answers a batch at this moment. A reload of the service's config makes another."""

    service: Service
    reader: Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one call came to: a completion for each of its request's choices, and every attempt's record."""

    completions: list[Completion]
    calls: list[CallRecord]


class Worker:
    """``created`` is the batch's, in seconds since 1970: its answers all carry it."""

    def __init__(self, bench: Callable[[], Bench], rows: Rows, *, created: int) -> None:
        self._bench = bench
        self._rows = rows
        self._created = created
        self._silent_since: dict[str, float] = {}

    async def ask(self, call: Call, raw: bytes) -> tuple[Said | Result, list[CallRecord]]:
        """The call's end; at once the line's row where nothing else is to be waited for. The records of its attempts
        come beside it. Raises only what ends the whole batch: its cancellation."""
        bench, run = self._bench(), None
        try:
            asked = bench.reader.read(raw)
            policy, request = bench.reader.policy(asked), bench.reader.request(asked, self._rows.request_id(call.n))
            # Calls of one line may be under way together, and the ledger knows a run by its request's id.
            own = replace(request, request_id=f"{request.request_id}-{call.slot}")
            run = Run(request=own, policy=policy)
            with bugs_told(), bench.service.ledger.watch(run):
                completions = await self._patiently(_expert(bench, call.expert_id), own)
        except CollegiumError as exc:
            return self._failed(call, exc), run.calls if run else []
        answer = Answer(completions=completions, calls=run.calls)
        if call.width == 1 and call.slot == 0 and not _explains(asked):
            whole = Run(request=request, policy=policy, calls=run.calls)
            return self._row(call.n, asked, whole, completions), run.calls
        return Said(n=call.n, slot=call.slot, ok=True, said=to_json(answer)), run.calls

    def spares(self, call: Call, raw: bytes, decision: bytes, failed: Said) -> Said:
        """``failed`` with who may stand in, where that is of use."""
        bench = self._bench()
        told = _read_decision(decision)
        asked = bench.reader.read(raw)
        policy, request = bench.reader.policy(asked), bench.reader.request(asked, self._rows.request_id(call.n))
        ranked = [e for e in told.ranked() if e in bench.service.experts]
        return replace(
            failed,
            spares=tuple((bench.service.experts[e].spec.engine_id, e) for e in ranked),
            max_calls=bench.service.orchestrator.max_calls(told, request, policy),
        )

    def combines_late(self, raw: bytes) -> bool:
        """Whether the line's aggregator may ask experts itself: then no line is combined before all calls have ended,
        so that no engine comes back for each of them."""
        try:
            reader = self._bench().reader
            return reader.policy(reader.read(raw)).aggregator.name not in FREE_AGGREGATORS
        except CollegiumError:
            return False  # a line that cannot be read any more needs nobody

    async def combine(
        self, n: int, raw: bytes, decision: bytes, heard: Sequence[tuple[bool, str, bytes]]
    ) -> tuple[Result, list[CallRecord]]:
        """The row of a line whose calls have all ended, and the calls that its aggregator made for it."""
        bench, made = self._bench(), list[CallRecord]()
        try:
            asked = bench.reader.read(raw)
            policy, request = bench.reader.policy(asked), bench.reader.request(asked, self._rows.request_id(n))
            run = Run(request=request, policy=policy, decision=_read_decision(decision))
            answers = [read_answer(said) for ok, _, said in heard if ok]
            if not answers:
                raise read_failure(heard[0][2])
            run.calls = [record for answer in answers for record in answer.calls]
            with bugs_told():
                completions = await self._one(bench, run, answers, made)
                return self._row(n, asked, run, completions), made
        except CollegiumError as exc:
            return self._rows.failure(n, custom_id(raw), exc), made

    async def _one(self, bench: Bench, run: Run, answers: Sequence[Answer], made: list[CallRecord]) -> list[Completion]:
        """One answer, in as many choices as were asked for; ``made`` is given the aggregator's own calls."""
        decision = run.decision
        assert decision is not None  # noqa: S101  # combine() read it
        if len(decision.expert_ids) == 1:
            completions = answers[0].completions
        else:
            own = Run(request=run.request, policy=run.policy, decision=decision, calls=made)
            with bench.service.ledger.watch(own):
                first = [answer.completions[0] for answer in answers]
                completions = [await run.policy.aggregator.aggregate(run.request, decision, first)]
            run.calls = [*run.calls, *made]
        run.answer_usage, run.trace = completions[0].usage, completions[0].trace
        return completions

    async def _patiently(self, expert: Expert, request: Request) -> list[Completion]:
        """The expert's answer. Where an online request would be sent away, a batch asks again after a while: else an
        endpoint that is down for a moment would fail the whole file within that moment."""
        engine_id = expert.spec.engine_id
        while True:
            try:
                completions = await collect_choices(expert.generate(request), request)
            except (BreakerOpen, QueueFull) as exc:
                since = self._silent_since.setdefault(engine_id, time.monotonic())
                if time.monotonic() - since > PATIENCE_S:
                    raise
                pause_s = exc.retry_after_s or 1.0
            else:
                self._silent_since.pop(engine_id, None)
                return completions
            await asyncio.sleep(pause_s)

    def _row(self, n: int, asked: Asked, run: Run, completions: list[Completion]) -> Result:
        explain, run.latency_s = _explains(asked), sum(call.latency_s for call in run.calls)
        body = answer_body(run, completions, asked.form, created=self._created, explain=explain)
        return self._rows.answer(n, asked.custom_id, body)

    def _failed(self, call: Call, exc: CollegiumError) -> Said:
        said = {"code": exc.code, "message": exc.message, "param": exc.param, "status": exc.status, "kind": exc.kind}
        return Said(n=call.n, slot=call.slot, ok=False, said=to_json(said), may_fall_back=exc.fallback)


def _expert(bench: Bench, expert_id: str) -> Expert:
    """Raises ExpertFailed where the config that the batch was planned by had it, and this one has not."""
    if (expert := bench.service.experts.get(expert_id)) is None:
        raise ExpertFailed(f"Expert '{expert_id}' was taken out of the config.", retryable=False)
    return expert


def read_answer(said: bytes) -> Answer:
    told = orjson.loads(said)
    return Answer(
        completions=[_completion(c) for c in told["completions"]],
        calls=[CallRecord(**{**c, "usage": Usage(**c["usage"])}) for c in told["calls"]],
    )


def read_failure(said: bytes) -> CollegiumError:
    told = orjson.loads(said)
    error = CollegiumError(told["message"], param=told["param"])
    error.code, error.status, error.kind = told["code"], told["status"], told["kind"]
    return error


def _completion(told: dict[str, Any]) -> Completion:
    return Completion(**{**told, "usage": Usage(**told["usage"]), "tool_calls": tuple(told["tool_calls"])})


def _read_decision(decision: bytes) -> RouteDecision:
    told = orjson.loads(decision)
    return RouteDecision(**{**told, "expert_ids": tuple(told["expert_ids"]), "weights": tuple(told["weights"])})


def _explains(asked: Asked) -> bool:
    return asked.body.collegium is not None and asked.body.collegium.explain  # type: ignore[union-attr]
