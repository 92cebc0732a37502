"""Symbolic-MoE's price of loading (arXiv 2503.05641, section 3.4): 60 questions, three experts each, room for one."""

import pytest

from tests.orchestrator.batches.batch import Batch, line

QUESTIONS, RECRUITS, LOAD, GENERATE = 60, 3, 10, 1
EXPERTS = ("one", "two", "three", "four", "five")


def settings():
    return {
        "engines": {name: {"backend": "fake"} for name in EXPERTS},
        "experts": {name: {"engine": name} for name in EXPERTS},
        "policies": {"default": {"router": "random", "top_k": RECRUITS, "aggregator": "vote"}},
    }


async def run(folder, order, **changes):
    """(charge for loads and calls, report, answers)."""
    folder.mkdir()
    batch = Batch(folder, settings())
    batch.write([line(f"q{i}", temperature=0, collegium={"seed": i}) for i in range(QUESTIONS)])
    report = await batch.run(order=order, **changes)
    assert not batch.errors
    return report["loads"] * LOAD + report["expert_calls"] * GENERATE, report, batch.answers()


async def test_grouped_by_expert_a_batch_pays_each_load_once(tmp_path):
    grouped, report, answers = await run(tmp_path / "grouped", "grouped", window=QUESTIONS)
    assert report["expert_calls"] == QUESTIONS * RECRUITS
    assert report["loads"] == len(EXPERTS)
    assert grouped == len(EXPERTS) * LOAD + QUESTIONS * RECRUITS * GENERATE
    one_by_one, report, same = await run(tmp_path / "arrival", "arrival", window=1)
    assert same == answers
    assert one_by_one > 5 * grouped
    assert one_by_one == pytest.approx(QUESTIONS * RECRUITS * (LOAD + GENERATE), rel=0.2)
