"""Region-based joint search of instructions (mixture of prompts, arXiv 2407.00256, section 4.2).

Candidates are inferred by a model from demonstrations that the region's own prompt does not show, screened on a few
validation questions, and chosen region by region on the validation questions that fall there. The model is a function
that is handed in: routers call no expert.

Legend: N demonstrations, V validation questions, K regions, W width of the embedding.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from routers.records import Array
from routers.regions import Region, nearest_region

Pair = tuple[str, str]
Propose = Callable[[Sequence[Pair], int], Awaitable[str]]
"""(demonstrations, number of the draw) -> an instruction that explains them."""
Grade = Callable[[str, Sequence[Pair], Pair], Awaitable[float]]
"""(instruction, demonstrations, question and gold answer) -> the score of the model's answer, 0 to 1."""

PROPOSALS, SHOWN, SCREENED, KEPT, BUDGET = 20, 5, 20, 4, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptExpert:
    """``validated`` is the score on ``queries`` validation questions, the region's own first."""

    instruction: str
    demos: tuple[Pair, ...]
    validated: float
    queries: int


async def search_prompts(
    demos: Sequence[Pair],
    regions: Sequence[Region],
    centroids_KW: Array,
    validation: Sequence[Pair],
    validation_VW: Array,
    *,
    propose: Propose,
    grade: Grade,
    seed: int = 0,
    most_demos: int | None = None,
) -> list[PromptExpert]:
    """One prompt a region. ``most_demos`` of a region's demonstrations are shown, those nearest in number first."""
    rng = np.random.default_rng(seed)
    proposed = await _propose(demos, regions, propose, rng)
    candidates = [*await _screen(proposed, validation, grade, rng), ""]
    distances_VK = nearest_region(validation_VW, centroids_KW)
    return list(
        await asyncio.gather(
            *(
                _choose(
                    candidates,
                    [demos[i] for i in dict.fromkeys(region.kept)][:most_demos],
                    [validation[v] for v in queries_of(distances_VK, k)],
                    grade,
                )
                for k, region in enumerate(regions)
            )
        )
    )


def outside(region: Region, regions: Sequence[Region]) -> list[int]:
    """The demonstrations that a region's candidates are made from: all that its own prompt does not show. A single
    region's are its own."""
    if len(regions) == 1:
        return sorted({*region.kept, *region.trimmed})
    others = {i for r in regions if r is not region for i in r.members}
    trimmed = {i for r in regions for i in r.trimmed}
    return sorted((others | trimmed) - set(region.kept))


def queries_of(distances_VK: Array, k: int, budget: int = BUDGET) -> list[int]:
    """Validation questions that are routed to region ``k``, then the next nearest until there are ``budget``."""
    mine = distances_VK.argmin(axis=1) == k
    order = np.lexsort((distances_VK[:, k], ~mine))
    return [int(v) for v in order[: max(budget, int(mine.sum()))]]


async def _propose(
    demos: Sequence[Pair], regions: Sequence[Region], propose: Propose, rng: np.random.Generator
) -> list[str]:
    tasks: list[Awaitable[str]] = []
    for region in regions:
        pool = outside(region, regions)
        for _ in range(PROPOSALS // len(regions)):
            shown = rng.choice(pool, min(SHOWN, len(pool)), replace=False)
            tasks.append(propose([demos[int(i)] for i in shown], len(tasks)))
    texts = [" ".join(text.split()) for text in await asyncio.gather(*tasks)]
    return list(dict.fromkeys(t for t in texts if t))


async def _screen(
    candidates: Sequence[str], validation: Sequence[Pair], grade: Grade, rng: np.random.Generator
) -> list[str]:
    """The best few by themselves, without demonstrations."""
    picks = rng.choice(len(validation), min(SCREENED, len(validation)), replace=False)
    sample = [validation[int(v)] for v in picks]
    scores = await asyncio.gather(*(_mean(c, (), sample, grade) for c in candidates))
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    return [candidates[i] for i in order[:KEPT]]


async def _choose(
    candidates: Sequence[str], demos: Sequence[Pair], queries: Sequence[Pair], grade: Grade
) -> PromptExpert:
    """The best candidate on the region's queries, also where all score 0; of equals the one screened higher."""
    scores = await asyncio.gather(*(_mean(c, demos, queries, grade) for c in candidates))
    best = max(range(len(candidates)), key=lambda i: scores[i])
    return PromptExpert(instruction=candidates[best], demos=tuple(demos), validated=scores[best], queries=len(queries))


async def _mean(instruction: str, demos: Sequence[Pair], queries: Sequence[Pair], grade: Grade) -> float:
    scores = await asyncio.gather(*(grade(instruction, demos, q) for q in queries))
    return float(np.mean(scores)) if scores else 0.0
