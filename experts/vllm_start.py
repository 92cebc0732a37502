"""Starting vLLM: the environment it needs, what it is told, and what its failures to start mean."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from experts.errors import ConfigError, ExpertFailed
from experts.models import resolve
from experts.types import EngineSpec
from experts.vllm_options import Options, check_memory, environment, read_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from experts.vllm_server import Server

log = logging.getLogger(__name__)

_STARTING = threading.Lock()
"""Engines start one at a time: the environment they start in belongs to the whole process."""


async def start(spec: EngineSpec) -> "Server":
    """A running server for ``spec``; its model is prepared first if need be.

    Raises ConfigError for what the config or the installation can mend, ExpertFailed for the rest.
    """
    started = time.monotonic()
    server, options = await asyncio.to_thread(_launch, spec)
    try:
        await server.open(options)
    except BaseException:
        await server.aclose()
        raise
    log.info("engine %s is ready after %.1f s", spec.engine_id, time.monotonic() - started)
    return server


def _launch(spec: EngineSpec) -> "tuple[Server, Options]":
    llm, options = launch(spec)
    from experts.vllm_server import Server

    return Server(engine_id=spec.engine_id, llm=llm, adapters=options.adapters), options


def launch(spec: EngineSpec) -> "tuple[AsyncLLM, Options]":
    """Everything that blocks: preparing the model, importing vLLM, waiting for its process. Raises as start() does."""
    model = resolve(spec.model)
    with _STARTING:
        with _environment(environment(model)):
            _check_import(spec)
            options = _options(spec, model)
            config = _configure(spec, options)
        with _environment(options.environment):
            return _run(spec, options, config), options


def _check_import(spec: EngineSpec) -> None:
    try:
        import experts.vllm_server  # noqa: F401
    except ImportError as exc:
        raise ConfigError(
            f"Engine '{spec.engine_id}': vLLM cannot be imported ({exc}). Install it: pip install 'collegium[cpu]', or "
            "'collegium[gpu]' on a machine with a GPU."
        ) from exc
    except (RuntimeError, AttributeError, OSError) as exc:
        raise ConfigError(
            f"Engine '{spec.engine_id}': vLLM's packages do not fit together ({exc}). Most often torchvision is built "
            "for another torch; text needs none of it: pip uninstall torchvision torchaudio torchcodec"
        ) from exc


def _options(spec: EngineSpec, model: str) -> Options:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    cpu = current_platform.is_cpu()
    known = [field.name for field in dataclasses.fields(AsyncEngineArgs) if not field.name.startswith("_")]
    options = read_options(spec, model, known, cpu=cpu, cores=_cores())
    if cpu:
        free = get_memory_node_info(get_visible_memory_node()[0]).available_memory
        check_memory(spec, options, available_bytes=free)
    return options


def _cores() -> int:
    """Those this process may use; macOS does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _configure(spec: EngineSpec, options: Options) -> "VllmConfig":
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.chat_utils import load_chat_template
    from vllm.usage.usage_lib import UsageContext

    try:
        load_chat_template(options.serving["chat_template"])
        return AsyncEngineArgs(**options.arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as exc:
        raise ConfigError(f"Engine '{spec.engine_id}': vLLM refuses its model or its options: {exc}") from exc


def _run(spec: EngineSpec, options: Options, config: "VllmConfig") -> "AsyncLLM":
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_vllm_config(
            config,
            enable_log_requests=options.arguments.get("enable_log_requests", False),
            disable_log_stats=options.arguments["disable_log_stats"],
        )
    except Exception as exc:
        raise ExpertFailed(
            f"Engine '{spec.engine_id}': vLLM did not start: {exc} Its own words are in the output above, more of them "
            "with VLLM_LOGGING_LEVEL=INFO. A process that was killed with -9 had too little memory.",
            retryable=False,
        ) from exc


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """``variables`` in the environment for a while, where nobody has set them: vLLM reads some settings from nowhere
    else."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
