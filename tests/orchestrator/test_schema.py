"""/openapi.json against the service: what the document allows is answered as it says, and nothing else is taken."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from fastapi import FastAPI

from orchestrator.openai import ChatBody, CompletionBody, EmbeddingBody, RouteBody
from tests.orchestrator.served import Served, fake_config, serving, wait_for

ASK: list[Any] = [{"role": "user", "content": "Ann"}]


class StubEncoder:
    name, width = "stub", 2

    async def encode(self, texts: list[str]) -> Any:
        return np.ones((len(texts), 2), dtype=np.float32)

    async def count_tokens(self, texts: list[str]) -> int:
        return sum(map(len, texts))


def stub_encoder(app: FastAPI) -> None:
    app.state.host.service = replace(app.state.host.service, encoder=StubEncoder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    sections = {
        "security": {"admin_key_env": "ADMIN_KEY"},
        "batches": {"path": str(tmp_path_factory.mktemp("batches")), "max_files": 1000},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADMIN_KEY", "sk-admin")
        with serving(fake_config(sections), prepare=stub_encoder) as running:
            yield running


@pytest.fixture(scope="module")
def document(served: Served) -> Any:
    return served.http.get("/openapi.json").json()


def check(document: Any, model: str, body: Any) -> None:
    """Raises when ``body`` is not what ``model`` says, or has a key that it does not mention."""
    schemas = {
        name: {"additionalProperties": False, **schema} if schema.get("type") == "object" else schema
        for name, schema in document["components"]["schemas"].items()
    }
    jsonschema.validate(body, {"$ref": f"#/components/schemas/{model}", "components": {"schemas": schemas}})


# positive_data_acceptance is left out: which routers, models and limits there are is the config's to say, and that two
# keys of a message belong together is more than the schema tells.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,missing_required_header,unsupported_method,"
    "allow_header_conformance"
)


@pytest.mark.slow
def test_the_service_keeps_to_its_document(served: Served, document: Any, tmp_path: Path) -> None:
    """schemathesis: the examples, the edges of every field, and random bodies, right ones and wrong ones."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{served.url}/openapi.json"]
    bounds = ["--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--seed", "1", "--no-shrink"]
    calm = {**os.environ, "NO_COLOR": "1", "SCHEMATHESIS_HOOKS": ""}
    done = subprocess.run(
        [*command, *bounds, "--checks", CHECKS], cwd=tmp_path, env=calm, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert f"Tested: {sum(map(len, document['paths'].values()))}\n" in done.stdout
    assert served.idle


def test_every_example_is_answered(served: Served) -> None:
    paths = {
        ChatBody: "/v1/chat/completions",
        CompletionBody: "/v1/completions",
        RouteBody: "/v1/route",
        EmbeddingBody: "/v1/embeddings",
    }
    for model, path in paths.items():
        examples = model.model_json_schema()["examples"]
        assert examples
        for example in examples:
            assert served.http.post(path, json=example).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/chat/completions", {"model": "one", "messages": ASK, "collegium": {"explain": True}}, "ChatCompletion"),
        ("/v1/completions", {"model": "one", "prompt": "x", "collegium": {"explain": True}}, "TextCompletion"),
        ("/v1/route", {"messages": ASK}, "Routed"),
        ("/v1/embeddings", {"model": "collegium", "input": "x"}, "Embeddings"),
        ("/v1/embeddings", {"model": "collegium", "input": "x", "encoding_format": "base64"}, "Embeddings"),
        ("/v1/embeddings", {}, "Error"),
        ("/v1/models", None, "Models"),
        ("/v1/models/one", None, "Model"),
        ("/v1/models/nobody", None, "Error"),
        ("/healthz", None, "Health"),
        ("/readyz", None, "Readiness"),
    ],
)
def test_replies_are_as_described(served: Served, document: Any, path: str, body: Any, model: str) -> None:
    reply = served.http.get(path) if body is None else served.http.post(path, json=body)
    check(document, model, reply.json())


def test_decisions_are_as_described(served: Served, document: Any) -> None:
    reply = served.http.post("/v1/chat/completions", json={"model": "one", "messages": ASK})
    check(document, "Explanation", served.http.get(f"/v1/decisions/{reply.json()['id']}").json())


def test_files_and_batches_are_as_described(served: Served, document: Any) -> None:
    form = {"files": {"file": ("in.jsonl", b"x")}, "data": {"purpose": "batch"}}
    file = served.http.post("/v1/files", **form).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "1h"}
    batch = served.http.post("/v1/batches", json=body).json()
    check(document, "File", file)
    check(document, "Batch", batch)
    check(document, "Files", served.http.get("/v1/files").json())
    check(document, "Batches", served.http.get("/v1/batches").json())
    wait_for(lambda: served.http.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed")
    check(document, "Batch", served.http.get(f"/v1/batches/{batch['id']}").json())
    check(document, "FileDeleted", served.http.delete(f"/v1/files/{file['id']}").json())


@pytest.mark.parametrize(
    ("path", "ask", "model"),
    [
        ("/v1/chat/completions", {"messages": ASK}, "ChatCompletionChunk"),
        ("/v1/completions", {"prompt": "x"}, "TextCompletionChunk"),
    ],
)
def test_events_are_as_described(served: Served, document: Any, path: str, ask: Any, model: str) -> None:
    extras = {"stream": True, "stream_options": {"include_usage": True}, "collegium": {"explain": True}}
    rows = served.http.post(path, json={"model": "one", **ask, **extras}).text.split("\n\n")[:-2]
    assert len(rows) == 7
    for row in rows:
        check(document, model, json.loads(row.removeprefix("data: ")))


def test_every_path_is_described(document: Any) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert operation["tags"], path
            assert "422" not in operation["responses"]
            for response in operation["responses"].values():
                assert response["content"], path
            if path.startswith(("/v1", "/admin")):
                assert operation["security"]
