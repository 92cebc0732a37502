"""The composition root: a Config in, a Service out. The only place that makes objects from names."""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from experts import BACKENDS
from experts.base import Engine, EngineExpert, Expert
from experts.errors import ConfigError
from experts.types import EngineSpec, ExpertSpec
from orchestrator.admission import Admission
from orchestrator.aggregators import AGGREGATORS
from orchestrator.aggregators.base import Aggregator, AggregatorParts, Closing, consulted
from orchestrator.config import AggregatorConfig, Config, RouterConfig, nearest
from orchestrator.dispatch import Dispatcher, Resident
from orchestrator.loading import Loading
from orchestrator.pipeline import Orchestrator
from orchestrator.policies import PolicyBook
from orchestrator.residency import Residency
from orchestrator.resilience import Breaker, BreakerState, Retrying, Timed
from orchestrator.run import Ledger, Observer, Policy
from orchestrator.security import KeyRing
from orchestrator.swaps import Rules
from routers import ROUTERS
from routers.base import Router, RouterParts
from routers.encoders import Encoder, MiniLM
from routers.static import WordLlama

log = logging.getLogger(__name__)

FREE_ROUTERS = ("always", "random", "hash", "round_robin")
FREE_AGGREGATORS = ("first", "vote", "weighted_vote")
"""What a request may name even when no policy of the config uses it: they need no options and no artefact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """All that answers requests under one config. A reload makes a new one."""

    config: Config
    engines: Mapping[str, Engine]
    experts: Mapping[str, Expert]
    breakers: Mapping[str, BreakerState]
    encoder: Callable[[], Encoder]
    policies: PolicyBook
    keys: KeyRing
    admission: Admission
    ledger: Ledger
    dispatcher: Dispatcher
    orchestrator: Orchestrator

    async def aclose(self) -> None:
        """Give back what its experts and aggregators hold alone; its engines may answer for another Service too. One
        that fails is logged: the others are still to be given back."""
        closing = [(a.name, a.aclose) for a in self.policies.aggregators if isinstance(a, Closing)]
        for name, close in [*((x.spec.expert_id, x.aclose) for x in self.experts.values()), *closing]:
            try:
                await close()
            except Exception:
                log.exception("%s did not end cleanly", name)


def make_engine(spec: EngineSpec) -> Engine:
    engine: Engine = _load(BACKENDS, spec.backend, "backend")(spec)
    return engine


def build_service(
    config: Config,
    engines: Mapping[str, Engine] | None = None,
    *,
    observers: Sequence[Observer] = (),
    make: Callable[[EngineSpec], Engine] = make_engine,
) -> Service:
    """Everything but the edges. ``engines`` are taken over where given (a reload); ``make`` makes the others.

    Raises ConfigError. Loads nothing: engines load in Host.start(), the encoder at its first use.
    """
    ledger, admission, given = Ledger(observers), _admission(config), engines or {}
    engines = {e: given[e] if e in given else make(_spec(e, config)) for e in config.engines}
    breakers = {e: _breaker(config) for e in engines}
    dispatcher = Dispatcher(_residency(config, engines))
    specs = [c.spec(e) for e, c in config.experts.items()]
    wrap = partial(_wrap, ledger=ledger, dispatcher=dispatcher, config=config)
    experts = {s.expert_id: wrap(s, engines[s.engine_id], breakers[s.engine_id]) for s in specs}
    wanted = config.encoder
    encoder = cache(partial(make_encoder, wanted.model, wanted.cache, wanted.runtime))
    return Service(
        config=config,
        engines=engines,
        experts=experts,
        breakers=breakers,
        encoder=encoder,
        policies=_policies(config, experts, encoder),
        keys=KeyRing(config.security),
        admission=admission,
        ledger=ledger,
        dispatcher=dispatcher,
        orchestrator=Orchestrator(
            experts=experts,
            admission=admission,
            ledger=ledger,
            hedge_after_s=config.resilience.hedge_after_s,
        ),
    )


def make_router(config: RouterConfig, experts: Mapping[str, Expert], encoder: Callable[[], Encoder]) -> Router:
    parts = RouterParts(encoder=encoder, experts=experts, artefact=config.artefact)
    router: Router = _make(ROUTERS, "router", config.name, config.options, parts)
    return router


def make_encoder(model: str, cache_size: int, runtime: str = "auto") -> Encoder:
    """``model`` is its name or a folder; ``runtime`` as for MiniLM. Loads nothing.

    Raises ConfigError when the model or its package is missing.
    """
    if model == WordLlama.NAME:
        return WordLlama()
    return MiniLM(model=model, cache_size=cache_size, runtime=runtime)


def make_aggregator(
    config: AggregatorConfig, experts: Mapping[str, Expert], encoder: Callable[[], Encoder]
) -> Aggregator:
    parts = AggregatorParts(encoder=encoder, experts=experts, artefact=config.artefact)
    aggregator: Aggregator = _make(AGGREGATORS, "aggregator", config.name, config.options, parts)
    return aggregator


def _policies(config: Config, experts: Mapping[str, Expert], encoder: Callable[[], Encoder]) -> PolicyBook:
    """What a request may name instead of its policy's own: every router and aggregator of the config (the first of a
    name), then the free ones."""
    policies = {name: _policy(name, config, experts, encoder) for name in config.policies}
    routers = {name: make_router(RouterConfig(name=name), experts, encoder) for name in FREE_ROUTERS}
    aggregators = {name: make_aggregator(AggregatorConfig(name=name), experts, encoder) for name in FREE_AGGREGATORS}
    for policy in reversed(policies.values()):
        routers[policy.router.name] = policy.router
        aggregators[policy.aggregator.name] = policy.aggregator
    return PolicyBook(
        policies=policies,
        routers=routers,
        aggregators=aggregators,
        expert_ids=tuple(experts),
        max_calls=config.limits.max_calls,
    )


def _policy(name: str, config: Config, experts: Mapping[str, Expert], encoder: Callable[[], Encoder]) -> Policy:
    wanted = config.policies[name]
    try:
        router = make_router(wanted.router, experts, encoder)
        aggregator = make_aggregator(wanted.aggregator, experts, encoder)
    except ConfigError as exc:
        raise ConfigError(f"policies.{name}: {exc.message}") from exc
    max_calls = wanted.max_calls or config.limits.max_calls
    own = len(consulted(aggregator, tuple(experts)[: wanted.top_k]))
    if wanted.top_k + own > max_calls:
        raise ConfigError(
            f"policies.{name}: {wanted.top_k} experts and the {own} calls of aggregator '{aggregator.name}' need "
            f"max_calls (and limits.max_calls) of {wanted.top_k + own}, not {max_calls}."
        )
    return Policy(
        name=name,
        router=router,
        aggregator=aggregator,
        top_k=wanted.top_k,
        max_calls=max_calls,
        max_usd=wanted.max_usd,
        one_by_one=wanted.one_by_one,
        quorum=wanted.quorum,
        late_s=wanted.late_s,
    )


def _wrap(
    spec: ExpertSpec, engine: Engine, breaker: BreakerState, *, ledger: Ledger, dispatcher: Dispatcher, config: Config
) -> Expert:
    """From the inside: the prompt, the clock, the lease (where engines come and go), the breaker, the retries."""
    limits = config.resilience
    expert: Expert = Timed(EngineExpert(spec, engine), on_call=ledger.note_call, first_chunk_s=limits.first_chunk_s)
    if dispatcher.residency.manages(engine):
        expert = Resident(expert, dispatcher)
    return Retrying(Breaker(expert, breaker), retries=limits.retries, backoff_s=limits.backoff_s)


def _spec(engine_id: str, config: Config) -> EngineSpec:
    """vLLM has to know from the start that it is to sleep."""
    spec = config.engines[engine_id].spec(engine_id)
    if spec.backend == "vllm" and config.residency.limited and config.residency.sleep:
        return replace(spec, options={"enable_sleep_mode": True, **spec.options})
    return spec


def _residency(config: Config, engines: Mapping[str, Engine]) -> Residency:
    wanted = config.residency
    rules = Rules(
        slots=wanted.slots,
        memory_gib=wanted.memory_gib,
        max_wait_s=wanted.max_wait_s,
        min_loaded_s=wanted.min_loaded_s,
    )
    loading = Loading(
        timeout_s=wanted.load_timeout_s,
        retries=wanted.load_retries,
        backoff_s=wanted.load_backoff_s,
        failed_s=wanted.failed_s,
        sleep_level=wanted.sleep,
    )
    return Residency(engines, rules=rules, loading=loading, queue=wanted.queue)


def _breaker(config: Config) -> BreakerState:
    return BreakerState(failures=config.resilience.breaker_failures, open_s=config.resilience.breaker_open_s)


def _admission(config: Config) -> Admission:
    return Admission(max_concurrency=config.limits.max_concurrency, queue=config.limits.queue)


def _make(registry: Mapping[str, str], what: str, name: str, options: Mapping[str, Any], *parts: Any) -> Any:
    """An object of ``registry``; options it does not know are a ConfigError that names the nearest it does."""
    maker = _load(registry, name, what)
    parameters = inspect.signature(maker).parameters.values()
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key in options:
        if key not in known:
            raise ConfigError(f"{what} '{name}': unknown option '{key}'{nearest(key, list(known))}")
    for key, option in known.items():
        if option.default is option.empty and key not in options:
            raise ConfigError(f"{what} '{name}' needs the option '{key}': {{name: {name}, options: {{{key}: ...}}}}")
    takes_parts = any(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    try:
        return maker(*(parts if takes_parts else ()), **options)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{what} '{name}': {exc}") from exc


def _load(registry: Mapping[str, str], name: str, what: str) -> Any:
    """The class that ``registry`` names; its heavy imports happen here."""
    if name not in registry:
        raise ConfigError(f"no {what} '{name}'{nearest(name, list(registry))}")
    module, _, attribute = registry[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as exc:
        raise ConfigError(
            f"{what} '{name}' cannot be used here: {exc}. 'collegium doctor' says which extra brings what it needs."
        ) from exc
