"""What an aggregator is: several answers in, one out."""

from collections.abc import Sequence
from typing import Protocol

from experts.types import Completion, Request
from routers.base import RouteDecision


class Aggregator(Protocol):
    """``takes_one`` says that one answer is all it looks at, so that only one expert is asked and can be streamed."""

    name: str
    takes_one: bool

    async def aggregate(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion]
    ) -> Completion:
        """One answer from ``completions`` (at least one, in the order of ``decision.expert_ids``, less the failed).

        The result does not depend on that order. ``trace`` of the result says what each answer counted for.
        """
