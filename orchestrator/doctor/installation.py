"""Checks of the machine: packages, cache, memory, port."""

import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experts.models import MODELS, cache_dir
from experts.types import EngineSpec
from orchestrator.doctor.case import Case, Finding

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BREAKABLE = ("torchvision", "torchaudio", "torchcodec")
VLLM_GIB = 1.9
"""What vLLM takes on a CPU beside weights and KV cache: the engine's own process and ours."""


def extras(case: Case) -> Iterator[Finding]:
    """The packages that the config's backends and routers need."""
    needs = {
        ("vllm", "gpu" if _has_gpu() else "cpu"): bool(case.specs("vllm")),
        ("ray", "ray"): bool(case.specs("serve")),
        (case.encoder_package, "encoder" if case.encoder_package != "wordllama" else "train"): case.needs_encoder,
        ("opentelemetry", "otel"): case.config.telemetry.otlp_endpoint is not None,
    }
    for (package, extra), needed in needs.items():
        if needed and _installed(package):
            yield Finding(check="extras", message=f"{package} is installed")
        elif needed:
            index = "" if extra == "gpu" else f" --extra-index-url {CPU_INDEX}"
            yield Finding(
                check="extras",
                status="fail",
                message=f"the config needs {package}, which is not installed",
                todo=f"pip install 'collegium[{extra}]'{index}",
            )


def imports(case: Case) -> Iterator[Finding]:
    """vLLM brings packages that a text service never uses, and that stop transformers when they are broken."""
    names = [name for name in BREAKABLE if _installed(name)]
    broken = _broken(names) if names else {}
    for name, reason in broken.items():
        yield Finding(
            check="imports",
            status="fail",
            message=f"{name} does not import, and transformers and vLLM fail with it: {reason}",
            todo=f"pip uninstall -y {name}",
        )
    if not broken:
        yield Finding(check="imports", message=f"nothing broken among {', '.join(BREAKABLE)}")


def cache(case: Case) -> Iterator[Finding]:
    """Prepared models are written to the cache."""
    yield _try_writing(cache_dir(), check="cache", todo="export COLLEGIUM_CACHE=/a/folder/of/yours")


def batches(case: Case) -> Iterator[Finding]:
    """Files and batches are kept in a folder, where there is one."""
    if (path := case.config.batches.path) is not None:
        yield _try_writing(Path(path), check="batches", todo="correct batches.path in the config")


def memory(case: Case) -> Iterator[Finding]:
    """The engines that are loaded together against what the system has left."""
    needs_gib = {name: _need_gib(e.spec(name)) for name, e in case.config.engines.items()}
    slots = case.config.residency.slots or len(needs_gib)
    need_gib = sum(sorted(needs_gib.values(), reverse=True)[:slots])
    if (budget_gib := case.config.residency.memory_gib) is not None:
        need_gib = min(need_gib, max(budget_gib, *needs_gib.values()))
    free_gib = available_gib()
    if free_gib is None:
        yield Finding(
            check="memory",
            status="warn",
            message=f"the engines need {need_gib:.1f} GiB; what is free is not known here",
        )
    elif need_gib > free_gib:
        largest = max(needs_gib, key=lambda name: needs_gib[name])
        yield Finding(
            check="memory",
            status="fail",
            message=f"the engines need {need_gib:.1f} GiB, {free_gib:.1f} GiB are free",
            todo=f"end other programs, load fewer at once (residency.slots), or take a smaller model for '{largest}'",
        )
    else:
        yield Finding(check="memory", message=f"the engines need {need_gib:.1f} GiB, {free_gib:.1f} GiB are free")


def port(case: Case) -> Iterator[Finding]:
    """Where 'collegium serve' is to listen."""
    place = f"{case.host}:{case.port}"
    try:
        with socket.create_server((case.host, case.port)):
            yield Finding(check="port", message=f"{place} is free")
    except OSError as exc:
        in_use = exc.errno == errno.EADDRINUSE
        yield Finding(
            check="port",
            status="fail",
            message=f"{place} is in use" if in_use else f"cannot listen on {place}: {exc.strerror}",
            todo="stop what runs there, or take another: collegium serve --port 8001",
        )


def available_gib(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float | None:
    """What the system, and the container around us, have left. None where neither says."""
    left = []
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        left.append(int(rows["MemAvailable"].split()[0]) * 1024)
    limit = cgroup / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        left.append(int(most) - int((cgroup / "memory.current").read_text()))
    return min(left) / 2**30 if left else None


def _try_writing(folder: Path, *, check: str, todo: str) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(check=check, message=f"{folder} can be written")
    except OSError as exc:
        return Finding(check=check, status="fail", message=f"{folder} cannot be written: {exc.strerror}", todo=todo)


def _need_gib(spec: EngineSpec) -> float:
    """``memory_gib`` where the config gives it; else a local vLLM engine is estimated and an endpoint takes nothing."""
    if spec.memory_gib is not None:
        return spec.memory_gib
    if spec.backend != "vllm" or _has_gpu():
        return 0.0
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    kv_cache = float(space) if space else spec.options.get("kv_cache_memory_bytes", 2**30) / 2**30
    return _weights_gib(spec.model) + kv_cache + VLLM_GIB


def _weights_gib(model: str) -> float:
    if model in MODELS:
        return MODELS[model].size_bytes / 2**30
    return sum(f.stat().st_size for f in Path(model).glob("*.safetensors")) / 2**30


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_PROBE = """
import importlib, json, sys
broken = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as exc:
        broken[name] = (str(exc).strip() or type(exc).__name__).splitlines()[0][:200]
print(json.dumps(broken))
"""


def _broken(names: Sequence[str]) -> Mapping[str, str]:
    """Which of ``names`` cannot be imported, and why: tried in another process, since a broken one may end it."""
    command = [sys.executable, "-W", "ignore", "-c", _PROBE, *names]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
        return found
    if len(names) == 1:
        return {names[0]: f"the import ends Python with status {result.returncode}"}
    return {name: reason for one in names for name, reason in _broken([one]).items()}
