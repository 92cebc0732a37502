"""``python -m evals.gateway.ray_bench``: what each of Ray Serve's settings gives our gateway, by the same measure as
evals/gateway/bench.py: everything of Ray on one core, the stub upstream and the load on another.

The first settings ask the stub as an endpoint. In "engine: ..." the stub is the engine of a ray.serve.llm deployment,
on the same core: a whole answer is 35 messages from one replica to another.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from evals.gateway.contestants import Contestant, stub
from evals.gateway.load import Target
from evals.gateway.measure import Figures, best, direct, full_round, warm_up
from evals.gateway.process import Process, free_port
from evals.gateway.report import machine

RUN = """
import sys
from pathlib import Path
from orchestrator.config import load_config
from orchestrator.ray_runtime import run
run(load_config(Path(sys.argv[1])), ingress_replicas=int(sys.argv[2]), port=int(sys.argv[3]))
"""
HAPROXY, THROUGHPUT = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    environment: Mapping[str, str]
    replicas: int = 1
    log_level: str = "info"
    hosted: bool = False


SETTINGS = {
    "Ray Serve as it comes": Setting(environment={HAPROXY: "0", THROUGHPUT: "0"}),
    "throughput": Setting(environment={HAPROXY: "0", THROUGHPUT: "1"}),
    "HAProxy": Setting(environment={HAPROXY: "1", THROUGHPUT: "0"}),
    "HAProxy, throughput (ours)": Setting(environment={HAPROXY: "1", THROUGHPUT: "1"}),
    "ours, one HAProxy thread": Setting(environment={"RAY_SERVE_HAPROXY_NBTHREAD": "1"}),
    "ours, two gateways": Setting(environment={}, replicas=2),
    "ours, no metrics of HAProxy's": Setting(environment={"RAY_SERVE_HAPROXY_METRICS_ENABLED": "0"}),
    "ours, no request log": Setting(environment={}, log_level="warning"),
    "engine: HAProxy": Setting(environment={THROUGHPUT: "0"}, hosted=True),
    "engine: ours": Setting(environment={}, hosted=True),
}


@dataclass(slots=True)
class Marked:
    """All processes that carry ``mark`` in their environment: Ray's are in sessions of their own."""

    mark: bytes
    pids: list[int] = field(default_factory=list)

    def find(self) -> list[int]:
        self.pids = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if self.mark in path.read_bytes():
                    self.pids.append(int(path.parent.name))
        return self.pids


class RayProcess(Process):
    def __init__(self, setting: Setting, config: Path, folder: Path, core: int) -> None:
        self._marked = Marked(f"RAY_TMPDIR={folder}".encode())
        port = free_port()
        environment = {
            "HOME": str(folder),
            "RAY_TMPDIR": str(folder),
            "RAYLLM_VLLM_ENGINE_CLS": "evals.gateway.ray_engine.StubEngine",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            **setting.environment,
        }
        command = [sys.executable, "-c", RUN, str(config), str(setting.replicas), str(port)]
        super().__init__(command, port=port, core=core, log=folder / "log", env=environment)

    def stop(self) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)
        for pid in self._marked.find():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _stats(self) -> Iterator[list[str]]:
        for pid in self._marked.find():
            with suppress(OSError):
                yield Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextmanager
def started(name: str, setting: Setting, upstream: int, core: int) -> Iterator[Contestant]:
    # Not below a long path: that of a Unix socket may have 107 characters only.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        config = folder / "collegium.yaml"
        endpoint = {"backend": "openai", "model": "stub", "base_url": f"http://127.0.0.1:{upstream}/v1"}
        engine = {"backend": "vllm", "model": "stub"} if setting.hosted else endpoint
        text = {
            "engines": {"stub": engine},
            "experts": {"one": {"engine": "stub"}, "two": {"engine": "stub"}},
            "policies": {"default": {"router": "always"}},
            "telemetry": {"log_level": setting.log_level},
        }
        config.write_bytes(orjson.dumps(text))
        process = RayProcess(setting, config, folder, core)
        try:
            process.wait(120)
            yield Contestant(target=Target(name=name, port=process.port, model="collegium"), process=process)
        finally:
            process.stop()


async def measure(seconds: float, rounds: int, only: list[str]) -> dict[str, Figures]:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    figures: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as place, stub(cores[0], Path(place)) as upstream:
        figures["stub"] = await direct(Target(name="stub", port=upstream, model="stub"), seconds)
        for name in only:
            with started(name, SETTINGS[name], upstream, cores[-1]) as contestant:
                await warm_up(contestant.target, 240)
                figures[name] = best([await full_round(contestant, seconds) for _ in range(rounds)])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    begun = time.monotonic()
    place = machine()
    figures = uvloop.run(measure(args.seconds, args.rounds, args.only))
    table = Table("setting", "requests/s", "added p50 ms", "CPU ms a request", "streams/s of 32", "RSS MiB", "faults")
    stub_figures = figures.pop("stub")
    for name, f in figures.items():
        added = f["p50_ms"] - stub_figures["p50_ms"]
        numbers = (f"{f['requests_per_s']:.0f}", f"{added:.2f}", f"{f['cpu_ms']:.2f}", f"{f['streams_per_s']:.0f}")
        table.add_row(name, *numbers, f"{f['rss_mib']:.0f}", f"{f['faults']:.0f}")
    console = Console(width=120)
    console.print(table)
    console.print(orjson.dumps(place).decode(), f"{time.monotonic() - begun:.0f} s", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
