"""What a line of the input says: {"custom_id", "method": "POST", "url", "body"}, OpenAI's batch format."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, ValidationError

from experts.errors import BadRequest, CollegiumError, TooLarge
from experts.types import Request
from orchestrator.build import Service
from orchestrator.invalid import explain_invalid
from orchestrator.messages import Wire
from orchestrator.openai import ChatBody, CompletionBody, EmbeddingBody
from orchestrator.policies import Overrides
from orchestrator.replies import ChatFormat, CompletionFormat, Format
from orchestrator.run import Policy
from orchestrator.security import Tenant

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
KINDS: Mapping[str, type[ChatBody] | type[CompletionBody] | type[EmbeddingBody]] = {
    CHAT: ChatBody,
    COMPLETIONS: CompletionBody,
    EMBEDDINGS: EmbeddingBody,
}


class BadLine(BadRequest):
    """A line that is no request at all. ``code`` is OpenAI's where it has one."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BatchLine(Wire):
    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A line that is a request: what is asked (of the router's encoder, where it has no policy)."""

    custom_id: str
    body: ChatBody | CompletionBody | EmbeddingBody

    @property
    def form(self) -> Format:
        return ChatFormat if isinstance(self.body, ChatBody) else CompletionFormat


class Reader:
    """Reads lines as the service would read their bodies. ``url``: the only one allowed (an HTTP batch names one).
    ``overrides`` are the command line's: they hold where a line does not say otherwise."""

    def __init__(
        self, service: Service, *, tenant: Tenant, url: str | None = None, overrides: Overrides | None = None
    ) -> None:
        self._service = service
        self._tenant = tenant
        self._urls = tuple(KINDS) if url is None else (url,)
        self._overrides = overrides or Overrides()

    def read(self, raw: bytes) -> Asked:
        """Raises a CollegiumError that says what is wrong with the line."""
        line = read_envelope(raw)
        if line.url not in self._urls:
            raise BadLine("invalid_url", f"url: '{line.url[:100]}' is not served here; use {', '.join(self._urls)}.")
        kind = KINDS[line.url]
        try:
            body = kind.model_validate(line.body)
        except ValidationError as exc:
            raise explain_invalid(exc, kind) from exc
        if not isinstance(body, EmbeddingBody) and body.stream:
            raise BadRequest("stream: a batch has nobody to stream to; leave it out.", param="stream")
        return Asked(custom_id=line.custom_id, body=body)

    def request(self, asked: Asked, request_id: str) -> Request:
        """What the experts are asked. Its deadline counts from the moment that it is made."""
        assert not isinstance(asked.body, EmbeddingBody)  # noqa: S101  # these are answered without an expert
        config = self._service.config
        request = asked.body.request(config.limits, self._tenant.name)
        deadline_s = config.batches.deadline_s
        return replace(request, request_id=request_id, stream=False, priority="batch", deadline_s=deadline_s)

    def policy(self, asked: Asked) -> Policy:
        """Raises NotFound, BadRequest, or Forbidden where the tenant may not ask for this model."""
        body, known = asked.body, self._service.policies
        assert not isinstance(body, EmbeddingBody)  # noqa: S101
        own = body.collegium.overrides() if body.collegium else Overrides()
        mine = Overrides() if body.model in self._service.experts else self._overrides
        policy = known.resolve(body.model, _over(mine, own))
        self._tenant.check(body.model)
        return policy


def custom_id(raw: bytes) -> str | None:
    """As much as can be said of a line that is no request."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    name = found.get("custom_id") if isinstance(found, Mapping) else None
    return name[:512] if isinstance(name, str) else None


def too_large(limit: int) -> CollegiumError:
    return TooLarge(f"The line is longer than {limit} bytes (limits.max_body_bytes).")


def read_envelope(raw: bytes) -> BatchLine:
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise BadLine("invalid_json_line", f"The line is not JSON: {exc}.") from exc
    if not isinstance(found, dict):
        raise BadLine("invalid_json_line", "The line must be a JSON object with custom_id, method, url and body.")
    try:
        return BatchLine.model_validate(found)
    except ValidationError as exc:
        raise explain_invalid(exc, BatchLine) from exc


def _over(under: Overrides, own: Overrides) -> Overrides:
    said: dict[str, Any] = {k: v for k in Overrides.__slots__ if (v := getattr(own, k)) is not None}
    return replace(under, **said) if said else under
