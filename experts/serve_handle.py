"""An engine hosted by Ray Serve as a ray.serve.llm deployment, reached by its handle.

Options: ``deployment`` and ``app`` name it; ``address`` ("auto") is the cluster to join from outside Ray, ``ready_s``
(600) how long load() waits for a replica.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from experts.errors import CollegiumError, ConfigError, ExpertFailed, Unavailable
from experts.types import ChunkStream, EngineSpec, ExpertSpec, Request
from experts.wire import read_error, read_event, request_body

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class ReplicaLost(Unavailable):
    """A replica went in the middle of a call. No ExpertFailed, which a breaker counts: one dead replica with many calls
    would have the engine's other replicas left alone too, and Serve replaces it by itself."""

    code, retryable = "replica_lost", True


class Call(Protocol):
    """A call to a replica, under way: Ray's DeploymentResponseGenerator."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    def cancel(self) -> None: ...


OPTIONS = ("deployment", "app", "address", "ready_s")

GATHER_S = 0.1
"""How long tokens are gathered in the replica for a caller who waits for the whole answer."""

Dial = Callable[[Request, ExpertSpec], Call]
"""Starts a call."""


class ServeEngine:
    """``handle``, where given, is the deployment's; without it load() looks the deployment up by its name.

    ``json_bodies`` says that the deployment is one of ours (serve_replica.py), which takes and gives JSON: Ray's own
    request objects need vLLM in this process too, 560 MB and seven seconds of it. Raises ConfigError for an unknown
    option.
    """

    def __init__(
        self, spec: EngineSpec, handle: "DeploymentHandle[Any] | None" = None, *, json_bodies: bool = False
    ) -> None:
        unknown = sorted(set(spec.options) - set(OPTIONS))
        if handle is None and not json_bodies and unknown:
            raise ConfigError(f"Engine '{spec.engine_id}': unknown option {unknown}; use {', '.join(OPTIONS)}.")
        self.spec = spec
        self._given: Any = handle
        self._make_dial = _dial_json if json_bodies else _dial_objects
        self._dial: Dial | None = None

    async def load(self) -> None:
        """Wait until a replica answers. Raises ExpertFailed."""
        try:
            async with asyncio.timeout(self.spec.options.get("ready_s", 600.0)):
                handle = self._given or await asyncio.to_thread(_find, self.spec)
                # Before the wait: a replica that comes too late for it can still answer.
                self._dial = self._make_dial(self.spec, handle)
                await handle.check_health.remote()
        except ImportError as exc:
            raise ConfigError(
                f"Engine '{self.spec.engine_id}' needs the package '{exc.name}': pip install 'collegium[ray]'."
            ) from exc
        except Exception as exc:
            raise _failure(exc, f"Engine '{self.spec.engine_id}'") from exc

    async def unload(self) -> None:
        """Let go of the deployment; it is Ray Serve's to end."""
        self._dial = None

    async def generate(self, request: Request, expert: ExpertSpec) -> ChunkStream:
        who = f"Expert '{expert.expert_id}'"
        if self._dial is None:
            raise ExpertFailed(f"{who}: its engine '{self.spec.engine_id}' is not loaded.")
        call = None
        try:
            call = self._dial(request, expert)
            async for item in call:
                for event in _events(item):
                    for chunk in read_event(event, expert):
                        yield chunk
            call = None
        except CollegiumError:
            raise
        except asyncio.CancelledError as exc:
            # Ray raises this also when it was the replica that ended the call and nobody here was cancelled.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _failure(exc, who) from exc
        except Exception as exc:
            raise _failure(exc, who) from exc
        finally:
            if call is not None:
                call.cancel()


def _dial_json(spec: EngineSpec, handle: Any) -> Dial:
    stream = handle.options(stream=True, method_name="stream")

    def dial(request: Request, expert: ExpertSpec) -> Call:
        body = request_body(request, expert.adapter or spec.model) | {"request_id": request.request_id}
        call: Call = stream.remote(_method(request), body, 0.0 if request.stream else GATHER_S)
        return call

    return dial


def _dial_objects(spec: EngineSpec, handle: Any) -> Dial:
    """For any other LLMServer. Its adapters go by "model:adapter"; Serve prefers replicas that hold them in memory."""
    with _logging_kept():
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

    models: dict[str, Any] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
    stream = handle.options(stream=True)

    def dial(request: Request, expert: ExpertSpec) -> Call:
        method, model = _method(request), spec.model
        target = stream.options(method_name=method)
        if expert.adapter is not None:
            model = f"{spec.model}:{expert.adapter}"
            target = target.options(multiplexed_model_id=model)
        try:
            body = models[method].model_validate(request_body(request, model) | {"request_id": request.request_id})
        except Exception as exc:
            # vLLM's are of several kinds; whatever does not make a request is the caller's.
            raise read_error(400, str(exc), expert) from exc
        call: Call = target.remote(body)
        return call

    return dial


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Ray's LLM package takes the root logger for itself when it is imported."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def _method(request: Request) -> str:
    return "chat" if request.prompt is None else "completions"


def _find(spec: EngineSpec) -> Any:
    """Blocks. Joins the cluster if this process is in none: Serve itself would start a new, empty one."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        address = spec.options.get("address", "auto")
        ray.init(address=address, namespace="serve", log_to_driver=False, configure_logging=False)
    return serve.get_deployment_handle(spec.options["deployment"], spec.options.get("app", "default"))


def _events(item: Any) -> Iterator[Mapping[str, Any]]:
    """What a deployment streams: SSE text, an error object, or a list of them."""
    if isinstance(item, list):
        for part in item:
            yield from _events(part)
    elif isinstance(item, str):
        # Not splitlines(): JSON may hold the other line breaks of Unicode as they are.
        for line in item.split("\n"):
            data = line.removeprefix("data:").strip()
            if data != line and data != "[DONE]":
                yield orjson.loads(data)
    else:
        yield item if isinstance(item, Mapping) else item.model_dump()


def _failure(exc: BaseException, who: str) -> Unavailable:
    """What went wrong between us and the replica. All but a deployment that cannot start may pass: another call
    reaches another replica, or the one that Serve starts in the dead one's place."""
    from grpc import StatusCode  # type: ignore[import-untyped]
    from grpc.aio import AioRpcError  # type: ignore[import-untyped]
    from ray.exceptions import RayActorError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    if isinstance(exc, RayActorError | TaskCancelledError | asyncio.CancelledError):
        return ReplicaLost(f"{who}: its replica went in the middle of the call ({type(exc).__name__}).")
    if isinstance(exc, AioRpcError):
        lost = exc.code() in (StatusCode.CANCELLED, StatusCode.UNAVAILABLE)
        return (ReplicaLost if lost else ExpertFailed)(f"{who}: its replica failed: {exc.code()}: {exc.details()}")
    if isinstance(exc, DeploymentUnavailableError):
        return ExpertFailed(f"{who}: {exc.message} 'serve status' says why.", retryable=False)
    if isinstance(exc, BackPressureError):
        retry_after_s = exc.retry_after_s or 1.0
        return ExpertFailed(f"{who}: its replicas are full.", upstream_status=503, retry_after_s=retry_after_s)
    if isinstance(exc, TimeoutError):
        return ExpertFailed(f"{who}: no replica became ready in time; 'serve status' says why.")
    if isinstance(exc, ConnectionError):
        return ExpertFailed(f"{who}: no Ray cluster to join; start one, or set RAY_ADDRESS. ({exc})")
    # Where it is a traceback, the last line says most.
    lines = str(exc).strip().splitlines() or ["no reason given"]
    return ExpertFailed(f"{who}: its replica failed: {type(exc).__name__}: {lines[-1][:300]}")
