"""Spans over OTLP/HTTP. Imported only where an endpoint is configured: it needs the otel extra."""

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

SEND_S = 3.0
"""How long a batch may take, its retries included; the end of the service waits for it."""


def make_exporter(endpoint: str) -> SpanExporter:
    """Sends to ``endpoint``; where that has no path, to its /v1/traces."""
    # It logs every attempt of every batch; CalmExporter says once what matters.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
    return CalmExporter(OTLPSpanExporter(endpoint=url, timeout=SEND_S), url)


class CalmExporter(SpanExporter):
    """Says when the endpoint goes, and when it is back."""

    def __init__(self, inner: SpanExporter, name: str) -> None:
        self._inner = inner
        self._name = name
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            log.warning("%s takes no spans; they are dropped until it does", self._name)
        elif self._failing and not failing:
            log.info("%s takes spans again", self._name)
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)
