"""Three real experts behind one request, over HTTP: SmolLM2 with three prompts, combined by vote, by fusing, and by
what was fitted."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.orchestrator.planted import fit_reward, fit_stack

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENGINE = {
    "backend": "vllm",
    "model": "smollm2-135m-instruct",
    "options": {"max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**28},
}
CONFIG: dict[str, Any] = {
    "engines": {"smollm2": ENGINE},
    "experts": {
        "plain": {"engine": "smollm2"},
        "terse": {"engine": "smollm2", "system_prompt": "Answer in one word."},
        "teacher": {"engine": "smollm2", "system_prompt": "You are a patient teacher of geography."},
    },
    "policies": {
        "default": {"router": "always"},
        "fused": {"router": "always", "aggregator": {"name": "fuse", "options": {"expert": "plain"}}},
        "judged": {
            "router": "always",
            "top_k": 3,
            "aggregator": {"name": "general_expert", "options": {"expert": "plain", "labels": ["Paris", "Rome"]}},
        },
    },
    "encoder": {"model": "wordllama"},
}
FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    path = tmp_path_factory.mktemp("combining") / "collegium.yaml"
    stack = fit_stack(path.parent, {"plain": 0.8, "terse": 0.5, "teacher": 0.3})
    fitted = {"stack": ("stack", stack, {"threshold": 1}), "best_of": ("best_of", fit_reward(path.parent), {})}
    policies = {
        name: {"router": "always", "aggregator": {"name": aggregator, "artefact": str(folder), "options": options}}
        for name, (aggregator, folder, options) in fitted.items()
    }
    path.write_text(yaml.safe_dump({**CONFIG, "policies": {**CONFIG["policies"], **policies}}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "orchestrator.cli", "serve", "-c", str(path), "--port", str(port)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=180, trust_env=False) as client:
                _wait(client, process)
                yield client
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _wait(client: httpx.Client, process: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + 300
    while True:
        assert process.poll() is None
        assert time.monotonic() < give_up
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)


def ask(http: httpx.Client, **collegium: Any) -> dict[str, Any]:
    model = collegium.pop("model", "collegium")
    body = {"model": model, "messages": FRANCE, "max_tokens": 48, "temperature": 0}
    reply = http.post("/v1/chat/completions", json={**body, "collegium": {"explain": True, **collegium}})
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


def test_three_experts_vote(http: httpx.Client) -> None:
    told = ask(http, top_k=3, aggregator="vote")
    assert "Paris" in told["choices"][0]["message"]["content"]
    explained = told["collegium"]
    assert {a["expert_id"] for a in explained["trace"]["answers"]} <= {"plain", "terse", "teacher"}
    assert len(explained["calls"]) == 3


def test_one_expert_fuses_three(http: httpx.Client) -> None:
    told = ask(http, top_k=3, aggregator="fuse")
    explained = told["collegium"]
    assert told["choices"][0]["message"]["content"].strip()
    assert explained["trace"]["expert"] == "plain"
    assert sorted(c["expert_id"] for c in explained["calls"]) == ["plain", "plain", "teacher", "terse"]
    assert told["usage"]["total_tokens"] == sum(c["usage"]["total_tokens"] for c in explained["calls"])
    assert "[Response" not in told["choices"][0]["message"]["content"]


def test_a_general_expert_decides(http: httpx.Client) -> None:
    told = ask(http, model="collegium/judged")
    assert told["choices"][0]["message"]["content"] in ("Paris", "Rome")


@pytest.mark.parametrize(("aggregator", "counts"), [("stack", "weight"), ("best_of", "score")])
def test_what_was_fitted_combines_three(http: httpx.Client, aggregator: str, counts: str) -> None:
    question: Any = {"role": "user", "content": "What is the capital of France?\nA. Rome\nB. Paris\nC. Madrid"}
    wanted = {"top_k": 3, "aggregator": aggregator, "explain": True}
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", timeout=180, max_retries=0) as client:
        reply = client.chat.completions.create(
            model="collegium", messages=[question], max_tokens=48, temperature=0, extra_body={"collegium": wanted}
        )
    assert reply.choices[0].message.content
    explained = reply.model_extra["collegium"]  # type: ignore[index]
    assert explained["aggregator"] == aggregator
    assert {a["expert_id"] for a in explained["trace"]["answers"]} == {"plain", "terse", "teacher"}
    assert all(isinstance(a[counts], float) for a in explained["trace"]["answers"])
    assert len(explained["calls"]) == 3
