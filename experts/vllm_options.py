"""What may stand in a vllm engine's options, and what is chosen where nothing stands.

Options are vLLM's engine arguments, and beside them:

    adapters                     LoRA adapters by name: a folder each; an expert's ``adapter`` names one
    tool_call_parser, enable_auto_tool_choice, exclude_tools_when_tool_choice_none
    chat_template, chat_template_content_format, default_chat_template_kwargs
                                 vLLM's server arguments of those names (default: tools in Hermes' format, which
                                 many models write, and which vLLM can make any model write by tool_choice)
    cpu_threads                  threads that compute, on a CPU (default: all cores but one, which the service needs)
"""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.errors import ConfigError
from experts.types import EngineSpec

_GIB = 2**30
_SERVING = {
    "tool_call_parser": "hermes",
    "enable_auto_tool_choice": True,
    "exclude_tools_when_tool_choice_none": False,
    "chat_template": None,
    "chat_template_content_format": "auto",
    "default_chat_template_kwargs": None,
}
_OURS = ("adapters", "autoscaling", "cpu_threads", *_SERVING)
_NOT_OPTIONS = ("model", "model_weights", "served_model_name", "lora_modules")
"""Said elsewhere: by the engine's ``model``, or by ``adapters``."""

_SMALL_CORES = 4
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM makes room for."""

_DEFAULTS: Mapping[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
_CPU_DEFAULTS: Mapping[str, Any] = {
    "block_size": 32,
    "enforce_eager": True,
    "kv_cache_memory_bytes": _GIB,
    "max_model_len": -1,
    "max_num_seqs": 32,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "worker_cls": "experts.vllm_worker.Worker",
}
"""Only whole blocks of a prompt are remembered: by vLLM's own 128 an expert's prompt seldom fills one, by 32 the first
token came after 19 ms instead of 38. Compiling takes minutes, and made SmolLM2 talk nonsense (gcc 12, vLLM 0.29). -1 is
the longest context that the KV cache can hold. Small models fill a JSON answer with blanks where they may."""

_EVERYWHERE: Mapping[str, str] = {"VLLM_NO_USAGE_STATS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``arguments`` are for AsyncEngineArgs, ``serving`` for vLLM's server classes, ``environment`` for the engine's
    process."""

    arguments: Mapping[str, Any]
    serving: Mapping[str, Any]
    adapters: Mapping[str, str]
    environment: Mapping[str, str]


def environment(model: str) -> dict[str, str]:
    """What vLLM is to find in the environment of this process. A model that lies here needs no hub. vLLM logs a
    traceback for every request it refuses, and those are the callers' business."""
    offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return {**_EVERYWHERE, **offline, "VLLM_LOGGING_LEVEL": "CRITICAL"}


def read_options(spec: EngineSpec, model: str, known: list[str], *, cpu: bool, cores: int) -> Options:
    """``spec.options`` and the defaults, sorted by who takes them. ``known`` are vLLM's engine arguments.

    Raises ConfigError for an option that nobody knows, naming the nearest, for an adapter that is not one, and for
    sleep on a CPU.
    """
    allowed = sorted({*known, *_OURS} - {*_NOT_OPTIONS})
    for name in spec.options:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "see vLLM's engine arguments."
            raise ConfigError(f"Engine '{spec.engine_id}': unknown option '{name}'; {hint}")
    if cpu and spec.options.get("enable_sleep_mode"):
        raise ConfigError(
            f"Engine '{spec.engine_id}': vLLM sleeps on GPUs only. Leave residency.sleep (and enable_sleep_mode) out: "
            "on a CPU an engine that goes ends, and all its memory is free."
        )
    adapters = {name: str(Path(folder).expanduser()) for name, folder in (spec.options.get("adapters") or {}).items()}
    defaults = {"model": model, **_DEFAULTS, **_lora(spec.engine_id, adapters, cpu=cpu)}
    defaults |= {**(_CPU_DEFAULTS if cpu else {}), **_executor(spec, cpu=cpu, cores=cores)}
    arguments = {**defaults, **{k: v for k, v in spec.options.items() if k not in _OURS}}
    return Options(
        arguments=arguments,
        serving={name: spec.options.get(name, default) for name, default in _SERVING.items()},
        adapters=adapters,
        environment={
            **environment(model),
            "VLLM_LOGGING_LEVEL": "ERROR",
            **(_cpu_environment(spec, cores, eager=arguments["enforce_eager"]) if cpu else {}),
        },
    )


def _executor(spec: EngineSpec, *, cpu: bool, cores: int) -> dict[str, Any]:
    """On a small machine the model runs in the scheduler's process, not in one more below it, which takes 10 s to
    start. On a larger one vLLM's own way stays: it binds the worker's threads to cores."""
    if max(spec.options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")) > 1:
        return {}
    kind = "WorkerProcess" if cpu and not _is_small(spec, cores) else "OneProcess"
    return {"distributed_executor_backend": f"experts.vllm_executor.{kind}"}


def _is_small(spec: EngineSpec, cores: int) -> bool:
    return cores <= _SMALL_CORES or "cpu_threads" in spec.options


def _cpu_environment(spec: EngineSpec, cores: int, *, eager: bool) -> dict[str, str]:
    found = {}
    if eager:
        # Else the first request with top_p or logprobs stops everybody for 12 s while vLLM's sampler is compiled, and
        # without a C++ compiler it ends the engine.
        found["TORCHDYNAMO_DISABLE"] = "1"
    if _is_small(spec, cores):
        # Threads that spin while they wait stop each other when the service or a neighbour needs their core:
        # measured, a token took 3 to 30 times as long.
        threads = spec.options.get("cpu_threads") or max(1, cores - 1)
        found |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return found


def _lora(engine_id: str, adapters: Mapping[str, str], *, cpu: bool) -> dict[str, Any]:
    if not adapters:
        return {}
    rank = max(_rank(engine_id, name, Path(folder)) for name, folder in adapters.items())
    # On CPUs vLLM gives a request without adapter, in a batch with others, the adapter in the last place
    # (github.com/vllm-project/vllm/pull/48421). One place more stays empty, and an empty one changes nothing.
    places = len(adapters) + 1 if cpu else len(adapters)
    room = next((r for r in _RANKS if r >= rank), rank)
    return {"enable_lora": True, "max_loras": places, "max_lora_rank": room}


def _rank(engine_id: str, name: str, folder: Path) -> int:
    try:
        return int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"Engine '{engine_id}': adapter '{name}' is no LoRA folder: {folder} needs adapter_config.json with 'r' "
            f"and adapter_model.safetensors, as peft saves them ({exc})."
        ) from exc


def check_memory(spec: EngineSpec, options: Options, *, available_bytes: int) -> None:
    """Raises ConfigError when a CPU engine cannot fit: the system would end the service without a word."""
    needed = spec.memory_gib * _GIB if spec.memory_gib else _estimate_bytes(options)
    if needed > available_bytes:
        raise ConfigError(
            f"Engine '{spec.engine_id}' needs about {needed / _GIB:.1f} GiB, but only {available_bytes / _GIB:.1f} GiB "
            "are free. Lower kv_cache_memory_bytes in its options, choose a smaller model, or end other programs; "
            "memory_gib says what it really needs where this estimate is wrong."
        )


_PROCESS_BYTES = _GIB
"""vLLM and torch themselves, without weights and KV cache."""


def _estimate_bytes(options: Options) -> int:
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    kv = int(space) * _GIB if space else int(options.arguments.get("kv_cache_memory_bytes") or 0)
    folder = Path(options.arguments["model"])
    return _PROCESS_BYTES + kv + sum(file.stat().st_size for file in folder.glob("*.safetensors"))
