"""A router and best_of: the router says who is asked, a reward which of their texts is given.

It is the service's own aggregator, on the texts that the pool has recorded and prompts as 'collegium eval run' writes
them: those list the options, which the reward reads too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from evals.generation.questions import read_questions
from evals.routing.setting import Setting
from evals.routing.votes import Outcome, Recorded, ask
from experts.errors import ConfigError
from experts.pools import RecordedPool
from experts.types import Completion, Request
from orchestrator.aggregators.base import Aggregator
from orchestrator.build import make_aggregator
from orchestrator.config import AggregatorConfig
from routers.encoders import Encoder
from routers.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """``prompts`` and ``answers`` (by expert) of the test split, by the number of a question."""

    prompts: dict[int, str]
    answers: dict[int, dict[str, str]]
    parsed: Recorded

    @classmethod
    def read(cls, folder: Path, setting: Setting, *, on_expert: Callable[[], None] = lambda: None) -> Self:
        """Raises ConfigError, also where the split has no text at all."""
        records, wanted = setting.records, {int(q) for q in setting.test}
        numbers = {records.question_ids[q]: q for q in wanted}
        questions = (q for q in read_questions(folder) if q.question_id in numbers)
        prompts = {numbers[q.question_id]: q.prompt for q in questions}
        answers: dict[int, dict[str, str]] = {q: {} for q in wanted}
        pool = RecordedPool(folder)
        for expert_id in records.expert_ids:
            for question, answer in pool.read(expert_id):
                if question in wanted and answer.text:
                    answers[question][expert_id] = answer.text
            on_expert()
        if not any(answers.values()):
            raise ConfigError(
                f"Pool '{records.name}' has no 'text' in responses/: there is nothing for a reward to read."
            )
        return cls(prompts=prompts, answers=answers, parsed=Recorded(setting))

    def request(self, question: int) -> Request:
        return replace(self.parsed.request(question), prompt=self.prompts[question])

    def completion(self, question: int, expert: int) -> Completion:
        parsed = self.parsed.completion(question, expert)
        return replace(parsed, text=self.answers[question].get(parsed.expert_id, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    aggregator: Aggregator
    texts: Texts

    @classmethod
    def make(cls, artefact: Path | None, encoder: Encoder, texts: Texts) -> Self:
        """Without an ``artefact``, by agreement. Raises ConfigError."""
        wanted = AggregatorConfig(name="best_of", artefact=artefact)
        return cls(aggregator=make_aggregator(wanted, {}, lambda: encoder), texts=texts)

    async def ask(self, predicted_QE: Array, top_k: int) -> Outcome:
        """The ``top_k`` best-scored experts; a reward waits for all."""
        return await ask(predicted_QE, self.texts.parsed.setting, self.aggregator, top_k, self.texts)
