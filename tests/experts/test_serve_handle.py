"""ServeEngine against a handle that is scripted; against the real one in tests/orchestrator/test_ray_runtime.py."""

import asyncio
import json
import warnings
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

with warnings.catch_warnings():
    # Ray declares its settings in the manner of pydantic 1.
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`")
    pytest.importorskip("ray.serve")

from experts.base import EngineExpert, collect
from experts.errors import BadRequest, ConfigError, ContextLengthExceeded, ExpertFailed
from experts.serve_handle import ReplicaLost, ServeEngine
from experts.types import Chunk, EngineSpec, ExpertSpec, Message, Request, SamplingParams, Usage
from orchestrator.resilience import Breaker, BreakerState

SPEC = EngineSpec(engine_id="e", backend="vllm", model="some-model")
EXPERT = ExpertSpec(expert_id="x", engine_id="e")
CHAT = Request(messages=(Message(role="user", content="hi"),), params=SamplingParams(max_tokens=5, stop=("END",)))


class Call:
    """Yields ``items``; an exception among them is raised, "wait" waits for ever."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.waiting = asyncio.Event()
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.items:
            if isinstance(item, BaseException):
                raise item
            if item == "wait":
                self.waiting.set()
                await asyncio.Event().wait()
            yield item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A DeploymentHandle: remembers what it was asked, and answers each call with the next of ``calls``."""

    def __init__(self, *calls: Call, healthy: asyncio.Event | None = None) -> None:
        self.calls = list(calls)
        self.asked: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self._healthy = healthy
        self._options: dict[str, Any] = {}

    @property
    def check_health(self) -> "Handle":
        return self.options(method_name="check_health")

    def options(self, **options: Any) -> "Handle":
        handle = Handle(healthy=self._healthy)
        handle.calls, handle.asked, handle._options = self.calls, self.asked, {**self._options, **options}
        return handle

    def remote(self, *args: Any) -> Any:
        if self._options["method_name"] == "check_health":
            return self._health()
        self.asked.append((self._options, args))
        return self.calls.pop(0)

    async def _health(self) -> None:
        if self._healthy is not None:
            await self._healthy.wait()


def event(**body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def token(text: str, finish_reason: str | None = None) -> str:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}])


async def loaded(*calls: Call) -> tuple[ServeEngine, Handle]:
    handle = Handle(*calls)
    engine = ServeEngine(SPEC, handle, json_bodies=True)  # type: ignore[arg-type]
    await engine.load()
    return engine, handle


async def chunks(engine: ServeEngine, request: Request = CHAT, expert: ExpertSpec = EXPERT) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request, expert)]


async def test_streams_events_alone_together_and_in_lists() -> None:
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
    call = Call([token("a"), token("b") + token("c\u2028d"), [token("e", "length"), usage], "data: [DONE]\n\n"])
    engine, handle = await loaded(call)

    answer = await collect(engine.generate(CHAT, EXPERT), CHAT)

    assert (answer.text, answer.finish_reason) == ("abc\u2028de", "length")
    assert answer.usage == Usage(prompt_tokens=7, completion_tokens=3)
    assert not call.cancelled
    options, (method, body, gather_s) = handle.asked[0]
    assert options == {"stream": True, "method_name": "stream"}
    assert gather_s == 0
    assert method == "chat"
    assert body["model"] == "some-model"
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert body["stop"] == ["END"]
    assert body["request_id"] == CHAT.request_id


async def test_a_prompt_goes_to_completions_and_an_adapter_by_its_name() -> None:
    text = event(choices=[{"index": 0, "text": "on", "finish_reason": "stop"}])
    engine, handle = await loaded(Call([text]))
    adapted = ExpertSpec(expert_id="x", engine_id="e", adapter="sql")

    assert [c.text for c in await chunks(engine, Request(prompt="go"), adapted)] == ["on"]

    method, body, _ = handle.asked[0][1]
    assert (method, body["prompt"], body["model"]) == ("completions", "go", "sql")


async def test_tokens_may_be_gathered_for_a_caller_who_reads_no_stream() -> None:
    engine, handle = await loaded(Call([token("a", "stop")]))
    await chunks(engine, replace(CHAT, stream=False))
    assert handle.asked[0][1][2] > 0


async def test_a_prompt_too_long_is_the_callers() -> None:
    message = "This model's maximum context length is 64 tokens, and your prompt contains at least 80 input tokens."
    engine, _ = await loaded(Call([{"error": {"message": message, "code": 400}}]), Call([[event(error={"code": 400})]]))

    with pytest.raises(ContextLengthExceeded) as caught:
        await chunks(engine)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (80, 64)
    with pytest.raises(BadRequest):
        await chunks(engine)


def failures() -> dict[str, tuple[Exception, bool, str]]:
    from grpc import StatusCode
    from grpc.aio import AioRpcError, Metadata
    from ray.exceptions import RayTaskError
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    task = RayTaskError("chat", "Traceback ...\nValueError: no", ValueError("no")).as_instanceof_cause()
    return {
        "bug": (task, True, "ValueError: no"),
        "grpc": (AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata()), True, "INTERNAL"),
        "garbage": (ValueError("not json"), True, "not json"),
        "full": (BackPressureError(num_queued_requests=9, max_queued_requests=9, retry_after_s=4.0), True, "full"),
        "broken": (DeploymentUnavailableError(DeploymentID(name="d", app_name="a")), False, "failed to deploy"),
    }


@pytest.mark.parametrize("what", failures())
async def test_whatever_happens_to_a_replica_is_a_failure_that_says_whether_to_ask_again(what: str) -> None:
    exception, retryable, words = failures()[what]
    call = Call([token("a"), exception])
    engine, _ = await loaded(call)

    with pytest.raises(ExpertFailed, match=words) as caught:
        await chunks(engine)

    assert caught.value.retryable is retryable
    assert caught.value.fallback
    assert "'x'" in caught.value.message
    if what == "full":
        assert (caught.value.retry_after_s, caught.value.upstream_status) == (4.0, 503)


def losses() -> dict[str, BaseException]:
    from grpc import StatusCode
    from grpc.aio import AioRpcError, Metadata
    from ray.exceptions import ActorDiedError, ActorUnavailableError
    from ray.serve.exceptions import RequestCancelledError

    return {
        "died": ActorDiedError(),
        "unreachable": ActorUnavailableError("gone", b"\0" * 16),
        "hung up": AioRpcError(StatusCode.UNAVAILABLE, Metadata(), Metadata()),
        "ended the call": RequestCancelledError("r"),
        "ended the call, as asyncio says it": asyncio.CancelledError(),
    }


@pytest.mark.parametrize("what", losses())
async def test_a_lost_replica_is_no_verdict_on_the_engine(what: str) -> None:
    """Fifty calls on a replica that dies must not open the breaker: the engine's other replicas are well."""
    call = Call([token("a"), losses()[what]])
    engine, _ = await loaded(call)
    state = BreakerState(failures=1, open_s=60)

    with pytest.raises(ReplicaLost) as caught:
        await collect(Breaker(EngineExpert(EXPERT, engine), state).generate(CHAT), CHAT)

    assert (caught.value.retryable, caught.value.fallback, caught.value.status) == (True, True, 503)
    assert state.state == "closed"


async def test_closing_the_stream_ends_the_call() -> None:
    call = Call([token("a"), "wait"])
    engine, _ = await loaded(call)

    async with aclosing(engine.generate(CHAT, EXPERT)) as stream:
        assert (await anext(stream)).text == "a"
        assert not call.cancelled
    assert call.cancelled


async def test_cancelling_the_caller_ends_the_call_and_stays_a_cancellation() -> None:
    call = Call(["wait"])
    engine, _ = await loaded(call)
    task = asyncio.create_task(chunks(engine))
    await call.waiting.wait()

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.cancelled


async def test_load_waits_for_a_replica() -> None:
    healthy = asyncio.Event()
    engine = ServeEngine(SPEC, Handle(healthy=healthy), json_bodies=True)  # type: ignore[arg-type]
    loading = asyncio.create_task(engine.load())
    await asyncio.sleep(0.01)
    assert not loading.done()
    healthy.set()
    await loading


async def test_a_replica_that_comes_too_late_for_load_still_answers() -> None:
    spec = EngineSpec(engine_id="e", backend="vllm", model="m", options={"ready_s": 0.01})
    handle = Handle(Call([token("a", "stop")]), healthy=asyncio.Event())
    engine = ServeEngine(spec, handle, json_bodies=True)  # type: ignore[arg-type]

    with pytest.raises(ExpertFailed, match="serve status"):
        await engine.load()
    assert [c.text for c in await chunks(engine)] == ["a"]


async def test_says_so_when_it_is_not_loaded() -> None:
    engine, _ = await loaded(Call([]))
    await engine.unload()
    with pytest.raises(ExpertFailed, match="not loaded"):
        await chunks(engine)


def test_an_option_that_nobody_knows_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="unknown option \\['redy_s'\\]; use deployment, app, address, ready_s"):
        ServeEngine(EngineSpec(engine_id="e", backend="serve", model="m", options={"deployment": "d", "redy_s": 1}))


async def test_says_what_to_do_when_there_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(address: str, **_: Any) -> None:
        raise ConnectionError(f"Could not find any running Ray instance at {address}.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    spec = EngineSpec(engine_id="e", backend="serve", model="m", options={"deployment": "d", "app": "a"})

    with pytest.raises(ExpertFailed, match=r"RAY_ADDRESS.*at auto"):
        await ServeEngine(spec).load()
