"""What deploy/ holds, checked by who will read it: Ray's schema, KubeRay's, a Dockerfile parser, our command line."""

import importlib
import json
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from experts.errors import ConfigError
from orchestrator import ray_runtime
from orchestrator.cli import app
from orchestrator.config import Config, parse_config
from orchestrator.ray_runtime import ENVIRONMENT, build_application

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SERVE = yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
CONFIG_MAP, RAY_SERVICE = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text(encoding="utf-8"))


def pinned(package: str) -> str:
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    (version,) = {m[1] for line in lines if (m := re.match(rf"{package}(?:\[\w+\])?==([\w.]+)$", line))}
    return version


def test_serve_yaml_is_what_ray_reads() -> None:
    with warnings.catch_warnings():
        # Ray declares its settings in the manner of pydantic 1.
        warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`")
        schema = pytest.importorskip("ray.serve.schema").ServeDeploySchema

    read = schema.model_validate(SERVE).model_dump(mode="json", exclude_unset=True)

    # Ray passes over keys that it does not know; each of ours has to come back.
    assert_within(SERVE, read)


def assert_within(part: Any, whole: Any, place: str = "") -> None:
    if isinstance(part, dict):
        for key in part:
            assert key in whole, f"{place}{key} is unknown"
            assert_within(part[key], whole[key], f"{place}{key}.")
    elif isinstance(part, list):
        assert len(part) == len(whole)
        for index, (a, b) in enumerate(zip(part, whole, strict=True)):
            assert_within(a, b, f"{place}{index}.")
    else:
        assert part == whole, place


def test_serve_yaml_names_a_function_that_takes_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (application,) = SERVE["applications"]
    module, _, name = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    config = tmp_path / "collegium.yaml"
    config.write_text(CONFIG_MAP["data"]["collegium.yaml"])
    made: dict[str, Any] = {}

    def make(config: Config, **settings: Any) -> str:
        made.update(settings, experts=list(config.experts))
        return "application"

    monkeypatch.setattr(ray_runtime, "make_application", make)

    assert build({**application["args"], "config": str(config)}) == "application"
    assert made == {"folder": tmp_path, "ingress_replicas": 2, "experts": ["generalist", "tutor"]}


@pytest.mark.parametrize(
    ("args", "words"),
    [({"conifg": "x"}, "did you mean 'config'"), ({}, "'config' is missing"), ({"config": "/nowhere"}, "Cannot read")],
)
def test_arguments_that_make_no_application(args: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_application(args)


def test_kuberay_yaml_is_a_ray_service() -> None:
    schema = json.loads((Path(__file__).parent / "rayservice_v1.schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    assert [e.message for e in validator.iter_errors(RAY_SERVICE)] == []

    broken = deepcopy(RAY_SERVICE)
    broken["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop("maxReplicas")
    assert len(list(validator.iter_errors(broken))) == 2


def test_kuberay_yaml_deploys_what_serve_yaml_does() -> None:
    assert yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"]) == SERVE
    assert RAY_SERVICE["spec"]["rayClusterConfig"]["rayVersion"] == pinned("ray")


def containers() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    cluster = RAY_SERVICE["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        yield from ((pod, container) for container in pod["containers"])


def test_every_node_has_the_config_and_the_settings() -> None:
    parse_config(yaml.safe_load(CONFIG_MAP["data"]["collegium.yaml"]))
    config = Path(SERVE["applications"][0]["args"]["config"])
    assert CONFIG_MAP["data"].keys() == {config.name}
    for pod, container in containers():
        volumes = {v["name"]: v["configMap"]["name"] for v in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        assert mounts[str(config.parent)] == CONFIG_MAP["metadata"]["name"]
        environment = {e["name"]: e["value"] for e in container["env"]}
        assert environment.items() <= ENVIRONMENT.items()
        assert {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"} <= environment.keys()
        assert pod["securityContext"]["runAsNonRoot"]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Its instructions and what stands behind each, in order."""
    parser = pytest.importorskip("dockerfile_parse").DockerfileParser(
        path=str(DEPLOY / "Dockerfile"), cache_content=True
    )
    return [(i["instruction"], i["value"]) for i in parser.structure if i["instruction"] != "COMMENT"]


def values(dockerfile: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in dockerfile if name == instruction]


def test_base_images_are_pinned_and_the_user_is_not_root(dockerfile: list[tuple[str, str]]) -> None:
    for image in values(dockerfile, "FROM"):
        assert re.match(r"python:3\.\d+\.\d+-slim-\w+( AS \w+)?$", image), image
    (user,) = values(dockerfile, "USER")
    assert int(user) > 0
    last = max(i for i, (name, _) in enumerate(dockerfile) if name == "USER")
    assert "useradd" not in str(dockerfile[last:])


def test_the_image_is_built_from_what_is_here(dockerfile: list[tuple[str, str]]) -> None:
    copied = [words for value in values(dockerfile, "COPY") for words in shlex.split(value)[:-1]]
    sources = [source for source in copied if not source.startswith(("/", "--from="))]
    assert all((ROOT / source).exists() for source in sources)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{source}" for source in sources} <= set(ignored)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert {package.split("/")[0] for package in wheel["wheel"]["packages"]} <= set(sources)

    arguments = dict(value.split("=", 1) for value in values(dockerfile, "ARG"))
    assert set(arguments["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    assert arguments["TORCH"] == f"torch=={pinned('torch')}+cpu"


def test_the_image_runs_a_command_that_there_is(dockerfile: list[tuple[str, str]]) -> None:
    (line,) = values(dockerfile, "CMD")
    command, *arguments = json.loads(line)
    assert command in PROJECT["scripts"]
    accepts(arguments)
    assert arguments[arguments.index("--port") + 1 :][:1] == values(dockerfile, "EXPOSE")
    assert str(SERVE["http_options"]["port"]) in values(dockerfile, "EXPOSE")
    assert arguments[arguments.index("--config") + 1] == SERVE["applications"][0]["args"]["config"]
    for run in values(dockerfile, "RUN"):
        for each in re.findall(r"\bcollegium ([a-z][^&;]*)", run):
            accepts(shlex.split(each))


def accepts(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output


def test_the_image_says_whether_it_is_well(dockerfile: list[tuple[str, str]]) -> None:
    (check,) = values(dockerfile, "HEALTHCHECK")
    command = json.loads(check.split("CMD", 1)[1])
    compile(command[2], "HEALTHCHECK", "exec")
    assert "127.0.0.1:8000/healthz" in command[2]
    settings = " ".join(values(dockerfile, "ENV"))
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_USAGE_STATS_ENABLED"):
        assert f"{name}={ENVIRONMENT[name]}" in settings
