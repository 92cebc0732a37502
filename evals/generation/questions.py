"""Questions with known answers: a file of them, or a recorded pool's.

A row has id, task, question, options (list or null) and answer; ``context`` stands after the question, ``tests`` and
``entry_point`` belong to code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import orjson

from evals.generation.scorers import KINDS, kind_of
from experts.errors import ConfigError
from experts.pools import RecordedAnswer, RecordedPool, read_rows

_DEMANDS = {
    "letter": 'Think step by step, then end with "The answer is (X)", X being the letter of your choice.',
    "letters": 'Think step by step, then end with "The answer is" and the letters of all right choices.',
    "number": 'Think step by step, then end with "The answer is" and the number.',
    "boxed": "Think step by step, then put the final answer in \\boxed{}.",
    "exact": 'Think step by step, then end with "The answer is" and the answer.',
    "contains": "",
    "code": "Complete the function. Answer with the whole function in one Python code block.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """``kind`` is the scorer's; ``answer`` is right, but unread for code; ``recorded``: what experts answered once."""

    question_id: str
    task: str
    text: str
    kind: str
    answer: str
    options: tuple[str, ...] = ()
    context: str = ""
    tests: str = ""
    entry_point: str = ""
    recorded: tuple[RecordedAnswer, ...] = ()

    @property
    def prompt(self) -> str:
        """What an expert is asked. The question comes first, so that a recorded pool recognises it."""
        listed = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(self.options))
        context = f"Context: {self.context}" if self.context else ""
        return "\n\n".join(part for part in (self.text.strip(), context, listed, _DEMANDS[self.kind]) if part)


def read_questions(path: Path, *, scorer: str = "auto", split: str | None = None) -> list[Question]:
    """All questions of a ``.jsonl.gz`` file, or of one ``split`` of a recorded pool. Raises ConfigError naming the
    row at fault."""
    if scorer != "auto" and scorer not in KINDS:
        raise ConfigError(f"No scorer '{scorer}'; known: auto, {', '.join(KINDS)}.")
    wanted = _split(path, split) if path.is_dir() else None
    file = path / "questions.jsonl.gz" if path.is_dir() else path
    seen: set[str] = set()
    questions = []
    for place, row in read_rows(file):
        question = _question(row, place, scorer)
        if question.question_id in seen:
            raise ConfigError(f"{place}: the id {question.question_id!r} was given already.")
        seen.add(question.question_id)
        if wanted is None or question.question_id in wanted:
            questions.append(question)
    if not questions:
        raise ConfigError(f"{path} has no question{'' if split is None else f' in split {split!r}'}.")
    return questions


def sample(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """``limit`` of the questions, drawn by ``seed``, in the file's order; all of them where there are no more."""
    if limit is None or limit >= len(questions):
        return list(questions)
    chosen = sorted(Random(seed).sample(range(len(questions)), limit))  # noqa: S311 - a sample, not a secret
    return [questions[i] for i in chosen]


def with_recorded(questions: Sequence[Question], folder: Path) -> list[Question]:
    """The same questions with the answers that the pool in ``folder`` has recorded to them."""
    pool = RecordedPool(folder)
    numbers = {pool.by_id(q.question_id): q.question_id for q in questions}
    found: dict[str, list[RecordedAnswer]] = {q.question_id: [] for q in questions}
    for expert_id in pool.expert_ids:
        for number, answer in pool.read(expert_id):
            if number in numbers:
                found[numbers[number]].append(answer)
    return [replace(q, recorded=tuple(found[q.question_id])) for q in questions]


def _split(folder: Path, split: str | None) -> set[str] | None:
    if split is None:
        return None
    try:
        splits = orjson.loads((folder / "pool.json").read_bytes()).get("splits", {})
    except (OSError, orjson.JSONDecodeError) as exc:
        raise ConfigError(f"Cannot read {folder / 'pool.json'}: {exc}.") from exc
    if not splits.get(split):
        filled = ", ".join(name for name, ids in splits.items() if ids)
        raise ConfigError(f"{folder}: split '{split}' is empty or unknown; there are {filled or 'none'}.")
    return set(splits[split])


def _question(row: Mapping[str, Any], place: str, scorer: str) -> Question:
    for key in ("id", "question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ConfigError(f"{place}: '{key}' is a text, and may not be empty; got {row.get(key)!r}.")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ConfigError(f"{place}: 'options' is a list of texts, got {options!r}.")
    context = row.get("context") or ""
    kind = kind_of(row) if scorer == "auto" else scorer
    return Question(
        question_id=row["id"],
        task=str(row.get("task") or ""),
        text=row["question"],
        kind=kind,
        answer=_gold(row["answer"], options, kind, place),
        options=tuple(options),
        context=context if isinstance(context, str) else "\n".join(map(str, context)),
        tests=str(row.get("tests") or ""),
        entry_point=str(row.get("entry_point") or ""),
    )


def _gold(answer: str, options: Sequence[str], kind: str, place: str) -> str:
    """The letter, where the file gives the right option's wording instead."""
    if kind != "letter":
        return answer
    bare = answer.strip().strip("()")
    if len(bare) == 1 and bare.isalpha() and (not options or ord(bare.upper()) - ord("A") < len(options)):
        return bare.upper()
    if answer not in options:
        raise ConfigError(f"{place}: the answer {answer!r} is neither a letter nor one of the options.")
    return chr(ord("A") + options.index(answer))
