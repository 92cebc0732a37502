"""A recorded pool on disk, small and made up: four skills, an expert for each, answers drawn by a seed."""

import gzip
import json
import os
from pathlib import Path

# Small matrices are multiplied faster by one thread, and many times faster so on a busy machine. Read by numpy once.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

SKILLS = {
    "algebra": "solve the equation for x",
    "law": "the court and the contract",
    "cells": "the membrane of a living cell",
    "prices": "supply and demand of a market",
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


@pytest.fixture
def make_pool(tmp_path):
    """make_pool(questions=.., skilled=.., other=..) -> the folder. Expert i answers skill i with ``skilled``."""

    def make(*, questions=240, skilled=0.9, other=0.3, seed=0, name="toy") -> Path:
        rng = np.random.default_rng(seed)
        folder, skills = tmp_path / name, list(SKILLS)
        rows = [
            {
                "id": f"q{i}",
                "task": skills[i % 4],
                "question": f"{SKILLS[skills[i % 4]]} number {i}",
                "options": ["a", "b", "c", "d"],
                "answer": "ABCD"[int(rng.integers(4))],
            }
            for i in range(questions)
        ]
        experts = [f"{skill}-expert" for skill in skills]
        order = [row["id"] for row in rows]
        head = {
            "name": name,
            "experts": [{"expert_id": e, "params_b": 1 + i, "context_length": 4} for i, e in enumerate(experts)],
            "splits": {"train": order[: questions // 2], "val": [], "test": order[questions // 2 :]},
        }
        folder.mkdir()
        (folder / "pool.json").write_text(json.dumps(head))
        write_rows(folder / "questions.jsonl.gz", rows)
        for number, expert in enumerate(experts):
            write_rows(folder / "responses" / f"{expert}.jsonl.gz", _answers(rng, rows, number, skilled, other))
        return folder

    return make


def _answers(rng, rows, expert, skilled, other):
    for number, row in enumerate(rows):
        right = rng.random() < (skilled if number % 4 == expert else other)
        wrong = [letter for letter in "ABCD" if letter != row["answer"]]
        yield {
            "id": row["id"],
            "answer": row["answer"] if right else wrong[int(rng.integers(3))],
            "score": float(right),
            "text": None,
            "completion_chars": 100,
        }
