"""What an aggregator is: several answers in, one out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from experts.base import Expert
from experts.types import Completion, Request
from routers.base import RouteDecision
from routers.encoders import Encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorParts:
    """What an aggregator may be made from; constructors that need it take it first, then their options by keyword.
    ``encoder`` gives the service's encoder, the same one each time, made at the first call; ``experts`` are wrapped
    already and report their calls like any other."""

    encoder: Callable[[], Encoder]
    experts: Mapping[str, Expert]
    artefact: Path | None = None


@runtime_checkable
class Consulting(Protocol):
    """An aggregator that asks experts itself: its calls count in a request's budgets."""

    def consults(self, expert_ids: Sequence[str]) -> Sequence[str]:
        """Whom it may ask to combine the answers of ``expert_ids``: an expert for each call, at most."""


@runtime_checkable
class Closing(Protocol):
    """An aggregator that holds something of its own, such as a reward's session or engine."""

    async def aclose(self) -> None:
        """Give it back. Safe on one that was never used, and twice."""


def consulted(aggregator: object, expert_ids: Sequence[str]) -> Sequence[str]:
    """What ``aggregator`` asks itself to combine several answers; nobody where there is but one."""
    # In this order: isinstance() of a Protocol is slow, and most requests ask one expert.
    return aggregator.consults(expert_ids) if len(expert_ids) > 1 and isinstance(aggregator, Consulting) else ()


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

    async def settled(
        self, request: Request, decision: RouteDecision, completions: Sequence[Completion], pending: Sequence[str]
    ) -> bool:
        """Whether the answers still to come, of the experts ``pending``, cannot change the result, or are not worth
        waiting for. Their calls are then cancelled, or never made."""
