"""Which expert merges answers best (Symbolic-MoE, arXiv 2503.05641): each is shown one right and two wrong answers to a
question of the validation split, and is scored on what it makes of them. Being good at answering and being good at
merging are two skills; the profile says nothing of the second.

Legend: Q questions, E experts.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experts.errors import ConfigError
from routers.records import Array

WRONG = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """``responses``: texts in random order, empty where there were not enough. ``winnable``: one of them is right, so
    that a mere selector could get it."""

    question: int
    responses: tuple[str, ...]
    winnable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Merger:
    """``winnable_score`` is on the exams that can be won by choosing alone; None where there are none."""

    name: str
    score: float
    winnable_score: float | None


Merge = Callable[[Exam], Awaitable[float]]
"""An exam to the score, 0 to 1, of the answer that was made of it."""


def make_exams(texts_QE: Sequence[Sequence[str | None]], scores_QE: Array, seed: int) -> list[Exam]:
    """One exam a question. From a score of one half an answer counts as right; texts that were not kept are left
    out."""
    rng = np.random.default_rng(seed)
    exams = []
    for question, (texts, scores) in enumerate(zip(texts_QE, scores_QE, strict=True)):
        known = [(t, s >= 0.5) for t, s in zip(texts, scores, strict=True) if t is not None]
        right = _some([t for t, good in known if good], 1, rng)
        wrong = _some([t for t, good in known if not good], WRONG, rng)
        shown = [*(right or [""]), *wrong, *[""] * (WRONG - len(wrong))]
        order = rng.permutation(len(shown))
        exams.append(Exam(question=question, responses=tuple(shown[i] for i in order), winnable=bool(right)))
    return exams


async def rank_mergers(exams: Sequence[Exam], mergers: Mapping[str, Merge]) -> list[Merger]:
    """Best first; of equals the one named first. Raises ConfigError without an exam or a merger."""
    if not exams or not mergers:
        raise ConfigError("Choosing an aggregator takes a question and an expert at least.")
    winnable = np.array([exam.winnable for exam in exams])
    found = []
    for name, merge in mergers.items():
        scores = np.array(await asyncio.gather(*(merge(exam) for exam in exams)), np.float64)
        won = float(scores[winnable].mean()) if winnable.any() else None
        found.append(Merger(name=name, score=float(scores.mean()), winnable_score=won))
    return sorted(found, key=lambda m: -m.score)


def _some(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [texts[int(i)] for i in rng.permutation(len(texts))[:count]]
