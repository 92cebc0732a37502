"""A gateway without Ray around it: what Serve's hooks do."""

from pathlib import Path
from typing import Any

import pytest

from experts.errors import ConfigError
from experts.fake import FakeEngine
from experts.serve_handle import ServeEngine
from orchestrator import ray_gateway
from orchestrator.host import Host
from orchestrator.ray_gateway import Gateway, check

CONFIG: dict[str, Any] = {
    "engines": {"far": {"backend": "vllm", "model": "m"}, "near": {"backend": "fake"}},
    "experts": {"a": {"engine": "far"}, "b": {"engine": "near"}},
    "policies": {"default": {"router": "always"}},
}


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setattr(ray_gateway, "_configure_log", lambda level: None)
    monkeypatch.chdir(Path.cwd())  # so that the gateway's own is undone
    return Gateway(CONFIG, str(tmp_path), {"far": "a handle"})  # type: ignore[dict-item]


async def host_of(gateway: Gateway) -> Host:
    host: Host = gateway.__serve_build_asgi_app__().state.host
    host.service.engines["near"].loaded = True  # type: ignore[attr-defined]
    return host


async def test_vllm_engines_are_out_of_the_process_and_the_others_in_it(gateway: Gateway, tmp_path: Path) -> None:
    engines = (await host_of(gateway)).service.engines
    assert isinstance(engines["far"], ServeEngine)
    assert isinstance(engines["near"], FakeEngine)
    assert Path.cwd() == tmp_path


async def test_takes_a_changed_config_and_keeps_its_engines(gateway: Gateway) -> None:
    host = await host_of(gateway)
    before, engine = host.service, host.service.engines["far"]

    await gateway.reconfigure(CONFIG)
    assert host.service is before

    await gateway.reconfigure({**CONFIG, "experts": {**CONFIG["experts"], "c": {"engine": "far"}}})
    assert set(host.service.experts) == {"a", "b", "c"}
    assert host.service.engines["far"] is engine


async def test_a_config_that_does_not_load_leaves_the_gateway_as_it_was(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    host = await host_of(gateway)
    broken = {"backend": "fake", "options": {"fail": ["load"]}}

    await gateway.reconfigure({**CONFIG, "engines": {**CONFIG["engines"], "broken": broken}})

    assert set(host.service.engines) == {"far", "near"}
    assert "config not reloaded, the old one stays" in caplog.text
    # And it can still be told better.
    await gateway.reconfigure({**CONFIG, "experts": {"b": {"engine": "near"}}})
    assert set(host.service.experts) == {"b"}


async def test_serve_may_reconfigure_before_there_is_an_app(gateway: Gateway) -> None:
    await gateway.reconfigure({**CONFIG, "experts": {"b": {"engine": "near"}}})
    assert set((await host_of(gateway)).service.experts) == {"b"}


def test_what_no_gateway_could_run_on_is_found_first(tmp_path: Path) -> None:
    from orchestrator.config import parse_config

    check(parse_config(CONFIG), folder=tmp_path)
    router = {"name": "random", "options": {"sed": 1}}
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        check(parse_config({**CONFIG, "policies": {"default": {"router": router}}}), folder=tmp_path)


def test_batches_are_refused_in_words(tmp_path: Path) -> None:
    from orchestrator.config import parse_config

    with pytest.raises(ConfigError, match=r"batches\.path: .*--runtime local"):
        check(parse_config({**CONFIG, "batches": {"path": str(tmp_path)}}), folder=tmp_path)
