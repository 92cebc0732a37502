"""'make demo': four answers by a real model, and nothing left running, however it ends."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from orchestrator import demo
from orchestrator.demo import QUESTIONS

STAND_IN = """#!{python}
import json, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({readiness!r}).encode()
        self.send_response(200 if {readiness!r}["ready"] else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

subprocess.Popen(["sleep", "600"])
print("the stand-in says hello", file=sys.stderr, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo puts the folder that its service, and all below it, run in: what runs there is the demo's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    for pid in running(tmp_path):
        os.kill(pid, signal.SIGKILL)


def running(place: Path) -> dict[int, str]:
    """The processes that run under ``place``, zombies left out, and their names."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            where, name = os.readlink(folder / "cwd"), (folder / "cmdline").read_text()
            if where.startswith(str(place)) and "\nState:\tZ" not in (folder / "status").read_text():
                found[int(folder.name)] = name
    return found


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Takes the service's place: a program with a child of its own, that answers /readyz only."""
    path = tmp_path / "stand-in"
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(demo, "prepare", lambda *_: path)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield path
    for number, handler in kept.items():
        signal.signal(number, handler)


def write(path: Path, *, ready: bool, engine: str) -> None:
    readiness = {"ready": ready, "engines": {"smollm2": engine}}
    path.write_text(STAND_IN.format(python=os.path.realpath("/proc/self/exe"), readiness=readiness))
    path.chmod(0o755)


def test_a_service_that_does_not_answer_fails_the_demo_and_is_ended_with_its_children(
    stand_in: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(stand_in, ready=True, engine="ready")
    assert demo.main() == 1
    assert "the service did not answer" in capsys.readouterr().out
    assert running(place) == {}


def test_an_engine_that_does_not_load_fails_the_demo_with_the_end_of_the_log(
    stand_in: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(stand_in, ready=False, engine="failed: no memory")
    assert demo.main() == 1
    told = capsys.readouterr().out
    assert "did not get ready" in told
    assert "the stand-in says hello" in told
    assert running(place) == {}


def test_a_service_that_ends_at_once_fails_the_demo(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.write_text("#!/bin/sh\necho broken installation\nexit 3\n")
    stand_in.chmod(0o755)
    assert demo.main() == 1
    assert "broken installation" in capsys.readouterr().out


def started() -> subprocess.Popen[str]:
    """The demo as a terminal starts it: a background job may have been told to ignore Ctrl-C, and hands that down."""
    command = [sys.executable, "-m", "orchestrator.demo"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(number: int, place: Path) -> None:
    process = started()
    assert process.stdout is not None
    with process, process.stdout as output:
        next(line for line in output if line.startswith("Starting the service"))
        process.send_signal(number)
        told = output.read()
        assert process.wait(timeout=60) == 130
    assert told.endswith("Stopped.\n")
    assert running(place) == {}


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_is_loading_goes_too(place: Path) -> None:
    process = started()
    assert process.stdout is not None
    with process, process.stdout:
        deadline = time.monotonic() + 200
        while not any("EngineCore" in name for name in running(place).values()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=100) == 130
    assert running(place) == {}


@pytest.mark.vllm
@pytest.mark.slow
def test_four_questions_get_four_answers_from_four_experts(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.demo"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    blocks = done.stdout.split("\n> ")[1:]
    assert len(blocks) == len(QUESTIONS) == 4
    experts = [_expert(block, question) for block, question in zip(blocks, QUESTIONS, strict=True)]
    assert experts == ["generalist", "tutor", "translator", "coder"]
    assert "Paris" in blocks[0]
    assert "def " in blocks[3]
    assert running(place) == {}


def _expert(block: str, question: str) -> str:
    """Who answered, after checking that the block has a question, an answer, a decision with scores, and usage."""
    asked, *answer, decision, scores, usage = block.split("\nStopping the service")[0].strip().splitlines()
    assert asked == question
    assert any(line.strip() for line in answer)
    found = re.fullmatch(r"(\w+) by centroid in [\d.]+ ms: closest to .*", decision)
    assert found is not None, decision
    assert scores.startswith(found[1])
    assert len(re.findall(r"\w+ -?\d\.\d{3}", scores)) == 4
    assert re.fullmatch(r"[1-9]\d* \+ [1-9]\d* tokens, first after \d+ ms, all after \d+ ms", usage), usage
    return found[1]
