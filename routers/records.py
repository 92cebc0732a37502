"""A recorded pool as arrays: what routers are fitted on and measured with.

Legend: Q questions, E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from experts.errors import ConfigError
from experts.pools import RecordedPool, read_rows

Array = NDArray[Any]
SPLITS = ("train", "val", "test")
LEAST = 8
"""Questions below which folds are empty or alike, and nothing can be fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedExpert:
    """What is known of an expert before it is asked. None: not known."""

    expert_id: str
    params_b: float | None
    usd_per_mtok_in: float | None
    usd_per_mtok_out: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """``scores_QE`` is 0 where an expert gave no answer, which ``answered_QE`` tells from a wrong one.

    ``answers_QE`` numbers the parsed answers: equal answers have equal numbers, -1 is an answer that cannot be read.
    ``chars_QE`` and ``usd_QE`` are NaN where they were not recorded. ``splits`` holds numbers of questions.
    """

    name: str
    digest: str
    question_ids: tuple[str, ...]
    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    experts: tuple[RecordedExpert, ...]
    scores_QE: Array
    answered_QE: Array
    answers_QE: Array
    chars_QE: Array
    usd_QE: Array
    answer_texts: tuple[str, ...]
    splits: Mapping[str, Array]

    @property
    def expert_ids(self) -> tuple[str, ...]:
        return tuple(e.expert_id for e in self.experts)

    def rows(self, split: str) -> Array:
        """The numbers of a split's questions. Raises ConfigError for one that is empty or unknown."""
        rows = self.splits.get(split)
        if rows is None or not len(rows):
            filled = ", ".join(f"{name} ({len(own)})" for name, own in self.splits.items() if len(own))
            raise ConfigError(f"Pool '{self.name}': split '{split}' is empty; there are {filled or 'none'}.")
        return rows

    def lessons(self, split: str) -> Array:
        """As ``rows``, of a split that a router can learn from. Raises ConfigError for a few questions, and where all
        scores are one."""
        rows = self.rows(split)
        low, high = float(self.scores_QE[rows].min()), float(self.scores_QE[rows].max())
        if low == high:
            raise ConfigError(
                f"Pool '{self.name}', split '{split}': every score in responses/ of {', '.join(self.expert_ids)} is "
                f"{low:g} ({len(rows)} questions): there is nothing to learn from."
            )
        if len(rows) < LEAST:
            raise ConfigError(
                f"Pool '{self.name}', split '{split}': {len(rows)} questions are too few to learn from; {LEAST} is the "
                "least, and hundreds are better."
            )
        return rows

    def only(self, expert_ids: Sequence[str]) -> Self:
        """The same pool with these experts, in this order. Raises ConfigError for unknown and repeated ones."""
        known = {e: i for i, e in enumerate(self.expert_ids)}
        for expert_id in expert_ids:
            if expert_id not in known:
                raise ConfigError(f"Pool '{self.name}' has no expert '{expert_id}'; known: {', '.join(known)}.")
        if len(set(expert_ids)) < len(expert_ids) or not expert_ids:
            raise ConfigError(f"Name each expert once, and at least one: {', '.join(expert_ids) or 'none given'}.")
        columns = [known[e] for e in expert_ids]
        return replace(
            self,
            experts=tuple(self.experts[c] for c in columns),
            **{key: getattr(self, key)[:, columns] for key in _COLUMNED},
        )


_COLUMNED = ("scores_QE", "answered_QE", "answers_QE", "chars_QE", "usd_QE")


def read_records(
    folder: Path, expert_ids: Sequence[str] | None = None, *, on_expert: Callable[[str], None] = lambda _: None
) -> Records:
    """The pool in ``folder``; ``on_expert`` hears of each expert as its answers are read. Raises ConfigError."""
    pool = RecordedPool(folder)
    chosen = pool.expert_ids if expert_ids is None else tuple(expert_ids)
    head = orjson.loads((folder / "pool.json").read_bytes())
    questions = list(read_rows(folder / "questions.jsonl.gz"))
    columns = _Columns(len(questions), len(chosen))
    for number, expert_id in enumerate(chosen):
        on_expert(expert_id)
        columns.read(pool, expert_id, number)
    about = {e["expert_id"]: e for e in head["experts"]}
    records = Records(
        name=str(head.get("name") or folder.name),
        digest=_digest(folder, chosen),
        question_ids=tuple(row["id"] for _, row in questions),
        texts=tuple(_text(row) for _, row in questions),
        tasks=tuple(_task(row, place) for place, row in questions),
        experts=tuple(_expert(about[e], folder) for e in chosen),
        scores_QE=columns.scores,
        answered_QE=columns.answered,
        answers_QE=columns.answers,
        chars_QE=columns.chars,
        usd_QE=columns.usd,
        answer_texts=tuple(columns.codes),
        splits=_splits(head, {row["id"]: i for i, (_, row) in enumerate(questions)}, folder / "pool.json"),
    )
    return records.only(chosen)


class _Columns:
    def __init__(self, questions: int, experts: int) -> None:
        shape = (questions, experts)
        self.scores = np.zeros(shape, np.float32)
        self.answered = np.zeros(shape, np.bool_)
        self.answers = np.full(shape, -1, np.int32)
        self.chars = np.full(shape, np.nan, np.float32)
        self.usd = np.full(shape, np.nan, np.float64)
        self.codes: dict[str, int] = {}

    def read(self, pool: RecordedPool, expert_id: str, column: int) -> None:
        for question, answer in pool.read(expert_id):
            self.scores[question, column] = answer.score
            self.answered[question, column] = True
            self.chars[question, column] = math.nan if answer.completion_chars is None else answer.completion_chars
            self.usd[question, column] = math.nan if answer.usd is None else answer.usd
            if answer.answer is not None:
                self.answers[question, column] = self.codes.setdefault(answer.answer, len(self.codes))
        if not self.answered[:, column].any():
            raise ConfigError(f"Pool: 'responses/{expert_id}.jsonl.gz' has no row; leave this expert out.")


def question_text(question: str, options: Sequence[str] | None) -> str:
    """What a router reads of a recorded question."""
    return "\n".join([question, *(options or ())])


def _text(row: Mapping[str, Any]) -> str:
    return question_text(str(row.get("question") or ""), row.get("options"))


def _task(row: Mapping[str, Any], place: str) -> str:
    task = row.get("task")
    if not isinstance(task, str):
        raise ConfigError(f"{place}: 'task' is a text, got {task!r}.")
    return task


def _expert(about: Mapping[str, Any], folder: Path) -> RecordedExpert:
    numbers: dict[str, float | None] = {}
    for key in ("params_b", "usd_per_mtok_in", "usd_per_mtok_out"):
        value = about.get(key)
        if value is not None and (not isinstance(value, int | float) or not 0 <= value < math.inf):
            raise ConfigError(f"{folder / 'pool.json'}, expert '{about['expert_id']}': '{key}' is {value!r}.")
        numbers[key] = value
    return RecordedExpert(
        expert_id=about["expert_id"],
        params_b=numbers["params_b"],
        usd_per_mtok_in=numbers["usd_per_mtok_in"],
        usd_per_mtok_out=numbers["usd_per_mtok_out"],
    )


def _splits(head: Mapping[str, Any], numbers: Mapping[str, int], path: Path) -> dict[str, Array]:
    given = head.get("splits")
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}: 'splits' names the questions of train, val and test.")
    owner: dict[str, str] = {}
    splits: dict[str, Array] = {}
    for split, question_ids in given.items():
        if not isinstance(question_ids, list):
            raise ConfigError(f"{path}: split '{split}' is a list of question ids, got {question_ids!r:.60}.")
        for place, question_id in enumerate(question_ids, 1):
            if not isinstance(question_id, str) or question_id not in numbers:
                raise ConfigError(f"{path}, split '{split}', entry {place}: no question {question_id!r}.")
            if question_id in owner:
                raise ConfigError(
                    f"{path}, split '{split}', entry {place}: question {question_id!r} is in '{owner[question_id]}' "
                    "already; what is tested must not be learned from."
                )
            owner[question_id] = split
        splits[split] = np.array([numbers[q] for q in question_ids], np.int64)
    return splits


def _digest(folder: Path, expert_ids: Sequence[str]) -> str:
    """Of the files as they are: gzip without time stamps gives the same bytes for the same rows."""
    digest = blake2b(digest_size=32)
    for path in (folder / "pool.json", folder / "questions.jsonl.gz"):
        digest.update(path.read_bytes())
    for expert_id in expert_ids:
        digest.update((folder / "responses" / f"{expert_id}.jsonl.gz").read_bytes())
    return digest.hexdigest()
