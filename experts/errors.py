"""Every failure that leaves a layer is one of these.

CollegiumError                 500  retryable: may succeed on the same expert when asked again
├── BadRequest                 400  fallback: another expert may succeed where this one did not
│   └── ContextLengthExceeded  400
├── Unauthorized               401
├── Forbidden                  403
├── NotFound                   404
├── TooLarge                   413
├── RateLimited                429  + Retry-After
├── ConfigError                500  the config or an artefact is wrong; the message says what to write
├── Unavailable                503  + Retry-After
│   ├── QueueFull              503
│   ├── BreakerOpen            503
│   └── ExpertFailed           503  an expert broke, refused or hung up; carries the upstream status
└── DeadlineExceeded           504

Foreign exceptions are translated once, in the backend that met them (``raise ... from exc``).
Cancellation stays ``asyncio.CancelledError``.
"""


class CollegiumError(Exception):
    """The root. ``message`` says what happened and what to do next; ``param`` names the field at fault."""

    status = 500
    code = "internal_error"
    kind = "server_error"
    retryable = False
    fallback = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(CollegiumError):
    status, code, kind = 400, "bad_request", "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    code, fallback = "context_length_exceeded", True

    def __init__(self, *, prompt_tokens: int, context_length: int, expert_id: str) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens, but expert '{expert_id}' reads at most {context_length}. "
            "Shorten the prompt or max_tokens, or choose an expert with a longer context.",
            param="messages",
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class Unauthorized(CollegiumError):
    status, code, kind = 401, "invalid_api_key", "authentication_error"


class Forbidden(CollegiumError):
    status, code, kind = 403, "not_allowed", "permission_error"


class NotFound(CollegiumError):
    status, code, kind = 404, "not_found", "invalid_request_error"


class TooLarge(CollegiumError):
    status, code, kind = 413, "request_too_large", "invalid_request_error"


class RateLimited(CollegiumError):
    status, code, kind = 429, "rate_limit_exceeded", "rate_limit_error"


class ConfigError(CollegiumError):
    code = "config_error"


class Unavailable(CollegiumError):
    status, code, fallback = 503, "unavailable", True

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = 1.0) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)


class QueueFull(Unavailable):
    """The whole service is full: no expert is tried in place of another."""

    code, fallback = "queue_full", False


class BreakerOpen(Unavailable):
    code = "breaker_open"


class ExpertFailed(Unavailable):
    """``upstream_status`` is the HTTP status an endpoint gave, if it gave one; ``retry_after_s`` how long it asked to
    be left alone, if it did, kept in ``asked_pause_s``."""

    code = "expert_failed"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = True,
        upstream_status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.asked_pause_s = retry_after_s or 0.0
        super().__init__(message, retry_after_s=retry_after_s or 1.0)
        self.retryable = retryable
        self.upstream_status = upstream_status


class DeadlineExceeded(CollegiumError):
    status, code = 504, "deadline_exceeded"


def variable(name: str) -> str:
    """An environment variable's name, for messages. Some write the key itself where its variable belongs: what does not
    look like a name is not shown."""
    return name if name.isupper() and len(name) <= _NAME_CHARS else "an environment variable"


_NAME_CHARS = 64
