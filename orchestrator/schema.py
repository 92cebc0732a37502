"""What /docs and /openapi.json say: each path with its body, replies and examples."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_swagger import patch_fastapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import RedirectResponse, Response

from orchestrator import reply_models as replies
from orchestrator.batches.endpoints import BatchBody, BatchEndpoints
from orchestrator.endpoints import Endpoints
from orchestrator.openai import ChatBody, CompletionBody, EmbeddingBody, RouteBody

Handler = Callable[..., Awaitable[Any]]
Responses = dict[int | str, dict[str, Any]]
REF = "#/components/schemas/{model}"

BODIES: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody, RouteBody, EmbeddingBody, BatchBody)
ERRORS = {
    400: "The request is wrong; the message says where.",
    401: "No such API key.",
    403: "This key may not do that.",
    404: "No such model, policy, decision, file or batch.",
    413: "The body is larger than limits.max_body_bytes, or the file than batches.max_file_bytes.",
    429: "Too many requests of this key; see Retry-After.",
    500: "A bug or a mistake in the config; the message or the log says more.",
    503: "No capacity, or no expert could answer; see Retry-After.",
    504: "The deadline passed.",
}


def mount(app: FastAPI, endpoints: Endpoints, batches: BatchEndpoints) -> None:
    """Every path of ``endpoints`` and ``batches``, described."""
    say = replies
    about = "Answer a conversation"
    _asks(app, "/v1/chat/completions", endpoints.chat, ChatBody, say.ChatCompletion, about, say.ChatCompletionChunk)
    about = "Continue a text"
    _asks(
        app,
        "/v1/completions",
        endpoints.completions,
        CompletionBody,
        say.TextCompletion,
        about,
        say.TextCompletionChunk,
    )
    _asks(app, "/v1/route", endpoints.route, RouteBody, say.Routed, "Decide who would answer; nobody is asked")
    about = "Embed texts by the routers' encoder"
    _asks(app, "/v1/embeddings", endpoints.embeddings, EmbeddingBody, say.Embeddings, about)
    _tells(app, "/v1/models", endpoints.models, say.Models, "The service, its policies and its experts", (401, 429))
    _tells(app, "/v1/models/{model:path}", endpoints.model, say.Model, "One model", (401, 403, 404, 429))
    about = "Who answered a request, and at what cost"
    _tells(app, "/v1/decisions/{request_id}", endpoints.decision, say.Explanation, about, (401, 404, 429, 503))
    _tells(app, "/healthz", endpoints.healthz, say.Health, "The process lives", (), tag="operation")
    _tells(app, "/readyz", endpoints.readyz, say.Readiness, "The engines have loaded", (), tag="operation")
    _tell_metrics(app, endpoints)
    app.add_api_route(
        "/admin/reload",
        endpoints.reload,
        methods=["POST"],
        tags=["operation"],
        summary="Read the config file again; requests under way end on the old one",
        responses={200: _reply(replies.Reloaded), **_errors((400, 401, 403, 500))},
        openapi_extra={"security": [{"bearer": []}]},
    )
    _mount_batches(app, batches)
    _show_docs(app)
    document = _document(app)
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's documented way


def _show_docs(app: FastAPI) -> None:
    """Swagger UI from the package, not from a CDN: /docs works offline. Its addresses are relative, so that it works
    behind whatever speaks TLS, or adds a prefix, before us."""

    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="swagger/swagger-ui-bundle.js",
            swagger_css_url="swagger/swagger-ui.css",
            swagger_favicon_url="swagger/favicon-32x32.png",
            swagger_ui_parameters={"tryItOutEnabled": True, "persistAuthorization": True, "filter": True},
        )

    async def root() -> Response:
        return RedirectResponse("docs")

    # Before the package's own, which name the scheme and host that reached us.
    app.add_api_route("/docs", docs, include_in_schema=False)
    app.add_api_route("/", root, include_in_schema=False)
    patch_fastapi(app)


def _mount_batches(app: FastAPI, batches: BatchEndpoints) -> None:
    form = {"multipart/form-data": {"schema": _UPLOAD}}
    body, batch, file = _json(BatchBody), replies.Batch, replies.File
    for method, path, handler, reply, about, extra in (
        ("POST", "/v1/files", batches.upload, file, "Upload a file of requests", _takes(form)),
        (
            "GET",
            "/v1/files",
            batches.files,
            replies.Files,
            "Your files, the newest first",
            _asks_for("purpose", *_PAGE, most=10_000),
        ),
        ("GET", "/v1/files/{file_id}", batches.file, file, "One file", {}),
        ("DELETE", "/v1/files/{file_id}", batches.delete, replies.FileDeleted, "Delete a file", {}),
        ("POST", "/v1/batches", batches.create, batch, "Answer a file, engine by engine", _takes(body)),
        ("GET", "/v1/batches", batches.batches, replies.Batches, "Your batches, the newest first", _asks_for(*_PAGE)),
        ("GET", "/v1/batches/{batch_id}", batches.batch, batch, "One batch, and how far it is", {}),
        ("POST", "/v1/batches/{batch_id}/cancel", batches.cancel, batch, "End a batch; its answers are kept", {}),
    ):
        responses = {200: _reply(reply), **_errors(tuple(ERRORS))}
        more = {**extra, **_PERHAPS_A_KEY}
        app.add_api_route(
            path, handler, methods=[method], tags=["batches"], summary=about, responses=responses, openapi_extra=more
        )
    app.add_api_route(
        "/v1/files/{file_id}/content",
        batches.content,
        methods=["GET"],
        tags=["batches"],
        summary="What is in a file",
        responses={
            200: {"description": "As it is.", "content": {"application/octet-stream": {"schema": _BINARY}}},
            **_errors((401, 403, 404, 429, 503)),
        },
        openapi_extra=_PERHAPS_A_KEY,
    )


_PAGE = ("after", "limit", "order")
_PARAMETERS: dict[str, dict[str, Any]] = {
    "after": {"type": "string", "description": "The id after which to go on."},
    "limit": {"type": "integer", "minimum": 1, "default": 20},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
    "purpose": {"enum": ["batch", "batch_output"]},
}
_BINARY = {"type": "string", "format": "binary"}
_UPLOAD = {
    "type": "object",
    "properties": {"file": _BINARY, "purpose": {"const": "batch"}},
    "required": ["file", "purpose"],
}


def _takes(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}


def _asks_for(*names: str, most: int = 100) -> dict[str, Any]:
    known = {**_PARAMETERS, "limit": {**_PARAMETERS["limit"], "maximum": most}}
    return {"parameters": [{"name": name, "in": "query", "schema": known[name]} for name in names]}


def _asks(
    app: FastAPI,
    path: str,
    handler: Handler,
    body: type[BaseModel],
    reply: type[BaseModel],
    summary: str,
    event: type[BaseModel] | None = None,
) -> None:
    ok = _reply(reply)
    if event is not None:
        ok["content"]["text/event-stream"] = {"schema": _events(event)}
        ok["headers"] = {
            "x-collegium-decision": {"description": "For GET /v1/decisions.", "schema": {"type": "string"}}
        }
    app.add_api_route(
        path,
        handler,
        methods=["POST"],
        tags=["OpenAI" if "route" not in path else "collegium"],
        summary=summary,
        responses={200: ok, **_errors(tuple(ERRORS))},
        openapi_extra={"requestBody": {"required": True, "content": _json(body)}, **_PERHAPS_A_KEY},
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
    extra = _PERHAPS_A_KEY if 401 in errors else {}
    app.add_api_route(
        path, handler, methods=["GET"], tags=[tag], summary=summary, responses=responses, openapi_extra=extra
    )


_PERHAPS_A_KEY: dict[str, Any] = {"security": [{"bearer": []}, {}]}
"""A key is asked for where the config has some."""


def _tell_metrics(app: FastAPI, endpoints: Endpoints) -> None:
    text: Responses = {
        200: {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    }
    about = "Prometheus metrics"
    app.add_api_route("/metrics", endpoints.metrics, methods=["GET"], tags=["operation"], summary=about, responses=text)


def _reply(model: type[BaseModel]) -> dict[str, Any]:
    return {"description": (model.__doc__ or model.__name__).strip(), "content": _json(model)}


def _events(event: type[BaseModel]) -> dict[str, Any]:
    said = {"oneOf": [_ref(event), _ref(replies.Error)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": said}
    about = "A chunk as JSON, or an error after the first chunk; the last is [DONE]."
    any_of = [{**data, "title": "JSON"}, {"const": "[DONE]"}]
    return {"type": "object", "properties": {"data": {"anyOf": any_of, "description": about}}, "required": ["data"]}


def _errors(statuses: tuple[int, ...]) -> Responses:
    wait = {"retry-after": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
    return {
        status: {
            "description": ERRORS.get(status, "See the message."),
            "content": _json(replies.Error),
            **({"headers": wait} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(model)}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, plus the schemas that the paths refer to, less FastAPI's own 422, which is a 400 here."""
    document = app.openapi()
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(_schemas())
    components.setdefault("securitySchemes", {})["bearer"] = {"type": "http", "scheme": "bearer"}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    return document


def _schemas() -> dict[str, Any]:
    said = [
        m for m in vars(replies).values() if isinstance(m, type) and issubclass(m, BaseModel) and m is not BaseModel
    ]
    pairs = [(model, "validation") for model in BODIES] + [(model, "serialization") for model in said]
    _, definitions = models_json_schema(pairs, ref_template=REF)  # type: ignore[arg-type]
    return dict(definitions["$defs"])
