"""Symbolic-MoE's synthetic task: who merges well is found out, and what nobody could win is counted apart."""

import asyncio
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from evals.aggregate.pick import Synthetic, make_tasks, rank_aggregators
from experts.errors import ConfigError, ExpertFailed
from orchestrator.aggregators.pick import AggregatorRanking, PickAggregator, Standing, load_ranking
from orchestrator.cli import app
from tests.orchestrator.aggregators.scripted import Scripted, always, broken, parts

QUESTIONS = 120


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Six experts; nobody knows every tenth question, and one in twenty has no gold answer."""
    folder, ids = tmp_path / "pool", [f"q{i}" for i in range(QUESTIONS)]
    options = ["one", "two", "three", "four"]
    golds = ["ABCD"[i % 4] if i % 20 != 19 else None for i in range(QUESTIONS)]
    rows = [
        {"id": q, "task": "t", "question": f"Which is number {q}?", "options": options, "answer": g}
        for q, g in zip(ids, golds, strict=True)
    ]
    write(folder / "questions.jsonl.gz", rows)
    experts = [f"e{n}" for n in range(6)]
    for n, expert in enumerate(experts):
        answers = []
        for i, (q, gold) in enumerate(zip(ids, golds, strict=True)):
            right = i % 10 != 0 and (i + n) % 3 == 0
            letter = (gold or "A") if right else "ABCD"[("ABCD".index(gold or "A") + 1 + n % 3) % 4]
            text = f"<think>hm {n}</think>{expert} says: the answer is ({letter})."
            answers.append({"id": q, "text": text, "answer": letter, "score": float(right)})
        write(folder / "responses" / f"{expert}.jsonl.gz", answers)
    head = {"name": "toy", "experts": [{"expert_id": e} for e in experts], "splits": {"train": [], "val": ids}}
    (folder / "pool.json").write_text(json.dumps(head))
    return folder


def tasks_of(pool: Path, seed: int = 0) -> list[Synthetic]:
    return make_tasks(pool, ids=[f"q{i}" for i in range(QUESTIONS)], seed=seed)


def test_one_right_and_two_wrong_answers_are_shuffled(pool: Path) -> None:
    tasks = tasks_of(pool)
    assert len(tasks) == QUESTIONS * 19 // 20
    places = set()
    for task in tasks:
        rights = [task.is_right(text) for text in task.responses]
        assert len(rights) == 3
        assert sum(rights) == task.winnable
        assert "think" not in "".join(task.responses)
        if task.winnable:
            places.add(rights.index(True))
        else:
            assert "" in task.responses
    assert places == {0, 1, 2}
    assert sum(not t.winnable for t in tasks) == QUESTIONS / 10


def test_tasks_repeat_by_seed_whatever_else_is_drawn(pool: Path) -> None:
    assert tasks_of(pool) == tasks_of(pool)
    assert tasks_of(pool, seed=1) != tasks_of(pool)
    (alone,) = make_tasks(pool, ids=["q7"], seed=0)
    assert alone in tasks_of(pool)


def fuser(expert_id: str, accuracy: float, tasks: list[Synthetic]) -> Scripted:
    """Returns the right response with this probability, else a wrong one."""
    by_question = {task.question: task for task in tasks}
    draw = random.Random(expert_id)

    def reply(prompt: str) -> str:
        task = next(t for q, t in by_question.items() if prompt.startswith(q))
        right = [r for r in task.responses if task.is_right(r)]
        wrong = [r for r in task.responses if not task.is_right(r)]
        return right[0] if right and draw.random() < accuracy else wrong[0]

    return Scripted(expert_id, reply)


def test_experts_are_ranked_by_how_often_they_return_the_right_one(pool: Path) -> None:
    tasks = tasks_of(pool)
    experts = {e: fuser(e, a, tasks) for e, a in {"poor": 0.3, "best": 0.95, "fair": 0.65}.items()}
    heard: list[str] = []
    standings = asyncio.run(rank_aggregators(experts, tasks, on_answer=heard.append))
    assert [s.expert_id for s in standings] == ["best", "fair", "poor"]
    best = standings[0]
    assert (best.asked, best.winnable, best.failed) == (len(tasks), sum(t.winnable for t in tasks), 0)
    assert best.right == best.winnable_right
    assert best.winnable_right / best.winnable == pytest.approx(0.95, abs=0.06)
    assert len(heard) == 3 * len(tasks)
    assert all(e.most <= 8 for e in experts.values())


def test_calls_that_fail_are_wrong_and_lose_nothing(pool: Path) -> None:
    tasks = tasks_of(pool)[:10]
    shaky = Scripted("shaky", lambda p: ExpertFailed("no") if re.search("q[02468]", p) else "The answer is (A).")
    standings = asyncio.run(rank_aggregators({"dead": broken("dead"), "shaky": shaky}, tasks))
    assert {s.expert_id: s.failed for s in standings} == {"dead": 10, "shaky": 5}
    assert standings[1].right == 0


def test_a_pool_without_texts_is_refused(pool: Path) -> None:
    for path in (pool / "responses").iterdir():
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        write(path, [{**row, "text": None} for row in rows])
    with pytest.raises(ConfigError, match="no question has a gold answer and recorded texts"):
        tasks_of(pool)


# The artefact


def ranking(*expert_ids: str) -> AggregatorRanking:
    standings = tuple(
        Standing(expert_id=e, asked=9, right=9 - i, winnable=9, winnable_right=9 - i, failed=0)
        for i, e in enumerate(expert_ids)
    )
    return AggregatorRanking(pool="toy", pool_digest="0", split="val", seed=0, standings=standings)


def test_the_best_that_the_config_has_fuses(tmp_path: Path) -> None:
    ranking("gone", "good", "bad").save(tmp_path)
    assert load_ranking(tmp_path) == ranking("gone", "good", "bad")
    own = parts(always("bad", ""), always("good", ""))
    picked = PickAggregator(type(own)(encoder=own.encoder, experts=own.experts, artefact=tmp_path))
    assert (picked.name, picked._expert.spec.expert_id) == ("pick_aggregator", "good")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.unlink(), "Cannot read .*'collegium eval aggregators' writes it"),
        (lambda p: p.write_text("{"), "is no ranking of aggregators"),
        (lambda p: p.write_text("[]"), "is no ranking of aggregators"),
        (lambda p: p.write_text('{"version": 1, "standings": [{}]}'), "is no ranking of aggregators"),
        (lambda p: p.write_text(p.read_text().replace('"version": 1', '"version": 2')), "of another version"),
        (lambda p: p.write_text(p.read_text().replace("good", "gone")), "ranks gone: none of them"),
    ],
)
def test_an_artefact_that_is_no_use_is_named(tmp_path: Path, spoil: Callable[[Path], object], words: str) -> None:
    ranking("good").save(tmp_path)
    spoil(tmp_path / "aggregators.json")
    own = parts(always("good", ""))
    with pytest.raises(ConfigError, match=words):
        PickAggregator(type(own)(encoder=own.encoder, experts=own.experts, artefact=tmp_path))
    with pytest.raises(ConfigError, match="needs an artefact"):
        PickAggregator(own)


# The command


def test_the_command_ranks_the_experts_of_a_config(pool: Path, tmp_path: Path) -> None:
    config = {
        "engines": {e: {"backend": "fake", "options": {"text": f"The answer is ({e})."}} for e in "AB"},
        "experts": {f"says-{e}": {"engine": e} for e in "AB"},
        "policies": {"default": {}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = ["eval", "aggregators", "--pool", str(pool), "-c", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, [*command, "--questions", "40"])
    assert done.exit_code == 0, done.output
    ranked = load_ranking(tmp_path / "o")
    assert {s.expert_id for s in ranked.standings} == {"says-A", "says-B"}
    assert (ranked.split, len(ranked.pool_digest)) == ("val", 64)
    assert all(s.asked > 30 for s in ranked.standings)
    assert "says-A:" in done.output
    refused = CliRunner().invoke(app, [*command, "--experts", "nobody"])
    assert (refused.exit_code, "No expert ['nobody']" in refused.output) == (1, True)
    broken_config = {
        **config,
        "engines": {e: {"backend": "fake", "options": {"fail": ["refuse"]}} for e in config["engines"]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(broken_config))
    failed = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "none"), "--questions", "4"])
    assert (failed.exit_code, "Every call failed" in failed.output) == (1, True)
    assert not (tmp_path / "none").exists()
