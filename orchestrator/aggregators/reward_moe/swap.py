"""DMoERM's filter for labels by a judge: each pair is asked in both orders, and kept only where both agree, so that a
judge with a liking for one place teaches nothing."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

Verdict = Literal["first", "second", "tie"]
Judge = Callable[[str, str, str], Awaitable[Verdict]]
"""Prompt, first answer, second answer: which one is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """``winners`` holds, for each pair, 0 or 1, or None where the judge contradicted itself or saw a tie."""

    winners: tuple[int | None, ...]

    @property
    def dropped(self) -> float:
        """The share of pairs that teach nothing; 0.2 to 0.4 is usual."""
        return sum(w is None for w in self.winners) / len(self.winners) if self.winners else 0.0


async def swap_filter(judge: Judge, pairs: Sequence[tuple[str, str, str]]) -> Judged:
    """``pairs`` of (prompt, answer, answer). The judge's errors are the caller's."""
    winners: list[int | None] = []
    for prompt, a, b in pairs:
        verdict, swapped = await judge(prompt, a, b), await judge(prompt, b, a)
        agreed = {("first", "second"): 0, ("second", "first"): 1}
        winners.append(agreed.get((verdict, swapped)))
    found = Judged(winners=tuple(winners))
    log.info("the judge contradicted itself on %.0f %% of %d pairs", 100 * found.dropped, len(pairs))
    return found
