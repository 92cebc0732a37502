"""The other end of serve_handle.py: what runs in a replica, and how Ray Serve is told to host it.

Imports vLLM, so only whoever deploys imports it, and the replicas themselves.
"""

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError
from ray.serve import Application
from ray.serve.llm import LLMConfig, LLMServer, build_llm_deployment
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMClientError

from experts.models import MODELS, resolve
from experts.types import EngineSpec
from experts.vllm_options import Options, read_options

log = logging.getLogger(__name__)


class JsonServer(LLMServer):
    """ray.serve.llm's server with JSON in and out, so that callers need no vLLM."""

    async def __init__(self, llm_config: LLMConfig, *, spec: EngineSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        # Anew, with the model made ready on this node: what whoever deploys has in its cache says nothing about ours.
        folder = await asyncio.to_thread(resolve, spec.model)
        await super().__init__(make_llm_config(spec, source=folder))

    async def stream(
        self, method: str, body: Mapping[str, Any], gather_s: float
    ) -> AsyncGenerator[list[str | Mapping[str, Any]], None]:
        """``method`` is "chat" or "completions", ``body`` as in OpenAI's API. Yields SSE events, or an error object:
        an exception of vLLM's would bring vLLM into the process that it is raised in.

        The first event goes at once, the others in lists of what came within ``gather_s``: each is a message between
        processes, 0.1 ms of CPU.
        """
        held: list[str | Mapping[str, Any]] = []
        due_s = 0.0
        async with aclosing(self._events(method, body)) as events:
            async for event in events:
                held.append(event)
                if (now_s := time.monotonic()) >= due_s:
                    yield held
                    held, due_s = [], now_s + gather_s
        if held:
            yield held

    async def _events(self, method: str, body: Mapping[str, Any]) -> AsyncGenerator[str | Mapping[str, Any], None]:
        model: Any = {"chat": ChatCompletionRequest, "completions": CompletionRequest}[method]
        try:
            async with aclosing(await getattr(self, method)(model.model_validate(body))) as items:
                async for item in items:
                    for event in item if isinstance(item, list) else [item]:
                        yield event if isinstance(event, str) else event.model_dump()
        except (ValidationError, VLLMClientError) as exc:
            yield create_error_response(exc).model_dump()
        except Exception as exc:
            log.exception("a call failed")
            yield create_error_response(exc).model_dump()

    async def check_health(self) -> None:
        """Serve asks, and so does the gateway."""
        try:
            await super().check_health()
        except Exception as exc:
            raise RuntimeError(f"{type(exc).__name__}: {exc}") from exc


def make_deployment(spec: EngineSpec, *, name: str, drain_s: float) -> Application:
    """A JsonServer for ``spec``, to be bound into an application. A replica that has to go first finishes its
    requests, for up to ``drain_s``. Raises ConfigError."""
    return build_llm_deployment(
        make_llm_config(spec, source=spec.model),
        deployment_cls=JsonServer,
        bind_kwargs={"spec": spec},
        override_serve_options={"name": name, "graceful_shutdown_timeout_s": drain_s},
    )


def make_llm_config(spec: EngineSpec, *, source: str) -> LLMConfig:
    """``spec`` in Ray's words. ``source`` is the model's folder, or its id on a hub. Raises ConfigError."""
    from vllm.platforms import current_platform

    cpu = bool(current_platform.is_cpu())
    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    options = read_options(spec, source, known, cpu=cpu, cores=len(os.sched_getaffinity(0)))
    scaling = spec.options.get("autoscaling")
    actor: dict[str, Any] = {} if spec.memory_gib is None else {"memory": int(spec.memory_gib * 2**30)}
    if cpu:
        # The replica only passes messages: its CPU is the engine's, below.
        actor["num_cpus"] = 0
    offline = {"HF_HUB_OFFLINE": "1"} if spec.model in MODELS else {}
    return LLMConfig(
        model_loading_config={"model_id": spec.model, "model_source": source},
        engine_kwargs=_engine_kwargs(options),
        # Of its own, Ray asks for a GPU for each of the engine's workers.
        placement_group_config={"bundle_per_worker": {"CPU": spec.options.get("cpu_threads", 1)}} if cpu else None,
        deployment_config={
            "ray_actor_options": actor,
            **({"autoscaling_config": dict(scaling)} if scaling else {"num_replicas": 1}),
        },
        runtime_env={"env_vars": {**options.environment, **offline}},
        # Every token its own event: Ray would gather them for 50 ms, and hold the first one back for as long.
        experimental_configs={"stream_batching_interval_ms": 0},
        log_engine_metrics=not options.arguments["disable_log_stats"],
    )


def _engine_kwargs(options: Options) -> dict[str, Any]:
    """vLLM's engine and server arguments, which Ray takes together. It sets ``model`` itself."""
    modules = [LoRAModulePath(name=name, path=folder) for name, folder in options.adapters.items()]
    kwargs = {**options.arguments, **options.serving, "lora_modules": modules or None}
    return {name: value for name, value in kwargs.items() if name != "model" and value is not None}
