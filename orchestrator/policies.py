"""From the ``model`` a caller names, and what he overrides, to the Policy that answers him."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from experts.errors import BadRequest, NotFound
from orchestrator.aggregators.base import Aggregator
from orchestrator.aggregators.first import First
from orchestrator.run import Policy
from routers.base import Router
from routers.baseline import Direct

SERVICE_MODEL = "collegium"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """The part of the body's ``collegium`` key that changes a policy for one request."""

    router: str | None = None
    top_k: int | None = None
    aggregator: str | None = None
    max_calls: int | None = None
    max_usd: float | None = None


_NONE = Overrides()


class PolicyBook:
    def __init__(
        self,
        *,
        policies: Mapping[str, Policy],
        routers: Mapping[str, Router],
        aggregators: Mapping[str, Aggregator],
        expert_ids: tuple[str, ...],
        max_calls: int,
    ) -> None:
        self._by_model = {f"{SERVICE_MODEL}/{name}": p for name, p in policies.items()}
        self._by_model[SERVICE_MODEL] = policies["default"]
        self._by_model |= {e: Policy(name=e, router=Direct(e), aggregator=First(), max_calls=1) for e in expert_ids}
        self._own_aggregators = [p.aggregator for p in policies.values()]
        self._experts = frozenset(expert_ids)
        self._routers = routers
        self._aggregators = aggregators
        self._max_calls = max_calls

    @property
    def aggregators(self) -> list[Aggregator]:
        """Each policy's own."""
        return self._own_aggregators

    @property
    def models(self) -> list[str]:
        """All that ``model`` may be: the service, its policies, its experts."""
        return [SERVICE_MODEL, *(m for m in self._by_model if m != SERVICE_MODEL)]

    def resolve(self, model: str, overrides: Overrides = _NONE) -> Policy:
        """Raises NotFound for a model, BadRequest for an override, that does not exist.

        A request may ask for more calls than its policy, up to the service's limit; never for a bigger budget.
        """
        policy = self._by_model.get(model)
        if policy is None:
            raise NotFound(f"No model '{model[:100]}'. GET /v1/models lists what there is.", param="model")
        if overrides == _NONE:
            return policy
        if model in self._experts and (overrides.router or (overrides.top_k or 1) > 1):
            raise BadRequest(
                f"Model '{model}' is one expert, asked by name; to route, ask for '{SERVICE_MODEL}'.",
                param="collegium",
            )
        _check_positive(overrides)
        return replace(
            policy,
            router=_pick(self._routers, overrides.router, "router", policy.router),
            aggregator=_pick(self._aggregators, overrides.aggregator, "aggregator", policy.aggregator),
            top_k=overrides.top_k or policy.top_k,
            max_calls=min(overrides.max_calls or policy.max_calls, self._max_calls),
            max_usd=min((usd for usd in (overrides.max_usd, policy.max_usd) if usd is not None), default=None),
        )


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


def _pick(known: Mapping[str, T], name: str | None, what: str, own: T) -> T:
    """The policy's ``own`` where the request names none or that one, whose options may differ from a namesake's."""
    if name is None or name == own.name:
        return own
    if name not in known:
        raise BadRequest(
            f"No {what} '{name[:100]}' here; known: {', '.join(sorted(known))}.", param=f"collegium.{what}"
        )
    return known[name]


def _check_positive(overrides: Overrides) -> None:
    for key in ("top_k", "max_calls", "max_usd"):
        value = getattr(overrides, key)
        if value is not None and not value > 0:  # so put, NaN is refused too
            raise BadRequest(f"collegium.{key} must be above 0, not {value}.", param=f"collegium.{key}")
