"""OpenTelemetry spans, made when a run has ended from the times it kept: nothing is paid while it runs.

request -> route, dispatch, expert call (one each), combine. A ``traceparent`` in the request's metadata is the parent.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experts.errors import ConfigError
from orchestrator.resilience import CallRecord
from orchestrator.run import Run

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

Attributes = Mapping[str, str | int | float]


class Tracing:
    """The Observer that exports spans."""

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "collegium"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("collegium")

    def routed(self, run: Run) -> None:
        """Told when the run ends."""

    def called(self, run: Run, call: CallRecord) -> None:
        """Told when the run ends."""

    def ended(self, run: Run) -> None:
        clock = Clock()
        start, end = run.request.arrival_s, time.monotonic()
        root = self._span(
            "request",
            _parent(run),
            clock.ns(start),
            clock.ns(end),
            {"request_id": run.request.request_id, "policy": run.policy.name, "outcome": run.error or "ok"},
        )
        if run.decision is None or run.routed_s is None:
            return
        routed = run.routed_s
        attributes = {"router": run.decision.router, "reason": run.decision.reason}
        self._span("route", root, clock.ns(routed - run.decision.route_ms / 1e3), clock.ns(routed), attributes)
        if not run.calls:
            return
        first = min(call.started_s for call in run.calls)
        last = max(call.started_s + call.latency_s for call in run.calls)
        self._span("dispatch", root, clock.ns(routed), clock.ns(max(first, routed)), {"calls": len(run.calls)})
        for call in run.calls:
            self._call(call, root, clock)
        self._span("combine", root, clock.ns(last), clock.ns(end), {"aggregator": run.policy.aggregator.name})

    def close(self) -> None:
        """Sends what is left. Blocks, for some seconds when nobody takes it."""
        self._provider.shutdown()

    def _call(self, call: CallRecord, root: "Context", clock: "Clock") -> None:
        attributes: Attributes = {
            "expert_id": call.expert_id,
            "prompt_tokens": call.usage.prompt_tokens,
            "completion_tokens": call.usage.completion_tokens,
            "usd": call.usd,
            "outcome": call.error or "ok",
        }
        self._span("expert", root, clock.ns(call.started_s), clock.ns(call.started_s + call.latency_s), attributes)

    def _span(
        self, name: str, parent: "Context | None", start_ns: int, end_ns: int, attributes: Attributes
    ) -> "Context":
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(name, context=parent, start_time=start_ns, attributes=dict(attributes))
        span.end(end_time=end_ns)
        return set_span_in_context(span)


class Clock:
    """Monotonic seconds to nanoseconds since the epoch, as of now."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, monotonic_s: float) -> int:
        return int(monotonic_s * 1e9) + self._offset_ns


def make_tracing(endpoint: str) -> Tracing:
    """Spans over OTLP/HTTP to ``endpoint``. Raises ConfigError when the extra is missing."""
    try:
        from orchestrator.otlp import make_exporter
    except ImportError as exc:
        raise ConfigError("telemetry.otlp_endpoint needs: pip install 'collegium[otel]'.") from exc
    return Tracing(make_exporter(endpoint))


def _parent(run: Run) -> "Context | None":
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    traceparent = run.request.metadata.get("traceparent")
    return TraceContextTextMapPropagator().extract({"traceparent": str(traceparent)}) if traceparent else None
