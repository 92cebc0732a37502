"""What one evaluation is about: a pool, its experts, which questions are learned from and which are asked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from experts.errors import ConfigError
from routers.costs import costs
from routers.encoders import Encoder
from routers.learned.base import Training
from routers.questions import Questions, embed
from routers.records import Array, Records


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """``cost_QE`` is what each recorded answer cost, in ``unit``; ``train`` and ``test`` number questions.

    With ``hide_tasks`` routers are not told the tasks of the test questions; the baselines still are.
    """

    records: Records
    questions: Questions
    train: Array
    test: Array
    cost_QE: Array
    unit: str
    seed: int
    hide_tasks: bool = False

    @property
    def costs_E(self) -> Array:
        """What a call of each expert is expected to cost, from the training split."""
        mean: Array = self.cost_QE[self.train].mean(axis=0)
        return mean

    @property
    def training(self) -> Training:
        return Training(
            questions=self.questions.take(self.train),
            scores_QE=self.records.scores_QE[self.train],
            answers_QE=self.records.answers_QE[self.train],
            costs_E=self.costs_E,
            seed=self.seed,
            expert_ids=self.records.expert_ids,
        )

    @property
    def asked(self) -> Questions:
        if not self.hide_tasks:
            return self.told
        return replace(self.told, tasks=(None,) * len(self.test))

    @property
    def told(self) -> Questions:
        return self.questions.take(self.test)

    @property
    def scores_QE(self) -> Array:
        """Of the test split."""
        scores: Array = self.records.scores_QE[self.test]
        return scores


async def make_setting(
    records: Records,
    encoder: Encoder,
    cache: Path,
    *,
    train: str,
    test: str,
    seed: int,
    hide_tasks: bool = False,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Setting:
    """Raises ConfigError for a split that is empty or unknown, a train split with nothing to learn, and one split that
    is to be both."""
    if train == test:
        raise ConfigError(f"Split '{train}' is to be learned from and tested on: name another with --train or --test.")
    rows = records.lessons(train), records.rows(test)
    vectors = await embed(encoder, records.texts, cache, on_batch=on_batch)
    cost, unit = costs(records)
    return Setting(
        records=records,
        questions=Questions(vectors_QW=vectors, tasks=records.tasks, texts=records.texts),
        train=rows[0],
        test=rows[1],
        cost_QE=cost,
        unit=unit,
        seed=seed,
        hide_tasks=hide_tasks,
    )
