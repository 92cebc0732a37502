"""The command line of ``collegium eval run``."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from evals.generation.measures import Row
    from evals.generation.questions import Question
    from evals.generation.run import Evaluator, Outcome, Plan
    from orchestrator.build import Service
    from orchestrator.config import Config
    from orchestrator.policies import Overrides

Source = Annotated[Path, typer.Option("--questions", "--pool", help="A .jsonl.gz of questions, or a recorded pool.")]
File = Annotated[Path | None, typer.Option("--config", "-c", help="collegium.yaml; a recorded pool needs none.")]
PolicyName = Annotated[str, typer.Option("--policy", help="A policy of the config.")]
RouterName = Annotated[str | None, typer.Option("--router", help="Another router than the policy's.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Experts asked a question.")]
AggregatorName = Annotated[str | None, typer.Option("--aggregator", help="Another aggregator than the policy's.")]
Split = Annotated[str | None, typer.Option(help="A split of a recorded pool; all of it by default.")]
Limit = Annotated[int | None, typer.Option(min=1, help="So many questions, drawn by the seed.")]
ScorerName = Annotated[
    str, typer.Option("--scorer", help="letter, letters, number, boxed, exact, contains, code; auto: by question.")
]
Seed = Annotated[int, typer.Option(min=0, help="Draws questions, samples, ties and splits.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Calls under way at a time.")]
Tell = Annotated[bool, typer.Option("--tell-tasks", help="Routers learn each question's task.")]
Sampled = Annotated[bool, typer.Option(help="Sample the best expert again, as often as the policy calls.")]
Record = Annotated[Path | None, typer.Option(help="Also write the experts' answers as a recorded pool, here.")]
Out = Annotated[Path, typer.Option(help="Folder for the report; answers are kept there, and asked once only.")]


def run(
    questions: Source,
    config: File = None,
    policy: PolicyName = "default",
    router: RouterName = None,
    top_k: TopK = None,
    aggregator: AggregatorName = None,
    split: Split = None,
    limit: Limit = None,
    scorer: ScorerName = "auto",
    seed: Seed = 0,
    concurrency: Concurrency = 16,
    tell_tasks: Tell = False,
    self_consistency: Sampled = True,
    record: Record = None,
    out: Out = Path("run-report"),
) -> None:
    """Answer questions by a policy, and say what it is worth beside its experts, their majority and an oracle.

    Run again with the same --out, it goes on where it was ended: an answer is asked for once.

    Example: collegium eval run --questions gsm8k-test.jsonl.gz -c collegium.yaml --policy panel --limit 100
    """
    from evals.generation.questions import read_questions, sample, with_recorded
    from evals.generation.recording import check_free
    from orchestrator.commands.screen import make_console
    from orchestrator.config import load_config
    from orchestrator.policies import Overrides

    if record is not None:
        check_free(record)
    settings = load_config(config) if config is not None else _recorded(questions)
    asked = sample(read_questions(questions, scorer=scorer, split=split), limit, seed)
    job = _Job(
        console=make_console(stderr=True),
        config=settings,
        source=questions.name.removesuffix(".jsonl.gz"),
        questions=with_recorded(asked, questions) if questions.is_dir() else asked,
        policy=policy,
        overrides=Overrides(router=router, top_k=top_k, aggregator=aggregator),
        seed=seed,
        concurrency=concurrency,
        tell_tasks=tell_tasks,
        samples=self_consistency,
        record=record,
        out=out,
    )
    asyncio.run(job.run())


def _recorded(pool: Path) -> "Config":
    """Every expert of a recorded pool, as it was recorded. Base models shown examples go on with a question of their
    own making; their answers are cut there."""
    from experts.errors import ConfigError
    from experts.pools import RecordedPool
    from orchestrator.config import parse_config

    if not pool.is_dir():
        raise ConfigError(f"{pool} is a question file: name the experts that are to answer with -c collegium.yaml.")
    ids = RecordedPool(pool).expert_ids
    expert = {"engine": "recorded", "defaults": {"stop": ["\nQuestion:"]}}
    return parse_config(
        {
            "engines": {"recorded": {"backend": "recorded", "model": str(pool)}},
            "experts": {e: {**expert, "adapter": e} for e in ids},
            "policies": {"default": {"router": "always", "top_k": min(5, len(ids)), "aggregator": "vote"}},
            "limits": {"max_calls": len(ids)},
        },
        source=str(pool),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    console: "Console"
    config: "Config"
    source: str
    questions: "Sequence[Question]"
    policy: str
    overrides: "Overrides"
    seed: int
    concurrency: int
    tell_tasks: bool
    samples: bool
    record: Path | None
    out: Path

    async def run(self) -> None:
        from evals.generation.answers import Answers
        from evals.generation.remembering import Remembering
        from evals.generation.run import Clock, Evaluator
        from orchestrator.build import build_service, make_engine
        from orchestrator.commands.screen import bars

        clock, answers, started = Clock(), Answers(self.out / "answers.sqlite"), time.monotonic()
        service = build_service(self.config, make=lambda spec: Remembering(make_engine(spec), answers, clock.note))
        try:
            with bars(self.console) as progress:

                def tell(what: str, count: int) -> None:
                    if count:
                        progress.start(what, count, "bytes")
                    else:
                        progress.advance(1)

                evaluator = Evaluator(service, clock, self._plan(service), tell)
                outcome = await evaluator.run()
        finally:
            await service.aclose()
            for engine in service.engines.values():
                await engine.unload()
            answers.close()
        await self._report(service, evaluator, outcome, time.monotonic() - started)

    def _plan(self, service: "Service") -> "Plan":
        from evals.generation.run import Plan

        live = any(engine.spec.backend != "recorded" for engine in service.engines.values())
        return Plan(
            questions=self.questions,
            policy=service.policies.resolve(f"collegium/{self.policy}", self.overrides),
            seed=self.seed,
            concurrency=self.concurrency,
            tell_tasks=self.tell_tasks,
            temperature=0.7 if live and self.samples else None,
        )

    async def _report(self, service: "Service", evaluator: "Evaluator", outcome: "Outcome", wall_s: float) -> None:
        from evals.generation import recording, report
        from evals.generation.measures import table
        from evals.generation.run import loads
        from orchestrator.build import make_aggregator
        from orchestrator.config import AggregatorConfig

        vote = make_aggregator(AggregatorConfig(name="vote"), service.experts, service.encoder)
        rows = await table(outcome, self.questions, self.seed, vote, evaluator.request)
        policy = evaluator.plan.policy
        about = report.About(
            source=self.source,
            policy=self.policy,
            router=policy.router.name,
            aggregator=policy.aggregator.name,
            experts=list(service.experts),
            seed=self.seed,
            loads=loads(service),
            wall_s=wall_s,
        )
        report.write(report.as_json(rows, self.questions, about), rows, outcome, self.questions, self.out)
        if self.record is not None:
            specs = [expert.spec for expert in service.experts.values()]
            recording.record(outcome, self.questions, specs, self.source, self.seed, self.record)
            self.console.print(f"[dim]recorded pool: {self.record}[/]")
        _show(rows)
        self.console.print(f"[dim]the report, every answer and the plot are in {self.out}[/]")


def _show(rows: "list[Row]") -> None:
    from rich.table import Table

    from evals.generation.report import verdict
    from orchestrator.commands.screen import make_console

    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("", "score", "ci95", "vs best", "calls", "tokens", "USD", "seconds", "failed"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            *_cells(row), style="green" if row.helps and not row.note else "dim" if row.note == "expert" else ""
        )
    console = make_console(stderr=False)
    console.print(table)
    if cut_off := {row.name: row.cut_off for row in rows if row.note == "expert" and row.cut_off}:
        counts = ", ".join(f"{name} {count}" for name, count in cut_off.items())
        console.print(
            f"cut off at their token limit: {counts}; see an expert's max_tokens", style="yellow", markup=False
        )
    console.print(f"policy: {verdict(rows[0])}; " + "; ".join(f"{r.name}: {r.note}" for r in rows[1:6]), style="dim")


def _cells(row: "Row") -> list[str]:
    low, high = (f"{x * 100:.1f}" for x in row.accuracy.ci95)
    return [
        row.name,
        f"{row.accuracy.value * 100:.1f}",
        f"{low}-{high}",
        f"{row.difference.value * 100:+.1f}",
        f"{row.calls:.2f}",
        f"{row.tokens:.0f}",
        f"{row.usd:.2g}",
        f"{row.seconds:.2f}",
        str(row.failed),
    ]
