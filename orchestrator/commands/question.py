"""What 'ask' and 'route' were asked, as the service in this process or the one at a URL wants it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from experts.types import Message, Request

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.policies import Overrides

Explanation = Mapping[str, Any]
"""The reply's ``collegium`` object; see orchestrator.replies.explanation()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    text: str
    router: str | None = None
    top_k: int | None = None
    aggregator: str | None = None
    expert: str | None = None
    policy: str | None = None

    @property
    def model(self) -> str:
        return self.expert or (f"collegium/{self.policy}" if self.policy else "collegium")

    @property
    def overrides(self) -> "Overrides":
        from orchestrator.policies import Overrides

        return Overrides(router=self.router, top_k=self.top_k, aggregator=self.aggregator)

    def request(self, config: "Config") -> Request:
        return Request(messages=(Message(role="user", content=self.text),), deadline_s=config.limits.deadline_s)

    def body(self) -> dict[str, Any]:
        """The JSON that every path of the HTTP interface shares."""
        asked = {"router": self.router, "top_k": self.top_k, "aggregator": self.aggregator}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.text}],
            "collegium": {key: value for key, value in asked.items() if value is not None},
        }


class View(Protocol):
    """Who shows an answer as it comes."""

    def routed(self, decision: Mapping[str, Any]) -> None:
        """Who is asked; the explanation's ``decision``."""

    def text(self, piece: str) -> None:
        """A piece of the answer."""

    def waiting(self, what: str) -> Any:
        """A context manager around something slow."""
