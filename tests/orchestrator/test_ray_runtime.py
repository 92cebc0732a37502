"""`collegium serve --runtime ray` as its own process, with scripted engines in Ray's place for vLLM."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from openai import AsyncOpenAI, BadRequestError, InternalServerError, OpenAI

from experts.models import cache_dir
from orchestrator.ray_runtime import ENVIRONMENT

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra 'ray'"),
]

START_S, STOP_S = 240, 90
CONFIG: dict[str, Any] = {
    "engines": {
        "left": {"backend": "vllm", "model": "left", "autoscaling": {"min_replicas": 2, "max_replicas": 2}},
        "right": {"backend": "vllm", "model": "right"},
        "near": {"backend": "fake"},
        # The same replica, reached as any LLMServer is: by its name, with Ray's own request objects.
        "outside": {"backend": "serve", "model": "right", "deployment": "engine-right", "app": "collegium"},
    },
    "experts": {
        "lefty": {"engine": "left"},
        "righty": {"engine": "right"},
        "neighbour": {"engine": "near"},
        "stranger": {"engine": "outside"},
    },
    "policies": {"default": {"router": "round_robin"}},
}


GATEWAY_ALONE: dict[str, Any] = {
    "engines": {"near": {"backend": "fake"}},
    "experts": {"neighbour": {"engine": "near"}},
    "policies": {"default": {"router": "always"}},
}


class Machine:
    """A folder for one Ray, and the environment that keeps it apart from any other on this machine."""

    def __init__(self) -> None:
        # Not pytest's folder: the path of a Unix socket may have 107 characters only.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        ports = [str(free_port()) for _ in range(4)]
        self.environment = {
            **os.environ,
            "HOME": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).parent),
            "RAYLLM_VLLM_ENGINE_CLS": "scripted_llm.ScriptedEngine",
            "RAY_TMPDIR": str(self.folder),
            **ENVIRONMENT,
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ports[0],
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": ports[1],
            "RAY_SERVE_HAPROXY_METRICS_PORT": ports[2],
            "RAY_SERVE_HAPROXY_STATS_PORT": ports[3],
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{self.folder}/haproxy/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{self.folder}/haproxy/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{self.folder}/haproxy",
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{self.folder}/haproxy/server-state",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{self.folder}/haproxy/metrics.sock",
        }
        self.config = self.folder / "collegium.yaml"
        self.log = self.folder / "log"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["nice", "-n", "10", sys.executable, *command],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def write(self, config: dict[str, Any]) -> None:
        self.config.write_text(yaml.safe_dump(config))

    def processes(self) -> list[int]:
        """Whoever has our folder in its environment, by process id."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"RAY_TMPDIR={self.folder}".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def clear(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Service:
    """The command under test on ``machine``."""

    def __init__(self, machine: Machine, config: dict[str, Any], *options: str) -> None:
        machine.write(config)
        self.machine = machine
        self.url = f"http://127.0.0.1:{free_port()}"
        command = ["-m", "orchestrator.cli", "serve", "-c", str(machine.config), "--runtime", "ray"]
        self.process = machine.start(*command, "--port", self.url.rsplit(":", 1)[1], *options)

    def wait_until_ready(self) -> "Service":
        wait(lambda: self.get("/readyz") == 200, START_S, self._explain)
        return self

    def get(self, path: str) -> int:
        assert self.process.poll() is None, self._explain()
        return get(self.url + path)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(STOP_S)

    def _explain(self) -> str:
        return self.machine.log.read_text(errors="replace")[-6000:]


class Cluster:
    """A Ray of somebody else's."""

    def __init__(self) -> None:
        self.machine = Machine()
        port, dashboard, agent, client = (free_port() for _ in range(4))
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self.head = self.machine.start(
            *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
            "--object-store-memory=100000000",
        )
        wait(lambda: "Ray runtime started" in self.machine.log.read_text(), 120, self.machine.log.read_text)


class Client:
    """The official client; it asks once only."""

    def __init__(self, service: Service) -> None:
        self.openai = AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60)

    async def ask(self, model: str, **script: Any) -> str:
        reply = await self.openai.chat.completions.create(model=model, messages=question(script))
        return (reply.choices[0].message.content or "").strip()


def get(url: str) -> int:
    """The status, or 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code
    except OSError:
        return 0


def ask_once(url: str, model: str, text: str) -> str:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0
    return reply.choices[0].message.content or ""


def question(script: dict[str, Any]) -> Any:
    return [{"role": "user", "content": json.dumps(script)}]


def wait(condition: Any, limit_s: float, explain: Any = str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.clear()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    machine = Machine()
    service = Service(machine, CONFIG)
    try:
        yield service.wait_until_ready()
    finally:
        machine.clear()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    client = Client(service)
    async with client.openai:
        yield client


async def test_engines_answer_from_other_processes(service: Service, client: Client) -> None:
    right = await client.ask("righty", tokens=1)
    left = set(await asyncio.gather(*(client.ask("lefty", tokens=1, wait_s=0.2) for _ in range(12))))
    # Two replicas, as its autoscaling says.
    assert len({str(service.process.pid), right, *left}) == 4
    assert await client.ask("neighbour") == "neighbour heard: {}"
    assert await client.ask("stranger", tokens=1) == right
    assert (await client.openai.completions.create(model="righty", prompt="go on")).choices[0].text == "go on!"


async def test_streams_each_token_as_it_comes(service: Service, client: Client) -> None:
    """The second token is not written before the first has been read."""
    gate = service.machine.folder / "gate"
    script = question({"tokens": 2, "gate": str(gate)})
    stream = await client.openai.chat.completions.create(model="righty", messages=script, stream=True)
    assert (await anext(stream)).choices[0].delta.content
    gate.touch()
    assert [event.choices[0].finish_reason async for event in stream][-1] == "stop"


async def test_a_refusal_is_the_callers(client: Client) -> None:
    words = "This model's maximum context length is 64 tokens. However, your messages resulted in 80 tokens."
    with pytest.raises(BadRequestError, match=r"has 80 tokens.*at most 64"):
        await client.ask("righty", error=400, message=words)
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    another = {"type": "function", "function": {"name": "listen"}}
    # What vLLM's own model of a request refuses, in the replica and in the gateway.
    for model in ("righty", "stranger"):
        with pytest.raises(BadRequestError, match=r"'(righty|stranger)' refused the request"):
            await client.openai.chat.completions.create(
                model=model,
                messages=question({}),
                tools=[tool],
                tool_choice=another,  # type: ignore[list-item, arg-type]
            )


async def test_a_bug_in_a_replica_is_its_own(client: Client) -> None:
    with pytest.raises(InternalServerError, match="scripted crash") as caught:
        await client.ask("righty", crash=True)
    assert caught.value.status_code == 503
    assert await client.ask("righty", tokens=1)


async def test_a_client_that_goes_away_stops_the_replica(service: Service, client: Client) -> None:
    note = service.machine.folder / "note"
    stream = await client.openai.chat.completions.create(
        model="righty", messages=question({"tokens": 600, "token_s": 0.1, "note": str(note)}), stream=True
    )
    await anext(stream)
    await stream.close()
    await asyncio.to_thread(wait, note.exists, 20)
    assert note.read_text() == "cancelled"


async def test_hangup_reloads_without_losing_a_request_or_a_replica(service: Service, client: Client) -> None:
    before = await client.ask("righty", tokens=1)
    under_way = asyncio.create_task(client.ask("righty", tokens=4, token_s=1))
    await asyncio.sleep(0.1)
    service.machine.write({**CONFIG, "experts": {**CONFIG["experts"], "newcomer": {"engine": "right"}}})
    service.process.send_signal(signal.SIGHUP)

    await asyncio.to_thread(wait, lambda: service.get("/v1/models/newcomer") == 200, 60)

    assert await client.ask("newcomer", tokens=1) == before
    assert await under_way == " ".join([before] * 4)


async def test_a_config_with_a_mistake_changes_nothing(service: Service, client: Client) -> None:
    service.machine.write({**CONFIG, "policies": {"default": {"router": {"name": "random", "options": {"sed": 1}}}}})
    service.process.send_signal(signal.SIGHUP)
    await asyncio.to_thread(wait, lambda: "config not deployed" in service.machine.log.read_text(), 60)
    assert "unknown option 'sed'; did you mean 'seed'?" in service.machine.log.read_text()
    assert await client.ask("lefty", tokens=1)


async def test_no_request_is_lost_when_a_replica_is_killed(client: Client) -> None:
    """Forty requests are under way, half of them on the engine with two replicas, when one of those is killed."""
    victim = int(await client.ask("lefty", tokens=1))
    script = {"tokens": 4, "token_s": 0.3}
    asked = [
        asyncio.create_task(client.ask(model, **script))
        for model in ["lefty"] * 20 + ["righty"] * 10 + ["collegium"] * 10
    ]
    streams = [asyncio.create_task(read_stream(client, "lefty", script)) for _ in range(6)]
    await asyncio.sleep(0.5)

    os.kill(victim, signal.SIGKILL)

    answers = await asyncio.gather(*asked)
    said = Counter(word for answer in answers for word in answer.split() if word.isdigit())
    assert str(victim) not in said
    assert all(answer.startswith("neighbour") or len(answer.split()) == 4 for answer in answers)
    # A stream that has begun cannot be taken back: it is whole, or ends with an error and [DONE].
    ends = Counter(await asyncio.gather(*streams))
    assert set(ends) <= {"whole", "error"}, ends
    assert len(await asyncio.gather(*(client.ask("lefty", tokens=1) for _ in range(20)))) == 20


async def read_stream(client: Client, model: str, script: dict[str, Any]) -> str:
    body = {"model": model, "stream": True, "messages": question(script)}
    raw = await client.openai.post("/chat/completions", body=body, cast_to=str)
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return "cut off"
    return "error" if "error" in json.loads(events[-2]) else "whole"


async def test_terminate_finishes_what_is_under_way_and_leaves_nothing(service: Service, client: Client) -> None:
    """Last in this file for the service."""
    under_way = asyncio.create_task(client.ask("righty", tokens=3, token_s=1))
    await asyncio.sleep(0.5)

    code = await asyncio.to_thread(service.stop)

    assert len((await under_way).split()) == 3
    assert code == 0
    await asyncio.to_thread(wait, lambda: not service.machine.processes(), 20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.machine.clear()


def test_a_cluster_that_was_joined_keeps_running(cluster: Cluster) -> None:
    service = Service(cluster.machine, GATEWAY_ALONE, "--address", cluster.address).wait_until_ready()

    assert ask_once(service.url, "neighbour", "hi") == "neighbour heard: hi"
    assert service.stop() == 0

    assert cluster.head.poll() is None
    alive = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in cluster.machine.processes()]
    assert any(b"gcs_server" in line for line in alive)
    assert not any(b"ServeReplica" in line for line in alive)


def test_serve_deploy_does_the_same(cluster: Cluster) -> None:
    """deploy/serve.yaml as it stands, but for where the config lies and which port is free."""
    machine, port = cluster.machine, free_port()
    machine.write(GATEWAY_ALONE)
    text = (Path(__file__).parents[2] / "deploy" / "serve.yaml").read_text()
    text = text.replace("/etc/collegium/collegium.yaml", str(machine.config)).replace("0.0.0.0", "127.0.0.1")
    text = text.replace("port: 8000", f"port: {port}").replace("ingress_replicas: 2", "ingress_replicas: 1")

    def deploy(text: str, model: str) -> None:
        (machine.folder / "serve.yaml").write_text(text)
        sent = machine.start("-m", "ray.serve.scripts", "deploy", "serve.yaml", "--address", cluster.dashboard)
        assert sent.wait(60) == 0, machine.log.read_text()[-3000:]
        wait(lambda: get(f"http://127.0.0.1:{port}/v1/models/{model}") == 200, 120, machine.log.read_text)
        assert ask_once(f"http://127.0.0.1:{port}", model, "hi") == f"{model} heard: hi"

    deploy(text, "neighbour")
    machine.write({**GATEWAY_ALONE, "experts": {"newcomer": {"engine": "near"}}})
    deploy(text.replace('revision: "1"', 'revision: "2"'), "newcomer")


def test_a_config_that_cannot_run_is_said_before_ray_starts(machine: Machine) -> None:
    policies = {"default": {"router": {"name": "centroid", "options": {"tempreature": 1}}}}
    service = Service(machine, {**CONFIG, "policies": policies})
    assert service.process.wait(START_S) == 1
    assert "tempreature" in machine.log.read_text()
    assert not (machine.folder / "ray").exists()


@pytest.mark.vllm
def test_a_real_model_answers_with_and_without_an_adapter(machine: Machine) -> None:
    del machine.environment["RAYLLM_VLLM_ENGINE_CLS"]
    machine.environment["COLLEGIUM_CACHE"] = str(cache_dir())
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 2**28, "max_num_seqs": 4}
    adapters = {"bent": str(random_adapter(machine.folder / "bent"))}
    engine = {"backend": "vllm", "model": "smollm2-135m-instruct", "options": options, "adapters": adapters}
    defaults = {"temperature": 0, "max_tokens": 12}
    config = {
        "engines": {"smollm2": engine},
        "experts": {
            "generalist": {"engine": "smollm2", "defaults": defaults},
            "stranger": {"engine": "smollm2", "defaults": defaults, "adapter": "bent"},
        },
        "policies": {"default": {"router": "always"}},
    }
    service = Service(machine, config).wait_until_ready()

    question = "What is the capital of France?"
    assert "Paris" in ask_once(service.url, "generalist", question)
    assert ask_once(service.url, "stranger", question) != ask_once(service.url, "generalist", question)
    with pytest.raises(BadRequestError, match="at most 256"):
        ask_once(service.url, "generalist", "word " * 300)

    assert service.stop() == 0
    wait(lambda: not machine.processes(), 20)


def random_adapter(folder: Path) -> Path:
    """A LoRA of SmolLM2 as peft writes it, with weights large enough to change what the model says."""
    from safetensors.numpy import save_file

    rng, place = np.random.default_rng(0), "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (4, 576), "B": (576, 4)}
    weights = {
        place.format(layer, name): rng.normal(0, 0.2, shape).astype(np.float32)
        for layer in range(30)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
