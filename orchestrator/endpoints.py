"""The HTTP paths. Bodies become dataclasses here; nothing below knows HTTP."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from experts.errors import NotFound, Unavailable
from experts.types import Request
from orchestrator.build import Service
from orchestrator.client import read_body
from orchestrator.decisions import DecisionLog
from orchestrator.exchange import Answer, Events, JSONReply, Teller, Whole
from orchestrator.host import Host
from orchestrator.invalid import explain_invalid
from orchestrator.log import request_id
from orchestrator.metrics import Metrics
from orchestrator.openai import ChatBody, CompletionBody, EmbeddingBody, Extension, RouteBody
from orchestrator.pipeline import deadline
from orchestrator.policies import SERVICE_MODEL, Overrides
from orchestrator.replies import ChatFormat, CompletionFormat, Format, embeddings_body, explanation
from orchestrator.run import Policy, Run
from orchestrator.security import Tenant

B = TypeVar("B", bound=BaseModel)


class Endpoints:
    """One method a path. ``reload`` reads the config file again."""

    def __init__(
        self, host: Host, decisions: DecisionLog, metrics: Metrics, *, reload: Callable[[], Awaitable[None]]
    ) -> None:
        self._host = host
        self._decisions = decisions
        self._metrics = metrics
        self._reload = reload

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, ChatBody, ChatFormat)

    async def completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, CompletionBody, CompletionFormat)

    async def route(self, http: HttpRequest) -> Response:
        service, tenant = self._enter(http)
        body = await _read(http, RouteBody, service)
        policy = _policy(body.model, body.collegium, service, tenant)
        run = Run(request=body.request(service.config.limits, tenant.name), policy=policy)
        request_id.set(run.request.request_id)
        async with deadline(run.request), service.admission.place():
            run.decision = await service.orchestrator.route(run.request, policy)
        told = explanation(run)
        return JSONReply({key: told[key] for key in ("request_id", "policy", "aggregator", "decision")})

    async def embeddings(self, http: HttpRequest) -> Response:
        service, tenant = self._enter(http)
        body = await _read(http, EmbeddingBody, service)
        encoder = service.encoder()
        if body.model not in (SERVICE_MODEL, encoder.name):
            raise NotFound(f"No embedding model '{body.model}'; the encoder is '{encoder.name}'.", param="model")
        tenant.check(body.model)
        within = deadline(Request(prompt="", deadline_s=service.config.limits.deadline_s))
        async with within, service.admission.place():
            vectors = await encoder.encode(body.texts())
            tokens = await encoder.count_tokens(body.texts())
        return JSONReply(embeddings_body(vectors, encoder.name, tokens, body.encoding_format))

    async def models(self, http: HttpRequest) -> Response:
        service, tenant = self._enter(http, ready=False)
        names = [m for m in service.policies.models if tenant.may_ask(m)]
        return JSONReply({"object": "list", "data": [_model(name) for name in names]})

    async def model(self, http: HttpRequest, model: str) -> Response:
        service, tenant = self._enter(http, ready=False)
        service.policies.resolve(model)
        tenant.check(model)
        return JSONReply(_model(model))

    async def decision(self, http: HttpRequest, request_id: str) -> Response:
        _, tenant = self._enter(http, ready=False)
        found = await self._decisions.read(request_id, tenant.name)
        if found is None:
            raise NotFound(f"No decision '{request_id[:100]}' is kept; the oldest ones are dropped.")
        return JSONReply(found)

    async def healthz(self) -> Response:
        return JSONReply({"status": "ok"})

    async def readyz(self) -> Response:
        """503 until the engines have loaded, and when none could be. Where engines come and go, one that is absent is
        as good as ready: it comes when it is asked for."""
        service, failed = self._host.service, dict(self._host.failed)
        engines = service.dispatcher.snapshot()
        failed |= {e: status.failure or "" for e, status in engines.items() if status.state == "failed"}
        state = {e: f"failed: {failed[e]}" if e in failed else engines[e].state for e in service.engines}
        ready = self._host.ready and len(failed) < len(state)
        body = {"ready": ready, "engines": state if self._host.ready else dict.fromkeys(state, "loading")}
        return JSONReply(body, status_code=200 if ready else 503, headers={} if ready else {"retry-after": "5"})

    async def metrics(self) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    async def reload(self, http: HttpRequest) -> Response:
        self._host.service.keys.check_admin(http.headers.get("authorization"))
        await self._reload()
        return JSONReply({"status": "reloaded", "models": self._host.service.policies.models})

    async def _answer(self, http: HttpRequest, kind: type[ChatBody] | type[CompletionBody], form: Format) -> Response:
        service, tenant = self._enter(http)
        body = await _read(http, kind, service)
        service = self._host.service  # a reload may have come while the body did
        limits, explain = service.config.limits, body.collegium is not None and body.collegium.explain
        policy = _policy(body.model, body.collegium, service, tenant)
        request = body.request(limits, tenant.name)
        if traceparent := http.headers.get("traceparent"):
            request = replace(request, metadata={**request.metadata, "traceparent": traceparent})
        request_id.set(request.request_id)
        run = Run(request=request, policy=policy)
        teller: Teller
        if body.stream:
            usage = body.wants_usage()
            teller = Events(service.orchestrator, run, form, include_usage=usage, explain=explain)
        else:
            teller = Whole(service.orchestrator, run, form, explain=explain)
        return Answer(teller, stall_s=limits.client_stall_s)

    def _enter(self, http: HttpRequest, *, ready: bool = True) -> tuple[Service, Tenant]:
        """The Service of the moment, and who asks. Whatever is awaited before a run begins, take the Service anew: a
        reload retires the old one once its runs have ended.

        Raises Unauthorized, RateLimited, or Unavailable while the engines load.
        """
        service = self._host.service
        tenant = service.keys.tenant(http.headers.get("authorization"))
        if ready and not self._host.ready:
            raise Unavailable("The engines are loading; /readyz says when they are there.", retry_after_s=5)
        return service, tenant


async def _read(http: HttpRequest, kind: type[B], service: Service) -> B:
    limits = service.config.limits
    raw = await read_body(http, max_bytes=limits.max_body_bytes, within_s=limits.client_stall_s)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as exc:
        raise explain_invalid(exc, kind) from exc


def _policy(model: str, extension: Extension | None, service: Service, tenant: Tenant) -> Policy:
    policy = service.policies.resolve(model, extension.overrides() if extension else Overrides())
    tenant.check(model)
    return policy


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "collegium"}
