"""From a recorded pool to a fitted router, and a fitted router in words."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from routers.costs import costs
from routers.encoders import Encoder
from routers.learned.artefact import Fitted, model_class
from routers.learned.base import Training
from routers.learned.skills import Rule, Skills
from routers.learned.task import Task
from routers.questions import Questions, embed
from routers.records import Records


async def fit_router(
    name: str,
    records: Records,
    encoder: Encoder,
    cache: Path,
    *,
    split: str,
    seed: int,
    keywords: Sequence[Sequence[str]] | None = None,
) -> Fitted:
    """Learns from ``split`` only. ``keywords`` of its questions are for 'skills', in place of mined ones. Raises
    ConfigError."""
    rows, model = records.lessons(split), model_class(name)
    # Embedded whole: an evaluation of the same pool then finds them in the cache.
    vectors = await embed(encoder, records.texts, cache)
    training = Training(
        questions=Questions(vectors_QW=vectors, tasks=records.tasks, texts=records.texts).take(rows),
        scores_QE=records.scores_QE[rows],
        answers_QE=records.answers_QE[rows],
        costs_E=costs(records)[0][rows].mean(axis=0),
        seed=seed,
        expert_ids=records.expert_ids,
    )
    return Fitted(
        name=name,
        model=model.fit(training) if keywords is None else Skills.from_keywords(training, keywords, Rule()),
        expert_ids=records.expert_ids,
        pool=records.name,
        pool_digest=records.digest,
        encoder=encoder.name,
        width=encoder.width,
        questions=len(rows),
        seed=seed,
    )


def describe(fitted: Fitted) -> str:
    """Where it comes from, and what it expects of each expert; of a router by task, whom it would ask in each."""
    model = fitted.model
    if isinstance(model, Task):
        what, row, tasks = "mean scores", model.mean_E, _by_task(model, fitted.expert_ids)
    else:
        nothing = Questions(vectors_QW=np.zeros((1, fitted.width), np.float32), tasks=(None,))
        what, row, tasks = "scores of a question about nothing in particular", model.predict(nothing)[0], []
    lines = [
        f"router    {fitted.name}",
        f"learned   {fitted.questions} questions of {fitted.pool} ({fitted.pool_digest[:12]}), seed {fitted.seed}",
        f"encoder   {fitted.encoder}, {fitted.width} wide",
        f"experts   {len(fitted.expert_ids)}; {what}:",
        *(f"  {row[e]:7.3f}  {fitted.expert_ids[e]}" for e in np.argsort(-row, kind="stable")),
        *tasks,
    ]
    return "\n".join(lines)


def _by_task(model: Task, expert_ids: Sequence[str]) -> list[str]:
    """The best three of each task."""
    lines = []
    for task, row in zip(model.labels.names, model.means_TE, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        lines.append(f"  {task}: " + ", ".join(f"{expert_ids[e]} {row[e]:.3f}" for e in best))
    return [f"tasks     {len(lines)}; the best of each:", *lines] if lines else []
