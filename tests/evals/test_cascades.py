"""Cascades on a recorded pool, with the service's own stopping rule."""

import asyncio
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from evals.routing.cascades import evaluate_cascade, follow
from evals.routing.setting import make_setting
from orchestrator.build import make_aggregator
from orchestrator.cli import app
from orchestrator.config import AggregatorConfig
from routers.records import read_records
from routers.static import WordLlama


@pytest.fixture
def setting(make_pool, tmp_path):
    return asyncio.run(
        make_setting(read_records(make_pool()), WordLlama(), tmp_path / "cache", train="train", test="test", seed=0)
    )


def aggregator():
    return make_aggregator(AggregatorConfig(name="cascade", options={"extract": "text"}), {}, WordLlama)


async def test_two_that_agree_spare_the_third(setting):
    records, (first, second, *_) = setting.records, setting.test
    records.answers_QE[first] = [0, 0, 1, 1]
    records.scores_QE[first] = [0, 0, 1, 1]
    records.answers_QE[second] = [0, 1, 1, 2]
    records.scores_QE[second] = [0, 1, 1, 0]
    order = np.tile([1.0, 0.9, 0.8, 0.7], (len(setting.test), 1))
    outcome = await follow(order, setting, aggregator(), 3)
    assert outcome.calls[:2].tolist() == [2, 3]
    assert outcome.scores[:2].tolist() == [0, 1]
    spent = setting.cost_QE[first, :2].sum()
    assert outcome.costs[0] == pytest.approx(spent)


async def test_a_budget_is_kept_and_more_of_it_is_never_spent_on_less(setting):
    found = await evaluate_cascade(setting, spends=(0.3, 1.0))
    router = [p for p in found["points"] if p["rule"] == "router"]
    assert [p["calls"] for p in router] == [1, 1]
    assert router[0]["cost"] <= router[1]["cost"]
    agreement = [p for p in found["points"] if p["rule"] == "agreement"]
    assert all(1 <= p["calls"] <= 3 for p in agreement)
    assert found["stages"][-1]["cost"] == 1


async def test_without_answers_nothing_can_agree(setting):
    setting.records.answers_QE[:] = -1
    found = await evaluate_cascade(setting, spends=(0.5,))
    assert {p["rule"] for p in found["points"]} == {"router"}


def test_the_command_writes_its_report(make_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    words = ["eval", "cascade", "--pool", make_pool(), "--encoder", "wordllama", "--out", tmp_path / "report"]
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    assert "agreement" in result.output
    report = json.loads((tmp_path / "report" / "cascade.json").read_text())
    assert report["pool"] == "toy"
    assert (tmp_path / "report" / "cascade.png").read_bytes().startswith(b"\x89PNG")
