"""Structured logs: one JSON object a line, with the request id where there is one."""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson

from experts.errors import BadRequest, ContextLengthExceeded
from orchestrator.resilience import CallRecord
from orchestrator.run import Run

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Set at the edge; tasks started for a request inherit it, and every record logged there carries it."""

log = logging.getLogger("collegium.request")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (running := request_id.get()) is not None:
            line["request_id"] = running
        line.update(getattr(record, "fields", ()))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # a lone surrogate (a file name, say) or a huge number: slower, but it takes everything
            return json.dumps(line, default=str)


def configure(level: str) -> None:
    """JSON lines on stderr from the root logger. For the commands that serve; a library never calls it."""
    # What the lines do not say need not be found out for each of them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


_NOBODYS_FAULT = (None, "cancelled", BadRequest.code, ContextLengthExceeded.code)


class RequestLog:
    """The Observer that writes one line a request."""

    def routed(self, run: Run) -> None:
        """Said when the run ends."""

    def called(self, run: Run, call: CallRecord) -> None:
        if call.error not in _NOBODYS_FAULT:
            fields = {"expert": call.expert_id, "error": call.error, "request_id": run.request.request_id}
            said = call.reason or f"Expert '{call.expert_id}' failed: {call.error}"
            log.warning("%s", said, extra={"fields": fields})

    def ended(self, run: Run) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        usage = run.usage
        fields = {
            "request_id": run.request.request_id,
            "tenant": run.request.tenant,
            "policy": run.policy.name,
            "experts": [call.expert_id for call in run.calls],
            "outcome": run.error or "ok",
            "latency_ms": round(run.latency_s * 1e3, 2),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        # Not log.info(): who calls it is nothing that has to be found out for each request.
        log.handle(log.makeRecord(log.name, logging.INFO, "", 0, "request ended", (), None, extra={"fields": fields}))
