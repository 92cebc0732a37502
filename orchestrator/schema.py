"""What /docs and /openapi.json say: each path with its body, replies and examples.

The reply models exist for this page only; what is sent is made in replies.py, and a test holds the two together.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import FastAPI
from fastapi_swagger import patch_fastapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from orchestrator.endpoints import Endpoints
from orchestrator.openai import ChatBody, CompletionBody, EmbeddingBody, RouteBody

Handler = Callable[..., Awaitable[Any]]
REF = "#/components/schemas/{model}"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    """All expert calls of the request together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Decision(BaseModel):
    """Who was asked. ``scores`` holds every candidate; ``weights`` sum to 1."""

    expert_ids: list[str]
    weights: list[float]
    scores: dict[str, float]
    reason: str
    router: str
    route_ms: float


class Call(BaseModel):
    """One call of one expert; a retry is a call of its own."""

    expert_id: str
    usage: Usage
    usd: float
    ttft_ms: float | None
    latency_ms: float
    error: str | None


class Explanation(BaseModel):
    request_id: str
    policy: str
    aggregator: str
    decision: Decision | None
    calls: list[Call]
    usage: Usage
    answer_usage: Usage
    usd: float
    trace: Any
    error: str | None
    latency_ms: float


class Routed(BaseModel):
    request_id: str
    policy: str
    aggregator: str
    decision: Decision


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    collegium: Explanation | None = None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    collegium: Explanation | None = None


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    ready: bool
    engines: dict[str, str]


class Reloaded(BaseModel):
    status: Literal["reloaded"]
    models: list[str]


BODIES: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody, RouteBody, EmbeddingBody)
ERRORS = {
    400: "The request is wrong; the message says where.",
    401: "No such API key.",
    403: "This key may not do that.",
    404: "No such model, policy or decision.",
    413: "The body is larger than limits.max_body_bytes.",
    429: "Too many requests of this key; see Retry-After.",
    503: "No capacity, or no expert could answer; see Retry-After.",
    504: "The deadline passed.",
}


def mount(app: FastAPI, endpoints: Endpoints) -> None:
    """Every path of ``endpoints``, described."""
    _asks(app, "/v1/chat/completions", endpoints.chat, ChatBody, ChatCompletion, "Answer a conversation", stream=True)
    _asks(app, "/v1/completions", endpoints.completions, CompletionBody, TextCompletion, "Continue a text", stream=True)
    _asks(app, "/v1/route", endpoints.route, RouteBody, Routed, "Decide who would answer; nobody is asked")
    _asks(app, "/v1/embeddings", endpoints.embeddings, EmbeddingBody, Embeddings, "Embed texts by the routers' encoder")
    _tells(app, "/v1/models", endpoints.models, Models, "The service, its policies and its experts", (401, 429))
    _tells(app, "/v1/models/{model:path}", endpoints.model, Model, "One model", (401, 403, 404, 429))
    about = "Who answered a request, and at what cost"
    _tells(app, "/v1/decisions/{request_id}", endpoints.decision, Explanation, about, (401, 404, 429))
    _tells(app, "/healthz", endpoints.healthz, Health, "The process lives", (), tag="operation")
    _tells(app, "/readyz", endpoints.readyz, Readiness, "The engines have loaded", (), tag="operation")
    _describe_metrics(app, endpoints)
    app.add_api_route(
        "/admin/reload",
        endpoints.reload,
        methods=["POST"],
        tags=["operation"],
        summary="Read the config file again; requests under way end on the old one",
        responses={200: _reply(Reloaded), **_errors((400, 401, 403, 500))},
    )
    patch_fastapi(app)  # Swagger UI from the package, not from a CDN: /docs works offline
    document = _document(app)
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's documented way


def _asks(
    app: FastAPI,
    path: str,
    handler: Handler,
    body: type[BaseModel],
    reply: type[BaseModel],
    summary: str,
    *,
    stream: bool = False,
) -> None:
    ok = _reply(reply)
    if stream:
        ok["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    app.add_api_route(
        path,
        handler,
        methods=["POST"],
        tags=["OpenAI" if "route" not in path else "collegium"],
        summary=summary,
        responses={200: ok, **_errors(tuple(ERRORS))},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}}},
    )


def _tells(
    app: FastAPI,
    path: str,
    handler: Handler,
    reply: type[BaseModel],
    summary: str,
    errors: tuple[int, ...],
    *,
    tag: str = "OpenAI",
) -> None:
    responses = {200: _reply(reply), **_errors(errors)}
    if path == "/readyz":
        responses[503] = {**_reply(reply), "description": "Not yet, or no engine could be loaded."}
    app.add_api_route(path, handler, methods=["GET"], tags=[tag], summary=summary, responses=responses)


def _describe_metrics(app: FastAPI, endpoints: Endpoints) -> None:
    text: dict[int | str, dict[str, Any]] = {
        200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    }
    about = "Prometheus metrics"
    app.add_api_route("/metrics", endpoints.metrics, methods=["GET"], tags=["operation"], summary=about, responses=text)


def _reply(model: type[BaseModel]) -> dict[str, Any]:
    return {"description": (model.__doc__ or model.__name__).strip(), "content": _json(model)}


def _errors(statuses: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    return {s: {"description": ERRORS.get(s, "See the message."), "content": _json(Error)} for s in statuses}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(model)}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, plus the schemas that the paths refer to, less FastAPI's own 422."""
    document = app.openapi()
    replies = (Error, Explanation, Routed, ChatCompletion, TextCompletion, Embeddings, Models, Model)
    models = [*BODIES, *replies, Health, Readiness, Reloaded]
    schemas: dict[str, Any] = {}
    for mode, group in (("validation", BODIES), ("serialization", models[len(BODIES) :])):
        _, definitions = models_json_schema([(m, mode) for m in group], ref_template=REF)  # type: ignore[misc]
        schemas |= definitions["$defs"]
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    document["components"].setdefault("securitySchemes", {})["bearer"] = {"type": "http", "scheme": "bearer"}
    return document
