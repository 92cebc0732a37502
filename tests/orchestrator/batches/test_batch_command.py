import json
import os

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.orchestrator.batches.batch import Batch, config, line


@pytest.fixture
def folder(tmp_path):
    Batch(tmp_path).write([line(f"q{i}") for i in range(6)])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config()))
    return tmp_path


def call(folder, *more, out="out.jsonl"):
    given = ["batch", "run", str(folder / "in.jsonl"), "--out", str(folder / out), "-c", str(folder / "c.yaml"), *more]
    return CliRunner().invoke(app, given)


def test_run(folder):
    result = call(folder, "--router", "always", "--top-k", "3")
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "out.report.json").read_bytes())
    assert (report["expert_calls"], report["loads"], report["order"], report["resident"]) == (18, 3, "grouped", 1)
    assert "6 of 6 lines answered by 18 calls" in " ".join(result.output.split())


def test_several_engines_at_a_time(folder):
    assert call(folder, "--resident", "3").exit_code == 0
    assert json.loads((folder / "out.report.json").read_bytes())["resident"] == 3


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("in.jsonl", "is the input itself"),
        ("none/out.jsonl", "There is no folder"),
        ("", "is a folder"),
        ("/proc/o", "Cannot write"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(folder, out, message):
    result = call(folder, out=out)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_a_disk_without_room_is_said_before_any_work(folder, monkeypatch):
    monkeypatch.setattr("orchestrator.batches.output.SPARE_BYTES", 2**60)
    result = call(folder)
    assert result.exit_code == 1
    assert "MB free" in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "in.jsonl"]


def test_no_input(folder):
    (folder / "in.jsonl").unlink()
    result = call(folder)
    assert (result.exit_code, "There is no file" in result.output) == (1, True)


def test_no_file_of_the_batch_takes_the_inputs_place(folder):
    (folder / "in.jsonl").rename(folder / "out.errors.jsonl")  # what failed before, corrected
    given = ["batch", "run", str(folder / "out.errors.jsonl"), "--out", str(folder / "out.jsonl")]
    result = CliRunner().invoke(app, [*given, "-c", str(folder / "c.yaml")])
    assert (result.exit_code, "is the input itself" in " ".join(result.output.split())) == (1, True)


def test_an_input_that_can_be_read_only_once(folder):
    (folder / "in.jsonl").unlink()
    os.mkfifo(folder / "in.jsonl")
    result = call(folder)
    assert (result.exit_code, "no regular file" in " ".join(result.output.split())) == (1, True)


def test_no_answer_at_all_is_a_failure(folder):
    (folder / "in.jsonl").write_text("x\ny\n")
    result = call(folder)
    assert (result.exit_code, "0 of 2 lines" in " ".join(result.output.split())) == (1, True)
    (folder / "in.jsonl").write_text("")
    assert call(folder).exit_code == 0


def test_reading_a_long_file_is_told(folder, monkeypatch):
    monkeypatch.setattr("orchestrator.commands.batch.READ_LINES", 512)
    Batch(folder).write([line(f"q{i}", model="one") for i in range(1100)])
    assert "reading: 512 lines" in call(folder).output


def test_nothing_to_resume(folder):
    assert "was never begun" in " ".join(call(folder, "--resume").output.split())


def test_usage_and_help():
    assert CliRunner().invoke(app, ["batch", "run"]).exit_code == 2
    told = CliRunner().invoke(app, ["batch", "run", "--help"])
    assert told.exit_code == 0
    assert "Example: collegium batch run" in " ".join(told.output.split())
