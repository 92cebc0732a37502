"""Prometheus metrics, in a registry of their own."""

from collections.abc import Callable, Iterator
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.build import Service
from orchestrator.resilience import CallRecord
from orchestrator.run import Run

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
CALLS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16)
BREAKER = {"closed": 0, "half_open": 1, "open": 2}


class Metrics:
    """The Observer that counts. ``service`` gives the Service of the moment, for the gauges."""

    def __init__(self, service: Callable[[], Service]) -> None:
        self.registry = Registry()
        self.registry.register(Gauges(service))
        ProcessCollector(registry=self.registry)
        name = "collegium_{}".format
        self._requests = self._counter(name("requests"), "Requests by policy and how they ended", "policy", "outcome")
        self._failures = self._counter(name("failures"), "Failures by kind, of requests and of calls", "of", "kind")
        self._refusals = self._counter(name("refusals"), "Requests refused before they ran, by kind", "kind")
        self._routes = self._counter(name("routes"), "Requests routed to an expert", "expert", "router")
        self._calls = self._counter(name("calls"), "Expert calls by how they ended", "expert", "outcome")
        self._tokens = self._counter(name("tokens"), "Tokens by expert and kind", "expert", "kind")
        self._usd = self._counter(name("usd"), "Cost of expert calls in US dollars", "expert")
        self._ttft = self._histogram(name("ttft_seconds"), "First chunk of an expert call", "expert")
        self._call_latency = self._histogram(name("call_latency_seconds"), "Whole expert call", "expert")
        self._run_calls = self._histogram(name("calls_per_request"), "Expert calls of a request", "policy", of=CALLS)
        self._latency = self._histogram(name("latency_seconds"), "Whole request", "policy")
        self._route = self._histogram(name("route_seconds"), "Routing decision", "router")

    def routed(self, run: Run) -> None:
        if (decision := run.decision) is None:
            return
        for expert_id in decision.expert_ids:
            self._routes(expert_id, decision.router).inc()
        self._route(decision.router).observe(decision.route_ms / 1e3)

    def called(self, run: Run, call: CallRecord) -> None:
        expert = call.expert_id
        self._calls(expert, call.error or "ok").inc()
        self._tokens(expert, "prompt").inc(call.usage.prompt_tokens)
        self._tokens(expert, "completion").inc(call.usage.completion_tokens)
        self._call_latency(expert).observe(call.latency_s)
        if call.usd:
            self._usd(expert).inc(call.usd)
        if call.ttft_s is not None:
            self._ttft(expert).observe(call.ttft_s)
        if call.error:
            self._failures("call", call.error).inc()

    def ended(self, run: Run) -> None:
        self._requests(run.policy.name, run.error or "ok").inc()
        self._latency(run.policy.name).observe(run.latency_s)
        self._run_calls(run.policy.name).observe(len(run.calls))
        if run.error:
            self._failures("request", run.error).inc()

    def refused(self, kind: str) -> None:
        """A request that never became a run: no such key, model or path, a bad body, too many."""
        self._refusals(kind).inc()

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    # labels() costs more than the count itself; label values are config names and error codes, so few.
    def _counter(self, name: str, text: str, *labels: str) -> Callable[..., Counter]:
        return lru_cache(maxsize=None)(Counter(name, text, labels, registry=self.registry).labels)

    def _histogram(
        self, name: str, text: str, *labels: str, of: tuple[float, ...] = SECONDS
    ) -> Callable[..., Histogram]:
        return lru_cache(maxsize=None)(Histogram(name, text, labels, registry=self.registry, buckets=of).labels)


class Registry(CollectorRegistry):
    """Without the ``_created`` series, one for each counter and histogram, that nobody reads."""

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


class Gauges(Collector):
    """What holds at the moment of the scrape."""

    def __init__(self, service: Callable[[], Service]) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []  # nothing to read before the service is there

    def collect(self) -> Iterator[Metric]:
        service = self._service()
        yield GaugeMetricFamily("collegium_queue_depth", "Requests that wait", value=service.admission.queued)
        yield GaugeMetricFamily("collegium_running", "Requests under way or waiting", value=len(service.ledger))
        breakers = GaugeMetricFamily("collegium_breaker_state", "0 closed, 1 half open, 2 open", labels=["engine"])
        for engine_id, breaker in service.breakers.items():
            breakers.add_metric([engine_id], BREAKER[breaker.state])
        yield breakers
