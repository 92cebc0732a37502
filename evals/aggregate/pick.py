"""Who is a good aggregator: Symbolic-MoE's synthetic task (Chen et al., 2025, arXiv 2503.05641, its code's version).

For each question of a recorded pool one right and two wrong answers, shuffled, stand in the fusing prompt; every expert
fuses them, and is ranked by how often the result is right. A question to which nobody gave a right answer stays in,
with an empty one in its place: whoever only selects cannot win it, so the winnable ones are counted on their own too.
"""

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.base import Expert, collect
from experts.errors import CollegiumError, ConfigError
from experts.pools import RecordedPool, read_rows
from experts.types import Message, Request, SamplingParams
from orchestrator.aggregators.extract import auto, read_request, same
from orchestrator.aggregators.fuse import fusion_prompt
from orchestrator.aggregators.pick import Standing
from orchestrator.aggregators.quoting import after_reasoning, clip, without_reasoning

WRONG = 2
_DEMAND = "Think step by step, then end with: The answer is (X)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """One question as every expert sees it. ``winnable``: one of ``responses`` is right."""

    question_id: str
    question: str
    gold: str
    responses: tuple[str, ...]
    winnable: bool

    def request(self, *, response_chars: int, max_tokens: int) -> Request:
        texts = [clip(text, response_chars) for text in self.responses]
        prompt, _ = fusion_prompt(self.question, texts, secret=self.question_id)
        params = SamplingParams(temperature=0.7, max_tokens=max_tokens, seed=0)
        return Request(messages=(Message(role="user", content=prompt),), params=params, stream=False, deadline_s=600)

    def is_right(self, text: str) -> bool:
        asked = read_request(Request(prompt=self.question))
        given = auto(after_reasoning(text), asked)
        return given is not None and same(given, self.gold)


def make_tasks(folder: Path, *, ids: Sequence[str], seed: int) -> list[Synthetic]:
    """A task for each of ``ids`` whose gold answer is known. Raises ConfigError."""
    pool, wanted = RecordedPool(folder), set(ids)
    rows = {str(row["id"]): row for _, row in read_rows(folder / "questions.jsonl.gz") if str(row["id"]) in wanted}
    answers: dict[str, dict[bool, list[str]]] = {i: {True: [], False: []} for i in rows}
    numbers = {pool.by_id(i): i for i in rows}
    for expert_id in pool.expert_ids:
        for number, answer in pool.read(expert_id):
            if (question_id := numbers.get(number)) is not None and answer.text:
                answers[question_id][answer.score >= 1].append(without_reasoning(answer.text))
    tasks = [t for i in ids if i in rows for t in _task(rows[i], answers[i], seed)]
    if not tasks:
        raise ConfigError(f"{folder}: no question has a gold answer and recorded texts; a pool with both is needed.")
    return tasks


def _task(row: Mapping[str, object], answers: Mapping[bool, list[str]], seed: int) -> Iterator[Synthetic]:
    if not row.get("answer") or not (answers[True] or answers[False]):
        return
    # By question, so that a task stays the same whatever others are drawn.
    draw = random.Random(f"{seed} {row['id']}")  # noqa: S311  # no secret
    right = draw.sample(answers[True], 1) if answers[True] else [""]
    wrong = draw.sample(answers[False], min(WRONG, len(answers[False])))
    responses = [*right, *wrong, *[""] * (WRONG - len(wrong))]
    draw.shuffle(responses)
    options = row.get("options") or []
    assert isinstance(options, list)  # noqa: S101  # read_rows' pool checked them
    listed = "".join(f"\n{chr(65 + i)}. {option}" for i, option in enumerate(options))
    yield Synthetic(
        question_id=str(row["id"]),
        question=f"{row['question']}{listed}\n{_DEMAND if options else ''}".strip(),
        gold=str(row["answer"]),
        responses=tuple(responses),
        winnable=bool(answers[True]),
    )


async def rank_aggregators(
    experts: Mapping[str, Expert],
    tasks: Sequence[Synthetic],
    *,
    at_once: int = 8,
    response_chars: int = 2000,
    max_tokens: int = 512,
    on_answer: Callable[[str], None] = lambda _: None,
) -> list[Standing]:
    """Every expert on every task, one expert after the other, so that each engine is loaded once. Best first; equals
    by name. A call that fails is a wrong answer."""

    async def standing(expert_id: str, expert: Expert) -> Standing:
        places = asyncio.Semaphore(at_once)

        async def fuse(task: Synthetic) -> bool | None:
            async with places:
                request = task.request(response_chars=response_chars, max_tokens=max_tokens)
                try:
                    return task.is_right((await collect(expert.generate(request), request)).text)
                except CollegiumError:
                    return None
                finally:
                    on_answer(expert_id)

        results = await asyncio.gather(*map(fuse, tasks))
        won = [result for task, result in zip(tasks, results, strict=True) if task.winnable]
        return Standing(
            expert_id=expert_id,
            asked=len(tasks),
            right=sum(r is True for r in results),
            winnable=len(won),
            winnable_right=sum(r is True for r in won),
            failed=sum(r is None for r in results),
        )

    standings = [await standing(expert_id, expert) for expert_id, expert in sorted(experts.items())]
    return sorted(standings, key=lambda s: (-s.right, -s.winnable_right, s.expert_id))
