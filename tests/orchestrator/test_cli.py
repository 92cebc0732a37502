"""The commands that need no running service. Exit codes: 0 ok, 1 failed, 2 usage."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from experts.errors import ConfigError
from orchestrator.cli import COMMANDS, app
from orchestrator.starter import find_config, read_config, starter_text

CONFIG = """
engines:
  good: {backend: fake, options: {text: "{expert_id} heard {question}", chunks: 4}}
  broken: {backend: fake, options: {fail: [load]}}
experts:
  one: {engine: good, usd_per_mtok_out: 1000}
  two: {engine: good}
  three: {engine: broken}
policies:
  default: {router: always}
  panel: {router: always, top_k: 2, aggregator: vote}
"""
EXPLANATION = {
    "request_id",
    "policy",
    "aggregator",
    "decision",
    "calls",
    "unanswered",
    "usage",
    "answer_usage",
    "usd",
    "trace",
    "error",
    "latency_ms",
}


@pytest.fixture
def run() -> CliRunner:
    return CliRunner()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands read ./collegium.yaml: run where there is none."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "fake.yaml"
    path.write_text(CONFIG)
    return str(path)


def command_lines(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group, as deep as they go."""
    yield path
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from command_lines(command.get_command(None, name), (*path, name))


COMMAND_LINES = list(command_lines(get_command(app)))


@pytest.mark.parametrize("command", COMMAND_LINES, ids=" ".join)
def test_every_command_has_help_with_an_example(run: CliRunner, command: tuple[str, ...]) -> None:
    result = run.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert f"Example: collegium {' '.join(command)}".strip() in text
    assert "--install-completion" not in result.output


def test_a_package_that_is_missing_is_named_with_its_extra(run: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: object) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")

    monkeypatch.setattr("orchestrator.doctor.read_config", missing)
    result = run.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "pip install 'collegium[train]'" in result.output
    assert isinstance(run.invoke(app, ["--debug", "doctor"]).exception, ModuleNotFoundError)


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    heavy = {"torch", "vllm", "ray", "fastapi", "openai", "transformers", "pydantic", "aiohttp", "uvicorn", "numpy"}
    code = (
        "import sys; from orchestrator.cli import app; app(['--help'], standalone_mode=False);"
        f"print('HEAVY', sorted({heavy!r} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in output
    assert all(f"│ {name} " in output for name in COMMANDS)


def test_version(run: CliRunner) -> None:
    assert run.invoke(app, ["--version"]).output.startswith("collegium 0.")


@pytest.mark.parametrize(
    "line",
    [["nonsense"], ["ask"], ["ask", "x", "--top-k", "0"], ["serve", "--port", "99999"], ["route", "x", "--wrong"]],
    ids=" ".join,
)
def test_a_wrong_command_line_is_a_usage_error(run: CliRunner, line: list[str]) -> None:
    assert run.invoke(app, line).exit_code == 2


def test_init_writes_the_embedded_default(run: CliRunner, tmp_path: Path) -> None:
    result = run.invoke(app, ["init", "new/folder"])
    assert result.exit_code == 0
    path = Path("new/folder/collegium.yaml")
    assert str(path) in result.output
    assert read_config(path) == read_config(None)


def test_init_keeps_a_file_that_is_there(run: CliRunner, tmp_path: Path) -> None:
    Path("collegium.yaml").write_text("mine")
    result = run.invoke(app, ["init"])
    assert result.exit_code == 1
    assert "--force replaces it" in result.output
    assert Path("collegium.yaml").read_text() == "mine"
    assert run.invoke(app, ["init", "--force"]).exit_code == 0
    assert Path("collegium.yaml").read_text() == starter_text()


def test_init_where_nothing_can_be_written(run: CliRunner) -> None:
    Path("file").write_text("")
    result = run.invoke(app, ["init", "file/folder"])
    assert (result.exit_code, "Cannot write" in result.output) == (1, True)


def test_the_schema_accepts_the_starter_and_refuses_a_typo(run: CliRunner) -> None:
    schema = json.loads(run.invoke(app, ["init", "--schema"]).output)
    starter = yaml.safe_load(starter_text())
    jsonschema.validate(starter, schema)
    assert not Path("collegium.yaml").exists()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**starter, "enginess": {}}, schema)


def test_the_starter_has_a_plain_expert_and_prompted_ones_on_one_real_engine() -> None:
    config = read_config(None)
    (engine,) = config.engines.values()
    assert (engine.backend, engine.model) == ("vllm", "smollm2-135m-instruct")
    assert len(config.experts) >= 3
    assert all(len(expert.examples) >= 3 for expert in config.experts.values())
    prompted = [e for e in config.experts.values() if e.system_prompt and e.demos]
    assert 2 <= len(prompted) < len(config.experts)
    assert (config.policies["panel"].top_k, config.policies["panel"].aggregator.name) == (3, "vote")


def test_the_config_is_the_one_named_then_the_one_here_then_the_embedded(tmp_path: Path) -> None:
    assert find_config(None) is None
    here = Path("collegium.yaml")
    here.write_text(CONFIG)
    assert find_config(None) == here
    assert find_config(tmp_path / "other.yaml") == tmp_path / "other.yaml"


def test_ask_answers_on_stdout_and_explains_on_stderr(run: CliRunner, config: str) -> None:
    result = run.invoke(app, ["ask", "Why?", "-c", config])
    assert result.exit_code == 0
    assert result.stdout == "one heard Why?\n"
    assert "one by always in" in result.stderr
    assert "always 'one'" in result.stderr
    assert all(f"{expert} 0." in result.stderr or f"{expert} 1." in result.stderr for expert in ("one", "two", "three"))
    assert "1 + 3 tokens" in result.stderr
    assert "0.003000 USD" in result.stderr


def test_ask_without_stream_gives_the_same_answer(run: CliRunner, config: str) -> None:
    assert run.invoke(app, ["ask", "Why?", "-c", config, "--no-stream"]).stdout == "one heard Why?\n"


def test_ask_in_json(run: CliRunner, config: str) -> None:
    result = run.invoke(app, ["ask", "Why?", "-c", config, "--json"])
    assert result.stderr == ""
    reply = json.loads(result.stdout)
    assert set(reply) == {"answer", *EXPLANATION}
    assert reply["answer"] == "one heard Why?"
    assert reply["decision"]["expert_ids"] == ["one"]
    assert reply["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


def test_ask_explained_shows_every_call(run: CliRunner, config: str) -> None:
    result = run.invoke(app, ["ask", "Why?", "-c", config, "--policy", "panel", "--explain"])
    assert result.exit_code == 0
    calls = [line.split() for line in result.stderr.splitlines() if line.split()[-1:] == ["ok"]]
    assert [call[0] for call in calls] == ["one", "two"]


def test_ask_an_expert_by_name(run: CliRunner, config: str) -> None:
    result = run.invoke(app, ["ask", "Why?", "-c", config, "--expert", "two"])
    assert result.stdout == "two heard Why?\n"
    assert "asked for by name" in result.stderr


def test_ask_loads_the_engine_it_needs_and_no_other(run: CliRunner, config: str) -> None:
    assert run.invoke(app, ["ask", "Why?", "-c", config]).exit_code == 0
    failed = run.invoke(app, ["ask", "Why?", "-c", config, "--expert", "three"])
    assert failed.exit_code == 1
    assert "'broken' failed to load" in failed.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--router", "nonsense"], "known: always, hash, random, round_robin"),
        (["--aggregator", "nonsense"], "No aggregator 'nonsense'"),
        (["--expert", "nobody"], "No model 'nobody'"),
        (["--policy", "nothing"], "No model 'collegium/nothing'"),
        (["--expert", "one", "--top-k", "2"], "asked by name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_without_a_traceback(run: CliRunner, config: str, line: list[str], says: str) -> None:
    result = run.invoke(app, ["ask", "Why?", "-c", config, *line])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("collegium: ")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_config_that_is_not_there(run: CliRunner) -> None:
    result = run.invoke(app, ["ask", "Why?", "-c", "missing.yaml"])
    assert (result.exit_code, "'collegium init' writes one" in result.stderr) == (1, True)


def test_debug_shows_the_traceback(run: CliRunner) -> None:
    result = run.invoke(app, ["--debug", "ask", "Why?", "-c", "missing.yaml"])
    assert isinstance(result.exception, ConfigError)


def test_route_loads_no_engine(run: CliRunner, config: str) -> None:
    result = run.invoke(app, ["route", "Why?", "-c", config, "--policy", "panel", "--top-k", "3", "--json"])
    assert result.exit_code == 0
    decision = json.loads(result.stdout)
    assert sorted(decision["expert_ids"]) == ["one", "three", "two"]
    assert sum(decision["weights"]) == pytest.approx(1)
    assert set(decision) == {"expert_ids", "weights", "scores", "reason", "router", "route_ms"}


def test_route_in_words_on_the_embedded_default(run: CliRunner) -> None:
    result = run.invoke(app, ["route", "Why?", "--router", "always"])
    assert result.exit_code == 0
    assert result.stdout.startswith("generalist by always in")
    assert "translator 0." in result.stdout


def test_models_list(run: CliRunner) -> None:
    rows = json.loads(run.invoke(app, ["models", "list", "--json"]).stdout)
    assert {"smollm2-135m-instruct", "all-minilm-l6-v2"} <= {row["name"] for row in rows}
    assert set(rows[0]) == {"name", "prepared", "size_bytes", "licence", "package", "path"}
    words = run.invoke(app, ["models", "list"]).stdout
    assert all(row["name"] in words and row["path"] in words for row in rows)


def test_models_prepare_of_an_unknown_model(run: CliRunner) -> None:
    result = run.invoke(app, ["models", "prepare", "smollm3"])
    assert (result.exit_code, "smollm2-135m-instruct" in result.stderr) == (1, True)


def test_an_address_is_for_ray(run: CliRunner, config: str) -> None:
    assert run.invoke(app, ["serve", "-c", config, "--address", "auto"]).exit_code == 2


def test_the_ray_runtime_gets_what_was_asked(run: CliRunner, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    module = ModuleType("orchestrator.ray_runtime")
    module.run = lambda config, **rest: seen.append((list(config.experts), rest))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orchestrator.ray_runtime", module)
    line = ["serve", "-c", config, "--runtime", "ray", "--host", "0.0.0.0", "--port", "9", "--address", "auto"]
    assert run.invoke(app, line).exit_code == 0
    where = {"config_path": Path(config), "host": "0.0.0.0", "port": 9, "address": "auto"}
    assert seen == [(["one", "two", "three"], where)]
