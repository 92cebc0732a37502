"""What is said of a stack that is hardly worth having."""

import gzip
from pathlib import Path

import orjson
from typer.testing import CliRunner

from orchestrator.aggregators.stacking import artefact
from orchestrator.aggregators.stacking.build import Wish
from orchestrator.aggregators.stacking.doubts import ADVISED, doubts
from orchestrator.aggregators.stacking.recorded import read_recorded, rows_of
from orchestrator.cli import app
from tests.orchestrator.planted import write_pool


def doubted(folder: Path, **pool: object) -> list[str]:
    recorded = read_recorded(write_pool(folder, questions=ADVISED * 5 // 4, **pool))  # type: ignore[arg-type]
    rows = rows_of(recorded, ["train"])
    return list(doubts(artefact.fit(recorded, rows, Wish(with_prior=False)), recorded, rows))


def test_nothing_is_said_of_a_stack_that_gains_on_enough_questions(tmp_path: Path) -> None:
    assert doubted(tmp_path, rates={"a": 0.6, "b": 0.6, "c": 0.55}) == []


def test_a_stack_no_better_than_its_best_expert_is_told(tmp_path: Path) -> None:
    (doubt,) = doubted(tmp_path, rates={"ace": 0.8, "noise": 0.1})
    assert "the best expert alone, ace" in doubt
    assert "'first' with that expert" in doubt


def test_questions_without_a_right_option_are_counted_and_brackets_are_read(tmp_path: Path) -> None:
    pool = write_pool(tmp_path, questions=ADVISED * 5 // 4, rates={"a": 0.6, "b": 0.6, "c": 0.55})
    path = pool / "questions.jsonl.gz"
    rows = [orjson.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows[0]["answer"] = f"({rows[0]['answer']})"
    ids = [rows[number]["id"] for number in (1, 2)]
    for number, answer in ((1, "nonsense"), (2, None)):
        rows[number]["answer"] = answer
    path.write_bytes(gzip.compress(b"".join(orjson.dumps(row) + b"\n" for row in rows)))
    recorded = read_recorded(pool)
    learned = rows_of(recorded, ["train"])
    assert set(ids) <= {recorded.records.question_ids[r] for r in learned}
    said = doubts(artefact.fit(recorded, learned, Wish(with_prior=False)), recorded, learned)
    (doubt,) = [one for one in said if "left out" in one]
    assert doubt.startswith(f"2 of {len(learned)} questions were left out")
    assert repr(ids[0]) in doubt


def test_a_tiny_pool_is_fitted_with_a_warning(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", questions=35)
    command = ["build", "stack", "--no-prior", "--pool", str(pool), "--out", str(tmp_path / "stack")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "Warning: 28 questions are few for a stack" in said
    assert f"Record {ADVISED} or more" in said
    assert artefact.load(tmp_path / "stack").questions == 28
