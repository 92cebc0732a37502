"""Retries, fallback, breaker, hedging and timing: each an Expert that wraps an Expert.

Around each expert, from the inside: Timed, Breaker, Retrying; for each request, Hedged and Fallback on top.
They replace a failed answer as long as the caller has seen nothing of it: before the first chunk of a stream, and up to
the last one where he reads no stream (``request.stream``). After that the failure is his to see.
"""

from orchestrator.resilience.breaker import Breaker, BreakerState
from orchestrator.resilience.failover import Fallback, Retrying
from orchestrator.resilience.hedged import Hedged
from orchestrator.resilience.timed import CallRecord, Timed, failure_kind, is_cancelled

__all__ = [
    "Breaker",
    "BreakerState",
    "CallRecord",
    "Fallback",
    "Hedged",
    "Retrying",
    "Timed",
    "failure_kind",
    "is_cancelled",
]
