"""A recorded pool with known truths: experts that are right at a given rate and otherwise guess; and what is quickly
fitted on it."""

import asyncio
import gzip
from pathlib import Path

import numpy as np
import orjson

from orchestrator.aggregators.reward_moe import artefact as rewards
from orchestrator.aggregators.reward_moe.build import build_reward, read_material
from orchestrator.aggregators.stacking import artefact as stacks
from orchestrator.aggregators.stacking.build import Wish
from orchestrator.aggregators.stacking.recorded import read_recorded, rows_of
from routers.static import WordLlama

RATES = {"ace": 0.85, "fair": 0.6, "poor": 0.35, "noise": 0.1}
OPTIONS = 5


def write_pool(folder: Path, *, questions: int = 300, rates: dict[str, float] | None = None, seed: int = 0) -> Path:
    """Numbered questions with the options of each; the last fifth is the test split. One in fifty answers is
    unreadable."""
    rng, rates = np.random.default_rng(seed), rates or RATES
    gold = rng.integers(0, OPTIONS, questions)
    rows = [_question(i, int(right)) for i, right in enumerate(gold)]
    folder.mkdir(parents=True, exist_ok=True)
    first = questions * 4 // 5
    head = {
        "name": "planted",
        "tasks": ["one", "two"],
        "experts": [{"expert_id": e} for e in rates],
        "splits": {"train": [r["id"] for r in rows[:first]], "val": [], "test": [r["id"] for r in rows[first:]]},
    }
    (folder / "pool.json").write_bytes(orjson.dumps(head))
    _write(folder / "questions.jsonl.gz", rows)
    for expert_id, rate in rates.items():
        said = [int(right) if rng.random() < rate else int(rng.integers(OPTIONS)) for right in gold]
        _write(
            folder / "responses" / f"{expert_id}.jsonl.gz",
            [
                _response(i, s, int(right), rng.random() < 0.02)
                for i, (s, right) in enumerate(zip(said, gold, strict=True))
            ],
        )
    return folder


def _question(number: int, right: int) -> dict[str, object]:
    return {
        "id": f"q{number}",
        "task": ("one", "two")[number % 2],
        "question": f"What is {number} and a bit?",
        "options": [f"{number * 3 + place} apples" for place in range(OPTIONS)],
        "answer": chr(ord("A") + right),
    }


def _response(number: int, said: int, right: int, unreadable: bool) -> dict[str, object]:
    letter = None if unreadable else chr(ord("A") + said)
    text = "I cannot say." if unreadable else f"It follows. The answer is ({letter})."
    return {"id": f"q{number}", "text": text, "answer": letter, "score": float(not unreadable and said == right)}


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(path, "wb", mtime=0) as out:
        out.writelines(orjson.dumps(row) + b"\n" for row in rows)


def fit_stack(folder: Path, rates: dict[str, float]) -> Path:
    recorded = read_recorded(write_pool(folder / "pool", rates=rates))
    stacks.save(stacks.fit(recorded, rows_of(recorded, ["train"]), Wish(with_prior=False)), folder / "stack")
    return folder / "stack"


def fit_reward(folder: Path) -> Path:
    """Likes an answer that answers."""
    rows: list[dict[str, object]] = [
        {"prompt": f"How many are {n}?", "response_a": f"It has {n} legs.", "response_b": "Who?", "label": "a"}
        for n in range(40)
    ]
    _write(folder / "preferences" / "counts.jsonl.gz", rows)
    material = read_material([], [folder / "preferences"], seed=0)
    fitted = asyncio.run(build_reward("single", material, WordLlama(), folder / "cache", seed=0))
    rewards.save(fitted, folder / "reward")
    return folder / "reward"
