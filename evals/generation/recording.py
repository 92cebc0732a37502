"""Writes what the experts said as a recorded pool (contracts.md), which routers and combiners can be fitted on."""

import gzip
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import orjson

from evals.generation.questions import Question
from evals.generation.run import Given, Outcome
from experts.errors import ConfigError
from experts.types import ExpertSpec

SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}


def check_free(folder: Path) -> None:
    """Before anything is asked. Raises ConfigError where a pool would be overwritten."""
    if (folder / "pool.json").exists():
        raise ConfigError(f"{folder} holds a recorded pool already; name another folder with --record, or remove it.")


def record(
    outcome: Outcome, questions: Sequence[Question], specs: Sequence[ExpertSpec], source: str, seed: int, folder: Path
) -> None:
    """``pool.json`` comes last: a folder without it is no pool, so one that was cut off is never read as one."""
    try:
        (folder / "responses").mkdir(parents=True, exist_ok=True)
        _write(folder / "questions.jsonl.gz", (_question(q) for q in questions))
        for expert_id, given in outcome.experts.items():
            answered = zip(questions, given, strict=True)
            rows = (_response(q, g) for q, g in answered if g.completion is not None)
            _write(folder / "responses" / f"{expert_id}.jsonl.gz", rows)
        head = orjson.dumps(_head(questions, specs, source, seed, folder.name), option=orjson.OPT_INDENT_2)
        (folder / "pool.json").write_bytes(head)
    except OSError as exc:
        raise ConfigError(f"Cannot record the pool in {folder}: {exc.strerror or exc}.") from exc


def _head(
    questions: Sequence[Question], specs: Sequence[ExpertSpec], source: str, seed: int, name: str
) -> dict[str, Any]:
    return {
        "name": name,
        "title": f"{source}, answered by {len(specs)} experts",
        "licence": "that of the questions and of the models",
        "source": f"collegium eval run on {source}",
        "metric": f"scorers: {', '.join(sorted({q.kind for q in questions}))}",
        "tasks": sorted({q.task for q in questions}),
        "experts": [_expert(spec) for spec in specs],
        "splits": splits(questions, seed),
        "notes": f"Splits by task, seed {seed}. A question whose call failed has no row.",
    }


def _expert(spec: ExpertSpec) -> dict[str, Any]:
    return {
        "expert_id": spec.expert_id,
        "params_b": None,
        "usd_per_mtok_in": spec.usd_per_mtok_in,
        "usd_per_mtok_out": spec.usd_per_mtok_out,
        "context_length": spec.context_length,
    }


def splits(questions: Sequence[Question], seed: int) -> dict[str, list[str]]:
    """Each task is split in the same shares, at random by ``seed``."""
    by_task: dict[str, list[str]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question.question_id)
    found: dict[str, list[str]] = {name: [] for name in SHARES}
    for task in sorted(by_task):
        ids = by_task[task]
        Random(f"{seed}/{task}").shuffle(ids)  # noqa: S311 - a split, not a secret
        train, val = round(SHARES["train"] * len(ids)), round(SHARES["val"] * len(ids))
        for name, part in (("train", ids[:train]), ("val", ids[train : train + val]), ("test", ids[train + val :])):
            found[name] += part
    return found


def _question(question: Question) -> Mapping[str, Any]:
    about = {
        "id": question.question_id,
        "task": question.task,
        "question": question.text,
        "options": list(question.options) or None,
        "answer": question.answer,
    }
    extra = {"context": question.context, "tests": question.tests, "entry_point": question.entry_point}
    return {**about, **{key: value for key, value in extra.items() if value}}


def _response(question: Question, given: Given) -> Mapping[str, Any]:
    text = given.completion.text if given.completion is not None else ""
    return {
        "id": question.question_id,
        "text": text,
        "answer": given.answer,
        "score": given.score,
        "completion_chars": len(text),
        "usd": given.usd,
    }


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    # Without a time stamp equal rows are equal bytes.
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        for row in rows:
            file.write(orjson.dumps(row) + b"\n")
