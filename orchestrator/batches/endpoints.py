"""/v1/files and /v1/batches, as OpenAI has them."""

import asyncio
import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from experts.errors import BadRequest, Forbidden
from orchestrator.batches.manager import Manager
from orchestrator.batches.register import Page, Register, StoredBatch, StoredFile, now
from orchestrator.batches.upload import take_upload
from orchestrator.client import read_body
from orchestrator.config import Batches
from orchestrator.exchange import JSONReply
from orchestrator.host import Host
from orchestrator.invalid import explain_invalid
from orchestrator.messages import Wire
from orchestrator.security import Tenant

CLOSED = "Files and batches are closed here: set batches.path in the config to a folder for them."
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
"""OpenAI's limits; every list of batches carries them."""


class BatchBody(Wire):
    """POST /v1/batches"""

    input_file_id: Annotated[str, Field(min_length=1, max_length=200)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,2}h$", description="Hours, such as '24h'.")]
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    output_expires_after: dict[str, Any] | None = Field(None, description="Accepted for compatibility; not read.")


class BatchEndpoints:
    """One method a path. Without ``manager`` they are closed, and say so."""

    def __init__(self, host: Host, register: Register | None, manager: Manager | None, settings: Batches) -> None:
        self._host = host
        self._register_or_none = register
        self._manager_or_none = manager
        self._settings = settings

    async def upload(self, http: HttpRequest) -> Response:
        tenant, register = self._enter(http), self._register
        stall_s = self._host.service.config.limits.client_stall_s
        file_id, path = register.place()
        got = await take_upload(http, path, max_bytes=self._settings.max_file_bytes, stall_s=stall_s)
        file = StoredFile(
            file_id=file_id,
            tenant=tenant.name,
            purpose=got.purpose,
            name=got.name,
            size_bytes=got.size_bytes,
            created_at=now(),
            path=path,
        )
        try:
            await asyncio.to_thread(register.add_file, file, most=self._settings.max_files)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return JSONReply(file.body())

    async def files(self, http: HttpRequest) -> Response:
        tenant, purpose = self._enter(http), http.query_params.get("purpose")
        if purpose not in (None, "batch", "batch_output"):
            raise BadRequest("purpose must be batch or batch_output.", param="purpose")
        page = _page(http, most=10_000)
        found = await asyncio.to_thread(self._register.files, tenant.name, purpose=purpose, page=page)
        return _list([file.body() for file in found], page)

    async def file(self, http: HttpRequest, file_id: str) -> Response:
        return JSONReply((await self._file(http, file_id)).body())

    async def content(self, http: HttpRequest, file_id: str) -> Response:
        file = await self._file(http, file_id)
        return FileResponse(file.path, media_type="application/octet-stream", filename=file.name)

    async def delete(self, http: HttpRequest, file_id: str) -> Response:
        tenant = self._enter(http)
        await asyncio.to_thread(self._register.remove_file, file_id, tenant.name)
        return JSONReply({"id": file_id, "object": "file", "deleted": True})

    async def create(self, http: HttpRequest) -> Response:
        tenant, limits = self._enter(http), self._host.service.config.limits
        raw = await read_body(http, max_bytes=limits.max_body_bytes, within_s=limits.client_stall_s)
        try:
            body = BatchBody.model_validate_json(raw)
        except ValidationError as exc:
            raise explain_invalid(exc, BatchBody) from exc
        file = await asyncio.to_thread(self._register.file, body.input_file_id, tenant.name)
        if file.purpose != "batch":
            raise BadRequest(f"File '{file.file_id}' was not uploaded for a batch.", param="input_file_id")
        most = self._settings.max_unfinished
        batch = await asyncio.to_thread(self._register.add_batch, tenant.name, _new(body), most=most)
        self._manager.submit(batch)
        return JSONReply(self._manager.body(batch))

    async def batches(self, http: HttpRequest) -> Response:
        tenant, page = self._enter(http), _page(http, most=100)
        found = await asyncio.to_thread(self._register.batches, tenant.name, page=page)
        return _list([self._manager.body(batch) for batch in found], page)

    async def batch(self, http: HttpRequest, batch_id: str) -> Response:
        return JSONReply(self._manager.body(await self._batch(http, batch_id)))

    async def cancel(self, http: HttpRequest, batch_id: str) -> Response:
        tenant = self._enter(http)
        batch, fresh = await asyncio.to_thread(self._register.cancel, batch_id, tenant.name)
        if fresh:
            self._manager.cancel(batch)
        return JSONReply(self._manager.body(batch))

    @property
    def _register(self) -> Register:
        if self._register_or_none is None:
            raise Forbidden(CLOSED)
        return self._register_or_none

    @property
    def _manager(self) -> Manager:
        if self._manager_or_none is None:
            raise Forbidden(CLOSED)
        return self._manager_or_none

    def _enter(self, http: HttpRequest) -> Tenant:
        """Who asks. Raises Unauthorized, RateLimited, and Forbidden where batches are closed."""
        tenant = self._host.service.keys.tenant(http.headers.get("authorization"))
        if self._register_or_none is None:
            raise Forbidden(CLOSED)
        return tenant

    async def _file(self, http: HttpRequest, file_id: str) -> StoredFile:
        tenant = self._enter(http)
        return await asyncio.to_thread(self._register.file, file_id, tenant.name)

    async def _batch(self, http: HttpRequest, batch_id: str) -> StoredBatch:
        tenant = self._enter(http)
        return await asyncio.to_thread(self._register.batch, batch_id, tenant.name)


def _new(body: BatchBody) -> dict[str, Any]:
    created = now()
    return {
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "output_file_id": None,
        "error_file_id": None,
        "created_at": created,
        "expires_at": created + 3600 * int(body.completion_window[:-1]),
        **{f"{what}_at": None for what in TIMES},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
    }


def _page(http: HttpRequest, *, most: int) -> Page:
    query = http.query_params
    limit, order = query.get("limit", str(min(most, 20))), query.get("order", "desc")
    if not re.fullmatch(r"[0-9]{1,5}", limit) or not 1 <= int(limit) <= most:
        raise BadRequest(f"limit must be a number from 1 to {most}.", param="limit")
    if order not in ("asc", "desc"):
        raise BadRequest("order must be asc or desc.", param="order")
    return Page(after=query.get("after"), limit=int(limit), oldest_first=order == "asc")


def _list(found: list[dict[str, Any]], page: Page) -> Response:
    data = found[: page.limit]
    return JSONReply(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > page.limit,
        }
    )
