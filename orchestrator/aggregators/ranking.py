"""Ranking by comparisons that are neither transitive nor symmetric: the relaxed comparison sort of TradExpert (Ding et
al., 2024, arXiv 2411.00782). Every ordered pair is asked, and who wins most stands first."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

Compare = Callable[[int, int], Awaitable[float | None]]
"""How the first of two items fares when it is shown first: 1 wins, 0 loses, 0.5 a tie; None where nobody could say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """``order`` is best first. ``wins`` by item, of 2(N-1) comparisons at most; a tie is half a win to each.
    ``unsaid`` counts the pairs that nobody could compare, which are ties."""

    order: tuple[int, ...]
    wins: tuple[float, ...]
    unsaid: int


async def rank_all_pairs(items: int, compare: Compare, *, at_once: int, ties: Sequence[float] = ()) -> Ranking:
    """N(N-1) comparisons, both orders of each pair, ``at_once`` of them running. Equal wins go by ``ties``, the higher
    first, then by number. The first exception that ``compare`` raises ends all."""
    wins, unsaid = [0.0] * items, 0
    pairs = iter(permutations(range(items), 2))

    async def work() -> None:
        nonlocal unsaid
        for first, second in pairs:  # the workers share one iterator
            outcome = await compare(first, second)
            unsaid += outcome is None
            share = 0.5 if outcome is None else outcome
            wins[first] += share
            wins[second] += 1 - share

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, items * (items - 1))):
                group.create_task(work())
    except ExceptionGroup as exc:
        raise exc.exceptions[0] from exc
    standing = ties or [0.0] * items
    order = sorted(range(items), key=lambda i: (-wins[i], -standing[i], i))
    return Ranking(order=tuple(order), wins=tuple(wins), unsaid=unsaid)
