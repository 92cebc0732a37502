"""Each check of the doctor against a real socket, folder, package or stub endpoint that is ill in the way it names."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config import parse_config
from orchestrator.doctor import CHECKS, configuration, examine, installation
from orchestrator.doctor.case import Case, Finding

KEY = "sk-good"


class StubEndpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible /v1/models that asks for a key."""

    def do_GET(self) -> None:  # http.server's name
        status = 404 if not self.path.startswith("/v1/models") else self._judge()
        body = json.dumps({"object": "list", "data": [{"id": "some-model"}]}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _judge(self) -> int:
        return 200 if self.headers.get("authorization") == f"Bearer {KEY}" else 401

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), StubEndpoint) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def make_case(*, port: int = 0, **sections: object) -> Case:
    data: dict[str, object] = {
        "engines": {"a": {"backend": "fake"}},
        "experts": {"x": {"engine": "a"}},
        "policies": {"default": {}},
        **sections,
    }
    return Case(config=parse_config(data), port=port)


def case_of_engine(**engine: object) -> Case:
    return make_case(engines={"a": engine})


def case_of_endpoint(base_url: str, **rest: object) -> Case:
    return case_of_engine(backend="openai", base_url=base_url, model="some-model", **rest)


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[str]], None]:
    """Makes the installation one that has just these packages."""

    def install(packages: set[str]) -> None:
        monkeypatch.setattr(installation, "_installed", packages.__contains__)

    return install


def test_a_typo_in_the_config_names_the_nearest_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "engines: {a: {backend: fake}}\nexperts: {x: {engine: a, sytem_prompt: hi}}\npolicies: {default: {}}"
    )
    finding = only(examine(path, host="127.0.0.1", port=0))
    assert finding.status == "fail"
    assert "did you mean 'system_prompt'?" in finding.message


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    finding = only(examine(tmp_path / "none.yaml", host="127.0.0.1", port=0))
    assert (finding.check, finding.status) == ("config", "fail")


@pytest.mark.parametrize(
    ("sections", "package", "extra"),
    [
        ({"engines": {"a": {"backend": "vllm", "model": "m"}}}, "vllm", "cpu"),
        ({"engines": {"a": {"backend": "serve", "model": "m", "deployment": "d"}}}, "ray", "ray"),
        ({"policies": {"default": {"router": "centroid"}}}, "sentence_transformers", "encoder"),
        ({"telemetry": {"otlp_endpoint": "http://127.0.0.1:4318"}}, "opentelemetry", "otel"),
    ],
)
def test_a_missing_extra(
    sections: dict[str, object],
    package: str,
    extra: str,
    installed: Callable[[set[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installation, "_has_gpu", lambda: False)
    installed(set())
    missing = only(installation.extras(make_case(**sections)))
    assert missing.status == "fail"
    assert package in missing.message
    assert missing.todo.startswith(f"pip install 'collegium[{extra}]'")
    installed({package})
    assert only(installation.extras(make_case(**sections))).status == "ok"


def test_the_gateway_alone_needs_no_extra(installed: Callable[[set[str]], None]) -> None:
    installed(set())
    assert list(installation.extras(make_case())) == []


def test_a_gpu_machine_is_told_the_gpu_extra(
    installed: Callable[[set[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "_has_gpu", lambda: True)
    installed(set())
    todo = only(installation.extras(case_of_engine(backend="vllm", model="m"))).todo
    assert todo == "pip install 'collegium[gpu]'"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms does not exist"),
        ("import os; os._exit(134)", "status 134"),
    ],
)
def test_a_torchvision_that_does_not_import(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(installation, "BREAKABLE", ("torchvision",))
    monkeypatch.syspath_prepend(tmp_path)
    finding = only(installation.imports(make_case()))
    assert finding.status == "fail"
    assert reason in finding.message
    assert finding.todo == "pip uninstall -y torchvision"


def test_packages_that_import_or_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "BREAKABLE", ("json", "not_installed_anywhere"))
    assert only(installation.imports(make_case())).status == "ok"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "file" / "cache"))
    finding = only(installation.cache(make_case()))
    assert finding.status == "fail"
    assert "COLLEGIUM_CACHE" in finding.todo


def test_a_cache_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    assert only(installation.cache(make_case())).status == "ok"
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_little_memory_names_the_largest_engine() -> None:
    engines = {"small": {"backend": "fake", "memory_gib": 1}, "huge": {"backend": "fake", "memory_gib": 100_000}}
    experts = {"x": {"engine": "small"}}
    finding = only(installation.memory(make_case(engines=engines, experts=experts)))
    assert finding.status == "fail"
    assert "100001.0 GiB" in finding.message
    assert "'huge'" in finding.todo


def test_memory_counts_the_engines_that_are_loaded_together() -> None:
    engines = {name: {"backend": "fake", "memory_gib": 0.1 if name else 1} for name in ("a", "b")}
    finding = only(installation.memory(make_case(engines=engines, residency={"slots": 1})))
    assert finding.status == "ok"
    assert "need 0.1 GiB" in finding.message


def test_a_vllm_engine_is_estimated_from_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_has_gpu", lambda: False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * 2**30)
    finding = only(installation.memory(case_of_engine(backend="vllm", model=str(tmp_path))))
    assert f"need {2 + 4 + installation.VLLM_GIB:.1f} GiB" in finding.message
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    options = {"kv_cache_memory_bytes": 3 * 2**30}
    bundled = case_of_engine(backend="vllm", model="smollm2-135m-instruct", options=options)
    assert f"need {0.25 + 3 + installation.VLLM_GIB:.1f} GiB" in only(installation.memory(bundled)).message


def test_memory_that_is_not_known_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "available_gib", lambda: None)
    assert only(installation.memory(make_case())).status == "warn"


def test_the_container_s_limit_counts_where_it_is_tighter(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 8388608 kB\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert installation.available_gib(meminfo, tmp_path) == 8
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    assert installation.available_gib(meminfo, tmp_path) == 2
    assert installation.available_gib(tmp_path / "none", tmp_path / "none") is None


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finding = only(installation.port(make_case(port=port)))
    assert finding.status == "fail"
    assert f"127.0.0.1:{port} is in use" in finding.message
    assert only(installation.port(make_case(port=port))).status == "ok"


def test_a_host_that_is_not_ours() -> None:
    case = Case(config=make_case().config, host="192.0.2.1", port=0)
    assert "cannot listen" in only(installation.port(case)).message


def test_a_router_that_does_not_exist_names_the_nearest() -> None:
    finding = only(configuration.policies(make_case(policies={"default": {"router": "randon"}})))
    assert finding.status == "fail"
    assert "did you mean 'random'?" in finding.message
    assert only(configuration.policies(make_case())).status == "ok"


def test_a_bundled_model_that_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    finding = only(configuration.models(case_of_engine(backend="vllm", model="smollm2-135m-instruct")))
    assert finding.status == "warn"
    assert finding.todo == "collegium models prepare smollm2-135m-instruct"


def test_the_encoder_s_model_is_checked_where_a_router_reads_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    assert list(configuration.models(make_case())) == []
    case = make_case(policies={"default": {"router": {"name": "centroid"}}})
    assert "all-minilm-l6-v2" in only(configuration.models(case)).message


def test_a_model_folder(tmp_path: Path) -> None:
    gone = case_of_engine(backend="vllm", model=str(tmp_path / "gone"))
    assert only(configuration.models(gone)).status == "fail"
    assert only(configuration.models(case_of_engine(backend="vllm", model=str(tmp_path)))).status == "ok"


def test_keys_that_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    security = {"api_keys": {"alice": {"env": "ALICE_KEY"}}, "admin_key_env": "ADMIN_KEY"}
    engine = {"backend": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "UP_KEY"}
    case = make_case(engines={"a": engine}, security=security)
    monkeypatch.setenv("ALICE_KEY", "k")
    monkeypatch.delenv("ADMIN_KEY", raising=False)
    monkeypatch.setenv("UP_KEY", "")
    found = {f.message: f for f in configuration.keys(case)}
    assert {m.split()[0]: f.status for m, f in found.items()} == {
        "ALICE_KEY": "ok",
        "ADMIN_KEY": "fail",
        "UP_KEY": "fail",
    }
    assert {f.todo for f in found.values()} == {"", "export ADMIN_KEY=...", "export UP_KEY=..."}


def test_a_key_in_the_place_of_its_variable_is_not_shown() -> None:
    case = make_case(security={"admin_key_env": "gsk_Abc123"})
    (found,) = configuration.keys(case)
    assert found.status == "fail"
    assert "gsk" not in found.message + found.todo
    assert "not the key" in found.todo


def test_an_endpoint_that_cannot_be_reached(closed_port: int) -> None:
    url = f"http://127.0.0.1:{closed_port}/v1"
    finding = only(configuration.endpoints(case_of_endpoint(url)))
    assert finding.status == "fail"
    assert f"{url}/models cannot be reached" in finding.message


def test_an_endpoint_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        assert "no answer within 0.1 s" in only(configuration.endpoints(case_of_endpoint(url))).message


@pytest.mark.parametrize(
    ("key", "status", "says"),
    [
        (KEY, "ok", "has 'some-model'"),
        ("sk-bad", "fail", "refuses the key in UP_KEY (HTTP 401)"),
        ("", "fail", "refuses a request without a key"),
    ],
)
def test_an_endpoint_s_key(endpoint: str, key: str, status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP_KEY", key)
    finding = only(configuration.endpoints(case_of_endpoint(f"{endpoint}/v1", api_key_env="UP_KEY")))
    assert finding.status == status
    assert says in finding.message
    assert "sk-" not in finding.message + finding.todo


def test_an_endpoint_without_the_model(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP_KEY", KEY)
    case = case_of_engine(backend="openai", base_url=f"{endpoint}/v1", model="other", api_key_env="UP_KEY")
    finding = only(configuration.endpoints(case))
    assert (finding.status, finding.todo) == ("warn", "take one it has: some-model")


def test_an_endpoint_is_asked_as_the_engine_will_ask_it(endpoint: str) -> None:
    """Some take their key in a header of their own, and a version in the query."""
    headers = {"authorization": f"Bearer {KEY}"}
    case = case_of_endpoint(f"{endpoint}/v1?api-version=2024", options={"headers": headers})
    finding = only(configuration.endpoints(case))
    assert (finding.status, "has 'some-model'" in finding.message) == ("ok", True)


def test_an_endpoint_that_is_no_address() -> None:
    finding = only(configuration.endpoints(case_of_endpoint("http://127.0.0.1:99999/v1")))
    assert (finding.status, "base_url is no address" in finding.message) == ("fail", True)


def test_an_endpoint_with_wrong_options(endpoint: str) -> None:
    finding = only(configuration.endpoints(case_of_endpoint(endpoint, options={"timeout": 5})))
    assert (finding.status, "unknown option 'timeout'" in finding.message) == ("fail", True)


def test_a_base_url_without_v1(endpoint: str) -> None:
    finding = only(configuration.endpoints(case_of_endpoint(endpoint)))
    assert finding.status == "warn"
    assert "ends in /v1" in finding.todo


def test_doctor_prints_a_line_a_check_and_fails_when_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("engines: {a: {backend: fake}}\nexperts: {x: {engine: a}}\npolicies: {default: {}}")
    run = CliRunner()
    well = run.invoke(app, ["doctor", "-c", str(path), "--port", "0"])
    assert well.exit_code == 0
    assert all(line.startswith("ok    ") for line in well.output.splitlines())
    with socket.create_server(("127.0.0.1", 0)) as server:
        ill = run.invoke(app, ["doctor", "-c", str(path), "--port", str(server.getsockname()[1]), "--json"])
    assert ill.exit_code == 1
    report = json.loads(ill.output)
    assert report["ok"] is False
    assert [f["check"] for f in report["findings"] if f["status"] == "fail"] == ["port"]


def test_doctor_runs_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("engines: {a: {backend: fake}}\nexperts: {x: {engine: a}}\npolicies: {default: {}}")
    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, lambda case, name=name: iter([Finding(check=name, message="seen")]))
    findings = list(examine(path, host="127.0.0.1", port=0))
    assert [f.check for f in findings] == ["config", *CHECKS]


def test_the_encoder_in_use_is_named_with_what_runs_it() -> None:
    routed = {"policies": {"default": {"router": "centroid"}}}
    found = only(configuration.encoder(make_case(encoder={"model": "wordllama"}, **routed)))
    assert (found.status, found.message) == ("ok", "wordllama (256 wide) by numpy, single spaces, in use")
    assert "no policy reads" in only(configuration.encoder(make_case(encoder={"model": "wordllama"}))).message
    absent = {"encoder": {"model": "/no/such/folder"}}
    assert only(configuration.encoder(make_case(**absent, **routed))).status == "fail"
    assert only(configuration.encoder(make_case(**absent))).status == "ok", "nobody needs it"


@pytest.mark.parametrize(
    ("policy", "needs"),
    [
        ({"aggregator": "best_of"}, True),
        ({"aggregator": {"name": "vote", "options": {"extract": "embedding"}}}, True),
        ({"aggregator": {"name": "best_of", "artefact": "reward"}}, False),
        ({"aggregator": "vote"}, False),
        ({"router": {"name": "prompts"}}, True),
    ],
)
def test_aggregators_may_read_embeddings_too(policy: dict[str, object], needs: bool) -> None:
    assert make_case(policies={"default": policy}).needs_encoder is needs


def test_the_folder_of_batches_can_be_written(tmp_path: Path) -> None:
    assert list(installation.batches(make_case())) == [], "batches are closed"
    assert only(installation.batches(make_case(batches={"path": str(tmp_path / "batches")}))).status == "ok"
    (tmp_path / "file").write_text("")
    ill = only(installation.batches(make_case(batches={"path": str(tmp_path / "file" / "batches")})))
    assert (ill.status, "cannot be written" in ill.message) == ("fail", True)


def test_a_static_encoder_does_without_sentence_transformers(installed: Callable[[set[str]], None]) -> None:
    installed({"wordllama"})
    case = make_case(encoder={"model": "wordllama"}, policies={"default": {"router": "centroid"}})
    assert only(installation.extras(case)).message == "wordllama is installed"
