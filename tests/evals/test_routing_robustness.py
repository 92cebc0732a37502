"""Rewritings, experts left out in turn, and how cost grows, on small pools."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from evals.routing import scale
from evals.routing.curves import hull_area
from evals.routing.robustness import rewritings
from orchestrator.cli import app


def test_a_rewriting_keeps_the_words():
    text = "Which of the following membranes surrounds a living cell?\nnucleus\nwall"
    rng = np.random.default_rng(0)
    changed = {name: change(text, rng) for name, change in rewritings("dear-expert").items()}
    assert len(set(changed.values()) - {text}) == 4
    assert sorted(changed["typos"]) == sorted(text)
    assert changed["whitespace"].split() == text.split()
    assert text in changed["paraphrase"]
    assert "dear-expert" in changed["begging"]


def test_a_report_of_all_says_what_wording_changes_and_who_was_left_out(make_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("routers.learned.MODELS", {"linear": "routers.learned.linear:Linear"})
    monkeypatch.setattr("evals.routing.bench.MODELS", {"linear": "routers.learned.linear:Linear"})
    out = tmp_path / "out"
    words = ["eval", "routing", "--pool", make_pool(questions=240), "--encoder", "wordllama", "--leave-one-out"]
    found = CliRunner().invoke(app, [str(w) for w in [*words, "--out", out]])
    assert found.exit_code == 0, found.output
    report = json.loads((out / "report.json").read_text())
    trials = report["robustness"]["routers"]["linear"]
    assert list(trials) == ["as asked", "typos", "paraphrase", "whitespace", "begging"]
    assert trials["as asked"]["flipped"] == 0
    assert trials["whitespace"]["flipped"] < 0.1, "spaces say nothing"
    assert all(0 <= t["flipped"] <= 1 for t in trials.values())
    left = report["leave_one_out"]
    assert [row["expert"] for row in left["experts"]] == report["experts"]
    # Each is the only specialist of its task: who comes back by 50 graded questions is found again.
    assert left["mean"]["without"] < left["mean"]["by_grades"] <= left["refitted"] + 0.05
    text = (out / "report.md").read_text()
    assert "When only the wording changes" in text
    assert "When an expert joins" in text


def test_the_area_is_that_of_the_best_mixes():
    points = [(0.0, 0.0), (1.0, 1.0), (0.5, 0.2)]
    assert hull_area(points, 0.0, 1.0) == pytest.approx(0.5), "a point under the mix of its neighbours does not count"
    assert hull_area([*points, (0.5, 0.9)], 0.0, 1.0) > 0.6
    assert hull_area([(0.0, 0.7), (1.0, 0.1)], 0.0, 1.0) == pytest.approx(0.7), "a dearer, poorer expert is never asked"
    assert hull_area(points, 1.0, 1.0) is None


def test_scale_is_measured_and_plotted(tmp_path, monkeypatch):
    for name, value in (
        ("FIT", (200, 5)),
        ("LARGE", (300, 8)),
        ("GROWTH_EXPERTS", (3, 6)),
        ("GROWTH_QUESTIONS", (100, 200)),
    ):
        monkeypatch.setattr(scale, name, value)
    monkeypatch.setattr(scale, "MODELS", {"task": "routers.learned.task:Task"})
    monkeypatch.setattr(scale, "measure_encoders", lambda: [{"encoder": "none", "p50_ms": 0.0, "p99_ms": 0.0}])
    scale.main(out=tmp_path)
    found = json.loads((tmp_path / "scale.json").read_text())
    assert found["fits"][0]["router"] == "task"
    assert 0 < found["fits"][0]["artefact_mb"] < 1
    assert {row["size"] for row in found["growth"]["questions"]} == {100, 200}
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
